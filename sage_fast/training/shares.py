"""Who takes which samples of a batch: ranks, and micro-batches within a rank."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError

__all__ = ["group_size", "path_share", "share_out"]


def share_out(batch: int, most: int, rank: int = 0, n_ranks: int = 1, accumulate: int = 1) -> list[Tensor]:
    """The samples of a batch that ``rank`` takes: ``accumulate`` micro-batches of indices.

    The discriminator compares samples n, n + M, n + 2M, ... of a batch in its M groups (minibatch standard deviation),
    so a micro-batch takes whole groups, in an order in which it groups them again the same way.

    Args:
        most: ``mbstd_group`` of the discriminator.
    Raises:
        InputError: the groups cannot be shared out evenly.
    """
    size = group_size(batch, most)
    n_groups, parts = batch // size, n_ranks * accumulate
    if n_groups % parts or (parts > 1 and size == 1):
        unit = parts * max(2, size)
        raise InputError(
            f"batch must be a multiple of {unit} ({n_ranks} ranks x {accumulate} micro-batches x groups of "
            f"{max(2, size)} for the minibatch standard deviation), got {batch}; change batch, accumulate or mbstd_group."
        )
    rows = torch.arange(batch).view(size, n_ranks, accumulate, -1)
    return [rows[:, rank, part].flatten() for part in range(accumulate)]


def path_share(share: Tensor, batch: int, most: int) -> Tensor:
    """The part of a micro-batch that the path-length penalty is taken over: half of each group (one of one)."""
    size = group_size(batch, most)
    return share[: len(share) * max(1, size // 2) // size]


def group_size(batch: int, most: int) -> int:
    """Images that share a minibatch standard deviation: the largest divisor of ``batch`` up to ``most``."""
    return next(size for size in range(min(most, batch), 0, -1) if batch % size == 0)
