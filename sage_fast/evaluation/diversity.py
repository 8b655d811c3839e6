"""How much the images of one category differ among themselves: mean distance over all pairs of the category.

A number *of a feature network*, like the distances of ``fid``: name the network beside it. Diversity alone is no merit:
images that leave their category are diverse. Read it together with category retention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.perceptual import FeatureNetwork, normalised_features

__all__ = ["category_diversity", "category_perceptual_diversity", "pairwise_diversity", "perceptual_diversity"]

_BLOCK = 1024  # rows of a distance matrix held at a time


def pairwise_diversity(features: Tensor, labels: Tensor) -> float:
    """Mean over categories of the mean Euclidean distance between two different images of the category.

    Args:
        features: [N, F].
        labels: int64 [N], any category numbers; categories of one image have no pair and do not count.

    Returns:
        At least 0, in units of the features.

    Raises:
        InputError: shapes that do not fit, or no category with two images.
    """
    return _mean_of_known(category_diversity(features, labels))


def category_diversity(features: Tensor, labels: Tensor) -> Tensor:
    """Mean pairwise Euclidean distance of each category: float64 [S] in rising order of labels (nan: one image)."""
    _check(features, labels, 2)
    return torch.stack([_mean_pairwise_distance(features[labels == label]) for label in labels.unique()])


def perceptual_diversity(images: Tensor, labels: Tensor, network: FeatureNetwork, batch: int = 64) -> float:
    """Mean over categories of the mean perceptual distance over all pairs of images of the category.

    The intra-category LPIPS of the papers when ``network`` is one of LPIPS's, and its like on the network's own scale
    otherwise; see :func:`category_perceptual_diversity`.

    Args:
        images: [N, C, H, W] in [-1, 1].
        labels: int64 [N]; categories of one image have no pair and do not count.
        network: feature network of ``models.perceptual``; name it beside the number (``network.name``).
        batch: images in the network at a time.

    Raises:
        InputError: shapes that do not fit, or no category with two images.
    """
    return _mean_of_known(category_perceptual_diversity(images, labels, network, batch))


@torch.no_grad()
def category_perceptual_diversity(images: Tensor, labels: Tensor, network: FeatureNetwork, batch: int = 64) -> Tensor:
    """Mean ``perceptual_distance`` over all pairs of each category: float64 [S] in rising order of labels.

    Exact over every pair, yet in one pass: the distance is a (weighted) squared Euclidean one of normalised feature
    maps f, for which the sum over pairs of |f_i - f_j|^2 is n sum |f_i|^2 - |sum f_i|^2. Memory: one batch's maps and
    one image's maps per sum; never a matrix of pairs.
    """
    _check(images, labels, 4)
    members = [labels == label for label in labels.unique()]
    return torch.stack([_mean_perceptual_distance(images, chosen, network, batch) for chosen in members])


def _mean_pairwise_distance(x: Tensor) -> Tensor:
    n = len(x)
    x = x.detach().to(torch.float64)
    if n < 2:
        return x.new_tensor(float("nan"))
    exact = "donot_use_mm_for_euclid_dist"  # by differences: equal images are at distance zero, exactly
    sums = [torch.cdist(rows, x, compute_mode=exact).sum() for rows in x.split(_BLOCK)]
    return torch.stack(sums).sum() / (n * (n - 1))


def _mean_perceptual_distance(images: Tensor, members: Tensor, network: FeatureNetwork, batch: int) -> Tensor:
    index = members.nonzero().flatten()
    n = len(index)
    if n < 2:
        return torch.tensor(float("nan"), dtype=torch.float64, device=images.device)
    sums: list[Tensor] = []
    squares = torch.zeros((), dtype=torch.float64, device=images.device)
    for rows in index.split(batch):
        maps = [f.to(torch.float64) for f in _weighted_maps(network, images[rows])]
        squares += sum(f.square().sum() for f in maps)
        sums = [f.sum(0) for f in maps] if not sums else [s + f.sum(0) for s, f in zip(sums, maps, strict=True)]
    total = n * squares - sum(s.square().sum() for s in sums)
    return total.clamp(min=0) * 2 / (n * (n - 1))


def _weighted_maps(network: FeatureNetwork, images: Tensor) -> list[Tensor]:
    """Maps [N, C_i, h_i, w_i] whose squared Euclidean distance, summed over all maps, is the perceptual distance."""
    maps = normalised_features(network, images)
    weights = network.channel_weights or [torch.ones(1)] * len(maps)
    scales = [(w.to(f) / f[0, 0].numel()).sqrt().view(1, -1, 1, 1) for f, w in zip(maps, weights, strict=True)]
    return [f * scale for f, scale in zip(maps, scales, strict=True)]


def _mean_of_known(per_category: Tensor) -> float:
    if bool(per_category.isnan().all()):
        raise InputError("labels must give at least one category two images, got single images; add images.")
    return float(per_category.nanmean())


def _check(values: Tensor, labels: Tensor, ndim: int) -> None:
    shape = "[N, F]" if ndim == 2 else "[N, C, H, W]"
    if values.ndim != ndim or labels.shape != (len(values),) or len(values) == 0:
        raise InputError(
            f"features or images must have shape {shape} and labels [N] with N at least 1, got {list(values.shape)} "
            f"and {list(labels.shape)}."
        )
