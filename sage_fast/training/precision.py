"""In which arithmetic a training step is computed."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["PRECISIONS", "autocast", "multiplies_bfloat16", "substitution"]

#: arithmetic of the convolutions and products in a training step; weights, optimizers and averages are always float32
PRECISIONS = ("float32", "bfloat16")

_CPU = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86 and ARM, in PyTorch's words


def autocast(precision: str, device: str | torch.device, keep_copies: bool = True) -> torch.autocast:
    """``torch.autocast`` for a training step: off for ``"float32"``; ``"bfloat16"`` halves the time of the convolutions.

    It is off too where a device does not multiply bfloat16 (:func:`multiplies_bfloat16`): there PyTorch computes in float32 inside
    and rounds, which takes one and a half to two times as long as float32.

    Args:
        keep_copies: of weights in 16 bits, for further calls inside.
    """
    kind = torch.device(device).type
    low = precision == "bfloat16" and multiplies_bfloat16(kind)
    return torch.autocast(kind, torch.bfloat16, enabled=low, cache_enabled=keep_copies)


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether a kind of device has instructions for products of bfloat16: GPUs since Ampere, processors with AVX-512 BF16 or AMX,
    ARM with BF16.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in _CPU)
    return True


def substitution(precision: str, device: str | torch.device) -> str | None:
    """A sentence where another precision than ``precision`` is computed in; None where it is that one."""
    device = torch.device(device)
    if precision != "bfloat16" or multiplies_bfloat16(device.type):
        return None
    kind = "this processor" if device.type == "cpu" else "this GPU"
    return f"{kind} does not multiply bfloat16, so what is set to it is computed in float32, which is faster here"
