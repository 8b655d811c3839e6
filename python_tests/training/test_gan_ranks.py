"""Two processes with half a batch each are one process with the whole of it."""

from __future__ import annotations

import json

import gan_programs
import pytest
import torch
from rank_processes import start_ranks


def logged(folder):
    lines = [json.loads(line) for line in (folder / "logs/gan.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


def weights(folder):
    return torch.load(folder / "checkpoints/gan.pt", weights_only=True)


def test_two_ranks_are_one(tmp_path):
    """Losses of 20 steps, the strength of augmentation and the weights after them, in float64."""
    children = start_ranks(gan_programs.train, 2, tmp_path, tmp_path / "two", {})
    gan_programs.train(tmp_path / "one", {})
    assert [child.wait() for child in children] == [0, 0], children[0].text() + children[1].text()
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == 20 and one[-1]["augment_p"] > 0
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-7)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for part in ("G", "D", "average"):
        for name, value in a[part].items():
            torch.testing.assert_close(
                b[part][name], value, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert a["augment"] == b["augment"] and a["sampler"] == b["sampler"] and torch.equal(a["rng"], b["rng"])


def test_two_ranks_go_on_where_they_stopped(tmp_path):
    """Each in two micro-batches."""
    whole, half = dict(accumulate=2, total_kimg=0.08), dict(accumulate=2, total_kimg=0.04)
    for folder, settings in (("whole", whole), ("halves", half)):
        children = start_ranks(gan_programs.train, 2, tmp_path / f"{folder}_log", tmp_path / folder, settings)
        assert [child.wait() for child in children] == [0, 0], children[0].text()
    children = start_ranks(gan_programs.train, 2, tmp_path / "third", tmp_path / "halves", whole, True)
    assert [child.wait() for child in children] == [0, 0], children[0].text()
    assert logged(tmp_path / "whole") == logged(tmp_path / "halves")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(a["average"][name], b["average"][name]) for name in a["average"])


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path):
    children = start_ranks(gan_programs.spoil, 2, tmp_path, tmp_path / "run")
    assert all(child.wait() != 0 for child in children)
    for child in children:
        assert "training stopped at step" in child.text() and "is not finite" not in child.text()
    report = json.loads((tmp_path / "run/logs/gan_diagnosis.json").read_text())
    assert len(report["images"]) == 8


def test_a_batch_that_ranks_cannot_share(tmp_path):
    children = start_ranks(gan_programs.train, 3, tmp_path, tmp_path / "run", {})
    assert all(child.wait() != 0 for child in children)
    assert "batch must be a multiple of 6 (3 ranks x 1 micro-batches x mbstd_group 2" in children[0].text()
    assert not (tmp_path / "run").exists()
