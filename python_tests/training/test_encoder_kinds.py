"""Training of every kind of encoder: it learns, resumes bit for bit, and does what its paper says."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.encoder_kinds import KINDS
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weight_deltas import synthesize
from sage_fast.training import encoder_steps
from sage_fast.training.encoder import EncoderConfig, HyperStyleConfig, train_encoder
from sage_fast.training.latent_critic import E4EConfig, LatentCritic, delta_norm, stage_of
from sage_fast.training.runtime import Run
from sage_fast.training.updates import Guard

TINY = EncoderConfig(
    total_steps=8,
    batch=4,
    channel_base=64,
    channel_max=16,
    head_width=4,
    lr=0.01,
    warmup=2,
    norm_weight=0.0,
    log_every=1,
    save_every=4,
    grid_every=4,
)
LONG = dataclasses.replace(
    TINY,
    total_steps=100,
    batch=8,
    flip=False,
    perceptual="none",
    ema_kimg=0.05,
    log_every=1,
    save_every=500,
    grid_every=500,
)
SETTINGS = {
    "psp": {},
    "e4e": {"e4e": E4EConfig(w_share=0.2, deltas_by=0.6, r1_every=2)},
    "restyle": {"n_iterations": 3},
    "hyperstyle": {"n_iterations": 2, "hyperstyle": HyperStyleConfig(w_share=0.5, head_width=4, rank=2)},
}


def _networks():
    torch.manual_seed(1)
    G = Generator(8, 8, 2, channel_base=64, channel_max=8)
    D = Discriminator(8, channel_base=64, channel_max=8)
    with torch.no_grad():
        for layer in (G.to_rgb1, *G.to_rgbs):
            layer.conv.weight.mul_(0.3)  # colours about [-1, 1]
    G.latent_avg.copy_(G.mean_latent(100))
    return G, D


def _config(kind, base=TINY, **changes):
    return dataclasses.replace(base, kind=kind, **SETTINGS[kind] | changes)


@pytest.fixture(scope="module")
def images():
    patches = torch.randint(0, 256, (40, 3, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    return torch.nn.functional.interpolate(patches, 8, mode="bilinear").to(torch.uint8)


def _log(folder):
    return [json.loads(line) for line in (folder / "logs" / "encoder.jsonl").read_text().splitlines()]


def _column(folder, key):
    return [line[key] for line in _log(folder) if key in line]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(tmp_path, images, kind):
    G, _ = _networks()
    encoder = train_encoder(_config(kind, LONG), images[:8], G, None, tmp_path)
    assert encoder.kind == kind and not encoder.training
    real = images[:8].float() / 127.5 - 1
    with torch.no_grad():
        found = encoder.invert(real, G)
        rebuilt = synthesize(G, found.offsets + G.latent_avg, found.weight_deltas, "none")
        start = G(G.latent_avg.expand(1, 4, -1), noise="none").expand_as(real)
    before, after = (torch.nn.functional.mse_loss(x, real).item() for x in (start, rebuilt))
    assert after < 0.5 * before
    errors = _column(tmp_path, "mse")
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_continues_bit_for_bit(tmp_path, images, monkeypatch, kind):
    config = _config(kind)
    whole = train_encoder(config, images, *_networks(), tmp_path / "a")

    class Killed(Exception):
        pass

    save = Run.save

    def save_then_die(self, state, score=None):
        save(self, state, score)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", save_then_die)
        train_encoder(config, images, *_networks(), tmp_path / "b")
    torch.manual_seed(99)
    resumed = train_encoder(config, images, *_networks(), tmp_path / "b", resume=True)
    a, b = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [_column(tmp_path / x, "loss") for x in "a"] == [_column(tmp_path / x, "loss") for x in "b"]


# --- e4e ---


def test_deltas_join_one_by_one():
    config = E4EConfig(w_share=0.1, deltas_by=0.3)
    stages = [stage_of(step, 1000, 8, config) for step in range(1000)]
    assert set(stages[:100]) == {0} and set(stages[300:]) == {7}
    assert stages == sorted(stages) and set(stages) == set(range(8))
    counts = [stages[100:300].count(stage) for stage in range(1, 8)]
    assert max(counts) - min(counts) <= 1
    # the paper's program at 1024 px: start 20,000, one every 2,000
    published = E4EConfig(w_share=0.1, deltas_by=0.27)
    assert [stage_of(s, 200_000, 18, published) for s in (0, 19_999, 20_000, 22_000, 52_000, 54_000)] == [
        0,
        0,
        1,
        2,
        17,
        17,
    ]


def test_the_log_follows_the_schedule_and_styles_that_have_not_joined_stay(tmp_path, images):
    config = _config("e4e", e4e=E4EConfig(w_share=0.5, deltas_by=1.0))
    stages = {}
    backward = encoder_steps.OnePassSteps.backward

    def look(self, update, real, step, rate, rng):
        loss = backward(self, update, real, step, rate, rng)
        gradients = [heads.weight.grad.flatten(1).abs().sum(1) for heads in self.E.heads]
        stages[step] = [bool(g > 0) for g in torch.cat(gradients)]
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_steps.OnePassSteps, "backward", look)
        train_encoder(config, images, *_networks(), tmp_path)
    logged = _column(tmp_path, "stage")
    assert logged == [0, 0, 0, 0, 1, 1, 2, 3]
    assert all(sum(learned) == stage + 1 for learned, stage in zip(stages.values(), logged))
    assert {"latent_loss", "latent_d_loss", "delta"} <= set(_log(tmp_path)[0])


def test_a_prior_of_another_width_than_w(tmp_path, images):
    G = Generator(8, 8, 2, channel_base=64, channel_max=8, z_dim=5)
    train_encoder(_config("e4e", total_steps=2, perceptual="none"), images, G, None, tmp_path / "run")
    assert _column(tmp_path / "run", "latent_d_loss")


def test_norm_of_the_deltas():
    offsets = torch.tensor([[[1.0, 1.0], [4.0, 5.0], [1.0, 1.0], [9.0, 9.0]]])
    assert delta_norm(offsets, 0).item() == 0
    assert delta_norm(offsets, 2).item() == pytest.approx(5.0, abs=1e-4)


def test_the_latent_discriminator_learns_to_tell_and_its_verdict_draws_codes_to_w(tmp_path):
    G, _ = _networks()
    critic = LatentCritic(
        E4EConfig(discriminator_lr=0.01, r1_gamma=0.01), G, Guard(Run(tmp_path, "encoder", TINY), {}), seed=0
    )
    rng = torch.Generator().manual_seed(0)
    far = torch.full((16, 3, 8), 3.0)
    losses = []
    for step in range(60):
        critic.update.guard.begin(step)
        critic.step(far, G, step, torch.randn(16, 8, generator=rng))
        losses.append(critic.scalars["latent_d_loss"].item())
    assert losses[-1] < 0.3 * losses[0]
    codes = far.clone().requires_grad_()
    near = G.mapping(torch.randn(16, 8, generator=rng)).unsqueeze(1).expand(-1, 3, -1)
    assert critic.verdict(codes) > 3 * critic.verdict(near)
    critic.verdict(codes).backward()
    assert codes.grad.abs().sum() > 0
    conditional = Generator(8, 8, 2, channel_base=64, channel_max=8, c_dim=2)
    with pytest.raises(InputError, match="unconditional generator"):
        LatentCritic(E4EConfig(), conditional, critic.update.guard, 0)


# --- restyle and hyperstyle ---


@pytest.mark.parametrize("n_iterations", [1, 4])
def test_restyle_has_a_loss_after_each_correction_and_no_gradient_between(tmp_path, images, monkeypatch, n_iterations):
    calls = []
    loss = encoder_steps.Reconstruction.loss

    def look(self, rebuilt, real, offsets):
        calls.append((rebuilt, offsets))
        return loss(self, rebuilt, real, offsets)

    monkeypatch.setattr(encoder_steps.Reconstruction, "loss", look)
    config = _config("restyle", total_steps=1, n_iterations=n_iterations)
    encoder = train_encoder(config, images, *_networks(), tmp_path)
    assert len(calls) == n_iterations == encoder.n_iterations
    assert all(not torch.equal(a[1], b[1]) for a, b in zip(calls, calls[1:]))
    if n_iterations > 1:  # no path from a later loss to an earlier correction
        assert torch.autograd.grad(calls[1][1].sum(), calls[0][1], allow_unused=True, retain_graph=True) == (None,)


def test_hyperstyle_trains_its_parts_one_after_the_other(tmp_path, images, monkeypatch):
    moved = []
    backward = encoder_steps.HyperStyleSteps.backward

    def look(self, update, real, step, rate, rng):
        loss = backward(self, update, real, step, rate, rng)
        moved.append(
            [any(p.grad is not None for p in part.parameters()) for part in (self.E.w_encoder, self.E.hypernet)]
        )
        return loss

    monkeypatch.setattr(encoder_steps.HyperStyleSteps, "backward", look)
    config = _config("hyperstyle")
    encoder = train_encoder(config, images, *_networks(), tmp_path)
    assert config.w_steps == 4 and moved == [[True, False]] * 4 + [[False, True]] * 4
    assert isinstance(encoder, HyperStyle)
    offsets = encoder.w_encoder(images[:2].float() / 127.5 - 1)
    assert torch.equal(offsets, offsets[:, :1].expand_as(offsets))
    rates = _column(tmp_path, "lr")
    assert rates[0] == rates[4] < rates[1] == rates[5]  # the second part warms up anew


def test_identity_by_path(tmp_path, images):
    from sage_fast.models.perceptual import SqueezeFeatures

    torch.manual_seed(0)
    fresh = SqueezeFeatures().state_dict()  # as drawn, biases outweigh images: all features point one way
    torch.save({name: 2 * w if w.ndim == 4 else 0 * w for name, w in fresh.items()}, tmp_path / "squeeze.pt")
    config = dataclasses.replace(TINY, total_steps=1, identity=str(tmp_path / "squeeze.pt"))
    train_encoder(config, images, *_networks(), tmp_path / "run")
    (value,) = _column(tmp_path / "run", "identity_squeezenet1_1")
    assert 0.01 < value <= 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "vae"}, "kind must be one of psp, e4e, restyle, hyperstyle"),
        ({"n_iterations": 3}, "n_iterations is at least 1, for restyle and hyperstyle"),
        ({"kind": "restyle", "n_iterations": 0}, "n_iterations is at least 1"),
        ({"kind": "restyle", "tune_generator": True}, "tune_generator goes with psp and e4e"),
        ({"e4e": E4EConfig(w_share=0.2)}, "settings of e4e have no effect on kind 'psp'"),
        ({"kind": "e4e", "hyperstyle": HyperStyleConfig(rank=2)}, "settings of hyperstyle have no effect"),
    ],
)
def test_refuses_settings_that_a_kind_ignores(setting, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **setting)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: E4EConfig(w_share=0.5, deltas_by=0.2), "w_share <= deltas_by"),
        (lambda: E4EConfig(r1_every=0), "r1_every must be positive"),
        (lambda: E4EConfig(delta_weight=-1.0), "delta_weight must not be negative"),
        (lambda: HyperStyleConfig(w_share=1.0), "w_share is a share"),
        (lambda: HyperStyleConfig(rank=0), "rank must be at least 1"),
    ],
)
def test_refuses_impossible_settings(build, message):
    with pytest.raises(InputError, match=message):
        build()
