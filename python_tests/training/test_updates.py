"""Micro-batches add up to the batch; a loss that is not finite never reaches the weights."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import tiny_training
import torch
from run_programs import ToyConfig

from sage_fast.errors import InputError
from sage_fast.training import classifier, dictionary, gan, latent_critic, tuning
from sage_fast.training.checkpoints import read_state
from sage_fast.training.latent_critic import E4EConfig
from sage_fast.training.logs import read_log
from sage_fast.training.reconstruction import Reconstruction
from sage_fast.training.runtime import Run
from sage_fast.training.updates import Guard, Update, block_norms, load_optimizer


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
    guard = Guard(Run(tmp_path, "toy", ToyConfig(), resume=True), {"line": line}, ("a lower lr", "more r1"))
    return line, optim, guard


def test_micro_batches_add_up(tmp_path):
    x, results = torch.randn(6, 2), []
    for n in (1, 3):
        line, optim, guard = setting(tmp_path)
        update = Update("loss", optim, guard, n)
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
    update = Update("d_loss", optim, guard)
    guard.begin(7, torch.tensor([3, 1]))
    update.add(line(torch.ones(1, 2)).mean())
    update.apply()
    before = [p.clone() for p in line.parameters()]
    guard.begin(8, torch.tensor([2, 5]))
    update.add(line(torch.ones(1, 2)).mean() * math.nan)
    with pytest.raises(
        InputError,
        match="stopped at step 8: d_loss is nan, and no update was made.*a lower lr or more r1, and begin anew",
    ):
        update.apply()
    assert all(torch.equal(a, b) for a, b in zip(before, line.parameters()))
    report = json.loads((tmp_path / "logs/toy_diagnosis.json").read_text())
    assert (report["step"], report["loss"], report["images"]) == (8, "d_loss", [2, 5])
    assert report["last_losses"][0]["step"] == 7 and math.isfinite(report["last_losses"][0]["d_loss"])
    assert report["norms"]["line"]["layers.0"]["gradients"] == "NaN"
    assert report["norms"]["line"]["offset"]["weights"] == pytest.approx(abs(before[0].item()))


def test_where_the_host_does_not_wait_the_device_skips_every_later_update(tmp_path, monkeypatch):
    """What a GPU does: the flag that the optimizers read stays up until the host looks."""
    line, optim, guard = setting(tmp_path)
    update = Update("g_loss", optim, guard)
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


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    line, optim, guard = setting(tmp_path)
    guard.begin(3, torch.tensor([1]))
    guard.before_saving()
    with torch.no_grad():
        line.layers[0].weight[0, 1] = math.inf
    with pytest.raises(InputError, match="stopped at step 3: the weights of line are not finite, and were not saved"):
        guard.before_saving()
    assert json.loads(guard.path.read_text())["norms"]["line"]["layers.0"]["weights"] == "Infinity"


@pytest.mark.usefixtures("multiplied_bfloat16")
def test_what_is_suggested_is_not_so_already(tmp_path):
    run = Run(tmp_path, "gan", tiny_training.GAN)
    assert run.remedy() == "try a lower lr, and begin anew: there is no checkpoint yet"
    run.save({"step": 1})
    newest = tmp_path / "checkpoints/gan.pt"
    low = Run(tmp_path / "low", "gan", dataclasses.replace(tiny_training.GAN, precision="bfloat16"))
    low.save({"step": 1})
    assert run.remedy("a", "b") == f"try a or b, and resume from {newest}"
    assert low.remedy() == f"try a lower lr or precision float32, and resume from {tmp_path / 'low/checkpoints/gan.pt'}"
    newest.rename(newest.with_name("gan_00000001.pt"))
    assert run.remedy().endswith("gan_00000001.pt")


E4E = dataclasses.replace(tiny_training.ENCODER, kind="e4e")
RESTYLE = dataclasses.replace(tiny_training.ENCODER, kind="restyle", n_iterations=2)
HYPERSTYLE = dataclasses.replace(tiny_training.ENCODER, kind="hyperstyle", n_iterations=2)
#: stage, config, the function of a loss that is spoiled, and in which call, the name of the loss
SPOILED = {
    "gan": ("gan", tiny_training.GAN, gan, "r1_penalty", 4, "r1"),
    "encoder": ("encoder", tiny_training.ENCODER, Reconstruction, "loss", 5, "loss"),
    "restyle": ("encoder", RESTYLE, Reconstruction, "loss", 9, "loss"),  # the first of two corrections
    "hyperstyle": ("encoder", HYPERSTYLE, Reconstruction, "loss", 5, "loss"),
    "tuned": ("encoder", tiny_training.TUNED, Reconstruction, "loss", 5, "loss"),
    "tuned d": ("encoder", tiny_training.TUNED, tuning, "logistic_d", 5, "d_loss"),
    "tuned r1": ("encoder", tiny_training.TUNED, tuning, "r1_penalty", 3, "r1"),
    "e4e d": ("encoder", E4E, latent_critic, "logistic_d", 5, "latent_d_loss"),
    "e4e r1": ("encoder", E4E, latent_critic, "r1_penalty", 2, "latent_r1"),
    "dictionary": ("dictionary", tiny_training.DICTIONARY, dictionary, "sparse_loss", 5, "loss"),
    "classifier": ("classifier", tiny_training.CLASSIFIER, classifier.F, "cross_entropy", 5, "loss"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_every_trainer_stops_before_the_update_and_goes_on_to_the_last_bit(tmp_path, monkeypatch, case):
    """Nothing is logged between; what was saved before the bad loss is whole."""
    stage, config, owner, function, number, loss = SPOILED[case]
    steps = {"total_kimg": 0.08} if stage == "gan" else {"total_steps": 20}
    config = dataclasses.replace(config, log_every=100, **steps)
    whole, real, calls = tiny_training.train(stage, tmp_path / "whole", config), getattr(owner, function), []

    def spoiled(*args, **named):
        calls.append(1)
        return real(*args, **named) * (math.nan if len(calls) == number else 1.0)

    monkeypatch.setattr(owner, function, spoiled)
    with pytest.raises(InputError, match=f"stopped at step .*: {loss} is nan, and no update was made with it"):
        tiny_training.train(stage, tmp_path / "run", config)
    monkeypatch.undo()
    assert json.loads((tmp_path / f"run/logs/{stage}_diagnosis.json").read_text())["loss"] == loss
    resumed = tiny_training.train(stage, tmp_path / "run", config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def finite(state):
    if isinstance(state, torch.Tensor):
        return bool(state.isfinite().all()) if state.is_floating_point() else True
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return all(finite(part) for part in parts)


@pytest.mark.parametrize("stage", ["gan", "encoder", "dictionary", "classifier"])
@pytest.mark.parametrize("lr", [1e25, 1e38])
def test_weights_that_run_away_are_not_saved(tmp_path, stage, lr):
    usual = {"gan": tiny_training.GAN, "encoder": tiny_training.ENCODER, "dictionary": tiny_training.DICTIONARY}
    usual |= {"classifier": tiny_training.CLASSIFIER}
    config = dataclasses.replace(usual[stage], lr=lr, log_every=100, save_every=1, keep=100)
    with pytest.raises(InputError, match="training stopped at step .*(no update was made|were not saved)"):
        tiny_training.train(stage, tmp_path, config)
    saved = [read_state(path) for path in (tmp_path / "checkpoints").iterdir()]
    weights = ("G", "D", "average", "E", "mlp", "directions", "network")
    assert all(finite({name: state[name] for name in weights if name in state}) for state in saved)
    assert (tmp_path / f"logs/{stage}_diagnosis.json").exists()


#: stage, config, what is changed, the weights that then stay, and some that still move
SLOWED = {
    "gan": ("gan", tiny_training.GAN, {"lr": 1e-12}, ("G", "D"), ()),
    "encoder": ("encoder", tiny_training.ENCODER, {"lr": 1e-12}, ("E",), ()),
    "tuned": ("encoder", tiny_training.TUNED, {"tune_lr": 1e-12}, ("G", "D"), ("E",)),
    "e4e": ("encoder", E4E, {"e4e": E4EConfig(discriminator_lr=1e-12)}, ("latent_D",), ("E",)),
    "schedule": ("encoder", dataclasses.replace(tiny_training.ENCODER, lr_end=1.0), {"lr_end": 0.0}, (), ("E",)),
    "dictionary": ("dictionary", tiny_training.DICTIONARY, {"lr": 1e-12}, ("mlp", "directions"), ()),
    "classifier": ("classifier", tiny_training.CLASSIFIER, {"lr": 1e-12}, ("network",), ()),
}


def learned(state, name):
    part = state[name] if isinstance(state[name], dict) else {name: state[name]}
    return {
        key: value
        for key, value in part.items()
        if value.is_floating_point() and not key.endswith(("latent_avg", "running_mean", "running_var"))
    }


@pytest.mark.parametrize("case", SLOWED)
def test_another_learning_rate_takes_effect_where_a_run_goes_on(tmp_path, case, capsys):
    stage, config, change, still, moving = SLOWED[case]
    length, half, full = ("total_kimg", 0.04, 0.08) if stage == "gan" else ("total_steps", 10, 20)
    tiny_training.train(stage, tmp_path, dataclasses.replace(config, **{length: half}))
    before = read_state(tmp_path / f"checkpoints/{stage}.pt")
    tiny_training.train(stage, tmp_path, dataclasses.replace(config, **{length: full}, **change))
    assert f"{next(iter(change))}" in next(line for line in capsys.readouterr().out.splitlines() if "other set" in line)
    after = read_state(tmp_path / f"checkpoints/{stage}.pt")
    assert after["step"] == 2 * before["step"]
    for names, moves in ((still, False), (moving, True)):
        for name in names:
            old, new = learned(before, name), learned(after, name)
            assert any(not torch.allclose(old[key], new[key], rtol=0, atol=1e-7) for key in old) == moves, name
    if case == "schedule":
        rates = [line["lr"] for line in read_log(tmp_path / "logs/encoder.jsonl") if "lr" in line]
        assert rates[9] == config.lr and rates[-1] < 0.02 * config.lr


@pytest.mark.usefixtures("multiplied_bfloat16")
@pytest.mark.parametrize("change", [{"r1_gamma": 100.0}, {"precision": "bfloat16"}])
def test_other_settings_that_a_run_may_go_on_with(tmp_path, change, capsys):
    """The same weights before, others after."""
    short = dataclasses.replace(tiny_training.GAN, total_kimg=0.04)
    plain = tiny_training.train("gan", tmp_path / "plain", dataclasses.replace(short, total_kimg=0.08))
    tiny_training.train("gan", tmp_path / "changed", short)
    changed = tiny_training.train("gan", tmp_path / "changed", dataclasses.replace(short, total_kimg=0.08, **change))
    assert f"({next(iter(change))} was " in capsys.readouterr().out
    logs = [read_log(tmp_path / name / "logs/gan.jsonl") for name in ("plain", "changed")]
    losses = [[line["d_loss"] for line in log] for log in logs]
    assert losses[0][:10] == losses[1][:10] and losses[0][11:] != losses[1][11:]
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


def test_an_optimizer_of_before_is_fused_again(tmp_path):
    line, optim, _ = setting(tmp_path)
    old = torch.optim.Adam(line.parameters(), lr=0.3)
    line(torch.ones(1, 2)).sum().backward()
    old.step()
    load_optimizer(optim, old.state_dict())
    (group,) = optim.param_groups
    assert group["fused"] and group["lr"] == 0.1 and optim.state[line.offset]["step"] == 1
    optim.step()
