"""Precision and recall of two sets of images as clouds of features: how many look real, how much of the real is reached.

Numbers *of a feature network*, like the distances of ``fid``: name the network beside them, and compare only numbers of
one network and one pair of set sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError

__all__ = ["Manifold", "precision_recall"]

_BLOCK = 1024  # rows of a distance matrix held at a time
_SAME = 1e-12  # a squared distance below this share of the squared lengths is rounding: the rows are equal


class Manifold:
    """A set of features with a ball around each that reaches to its k-th nearest neighbour in the set.

    Implements Eq. 1 of [Kynkaanniemi et al. 2019], in float64.

    Args:
        features: [N, F], N greater than ``k``.
        k: which neighbour, 3 in the paper.

    Raises:
        InputError: another shape, too few rows, or values that are not finite.
    """

    def __init__(self, features: Tensor, k: int = 3) -> None:
        if k < 1 or features.ndim != 2 or len(features) <= k:
            raise InputError(
                f"features must have shape [N, F] with N greater than the number of neighbours {k}, which is at least 1, "
                f"got {list(features.shape)}; give more images."
            )
        if not bool(torch.isfinite(features).all()):
            raise InputError("features must be finite, got inf or nan; the images or the network are damaged.")
        x = features.detach().to(torch.float64)
        self.origin = x.mean(0)  # distances keep more digits around it
        self.points = x - self.origin
        # the nearest of all is the point itself
        self.radii2 = torch.cat(
            [_distances2(rows, self.points).kthvalue(k + 1).values for rows in self.points.split(_BLOCK)]
        )

    def covers(self, features: Tensor) -> Tensor:
        """Whether each row of features [M, F] lies in a ball of at least one point: bool [M]."""
        x = features.detach().to(torch.float64) - self.origin
        return torch.cat([(_distances2(rows, self.points) <= self.radii2).any(1) for rows in x.split(_BLOCK)])


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of generated features on the real manifold, and share of real ones on the generated manifold; each 0 to 1.

    Implements Eq. 2 of [Kynkaanniemi et al. 2019]. Both rise with the sizes of the sets' balls, so with smaller sets.

    Deviation: the paper takes VGG-16's second fully connected layer; here whichever network made the features.

    Args:
        real: [N, F].
        generated: [M, F].
        k: which neighbour the balls reach to.

    Raises:
        InputError: other shapes, at most ``k`` rows, or values that are not finite.
    """
    reals, fakes = Manifold(real, k), Manifold(generated, k)
    if reals.points.shape[1] != fakes.points.shape[1]:
        raise InputError(
            f"real and generated must have features of one length, got {real.shape[1]} and {generated.shape[1]}."
        )
    return float(reals.covers(generated).double().mean()), float(fakes.covers(real).double().mean())


def _distances2(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances [N, M] of rows; exactly zero between equal ones."""
    lengths = a.square().sum(1, keepdim=True) + b.square().sum(1)
    squares = lengths - 2 * a @ b.T
    return torch.where(squares <= _SAME * lengths, 0, squares)
