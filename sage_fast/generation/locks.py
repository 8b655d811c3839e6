"""Who may write into an output.

All ranks of one run share the output's lock, in whose file the number of ranks is written, and each holds one of its own.
As the shards of a rank are a function of its number and of that of all ranks, two processes that hold locks never write
the same shard.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sage_fast.data.locks import cannot_make, fcntl, opened, taken, wait_for
from sage_fast.errors import InputError

__all__ = ["alone", "joined"]

_TRIES = 8


@contextmanager
def joined(
    output: str, file: Path, folder: Path, rank: int, world_size: int, when_alone: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the locks of one rank on an output while the block runs.

    Args:
        output: its name, for a message.
        file: the output's lock; stays.
        folder: where the ranks' own locks lie.
        when_alone: called first, while no other process holds any.
    Raises:
        InputError: another run is at work on the output, or this rank of it.
    """
    if fcntl is None:
        if when_alone is not None:
            when_alone()
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    with opened(file) as shared:
        _enter(shared, output, world_size, when_alone)
        own = _take_own(folder, f"rank-{rank}.lock", output)
        try:
            yield
        finally:
            os.close(own)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """One process after another runs the block."""
    with opened(file) as descriptor:
        if fcntl is not None:
            wait_for(descriptor, fcntl.LOCK_EX)
        yield


def _enter(shared: int, output: str, world_size: int, when_alone: Callable[[], None] | None) -> None:
    """Take a share of the output's lock; the first who comes says how many ranks there are."""
    own = str(world_size).encode()
    for _ in range(_TRIES):  # whoever came first may die before it has said so
        if taken(shared, fcntl.LOCK_EX):
            if when_alone is not None:
                when_alone()
            os.ftruncate(shared, 0)
            os.pwrite(shared, own, 0)
        elif when_alone is not None:
            break
        wait_for(shared, fcntl.LOCK_SH)
        if os.pread(shared, 32, 0) == own:
            return
        wait_for(shared, fcntl.LOCK_UN)
        time.sleep(random.uniform(0.01, 0.05))
    raise _at_work(output)


def _take_own(folder: Path, name: str, output: str) -> int:
    """A descriptor that holds a rank's lock; another rank may delete the folder at its end, so look whether it is there."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError as error:
            if folder.parent.is_dir():
                continue
            raise cannot_make(folder / name, error) from error
        except FileExistsError as error:  # also when the folder was there and then, as mkdir looked, no more
            if folder.is_dir() or not os.path.lexists(folder):
                continue
            raise cannot_make(folder / name, error) from error
        except OSError as error:
            raise cannot_make(folder / name, error) from error
        if not taken(descriptor, fcntl.LOCK_EX):
            os.close(descriptor)
            raise _at_work(output)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _at_work(output: str) -> InputError:
    return InputError(f"Output {output!r} is being written by another run; wait for its end or give another folder.")
