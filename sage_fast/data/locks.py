"""Locks of the kernel on files: they end with their process, whatever the clock says."""

from __future__ import annotations

import errno
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

__all__ = ["cannot_make", "fcntl", "opened", "taken", "wait_for"]

#: what file systems without such locks answer (some of a cluster's are mounted so): there two processes are not told apart
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


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
    """Whether the lock could be had as ``how`` says (``fcntl.LOCK_EX`` or ``LOCK_SH``), without waiting."""
    try:
        wait_for(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for(descriptor: int, how: int) -> None:
    """Take the lock, or change it, as ``how`` says; where the file system has none, that is nothing."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def cannot_make(file: Path, error: OSError) -> InputError:
    """The sentence for a lock that the system refuses."""
    return InputError(f"Lock {str(file)!r} cannot be made ({error.strerror}); {write_remedy(error, True)}.")
