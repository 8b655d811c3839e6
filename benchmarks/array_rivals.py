"""The array library of a device: NumPy with SciPy on a CPU, CuPy with its part of SciPy on a GPU."""

from __future__ import annotations

import functools
import importlib
import types
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Arrays:
    """``xp``: NumPy or CuPy; ``ndimage``: the module of SciPy or ``cupyx.scipy`` of that name, None where it is not installed."""

    name: str
    xp: types.ModuleType
    ndimage: types.ModuleType | None

    def of(self, x: torch.Tensor):
        """The tensor as an array, on the same memory."""
        return self.xp.from_dlpack(x)


@functools.cache
def array_library(device: torch.device) -> Arrays | None:
    """None where CuPy is not installed."""
    name, scipy = ("CuPy", "cupyx.scipy") if device.type == "cuda" else ("NumPy", "scipy")
    xp = imported(name.lower())
    return xp and Arrays(name, xp, imported(f"{scipy}.ndimage"))


def imported(name: str) -> types.ModuleType | None:
    """The module, or None where it cannot be imported: its rows are left out."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
