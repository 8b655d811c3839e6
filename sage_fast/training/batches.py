"""Which images a rank looks at in a step, and these as floats."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.data.sampling import EpochSampler

__all__ = ["deal", "to_pixels"]


def deal(sampler: EpochSampler, share: Tensor, flip: bool, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """This rank's part of the next batch: image numbers [n], and which of them to mirror (bool [n]; None without ``flip``).

    Both are drawn for the whole batch, so ``sampler`` and ``rng`` stay equal on all ranks.

    Args:
        share: from :meth:`sage_fast.training.ranks.Ranks.share`.
    """
    index = sampler.next()
    flips = torch.rand(len(index), generator=rng) < 0.5 if flip else None
    return index[share], None if flips is None else flips[share]


def to_pixels(images: Tensor, index: Tensor, flips: Tensor | None, like: Tensor) -> Tensor:
    """uint8 ``images`` [M, C, R, R] at ``index`` [n] in [-1, 1], mirrored where ``flips`` [n]; dtype and device of ``like``.

    Rows are copied in the order of ``index`` (to sort it first costs more than it gains, from a mapped file too), mirrored and moved
    as bytes, and turned into floats in place. On the way to a GPU, from memory that it can copy by itself, nobody waits for what it
    has still to do.
    """
    x = torch.empty(len(index), *images.shape[1:], dtype=images.dtype, pin_memory=like.is_cuda)
    torch.index_select(images, 0, index, out=x)
    if flips is not None:
        x[flips] = x[flips].flip(3)
    return x.to(like.device, non_blocking=True).to(like.dtype).div_(127.5).sub_(1)
