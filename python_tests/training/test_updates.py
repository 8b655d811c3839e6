"""Micro-batches add up to the batch; a loss that is not finite never reaches the weights."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.training.ranks import Ranks
from sage_fast.training.updates import Guard, Update, block_norms

ALONE = Ranks(torch.device("cpu"))


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False)])
        self.offset = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.layers[0](x) + self.offset


def setting(tmp_path):
    torch.manual_seed(0)
    line = Line()
    optim = torch.optim.Adam(line.parameters(), lr=0.1, fused=True)
    return line, optim, Guard(tmp_path / "why.json", {"line": line}, [optim], tmp_path / "gan.pt")


def test_micro_batches_add_up(tmp_path):
    x, results = torch.randn(6, 2), []
    for n in (1, 3):
        line, optim, guard = setting(tmp_path)
        update = Update("loss", optim, n, guard, ALONE)
        guard.begin(1, torch.arange(6))
        for part in x.chunk(n):
            update.add(line(part).square().mean(), weight=3.0)
        results.append((update.apply(), line.layers[0].weight.grad, line.layers[0].weight))
    for one, three in zip(*results):
        torch.testing.assert_close(one, three)
    loss = (x @ results[0][2].t()).square().mean()
    assert results[0][0].item() != pytest.approx(3 * loss.item())  # what is logged has no weight


def test_a_bad_loss_leaves_the_weights_and_says_what_is_known(tmp_path):
    line, optim, guard = setting(tmp_path)
    update = Update("d_loss", optim, 1, guard, ALONE)
    guard.begin(7, torch.tensor([3, 1]))
    update.add(line(torch.ones(1, 2)).mean())
    update.apply()
    before = [p.clone() for p in line.parameters()]
    guard.begin(8, torch.tensor([2, 5]))
    update.add(line(torch.ones(1, 2)).mean() * math.nan)
    with pytest.raises(InputError, match="stopped at step 8: d_loss is nan, and no update was made.*lower lr"):
        update.apply()
    assert all(torch.equal(a, b) for a, b in zip(before, line.parameters()))
    report = json.loads((tmp_path / "why.json").read_text())
    assert (report["step"], report["loss"], report["images"]) == (8, "d_loss", [2, 5])
    assert report["last_losses"][0]["step"] == 7 and math.isfinite(report["last_losses"][0]["d_loss"])
    assert report["norms"]["line"]["layers.0"]["gradients"] == "NaN"
    assert report["norms"]["line"]["offset"]["weights"] == pytest.approx(abs(before[0].item()))


def test_where_the_host_does_not_wait_the_device_skips_every_later_update(tmp_path, monkeypatch):
    """What a GPU does: the flag that the optimizers read stays up until the host looks."""
    line, optim, guard = setting(tmp_path)
    update = Update("g_loss", optim, 1, guard, ALONE)
    look = guard.look
    monkeypatch.setattr(guard, "look", lambda: None)
    before = [p.clone() for p in line.parameters()]
    for step, factor in ((63, math.inf), (65, 1.0)):
        guard.begin(step, torch.tensor([0]))
        update.add(line(torch.ones(1, 2)).mean() * factor)
        update.apply()
    assert all(torch.equal(a, b) for a, b in zip(before, line.parameters()))
    with pytest.raises(InputError, match="stopped at step 63"):
        look()


def test_norms_by_block():
    line = Line()
    norms = block_norms(line)
    assert list(norms) == ["offset", "layers.0"] and norms["offset"] == {"weights": 0.0, "gradients": None}
    assert norms["layers.0"]["weights"] == pytest.approx(line.layers[0].weight.norm().item())
