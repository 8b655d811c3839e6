"""Encoder training: it learns, resumes bit for bit, and freezes what it should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sage_fast.data.folders import ImageSet
from sage_fast.errors import InputError
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.checkpoints import read_state
from sage_fast.training.embed import embed, embed_images
from sage_fast.training.encoder import EncoderConfig, train_encoder
from sage_fast.training.logs import read_log
from sage_fast.training.runtime import Run
from sage_fast.training.tuning import mix_codes

GOLDEN = Path(__file__).parents[1] / "golden" / "encoder.json"
TINY = EncoderConfig(
    total_steps=8,
    batch=4,
    channel_base=64,
    channel_max=16,
    head_width=4,
    lr=0.01,
    warmup=2,
    log_every=1,
    save_every=4,
    grid_every=4,
)
LONG = dataclasses.replace(
    TINY,
    total_steps=120,
    batch=8,
    flip=False,
    perceptual="none",
    norm_weight=0.0,
    ema_kimg=0.05,
    log_every=20,
    save_every=500,
    grid_every=500,
)
TUNED = dataclasses.replace(TINY, tune_generator=True, r1_every=2)


@pytest.fixture
def images():
    return torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _networks(resolution=8, n_channels=3):
    torch.manual_seed(1)
    G = Generator(resolution, 8, 2, n_channels, channel_base=64, channel_max=8)
    D = Discriminator(resolution, n_channels, channel_base=64, channel_max=8)
    G.latent_avg.copy_(G.mean_latent(100))
    return G, D


def _log(folder, key="mse"):
    lines = [json.loads(line) for line in (folder / "logs" / "encoder.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def _same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def _clone(*networks):
    return [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]


def test_rebuilds_a_few_images_of_the_generator(tmp_path):
    G, _ = _networks()
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer in (G.to_rgb1, *G.to_rgbs):
            layer.conv.weight.mul_(0.2)  # colours well inside [-1, 1]
        targets = G(G.mapping(z), noise="none")
    images = ((targets.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    sizes = {"channel_base": 256, "channel_max": 32, "head_width": 16}
    encoder = train_encoder(dataclasses.replace(LONG, **sizes), images, G, None, tmp_path)
    assert not encoder.training
    real = images.float() / 127.5 - 1
    with torch.no_grad():
        rebuilt = G(encoder(real) + G.latent_avg, noise="none")
        average = G(G.broadcast(G.latent_avg[None]), noise="none")
    before, after = (torch.nn.functional.mse_loss(x.expand_as(real), real) for x in (average, rebuilt))
    assert after < before / 10


@pytest.mark.parametrize("config", [TINY, TUNED], ids=["frozen", "tuned"])
def test_resume_continues_bit_for_bit(tmp_path, images, monkeypatch, config):
    whole_G, whole_D = _networks()
    whole = train_encoder(config, images, whole_G, whole_D, tmp_path / "a")

    class Killed(Exception):
        pass

    save = Run.save

    def save_then_die(self, state, score=None):
        save(self, state, score)
        raise Killed

    G, D = _networks()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", save_then_die)
        train_encoder(config, images, G, D, tmp_path / "b")
    assert Run(tmp_path / "b", "encoder", config, resume=True).load()["step"] == 4
    torch.manual_seed(99)  # torch's own random state must not matter
    resumed = train_encoder(config, images, G, D, tmp_path / "b", resume=True)
    assert _same(whole.state_dict(), resumed.state_dict())
    assert _same(whole_G.state_dict(), G.state_dict()) and _same(whole_D.state_dict(), D.state_dict())
    assert _log(tmp_path / "a") == _log(tmp_path / "b")


def test_generator_and_discriminator_stay_frozen(tmp_path, images):
    G, D = _networks()
    before = _clone(G, D)
    train_encoder(TINY, images, G, D, tmp_path)
    assert all(_same(x, y) for x, y in zip(before, _clone(G, D)))
    assert all(p.requires_grad and p.grad is None for p in [*G.parameters(), *D.parameters()])


def test_tuning_trains_the_generator_but_not_the_frame(tmp_path, images):
    G, D = _networks()
    (g_before, d_before) = _clone(G, D)
    train_encoder(TUNED, images, G, D, tmp_path)
    g_after, d_after = _clone(G, D)
    changed = {k for k in g_before if not torch.equal(g_before[k], g_after[k])}
    assert "conv1.conv.weight" in changed and not _same(d_before, d_after)
    assert not {k for k in changed if k.startswith(("style.", "latent_avg", "noises."))}
    assert set(json.loads((tmp_path / "logs" / "encoder.jsonl").read_text().splitlines()[0])) >= {"g_loss", "d_loss"}

    G, D = _networks()
    train_encoder(dataclasses.replace(TUNED, tune_mapping=True), images, G, D, tmp_path / "mapping")
    after = G.state_dict()
    assert not torch.equal(g_before["style.1.weight"], after["style.1.weight"])
    assert torch.equal(g_before["latent_avg"], after["latent_avg"])


def test_tuning_draws_from_a_prior_of_another_width_than_w(tmp_path, images):
    G, D = Generator(8, 8, 2, channel_base=64, channel_max=8, z_dim=5), _networks()[1]
    before = _clone(G)[0]
    train_encoder(dataclasses.replace(TUNED, total_steps=2), images, G, D, tmp_path / "run")
    assert not torch.equal(G.state_dict()["conv1.conv.weight"], before["conv1.conv.weight"])


def test_tuning_rebuilds_better_than_a_frozen_generator(tmp_path):
    patches = torch.randint(0, 256, (8, 3, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    images = torch.nn.functional.interpolate(patches, 8, mode="bilinear").to(torch.uint8)
    finals = []
    for tune in (False, True):
        settings = dict(tune_generator=True, tune_lr=0.01, adversarial_weight=0.003) if tune else {}
        config = dataclasses.replace(LONG, total_steps=100, **settings)
        train_encoder(config, images, *_networks(), tmp_path / str(tune))
        finals.append(_log(tmp_path / str(tune))[-1])
    assert finals[1] < 0.8 * finals[0]


@pytest.mark.parametrize(("resolution", "n_channels"), [(4, 3), (16, 1), (32, 4)])
def test_other_sizes(tmp_path, resolution, n_channels):
    G, D = _networks(resolution, n_channels)
    images = torch.randint(0, 256, (8, n_channels, resolution, resolution), dtype=torch.uint8)
    config = dataclasses.replace(TUNED, total_steps=1, noise="const")
    encoder = train_encoder(config, images, G, D, tmp_path)
    assert embed_images(images, encoder, G, batch=3).shape == (8, G.n_latent, 8)
    with pytest.raises(InputError, match="batch must be at least 1, got -2"):
        embed_images(images, encoder, G, batch=-2)


def test_golden_run(tmp_path, images):
    """The first losses are those of the recorded run: a change of the arithmetic shows here."""
    golden = json.loads(GOLDEN.read_text())
    for name, config in (("frozen", TINY), ("tuned", TUNED)):
        train_encoder(config, images, *_networks(), tmp_path / name)
        for key, values in golden[name].items():
            assert _log(tmp_path / name, key) == pytest.approx(values, rel=1e-3, abs=1e-5), f"{name}: {key}"


def test_mixed_codes_come_from_two_parents():
    w_plus = torch.arange(6.0).view(6, 1, 1).expand(6, 5, 3)
    mixed = mix_codes(w_plus, 4, torch.Generator().manual_seed(0))
    assert mixed.shape == (4, 5, 3)
    assert all(len(m.unique()) <= 2 for m in mixed) and mixed.min() >= 0 and mixed.max() <= 5
    assert torch.equal(mixed, mix_codes(w_plus, 4, torch.Generator().manual_seed(0)))


def test_embed_keeps_every_image():
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 1])
    files = [f"{i}.png" for i in range(7)]
    encoder = PyramidEncoder(8, 4, 8, channel_base=64, channel_max=16).train()
    table = embed(ImageSet(images, labels, ["a", "b"], files, []), encoder, _networks()[0], batch=2)
    assert encoder.training and table.w_plus.dtype == torch.float32
    with torch.no_grad():
        expected = encoder(images.float() / 127.5 - 1)
    torch.testing.assert_close(table.w_plus, expected)
    assert torch.equal(table.labels, labels) and table.categories == ["a", "b"] and table.files == files


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"noise": "random"}, "noise must be 'none' or 'const'"),
        ({"norm_weight": -1.0}, "norm_weight must not be negative"),
        ({"mse_weight": 0.0, "perceptual": "none"}, "both off"),
        ({"tune_generator": True, "batch": 2}, "at least 4"),
        ({"lr_end": 2.0}, "share"),
        ({"tune_generator": True, "r1_gamma": -1.0}, "r1_gamma must not be negative"),
        ({"adversarial_weight": 0.1}, "adversarial_weight = 0.1 has no effect without tune_generator"),
        ({"tune_lr": 0.1}, "tune_lr = 0.1 has no effect without tune_generator"),
        ({"tune_mapping": True}, "tune_mapping = True has no effect without tune_generator"),
        ({"r1_gamma": 1.0}, "r1_gamma = 1.0 has no effect without tune_generator"),
        ({"r1_every": 4}, "r1_every = 4 has no effect without tune_generator"),
        ({"identity_weight": 0.2}, "identity_weight = 0.2 has no effect without a network in identity"),
        ({"perceptual": "none", "perceptual_weight": 0.2}, "perceptual_weight = 0.2 has no effect without a network"),
        ({"perceptual": "none", "perceptual_share": 0.5}, "perceptual_share = 0.5 has no effect without a network"),
    ],
)
def test_refuses_settings(setting, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **setting)


def test_refuses_what_does_not_fit(tmp_path, images):
    G, D = _networks()
    with pytest.raises(InputError, match=r"uint8 \[M, 3, 8, 8\]"):
        train_encoder(TINY, images.float(), G, D, tmp_path)
    with pytest.raises(InputError, match="got none"):
        train_encoder(TINY, images[:0], G, D, tmp_path)
    with pytest.raises(InputError, match="needs the discriminator"):
        train_encoder(dataclasses.replace(TUNED, perceptual="none"), images, G, None, tmp_path)
    train_encoder(TINY, images, G, D, tmp_path / "run")
    with pytest.raises(InputError, match="already holds a checkpoint"):
        train_encoder(TINY, images, G, D, tmp_path / "run")
    with pytest.raises(InputError, match="other settings"):
        train_encoder(dataclasses.replace(TINY, warmup=1), images, G, D, tmp_path / "run", resume=True)


@pytest.mark.usefixtures("multiplied_bfloat16")
def test_bfloat16_steps_follow_float32(tmp_path, images):
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(TUNED, precision=precision)
        encoder = train_encoder(config, images, *_networks(), tmp_path / precision)
        lines = [json.loads(line) for line in (tmp_path / precision / "logs/encoder.jsonl").read_text().splitlines()]
        losses[precision] = [line["mse"] for line in lines if "mse" in line]
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_unknown_precision():
    with pytest.raises(InputError, match="precision must be float32 or bfloat16, got 'half'"):
        dataclasses.replace(TINY, precision="half")


def test_another_data_set_or_generator_is_refused(tmp_path, images):
    G, D = _networks()
    labels, files = torch.arange(40) % 2, [f"{i}.png" for i in range(40)]
    train_encoder(TINY, ImageSet(images, labels, ["a", "b"], files, []), G, D, tmp_path)
    other = ImageSet(images, labels, ["a", "c"], files, [])
    with pytest.raises(InputError, match=r"begun with something else \(data.names was '\w{16}', is '\w{16}'\); give"):
        train_encoder(TINY, other, G, D, tmp_path, resume=True)
    torch.manual_seed(1)
    wider = Generator(8, 8, 2, 3, channel_base=64, channel_max=16)
    with pytest.raises(InputError, match=r"generator.channels was \[8, 8\], is \[16, 8\]"):
        train_encoder(TINY, ImageSet(images, labels, ["a", "b"], files, []), wider, D, tmp_path, resume=True)


def test_the_best_validation_is_kept(tmp_path, images):
    config = dataclasses.replace(TINY, grid_every=2, save_every=2, n_validation=2)
    train_encoder(config, images, *_networks(), tmp_path)
    errors = {line["step"]: line["val_mse"] for line in read_log(tmp_path / "logs/encoder.jsonl") if "val_mse" in line}
    assert read_state(tmp_path / "checkpoints/encoder_best.pt")["step"] == min(errors, key=errors.__getitem__)
    steps = [line["step"] for line in read_log(tmp_path / "logs/encoder.jsonl")]
    assert steps == list(range(1, 9))  # one line a step, with everything
