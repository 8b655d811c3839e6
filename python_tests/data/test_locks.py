"""Locks of files: of processes, and on file systems that have none."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from sage_fast.data import locks
from sage_fast.data.locks import opened, taken
from sage_fast.errors import InputError

fcntl = pytest.importorskip("fcntl")

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


def test_a_lock_ends_with_its_process(tmp_path):
    file = tmp_path / "lock"
    words = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        with opened(file) as descriptor:
            assert not taken(descriptor, fcntl.LOCK_EX) and not taken(descriptor, fcntl.LOCK_SH)
        other.kill()
    with opened(file) as descriptor:
        assert taken(descriptor, fcntl.LOCK_EX)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_holds_nobody_up(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, "of this file system")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with opened(tmp_path / "lock") as descriptor:
        assert taken(descriptor, fcntl.LOCK_EX)
    number = errno.EIO
    with opened(tmp_path / "lock") as descriptor, pytest.raises(OSError):
        taken(descriptor, fcntl.LOCK_EX)


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="Lock '.*none/lock' cannot be made"), opened(tmp_path / "none" / "lock"):
        pass
