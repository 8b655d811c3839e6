"""A rank that dies, stands still, stops for a reason, or only works for long: what the others do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_programs
from rank_processes import finish, free_port, start_ranks
from torch import distributed as dist

from sage_fast.training import heartbeat

ADDRESS = {"MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_named(tmp_path, victim):
    children = start_ranks(rank_programs.one_is_lost, 2, tmp_path, victim, signal.SIGKILL)
    assert children[victim].wait() == -signal.SIGKILL
    since = time.monotonic()
    assert children[1 - victim].wait() == 2
    assert time.monotonic() - since < 30
    said = children[1 - victim].text()
    assert f"rank {victim}" in said and "no longer answers" in said and "--resume" in said


def test_a_silent_rank_is_named(tmp_path):
    """In processes of their own, so that the interpreter's end is seen too: torch waits there for what is under way."""
    program = f"import rank_programs; rank_programs.one_is_lost(1, {int(signal.SIGSTOP)})"
    path = os.pathsep.join([str(Path(rank_programs.__file__).parent), *sys.path])
    env = os.environ | ADDRESS | {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        assert "InputError: rank 1 of 2 no longer answers" in ranks[0].communicate(timeout=60)[1]
    finally:
        ranks[1].kill()
        ranks[1].communicate()


def test_ranks_that_stood_still_together_go_on(tmp_path):
    """As after Ctrl-Z and fg, a suspended job or a machine that was halted."""
    children = start_ranks(rank_programs.all_stand_still, 2, tmp_path / "words", tmp_path)
    deadline = time.monotonic() + 60
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        assert time.monotonic() < deadline, children[0].text()
        time.sleep(0.1)
    time.sleep(2)  # each has looked at the other
    for child in children:
        os.kill(child.process.pid, signal.SIGSTOP)
    time.sleep(10)
    for child, seconds in zip(children, (3, 12)):  # rank 0 looks first; then longer than the grace of ten seconds
        os.kill(child.process.pid, signal.SIGCONT)
        time.sleep(seconds)
    (tmp_path / "end").touch()
    finish(children)


def test_only_the_time_that_one_was_awake_counts_as_silence_of_others(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    watching = heartbeat.Heartbeat(dist.HashStore(), 0, 2, lost_seconds=30)
    watching._store.set("beat/1", "7")

    def look(now):
        clock[0] = now
        watching._round()
        return watching.verdict

    assert all(look(float(now)) is None for now in range(1, 20))
    assert look(500.0) is None and look(501.0) is None
    assert all(look(501.0 + now) is None for now in range(1, 5))
    assert "rank 1 of 2 no longer answers" in next(filter(None, map(look, range(506, 530))))


def test_a_main_thread_that_hangs_is_ended(tmp_path):
    children = start_ranks(rank_programs.one_is_lost_and_a_call_hangs, 2, tmp_path)
    try:
        assert children[0].wait() == 1
        assert "rank 1 of 2 no longer answers" in children[0].text()
    finally:
        children[1].process.kill()


def test_the_reason_of_one_rank_is_told_by_all(tmp_path):
    children = start_ranks(rank_programs.one_refuses, 3, tmp_path)
    assert [child.wait() for child in children] == [2, 2, 2]
    assert all("'x' cannot be written" in child.text() for child in children)
    assert "rank 0 of 3 stopped (File 'x'" in children[1].text()


def test_long_work_of_one_rank_is_no_death(tmp_path):
    finish(start_ranks(rank_programs.slow_first_rank, 2, tmp_path))
