"""Checks that the dataclasses of settings share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

from sage_fast.errors import InputError

__all__ = ["check_at_least_one", "check_ignored", "check_not_negative", "check_numbers", "check_positive"]


def check_numbers(config: Any) -> None:
    """Raise InputError for a field of a dataclass that is NaN, infinite or a whole number of more than 64 bits."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{field.name} must be a finite number, got {value}.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{field.name} must be a whole number of at most 64 bits, got {value}.")


def check_positive(config: Any, *names: str) -> None:
    """Raise InputError for a field among ``names`` that is not above 0; None is no number and passes."""
    _check(config, names, lambda value: value > 0, "must be positive")


def check_not_negative(config: Any, *names: str) -> None:
    """Raise InputError for a field among ``names`` that is below 0; None passes."""
    _check(config, names, lambda value: value >= 0, "must not be negative")


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise InputError for a field among ``names`` that is below 1; None passes."""
    _check(config, names, lambda value: value >= 1, "must be at least 1")


def _check(config: Any, names: Iterable[str], fits: Callable[[Any], bool], wanted: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise InputError(f"{name} {wanted}, got {value}.")


def check_ignored(config: Any, names: Iterable[str], without: str) -> None:
    """Raise InputError for a field among ``names`` that has not its default, and has no effect ``without`` something."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            value = str(value) if isinstance(value, PurePath) else value
            raise InputError(
                f"{field.name} = {value!r} has no effect without {without}; give that too, or leave {field.name} out."
            )
