"""Dictionary training: it learns the residuals, resumes bit for bit, freezes what it should, and has three presets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.perceptual import DiscriminatorFeatures
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.dictionary import DictionaryConfig, train_dictionary
from sage_fast.training.runtime import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "dictionary.json"
TINY = DictionaryConfig(n_directions=6, total_steps=8, batch=8, lr=0.01, log_every=1, save_every=4, grid_every=4)
LATENT = dataclasses.replace(TINY, rec_weight=0.0)


def _codes(n=60, n_classes=5, n_latent=4, dim=8, rank=3):
    """Codes whose residuals span ``rank`` directions, the same in every class, and differ in class means."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    means = torch.randn(n_classes, n_latent, dim, generator=rng)
    basis = torch.randn(rank, n_latent, dim, generator=rng)
    return means[labels] + 0.5 * torch.einsum("nr,rld->nld", torch.randn(n, rank, generator=rng), basis), labels


def _networks():
    torch.manual_seed(1)
    G = Generator(8, 8, 2, 3, channel_base=64, channel_max=8)
    G.latent_avg.copy_(G.mean_latent(100))
    D = Discriminator(8, 3, channel_base=64, channel_max=8)
    return G, DiscriminatorFeatures(D)


@pytest.fixture
def images():
    return torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _log(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "logs" / "dictionary.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def _explained(directions, w_plus, labels):
    """Share of the residuals' energy that lies in the span of the directions, over all layers."""
    means = torch.stack([w_plus[labels == s].mean(0) for s in range(int(labels.max()) + 1)])
    delta_w = (w_plus - means[labels]).transpose(0, 1)  # [L, N, D]
    basis = torch.linalg.qr(directions)[0]
    return ((delta_w @ basis).square().sum() / delta_w.square().sum()).item()


@pytest.mark.parametrize(("init", "lr"), [("pca", 0.003), ("normal", 0.02)])
def test_learns_the_residuals_without_images(tmp_path, init, lr):
    w_plus, labels = _codes()
    config = dataclasses.replace(
        LATENT, init=init, n_directions=3, total_steps=300, batch=32, lr=lr, lambda2=0.0, lambda1=0.0, log_every=10
    )
    config = dataclasses.replace(config, save_every=300, grid_every=300)
    dictionary = train_dictionary(config, w_plus, labels, None, None, None, tmp_path)
    assert dictionary.directions.shape == (4, 8, 3)
    latent = _log(tmp_path, "latent")
    assert latent[-1] < latent[0] / 5
    assert _explained(dictionary.directions, w_plus, labels) > 0.95


def test_the_image_term_learns_too(tmp_path):
    G, _ = _networks()
    w_plus, labels = _codes()
    with torch.no_grad():
        drawn = G(w_plus + G.latent_avg, noise="none")
    images = ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    config = dataclasses.replace(TINY, total_steps=120, lr=0.003, latent_weight=0.0, log_every=10, save_every=500)
    train_dictionary(config, w_plus, labels, images, G, None, tmp_path)
    rec = _log(tmp_path, "rec")
    assert rec[-1] < 0.7 * rec[0]


def test_orthogonality_turns_directions_away_from_class_embeddings(tmp_path):
    w_plus, labels = _codes()
    orth = []
    for weight in (0.0, 0.1):
        config = dataclasses.replace(LATENT, lambda1=weight, total_steps=100, log_every=10, save_every=100)
        train_dictionary(config, w_plus, labels, None, None, None, tmp_path / str(weight))
        orth.append(_log(tmp_path / str(weight), "orth")[-1])
    assert orth[1] < 0.5 * orth[0]


@pytest.mark.parametrize("latent_only", [True, False])
def test_resume_continues_bit_for_bit(tmp_path, images, monkeypatch, latent_only):
    w_plus, labels = _codes()
    config = LATENT if latent_only else TINY
    given = (w_plus, labels, images, *_networks())
    whole = train_dictionary(config, *given, tmp_path / "a")

    class Killed(Exception):
        pass

    save = Run.save

    def save_then_die(self, state, score=None):
        save(self, state, score)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", save_then_die)
        train_dictionary(config, *given, tmp_path / "b")
    torch.manual_seed(99)
    resumed = train_dictionary(config, *given, tmp_path / "b", resume=True)
    assert torch.equal(whole.directions, resumed.directions)
    assert _log(tmp_path / "a") == _log(tmp_path / "b")


def test_generator_and_features_stay_frozen(tmp_path, images):
    G, features = _networks()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (G, features)]
    train_dictionary(TINY, *_codes(), images, G, features, tmp_path)
    for saved, module in zip(before, (G, features), strict=True):
        assert all(torch.equal(saved[k], v) for k, v in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in G.parameters())


@pytest.mark.parametrize(("dim", "expected"), [(8, 2), (64, 16), (512, 100), (2, 1)])
def test_directions_are_far_fewer_than_dimensions_unless_given(tmp_path, dim, expected):
    w_plus, labels = _codes(n=20, n_latent=1, dim=dim)
    config = dataclasses.replace(LATENT, n_directions=None, total_steps=1, reading="paper")
    assert train_dictionary(config, w_plus, labels, None, None, None, tmp_path).n_directions == expected
    assert DictionaryConfig.preset("default").n_directions is None


def test_presets():
    paper, released, default = (DictionaryConfig.preset(name) for name in ("paper", "released", "default"))
    for config in (paper, released):
        assert (config.lambda1, config.lambda2, config.lr, config.batch) == (5e-4, 5e-3, 1e-4, 32)
        assert (config.total_steps, config.init, config.latent_weight) == (15000, "normal", 0.0)
    assert paper.perceptual_weight == 0.0 and released.perceptual_weight == 1.0
    assert default.init == "pca" and default.reading == "default"
    assert DictionaryConfig.preset("paper", n_directions=32).n_directions == 32
    with pytest.raises(InputError, match="preset must be one of"):
        DictionaryConfig.preset("fancy")


def test_released_edits_the_first_six_layers_only(tmp_path):
    w_plus, labels = _codes(n_latent=8)
    config = dataclasses.replace(DictionaryConfig.preset("released"), n_directions=6, total_steps=2, batch=8)
    config = dataclasses.replace(config, rec_weight=0.0, latent_weight=1.0)
    dictionary = train_dictionary(config, w_plus, labels, None, None, None, tmp_path / "released")
    assert (dictionary.directions[6:] == 0).all() and (dictionary.directions[:6] != 0).any(2).all()
    config = dataclasses.replace(LATENT, total_steps=2)
    dictionary = train_dictionary(config, w_plus, labels, None, None, None, tmp_path / "default")
    assert (dictionary.directions != 0).any(2).all()


def test_as_many_directions_as_dimensions_and_no_more(tmp_path):
    dictionary = train_dictionary(
        dataclasses.replace(LATENT, n_directions=8, total_steps=2), *_codes(), None, None, None, tmp_path / "8"
    )
    assert dictionary.directions.shape == (4, 8, 8) and torch.isfinite(dictionary.directions).all()
    with pytest.raises(InputError, match="n_directions must be at most the width of the codes, 8, got 9; leave it out"):
        train_dictionary(dataclasses.replace(LATENT, n_directions=9), *_codes(), None, None, None, tmp_path / "9")
    assert not (tmp_path / "9").exists()


@pytest.mark.parametrize("name", ["paper", "released", "default"])
@pytest.mark.parametrize(("dim", "expected"), [(64, 16), (512, 100)])
def test_a_preset_has_as_many_directions_as_the_width_bears(tmp_path, name, dim, expected):
    config = DictionaryConfig.preset(name, total_steps=1, rec_weight=0.0, latent_weight=1.0)
    w_plus, labels = _codes(n=20, n_latent=6, dim=dim)
    assert train_dictionary(config, w_plus, labels, None, None, None, tmp_path).n_directions == expected


def test_golden_run(tmp_path, images):
    golden = json.loads(GOLDEN.read_text())
    for name, config in (("latent", LATENT), ("image", TINY)):
        train_dictionary(config, *_codes(), images, *_networks(), tmp_path / name)
        for key, values in golden[name].items():
            assert _log(tmp_path / name, key) == pytest.approx(values, rel=1e-3, abs=1e-5), f"{name}: {key}"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_directions": 0}, "n_directions must be at least 1"),
        ({"reading": "mine"}, "reading must be one of"),
        ({"init": "zeros"}, "init must be"),
        ({"noise": "random"}, "noise must be"),
        ({"precision": "half"}, "precision must be float32 or bfloat16, got 'half'"),
        ({"feature_cache_gb": -1.0}, "feature_cache_gb must not be negative"),
        ({"lambda1": -1.0}, "lambda1 must not be negative"),
        ({"rec_weight": 0.0, "latent_weight": 0.0}, "both 0"),
    ],
)
def test_refuses_settings(setting, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **setting)


def test_refuses_what_does_not_fit(tmp_path, images):
    w_plus, labels = _codes()
    G, _ = _networks()
    with pytest.raises(InputError, match="needs the images and the generator"):
        train_dictionary(TINY, w_plus, labels, None, None, None, tmp_path)
    with pytest.raises(InputError, match=r"\[N, 4, 8\] for this generator"):
        train_dictionary(TINY, w_plus[:, :2], labels, images, G, None, tmp_path)
    with pytest.raises(InputError, match="one for each code"):
        train_dictionary(TINY, w_plus, labels, images[:3], G, None, tmp_path)
    with pytest.raises(InputError, match=r"\[N, L, D\] and \[N\]"):
        train_dictionary(LATENT, w_plus, labels[:3], None, None, None, tmp_path)
    with pytest.raises(
        InputError, match="must give one category two codes at least, got 3 codes of as many categories"
    ):
        train_dictionary(LATENT, w_plus[:3], torch.arange(3), None, None, None, tmp_path)


def test_another_data_set_is_refused(tmp_path, images):
    w_plus, labels = _codes()
    train_dictionary(TINY, w_plus, labels, images, *_networks(), tmp_path)
    with pytest.raises(InputError, match="begun with something else .data.pixels was"):
        train_dictionary(TINY, w_plus, labels, 255 - images, *_networks(), tmp_path, resume=True)
    with pytest.raises(InputError, match=r"codes was \[60, 4, 8\], is \[59, 4, 8\]"):
        train_dictionary(TINY, w_plus[1:], labels[1:], images[1:], *_networks(), tmp_path, resume=True)


@pytest.mark.usefixtures("multiplied_bfloat16")
def test_bfloat16_and_features_at_every_step_change_little(tmp_path, images):
    logs = {}
    for name, change in {"whole": {}, "half": {"precision": "bfloat16"}, "anew": {"feature_cache_gb": 0.0}}.items():
        train_dictionary(dataclasses.replace(TINY, **change), *_codes(), images, *_networks(), tmp_path / name)
        logs[name] = {key: _log(tmp_path / name, key) for key in ("rec", "perceptual_discriminator")}
    for key, whole in logs["whole"].items():
        assert logs["half"][key] != whole and logs["half"][key] == pytest.approx(whole, rel=0.05)
        assert logs["anew"][key] == pytest.approx(whole, rel=1e-4)
