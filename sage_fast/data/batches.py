"""A batch of stored images as a network takes it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["float_batch"]


def float_batch(
    images: Tensor, index: Tensor, mirrored: Tensor | None = None, device: str | torch.device = "cpu"
) -> Tensor:
    """The images at ``index``, float32 [B, C, R, R] in [-1, 1] on ``device``: ``x / 127.5 - 1``.

    Rows are copied in the order of ``index`` (sorting it first gains less than it costs, from a mapped file too), mirrored
    and moved as bytes, and turned into floats in place.

    Args:
        images: uint8 [M, C, R, R] on the CPU, in memory or mapped from a file.
        index: int64 [B].
        mirrored: bool [B] on the CPU, which of them to mirror left to right.
    """
    batch = images.index_select(0, index)
    if mirrored is not None:
        batch[mirrored] = batch[mirrored].flip(3)
    return batch.to(device).to(torch.float32).div_(127.5).sub_(1.0)
