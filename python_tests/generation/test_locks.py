"""Who may write into an output; a dead process holds nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from sage_fast.errors import InputError
from sage_fast.generation.locks import alone, joined

HOLD = """
import sys, time
from pathlib import Path
from sage_fast.generation.locks import joined
folder = Path(sys.argv[1])
with joined("out", folder / "lock", folder / "own", int(sys.argv[2]), int(sys.argv[3])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder, rank, world_size):
    """A process that has entered as a rank."""
    words = [sys.executable, "-c", HOLD, str(folder), str(rank), str(world_size)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def enter(folder, rank=0, world_size=1, when_alone=None):
    return joined("out", folder / "lock", folder / "own", rank, world_size, when_alone)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    first = hold(tmp_path, 0, 1)
    try:
        for rank, world_size in ((0, 1), (0, 2), (1, 2)):
            with pytest.raises(InputError, match="is being written by another run"), enter(tmp_path, rank, world_size):
                pass
        with (
            pytest.raises(InputError, match="another run"),
            enter(tmp_path, when_alone=lambda: pytest.fail("not alone")),
        ):
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    with enter(tmp_path, 1, 2):
        pass


def test_ranks_of_one_run_enter_together_and_each_once(tmp_path):
    with ExitStack() as stack:
        for rank in (2, 0, 1):
            stack.enter_context(enter(tmp_path, rank, 3))
        with pytest.raises(InputError, match="another run"), enter(tmp_path, 1, 3):
            pass
        with pytest.raises(InputError, match="another run"), enter(tmp_path, 1, 2):
            pass
    with enter(tmp_path, 0, 1):
        pass


def test_who_dies_before_it_says_how_many_ranks_there_are_holds_nobody_up(tmp_path):
    first = hold(tmp_path, 0, 3)
    (tmp_path / "lock").write_bytes(b"")  # as if it had been killed while it wrote
    os.kill(first.pid, signal.SIGKILL)
    shared = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(shared, fcntl.LOCK_SH)  # another rank of the next run, at the same point
    threading.Timer(0.06, os.close, (shared,)).start()
    with enter(tmp_path, 1, 2):
        pass
    first.wait()


def test_when_alone_is_called_before_anybody_else_can_enter(tmp_path):
    called = []
    with enter(tmp_path, when_alone=lambda: called.append((tmp_path / "own").exists())):
        assert called == [False]


def test_a_ranks_lock_survives_that_its_folder_is_deleted(tmp_path):
    with enter(tmp_path, 0, 2):
        (tmp_path / "own" / "rank-0.lock").unlink()
        (tmp_path / "own").rmdir()
        with enter(tmp_path, 1, 2):
            assert (tmp_path / "own" / "rank-1.lock").exists()


def test_a_ranks_lock_survives_that_its_folder_is_deleted_as_it_is_made(tmp_path, monkeypatch):
    """``mkdir`` finds the folder, and then, as it asks whether that is one, no more."""
    make, failures = Path.mkdir, ["File exists"]

    def mkdir(folder, *args, **settings):
        if folder.name == "own" and failures:
            raise FileExistsError(17, failures.pop(), str(folder))
        make(folder, *args, **settings)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with enter(tmp_path, 0, 2):
        assert (tmp_path / "own" / "rank-0.lock").exists() and not failures


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "own").write_text("")
    with pytest.raises(InputError, match="rank-0.lock' cannot be made .*File exists"), enter(tmp_path, 0, 2):
        pass


def test_one_after_another(tmp_path):
    with alone(tmp_path / "lock"):
        pass
    with pytest.raises(InputError, match="cannot be made"), alone(tmp_path / "none" / "lock"):
        pass
