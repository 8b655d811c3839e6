"""GAN training: it learns, it resumes bit for bit, it refuses what it cannot use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.training.gan import GANConfig, train_gan

GOLDEN = Path(__file__).parents[1] / "golden" / "gan.json"
TINY = GANConfig(
    resolution=8,
    style_dim=8,
    n_mapping=2,
    channel_base=64,
    channel_max=8,
    batch=4,
    total_kimg=0.04,
    r1_every=2,
    pl_weight=2.0,
    pl_every=2,
    log_every=2,
    save_every=5,
    grid_every=5,
)


@pytest.fixture
def images():
    return torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_resume_continues_bit_for_bit(tmp_path, images):
    whole, _ = train_gan(TINY, images, tmp_path / "a")
    train_gan(dataclasses.replace(TINY, total_kimg=0.02), images, tmp_path / "b")
    resumed, _ = train_gan(TINY, images, tmp_path / "b", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_golden_run(tmp_path, images):
    """The first losses are those of the recorded run: a change of the arithmetic shows here."""
    config = dataclasses.replace(TINY, total_kimg=0.024, log_every=1)
    train_gan(config, images, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "logs/gan.jsonl").read_text().splitlines()]
    for key, values in json.loads(GOLDEN.read_text()).items():
        assert [line[key] for line in lines] == pytest.approx(values, rel=1e-3, abs=1e-5), key


def test_run_folder(tmp_path, images):
    train_gan(TINY, images, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "logs/gan.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert {"g_loss", "d_loss", "r1", "kimg", "seconds"} <= set(lines[0])
    assert json.loads((tmp_path / "configs/gan.json").read_text())["batch"] == 4
    assert (tmp_path / "grids/gan_fakes_000010.png").exists() and (tmp_path / "grids/gan_reals.png").exists()


def test_a_finished_folder_is_not_overwritten(tmp_path, images):
    train_gan(TINY, images, tmp_path)
    with pytest.raises(InputError, match="--resume"):
        train_gan(TINY, images, tmp_path)
    with pytest.raises(InputError, match="batch was 4, is 8"):
        train_gan(dataclasses.replace(TINY, batch=8), images, tmp_path, resume=True)


def test_a_truncated_checkpoint_is_named(tmp_path, images):
    config = dataclasses.replace(TINY, save_every=100)  # one checkpoint
    train_gan(config, images, tmp_path)
    path = tmp_path / "checkpoints/gan.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="gan.pt is not a readable checkpoint"):
        train_gan(config, images, tmp_path, resume=True)


def test_it_learns_a_colour(tmp_path):
    """Two-colour data: after a short run the fakes' mean colour moved most of the way to the data's."""
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = 255
    config = dataclasses.replace(
        TINY, batch=8, total_kimg=2.0, pl_weight=0.0, ema_kimg=0.2, save_every=1000, grid_every=1000
    )
    g, _ = train_gan(config, images, tmp_path)
    with torch.no_grad():
        colour = g(g.mapping(torch.randn(16, 8))).mean([0, 2, 3])
    assert colour[0] > 0.3 and colour[1] < -0.3 and colour[2] < -0.3, colour


@pytest.mark.parametrize(
    "bad, message", [(dict(batch=1), "batch must be"), (dict(lr=0.0), "lr must be"), (dict(style_mixing=2.0), "0 to 1")]
)
def test_bad_settings(bad, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **bad)


def test_bad_images(tmp_path, images):
    with pytest.raises(InputError, match=r"images must be uint8 \[M, 3, 8, 8\]"):
        train_gan(TINY, images.float(), tmp_path)
    with pytest.raises(InputError, match="at least one batch of 4 images, got 2"):
        train_gan(TINY, images[:2], tmp_path)


def test_bfloat16_steps_follow_float32(tmp_path, images):
    """The same first losses to bfloat16's three digits, weights in float32 all along."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(TINY, precision=precision, total_kimg=0.016, log_every=1)
        generator, _ = train_gan(config, images, tmp_path / precision)
        lines = (tmp_path / precision / "logs/gan.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["d_loss"] for line in lines]
        assert {p.dtype for p in generator.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_unknown_precision():
    with pytest.raises(InputError, match="precision must be float32 or bfloat16, got 'half'"):
        dataclasses.replace(TINY, precision="half")
