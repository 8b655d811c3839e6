"""Classifier training: it learns, generalises, resumes bit for bit and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.training.classifier import ClassifierConfig, train_classifier

CONFIG = ClassifierConfig(total_steps=50, batch=24, width=6, lr=0.01, warmup=5, log_every=5, save_every=25)


def striped(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images uint8 [n, 1, 16, 16] of three classes: level, upright and no stripes, at random phases."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=rng)
    waves = torch.sin(torch.arange(16) * 1.57 + 6.28 * torch.rand(n, 1, generator=rng))
    level, upright = waves[:, :, None].expand(-1, -1, 16), waves[:, None, :].expand(-1, 16, -1)
    stripes = torch.stack([level, upright, torch.zeros_like(level)])[labels, torch.arange(n)]
    images = 128 + 60 * stripes + 20 * torch.randn(n, 16, 16, generator=rng)
    return images.clamp(0, 255).to(torch.uint8)[:, None], labels


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return striped(300, 0)


@pytest.mark.usefixtures("multiplied_bfloat16")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_tells_new_images_apart(data: tuple[Tensor, Tensor], tmp_path: Path, precision: str) -> None:
    """Mirrored or not, the orientation of stripes is what it is."""
    network = train_classifier(dataclasses.replace(CONFIG, precision=precision), *data, tmp_path)
    assert not network.training and all(p.dtype == torch.float32 for p in network.parameters())
    images, labels = striped(200, 1)
    predicted = network(images.float() / 127.5 - 1).argmax(1)
    assert (predicted == labels).float().mean() > 0.95
    lines = [json.loads(line) for line in (tmp_path / "logs" / "classifier.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 51, 5))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["lr"] < 0.01 * max(line["lr"] for line in lines)


def test_it_continues_bit_for_bit(data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(CONFIG, total_steps=8, save_every=4, log_every=1)
    whole = train_classifier(short, *data, tmp_path / "whole")

    from sage_fast.training.runtime import Run

    save = Run.save

    def save_and_die(run: Run, state: dict) -> None:
        save(run, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(short, *data, tmp_path / "halves")
    monkeypatch.undo()
    torch.manual_seed(99)  # torch's own random state plays no part
    resumed = train_classifier(short, *data, tmp_path / "halves", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_it_leaves_the_global_random_state_alone(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train_classifier(dataclasses.replace(CONFIG, total_steps=1), *data, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_classes_than_labels(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    network = train_classifier(dataclasses.replace(CONFIG, total_steps=1), *data, tmp_path, n_classes=7)
    assert network.n_classes == 7


def test_data_that_do_not_fit_are_refused(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = data
    for bad, message in (
        ((images.float(), labels), "images must be uint8"),
        ((images[:0], labels[:0]), "images must be uint8"),
        ((images, labels[:-1]), "labels must be int64"),
        ((images, labels.int()), "labels must be int64"),
        ((images, labels - 1), "labels must be 0"),
        ((images, torch.zeros_like(labels)), "two classes"),
    ):
        with pytest.raises(InputError, match=message):
            train_classifier(CONFIG, *bad, tmp_path / "run")
    with pytest.raises(InputError, match="n_classes 2"):
        train_classifier(CONFIG, images, labels, tmp_path / "run", n_classes=2)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_not_overwritten(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, total_steps=1)
    train_classifier(short, *data, tmp_path)
    with pytest.raises(InputError, match="already holds a checkpoint"):
        train_classifier(short, *data, tmp_path)
    with pytest.raises(InputError, match="other settings"):
        train_classifier(dataclasses.replace(short, warmup=1), *data, tmp_path, resume=True)


@pytest.mark.parametrize(
    "change",
    [{"batch": 1}, {"lr": 0.0}, {"total_steps": 0}, {"weight_decay": -1.0}, {"precision": "float16"}, {"width": 0}],
)
def test_bad_settings_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        ClassifierConfig(**change)
