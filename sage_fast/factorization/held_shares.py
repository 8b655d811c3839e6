"""What the basis of the seen categories holds of a category that it was made without."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.factorization.class_embeddings import check_labels, check_w_plus

__all__ = ["held_shares", "mean_held_share"]

_ITERATIONS = 12  # of the secular equation; on the models measured, 10 leave an error of 1e-7 of the length
_CHUNK = 8  # categories at a time, whose [8, R, min(S, D)] numbers stay in the cache
_CATEGORIES, _LATENTS = 32, 8  # that the mean share is of, at most: a second at S = 1000, L = 18, D = 512


def held_shares(
    relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor, n_components: int | None = None
) -> Tensor:
    """How much of each latent of a seen category the basis of all other categories holds, as Eq. 17 of [SAGE] keeps it.

    Of the deviation of w from the mean m of the other categories' embeddings, in all layers together, the projection on
    their leading directions B (Eq. 16) keeps ``1 - |w - B B^T w|^2 / |w - m|^2``, or 0 where more than it is lost.

    No basis is made anew: leaving out a category takes e e^T from a matrix whose eigenvectors are known, and the new ones
    follow from the secular equation (Golub, "Some modified matrix eigenvalue problems", 1973).

    Args:
        relevant: fitted dictionary of the seen categories.
        w_plus: offsets [N, L, D]: images of seen categories, or class embeddings.
        labels: int64 [N], 0 to S - 1, the category that each belongs to and that is left out.
        n_components: R, or t_B, 1 to min(S, D), if not that of ``relevant``; min(S - 1, D) are used at most.
    Returns:
        shares in 0 to 1, float64 [N]; all 0 with a single category, which has no others.
    Raises:
        InputError: not fitted, tensors that do not belong together, or too many components.
    """
    R = relevant.leading(n_components).shape[2]
    embeddings = relevant.class_embeddings_.double()
    S, L, D = embeddings.shape
    check_w_plus(w_plus, L, D)
    check_labels(labels, len(w_plus), S)
    if S == 1:
        return embeddings.new_zeros(len(w_plus))
    poles, latents = relevant.singular_values_.double().square(), w_plus.double()
    directions = relevant.leading(min(S, D)).double()
    categories, rows = labels.unique(return_inverse=True)
    held = latents.new_zeros(len(latents))
    for layer, U in enumerate(directions.unbind()):
        left_out, y = embeddings[categories, layer] @ U, latents[:, layer] @ U
        for start in range(0, len(categories), _CHUNK):
            V = _eigenvectors(poles[layer], left_out[start : start + _CHUNK], min(R, S - 1))
            here = (rows // _CHUNK == start // _CHUNK).nonzero().flatten()
            held[here] += torch.einsum("nrm,nm->nr", V[rows[here] - start], y[here]).square().sum(1)
    lost = latents.square().sum((1, 2)) - held
    others = (embeddings.sum(0) - embeddings[labels]) / (S - 1)
    return (1 - lost / (latents - others).square().sum((1, 2)).clamp_min(1e-30)).clamp(0, 1)


def mean_held_share(
    relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor, n_components: int | None = None
) -> float:
    """Mean of :func:`held_shares`, 0 to 1, over 8 latents of each of 32 categories, evenly spaced, or all where there are fewer."""
    check_labels(labels, len(w_plus), len(relevant.class_embeddings_))
    order, counts = labels.argsort(stable=True), labels.bincount(minlength=len(relevant.class_embeddings_))
    of_each = order.split(counts.tolist())
    rows = torch.cat([_spread(of_each[category], _LATENTS) for category in _spread(counts.nonzero(), _CATEGORIES)])
    return float(held_shares(relevant, w_plus[rows], labels[rows], n_components).mean())


def _spread(things: Tensor, most: int) -> Tensor:
    """At most ``most`` of the rows of ``things``, evenly spaced."""
    count = min(len(things), most)
    return things[torch.arange(count, device=things.device) * len(things) // count]


def _eigenvectors(poles: Tensor, z: Tensor, R: int) -> Tensor:
    """The R leading eigenvectors [s, R, M], of length 1, of each ``diag(poles) - z z^T``.

    Args:
        poles: [M], falling, not negative.
        z: [s, M].
    """
    smallest = 1e-12 * poles[0].clamp_min(1e-18)  # keeps poles apart and z from 0: where they are, nothing moves
    poles = poles + smallest * torch.arange(len(poles), 0, -1, device=poles.device)
    z = torch.where(z < 0, -1.0, 1.0) * (z.square() + 0.01 * smallest).sqrt()
    vectors = z[:, None] * _inverse_gaps(poles, z.square(), R)
    return vectors / vectors.norm(dim=2, keepdim=True)


def _inverse_gaps(poles: Tensor, squares: Tensor, R: int) -> Tensor:
    """``1 / (poles - x_i)`` [s, R, M] for the R largest roots x_i of ``f(x) = 1 - sum(squares / (poles - x))``.

    Root i lies between pole i and the pole below it (or 0). The poles on either side of it are fitted by one each (the
    "middle way" of Li, "Solving secular equations stably and efficiently", 1993), which leaves a quadratic equation.
    """
    below = torch.cat([poles[1:], poles.new_zeros(1)])[:R]
    width = poles[:R] - below
    gaps = poles - below[:, None]  # [R, M]
    is_above = (gaps >= width[:, None]).to(squares)
    x = (width / 2).expand(len(squares), R)  # above the pole below [s, R]
    for _ in range(_ITERATIONS):
        inverse = (gaps - x[..., None]).reciprocal_()
        terms = squares[:, None] * inverse
        total = terms.sum(2)
        terms *= inverse
        slope_above = torch.einsum("srm,rm->sr", terms, is_above)
        slope_below = terms.sum(2) - slope_above
        upper, lower = slope_above * (width - x) ** 2, slope_below * x**2
        constant = 1 - total + slope_above * (width - x) - slope_below * x
        linear = constant * width - upper - lower
        root = (linear.square() + 4 * constant * lower * width).clamp_min(0).sqrt()
        x = torch.where(linear <= 0, 2 * lower * width / (root - linear), (linear + root) / (2 * constant))
        x = torch.minimum(torch.maximum(x, 1e-15 * width), (1 - 1e-15) * width)
    return (gaps - x[..., None]).reciprocal_()
