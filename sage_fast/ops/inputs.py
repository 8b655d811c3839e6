"""What ops and networks ask of their arguments, in one wording. Attributes are compared; a tensor's numbers are never read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sage_fast.errors import InputError

__all__ = ["FLOATS", "number", "require_floats", "require_real", "require_same_device", "require_tensor", "seen"]

#: floating point of 16 bits and more: what is narrower, plain PyTorch cannot add either
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_floats(name: str, x: Any, n_axes: int, axes: str) -> None:
    """Raise InputError unless ``x`` is a tensor of one of ``FLOATS`` with ``n_axes`` axes, which ``axes`` names."""
    if isinstance(x, Tensor) and x.ndim == n_axes and x.dtype in FLOATS:
        return
    narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in FLOATS
    remedy = "; convert it to 16 bits or more" if narrow else ""
    raise InputError(f"{name} must be floating point {axes}, got {seen(x)}{remedy}.")


def require_tensor(name: str, x: Any) -> None:
    """Raise InputError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {seen(x)}.")


def require_real(name: str, x: Any) -> None:
    """Raise InputError unless ``x`` is a tensor of integers or of one of ``FLOATS``."""
    if isinstance(x, Tensor) and x.dtype in FLOATS:
        return
    require_tensor(name, x)
    if x.is_complex() or x.is_floating_point():
        raise InputError(f"{name} must be real, and of 16 bits or more where it is floating point, got {x.dtype}.")


def require_same_device(name: str, x: Tensor, like: Tensor, whose: str) -> None:
    """Raise InputError unless ``x`` is where ``like``, which is ``whose``, is."""
    if x.device != like.device:
        raise InputError(
            f"{name} must be on {like.device}, as {whose} is, got {x.device}; move it with .to('{like.device}')."
        )


def number(name: str, value: Any) -> float:
    """``value`` as a float; what is not one number is refused by name."""
    if type(value) is float:
        return value
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise InputError(f"{name} must be a number, got {value!r:.60}.")


def seen(x: Any) -> str:
    """What came, for a message: dtype and shape of a tensor, the type of anything else."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)}"
    return "None" if x is None else f"a {type(x).__module__}.{type(x).__qualname__}".replace("a builtins.", "a ")
