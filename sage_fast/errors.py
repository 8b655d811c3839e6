"""The exception types that every room of the package may use, and counts and reasons as its sentences say them."""

from __future__ import annotations


class InputError(ValueError):
    """Something the caller gave (data, a setting, a file) cannot be used.

    The message is one sentence: the thing, what was expected, what came, and the remedy. The command line prints it
    and exits with code 2; from Python it is an ordinary ``ValueError``.
    """


class SageFastWarning(UserWarning):
    """A slower or narrower path is taken; the message names the reason and the remedy."""


class Stopped(KeyboardInterrupt):
    """A signal ended training after a step, whose checkpoint is saved; ``signal`` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def counted(n: int, noun: str) -> str:
    """``1 image``, ``3 images``, ``1,200 categories``."""
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {noun.removesuffix('y')}ies" if noun.endswith("y") else f"{n:,} {noun}s"


def reason_of(error: BaseException) -> str:
    """What went wrong, in a few words on one line without a full stop."""
    if isinstance(error, KeyError) and error.args:
        return f"no {error.args[0]!r}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200] or type(error).__name__
