"""Locks of the kernel on files: they end with their process, whatever the clock says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sage_fast.data.writers import write_remedy
from sage_fast.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two processes are not told apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["cannot_make", "fcntl", "opened", "taken"]


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """A descriptor of a lock's file, which is made where there is none; to close it gives the lock back.

    Raises:
        InputError: the file cannot be made.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_make(file, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def taken(descriptor: int, how: int) -> bool:
    """Whether the lock could be had as ``how`` says (of ``fcntl``, without waiting)."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True


def cannot_make(file: Path, error: OSError) -> InputError:
    """The sentence for a lock that the system refuses."""
    return InputError(f"Lock {str(file)!r} cannot be made ({error.strerror}); {write_remedy(error, True)}.")
