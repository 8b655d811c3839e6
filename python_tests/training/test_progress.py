"""What a stage shows: speed, memory, the last of everything logged, on a terminal and off one."""

from __future__ import annotations

import gc
import io
import re

import pytest
import torch
from rich.console import Console

from sage_fast.training import progress
from sage_fast.training.progress import StageProgress, memory, progress_line


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def clock(monkeypatch, *seconds):
    left = list(seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: left.pop(0) if len(left) > 1 else left[0])


def test_it_yields_the_steps_that_are_left():
    for terminal in (True, False):
        assert list(StageProgress("gan", 3, 7, console=console(terminal))) == [3, 4, 5, 6]


def test_speed_is_seconds_for_a_thousand_images_since_the_last_time(monkeypatch):
    clock(monkeypatch, 100.0, 110.0, 110.0, 140.0, 140.0, 150.0)
    stage = StageProgress("gan", 20, 100, console=console(False))
    stage.show(70, {"kimg": 70 * 0.016})  # at 110 s
    assert stage.values["s_per_kimg"] == pytest.approx(10 / 50 / 16 * 1000)
    stage.show(80, {"kimg": 80 * 0.016})  # at 140 s
    assert stage.values["s_per_kimg"] == pytest.approx(30 / 10 / 16 * 1000)
    stage.show(80, {"fd_oracle": 5.0})  # no step since
    assert stage.values["s_per_kimg"] == pytest.approx(30 / 10 / 16 * 1000)


def test_without_images_speed_is_counted_in_steps(monkeypatch):
    clock(monkeypatch, 0.0, 5.0)
    stage = StageProgress("encoder", 0, 100, console=console(False))
    stage.show(10, {"loss": 1.0})
    assert stage.values["s_per_step"] == pytest.approx(0.5)


def test_memory_is_what_the_process_holds():
    gc.collect()  # what other tests left is not to go meanwhile
    before = memory()
    if "rss_gb" not in before:
        pytest.skip("this system has no /proc")
    held = torch.ones(75_000_000)  # 0.3 GB
    assert 0.2 < memory()["rss_gb"] - before["rss_gb"] < 0.4
    assert before["rss_gb"] > 0.05 and "cuda_peak_gb" not in before and len(held)


def test_a_line_has_speed_and_memory_first_and_four_digits():
    values = {"step": 9, "kimg": 84.8, "g_loss": 1.234567, "fd_oracle": 12.3456, "rss_gb": 1.234, "s_per_kimg": 6.2501}
    line = progress_line(values | {"time": 1.7e9, "seconds": 4.7, "cuda_peak_gb": 3.5})
    assert line == "6.25 s/kimg  1.23 GB  3.50 GB on the GPU  kimg 84.8  g_loss 1.235  fd_oracle 12.35"


def test_off_a_terminal_a_line_comes_now_and_then_and_at_the_end(monkeypatch):
    clock(monkeypatch, 0.0, 100.0, 100.0, 130.0, 130.0, 170.0, 170.0, 171.0)
    monkeypatch.setattr(progress, "memory", lambda device: {"rss_gb": 1.5})
    to = console(False)
    stage = StageProgress("gan", 0, 40, console=to)
    for step in (10, 20, 30, 40):  # at 100, 130, 170 and 171 s
        stage.show(step, {"kimg": step / 40, "g_loss": step / 10})
    assert to.file.getvalue().splitlines() == [
        "gan 10/40  ETA 0:05:00  400 s/kimg  1.50 GB  kimg 0.25  g_loss 1",
        "gan 30/40  ETA 0:00:40  160 s/kimg  1.50 GB  kimg 0.75  g_loss 3",
        "gan 40/40  ETA 0:00:00  4 s/kimg  1.50 GB  kimg 1  g_loss 4",
    ]


def test_the_last_value_of_each_name_stays_in_sight(monkeypatch):
    to = console(False)
    stage = StageProgress("gan", 0, 2, console=to)
    stage.show(1, {"g_loss": 1.0, "fd_oracle": 7.0})
    stage.show(2, {"g_loss": 2.0})
    assert "g_loss 2  fd_oracle 7" in to.file.getvalue().splitlines()[-1]


def test_a_terminal_of_any_width_gets_a_whole_bar_with_the_words_below():
    values = {"g_loss": 1.5, "ada_p": 0.25, "precision_squeezenet1_1": 0.5, "recall_squeezenet1_1": 0.5}
    for width in (80, 200):
        to = Console(file=io.StringIO(), force_terminal=True, width=width)
        stage = StageProgress("gan", 0, 3, console=to)
        for step in stage:
            stage.show(step + 1, values)
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", to.file.getvalue()).rpartition(" gan ")[2]
        bar, *words = shown.splitlines()
        assert re.search("━{40} 3/3 0:00:0[0-9] 0:00:00", bar), bar
        assert " ".join(" ".join(words).split()).endswith(
            "g_loss 1.5 ada_p 0.25 precision_squeezenet1_1 0.5 recall_squeezenet1_1 0.5"
        )


def test_quiet_is_quiet():
    for terminal in (True, False):
        to = console(terminal)
        stage = StageProgress("gan", 0, 3, quiet=True, console=to)
        for step in stage:
            stage.show(step + 1, {"g_loss": 1.5})
        assert to.file.getvalue() == ""
