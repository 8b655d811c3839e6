"""Weights that a formula gives, so that two programs can be compared without a file of weights between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGE = 20_000_000  # only the first million numbers of a tensor this large are not zero


def filled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names and shapes with numbers that depend on the order of the names, the shape and the position alone."""
    shared = {name: "shared_weight_hypernet." + name.rsplit(".", 1)[1] for name in state if ".hypernet." in name}
    names = sorted(set(state) - set(shared))
    made = {name: _numbers(number, name, state[name]) for number, name in enumerate(names)}
    return {name: made[shared.get(name, name)] for name in state}


def _numbers(number: int, name: str, like: Tensor) -> Tensor:
    """Near-uniform numbers: a variance of one over the fan-in for kernels, around 1 for scales and variances."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    count = min(like.numel(), 1_000_000) if like.numel() > _LARGE else like.numel()
    x = (torch.arange(count) * 2654435761 + number * 2654435769) % 2**24
    values = torch.zeros(like.numel())
    values[:count] = x.float() / 2**24 - 0.5
    values = values.reshape(like.shape)
    if name.endswith("running_var"):
        return values + 1
    if like.ndim < 2:
        return values * 0.2 + (1.0 if name.endswith("weight") else 0.0)
    if name.split(".")[-2] == "linear":  # scaled at run time
        return values * math.sqrt(12)
    return values * math.sqrt(12 / math.prod(like.shape[1:]))
