"""Distances between two sets of images as clouds of features: Frechet distance and kernel distance.

Both are numbers *of a feature network*: the Frechet distance of Inception-v3 features is the FID, and of no other.
Callers name the network beside the number (``FD-oracle``, ``FD-discriminator`` ...), and compare only numbers of one
network, one resolution and one pair of set sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError

__all__ = ["feature_statistics", "frechet_distance", "frechet_distance_of_statistics", "kernel_distance"]

_BLOCK = 2048  # rows of a kernel matrix held at a time


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features.

    Implements Eq. 6 of [Heusel et al. 2017]: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Computed in float64.
    Name the network that made the features wherever the number is shown; it is the FID for Inception-v3's pool features
    only. The estimate is biased upwards, more so for small sets: compare sets of equal size.

    Args:
        features_a: [N, F], N at least 2.
        features_b: [M, F], M at least 2.

    Returns:
        At least 0, in squared units of the features.

    Raises:
        InputError: other shapes, fewer than two rows, or values that are not finite.
    """
    a, b = _checked(features_a, features_b)
    return frechet_distance_of_statistics(*feature_statistics(a), *feature_statistics(b))


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and unbiased covariance [F, F] of features [N, F], in float64."""
    x = features.detach().to(torch.float64)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / max(len(x) - 1, 1)


def frechet_distance_of_statistics(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """:func:`frechet_distance` from two means [F] and covariances [F, F].

    tr (S_a S_b)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric product R_a S_b R_a with
    R_a = S_a^(1/2), which are the singular values of R_a R_b. Taken as singular values they need no square root
    of small eigenvalues, so covariances without full rank (fewer images than features) cost no precision.
    """
    cross = torch.linalg.svdvals(_square_root(covariance_a).T @ _square_root(covariance_b)).sum()
    means = (mean_a - mean_b).square().sum()
    return max(0.0, float(means + covariance_a.trace() + covariance_b.trace() - 2 * cross))


def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    subset_size: int | None = None,
    n_subsets: int = 100,
    rng: torch.Generator | None = None,
) -> float:
    """Kernel distance of two sets of features: unbiased estimate of the squared maximum mean discrepancy.

    Implements the KID of [Binkowski et al. 2018] with k(x, y) = (x.y / F + 1)^3, in float64. Its expectation does not
    depend on the sizes of the sets; it may be negative when the sets agree. Name the network that made the features
    wherever the number is shown.

    Args:
        features_a: [N, F], N at least 2.
        features_b: [M, F], M at least 2.
        subset_size: None takes all pairs (exact, no memory of N x M); a number takes the mean over ``n_subsets`` random
            subsets of that many rows of each set, as published tables do.
        n_subsets: how many subsets; used with ``subset_size`` only.
        rng: of the subsets; seed 0 when None.

    Raises:
        InputError: other shapes, fewer than two rows, a subset larger than a set, or values that are not finite.
    """
    a, b = _checked(features_a, features_b)
    if subset_size is None:
        return _unbiased_mmd2(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)) or n_subsets < 1:
        raise InputError(
            f"subset_size must be 2 to {min(len(a), len(b))} (the smaller set) and n_subsets at least 1, got "
            f"{subset_size} and {n_subsets}; take a smaller subset, or None for all pairs."
        )
    rng = rng or torch.Generator().manual_seed(0)
    return (
        sum(
            _unbiased_mmd2(_random_rows(a, subset_size, rng), _random_rows(b, subset_size, rng))
            for _ in range(n_subsets)
        )
        / n_subsets
    )


def _unbiased_mmd2(a: Tensor, b: Tensor) -> float:
    n, m = len(a), len(b)
    within_a = (_kernel_sum(a, a) - _kernel_diagonal_sum(a)) / (n * (n - 1))
    within_b = (_kernel_sum(b, b) - _kernel_diagonal_sum(b)) / (m * (m - 1))
    return within_a + within_b - 2 * _kernel_sum(a, b) / (n * m)


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    """Sum of k(x, y) over all x of a and y of b, a block of rows at a time."""
    return sum(float((rows @ b.T / a.shape[1] + 1).pow(3).sum()) for rows in a.split(_BLOCK))


def _kernel_diagonal_sum(a: Tensor) -> float:
    return float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())


def _random_rows(x: Tensor, n: int, rng: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=rng, device=rng.device)[:n].to(x.device)]


def _square_root(covariance: Tensor) -> Tensor:
    """R [F, rank] with R R^T = covariance; eigenvalues at the level of rounding count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    smallest = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > smallest
    return vectors[:, kept] * values[kept].sqrt()


def _checked(features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("features_a", features_a), ("features_b", features_b)):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != features_a.shape[1]:
            raise InputError(
                f"{name} must have shape [N, F] with N at least 2 and the F of features_a ({features_a.shape[-1]}), "
                f"got {list(x.shape)}; give two images or more in each set."
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{name} must be finite, got inf or nan; the images or the network are damaged.")
    return features_a.detach().to(torch.float64), features_b.detach().to(torch.float64)
