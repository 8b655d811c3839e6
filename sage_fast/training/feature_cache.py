"""Features of images that a training compares with again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.models.perceptual import FeatureNetwork, normalised_features
from sage_fast.training.batches import to_pixels

__all__ = ["cached_features"]

_BLOCK = 64  # images at a time; always the same, so that a resumed run has the same bits


@torch.no_grad()
def cached_features(network: FeatureNetwork, images: Tensor, like: Tensor, budget_gb: float) -> list[Tensor] | None:
    """What ``normalised_features`` gives for every image, or None where that takes more than the budget.

    Args:
        images: uint8 [N, C, R, R].
        like: dtype and device of the pixels.
        budget_gb: memory for the result, in 10^9 bytes.
    Returns:
        A map [N, C_i, h_i, w_i] a layer, for ``perceptual_distance`` to compare with.
    """
    blocks = torch.arange(len(images)).split(_BLOCK)
    first = normalised_features(network, to_pixels(images, blocks[0], None, like))
    if sum(m.nbytes for m in first) / len(blocks[0]) * len(images) > budget_gb * 1e9:
        return None
    cached = [m.new_empty(len(images), *m.shape[1:]) for m in first]
    for block in blocks:
        for whole, part in zip(cached, normalised_features(network, to_pixels(images, block, None, like))):
            whole[block] = part
    return cached
