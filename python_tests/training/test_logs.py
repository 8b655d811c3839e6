"""Logs: each step once, whatever was cut; TensorBoard's events when asked for."""

from __future__ import annotations

import json
import sys

import pytest

from sage_fast.data.writers import prepare_output
from sage_fast.errors import InputError
from sage_fast.training.logs import TrainingLog, read_log


def _steps(log):
    return [line["step"] for line in read_log(log.path)]


def test_lines_have_six_digits_and_times(tmp_path):
    log = TrainingLog(tmp_path, "gan")
    assert log.write(3, {"loss": 0.123456789}) == {"loss": 0.123457}
    (line,) = (json.loads(text) for text in log.path.read_text().splitlines())
    assert set(line) == {"step", "loss", "seconds", "time"} and line["loss"] == 0.123457 and line["step"] == 3


def test_lines_after_the_checkpoint_are_cut(tmp_path):
    log = TrainingLog(tmp_path, "gan")
    for step in range(1, 7):
        log.write(step, {"loss": step / 2})
    with open(log.path, "a") as file:
        file.write('{"step": 7, "lo')  # killed here
    assert _steps(log) == [1, 2, 3, 4, 5, 6]
    before = log.path.read_text().splitlines()[:4]
    log = TrainingLog(tmp_path, "gan")
    log.cut(4)
    assert log.path.read_text().splitlines() == before
    log.write(5, {"loss": 0.0})
    assert _steps(log) == [1, 2, 3, 4, 5]
    log.cut(0)
    assert log.path.read_text() == ""


def test_nothing_to_cut(tmp_path):
    log = TrainingLog(tmp_path, "gan")
    log.cut(0)
    assert not log.path.exists()
    log.write(1, {"loss": 1.0})
    modified = log.path.stat().st_mtime_ns
    log.cut(1)
    assert log.path.stat().st_mtime_ns == modified


def test_a_line_cut_by_a_full_disk_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2}\n{"step": 2, "a\n[3]\n\xff\n{"step": "4"}\n{"step": 5}\n')
    assert [line["step"] for line in read_log(path)] == [1, 5]


def test_tensorboard_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'sage_fast\[logs\]'"):
        TrainingLog(tmp_path, "gan", tensorboard=True)


def test_events_beside_the_log(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra 'logs' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = prepare_output(tmp_path / "run")
    for first in (1, 4):  # stopped after step 4, whose checkpoint was of step 3, and resumed
        log = TrainingLog(folder, "gan", tensorboard=True)
        log.cut(first - 1)
        for step in range(first, 5):
            log.write(step, {"loss": step * first})
        log.flush()
    events = EventAccumulator(str(folder / "gan"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 16)]
    prepare_output(folder, overwrite=True)  # these files are ours
    assert not (folder / "gan").exists()
