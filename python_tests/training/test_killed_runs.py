"""Runs that SIGKILL ends at any moment, also while they write, and that go on to the bits of one that nothing ended."""

from __future__ import annotations

import random
import signal
import time

import pytest
import tiny_training
import torch
from rank_processes import start

from sage_fast.training.logs import read_log

STAGES = ("gan", "encoder", "dictionary")
N_KILLS = 8  # of each stage, by the clock and by steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Stage -> folder and seconds of a run that nothing ended."""
    start(
        tiny_training.networks, log=tmp_path_factory.mktemp("warm") / "log.txt"
    ).wait()  # imports are done from here on
    runs = {}
    for name in STAGES:
        folder, since = tmp_path_factory.mktemp(name), time.monotonic()
        _finish(name, folder)
        runs[name] = folder, time.monotonic() - since
    return runs


def _finish(name, folder):
    child = start(tiny_training.train_to_file, name, folder, log=folder / "log.txt")
    assert child.wait() == 0, child.text()


def _check_same(folder, other, name):
    weights, expected = (torch.load(f / "weights.pt") for f in (folder, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    clocks = ("seconds", "time")
    logs = [
        [{k: v for k, v in line.items() if k not in clocks} for line in read_log(f / f"logs/{name}.jsonl")]
        for f in (folder, other)
    ]
    assert logs[0] == logs[1]
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", STAGES)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not(whole, tmp_path, name):
    expected, seconds = whole[name]
    rng, kills, number = random.Random(name), 0, 0
    while kills < N_KILLS:
        folder = tmp_path / str(number)
        folder.mkdir()
        number += 1
        while kills < N_KILLS:
            child = start(tiny_training.train_to_file, name, folder, log=folder / "log.txt")
            child.process.join(rng.uniform(0.2, 0.7) * seconds)
            child.process.kill()
            code = child.wait()
            if code == 0:  # it was done before
                break
            assert code == -signal.SIGKILL, child.text()
            kills += 1
        _finish(name, folder)
        _check_same(folder, expected, name)


@pytest.mark.parametrize("name", STAGES)
def test_a_run_killed_after_drawn_steps_ends_as_if_it_had_not(whole, tmp_path, name):
    expected, rng = whole[name][0], random.Random(name)
    last = max(line["step"] for line in read_log(expected / f"logs/{name}.jsonl"))
    for step in sorted(rng.sample(range(1, last - 8), N_KILLS)):  # a step takes more than 1 ms
        child = start(
            tiny_training.die_after_step, name, tmp_path, step, rng.uniform(0, 0.005), log=tmp_path / "log.txt"
        )
        assert child.wait() == -signal.SIGKILL, child.text()
        reached = max(line["step"] for line in read_log(tmp_path / f"logs/{name}.jsonl"))
        assert reached >= step, f"killed at step {reached}, before {step}"
    _finish(name, tmp_path)
    _check_same(tmp_path, expected, name)


@pytest.mark.parametrize(
    ("call", "number"),
    [("write", 4), ("write", 6), ("fsync", 3), ("replace", 2), ("replace", 4), ("link", 0), ("unlink", 8)],
)
def test_a_kill_while_a_file_is_written(whole, tmp_path, call, number):
    child = start(tiny_training.die_while_saving, "dictionary", tmp_path, call, number, log=tmp_path / "log.txt")
    assert child.wait() == -signal.SIGKILL, child.text()
    _finish("dictionary", tmp_path)
    _check_same(tmp_path, whole["dictionary"][0], "dictionary")
