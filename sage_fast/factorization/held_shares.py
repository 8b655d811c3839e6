"""What the basis of the seen categories holds of a category that it was made without."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.factorization.class_embeddings import check_labels, check_w_plus

__all__ = ["fewest_components", "held_shares", "mean_held_share"]

_ITERATIONS = 12  # of the secular equation; on the models measured, 10 leave an error of 1e-7 of the length
_CHUNK = 8  # categories at a time, whose [8, R, min(S, D)] numbers stay in the cache
_CATEGORIES, _LATENTS = 32, 8  # that the mean share is of, at most: two seconds at S = 1000, L = 18, D = 512, R = 40
_STEP = 40  # directions that are looked at together for the fewest that are enough


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
    check_w_plus(w_plus, *relevant.class_embeddings_.shape[1:])
    check_labels(labels, len(w_plus), len(relevant.class_embeddings_))
    return _shares(relevant, w_plus, labels, _held(relevant, w_plus, labels, 0, R).sum(1, keepdim=True)).flatten()


def mean_held_share(
    relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor, n_components: int | None = None
) -> float:
    """Mean of :func:`held_shares`, 0 to 1, over 8 latents of each of 32 categories, evenly spaced, or all where there are fewer."""
    rows = _sample(labels, len(relevant.class_embeddings_))
    return float(held_shares(relevant, w_plus[rows], labels[rows], n_components).mean())


def fewest_components(
    relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor, share: float, at_least: int = 1
) -> int:
    """The smallest R of ``at_least`` and more whose :func:`mean_held_share` is ``share``, or min(S, D) where none is.

    The directions of a basis without a category are found one by one, so none beyond the last that is needed are.

    Args:
        relevant, w_plus, labels: as of :func:`held_shares`.
        share: to be held, 0 to 1.
        at_least: the smallest R that is looked at, from 1.
    Returns:
        R, 1 to min(S, D).
    Raises:
        InputError: not fitted, or tensors that do not belong together.
    """
    S, _, D = relevant.class_embeddings_.shape
    check_labels(labels, len(w_plus), S)
    most, rows = min(S, D), _sample(labels, S)
    w_plus, labels = w_plus[rows], labels[rows]
    check_w_plus(w_plus, *relevant.class_embeddings_.shape[1:])
    held, first, last = w_plus.new_zeros(len(w_plus), 1, dtype=torch.float64), 0, min(at_least, most)
    while first < min(most, S - 1):
        held = held[:, -1:] + _held(relevant, w_plus, labels, first, last).cumsum(1)
        enough = _shares(relevant, w_plus, labels, held).mean(0) >= share
        if bool(enough.any()):
            return max(min(at_least, most), first + 1 + int(enough.nonzero()[0]))
        first, last = last, min(last + _STEP, most)
    return most


def _held(relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor, first: int, last: int) -> Tensor:
    """What directions ``first`` to ``last - 1`` of the bases without each latent's category hold of its squared length.

    Returns:
        float64 [N, last - first], all layers together; 0 from direction S - 1 on, which S - 1 categories do not have.
    """
    embeddings = relevant.class_embeddings_.double()
    S, _, D = embeddings.shape
    poles, latents = relevant.singular_values_.double().square(), w_plus.double()
    directions = relevant.leading(min(S, D)).double()
    categories, rows = labels.unique(return_inverse=True)
    held = latents.new_zeros(len(latents), last - first)
    there = min(last, S - 1)
    if there <= first:
        return held
    for layer, U in enumerate(directions.unbind()):
        left_out, y = embeddings[categories, layer] @ U, latents[:, layer] @ U
        for start in range(0, len(categories), _CHUNK):
            V = _eigenvectors(poles[layer], left_out[start : start + _CHUNK], first, there)
            here = (rows // _CHUNK == start // _CHUNK).nonzero().flatten()
            held[here, : there - first] += torch.einsum("nrm,nm->nr", V[rows[here] - start], y[here]).square()
    return held


def _shares(relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor, held: Tensor) -> Tensor:
    """Squared lengths that are held [N, n] -> shares [N, n] of the deviation from the mean of the other categories."""
    embeddings, latents = relevant.class_embeddings_.double(), w_plus.double()
    if len(embeddings) == 1:
        return torch.zeros_like(held)
    others = (embeddings.sum(0) - embeddings[labels]) / (len(embeddings) - 1)
    lost = latents.square().sum((1, 2))[:, None] - held
    return (1 - lost / (latents - others).square().sum((1, 2)).clamp_min(1e-30)[:, None]).clamp(0, 1)


def _sample(labels: Tensor, n_categories: int) -> Tensor:
    """Rows of 8 latents of each of 32 categories, evenly spaced, or of all where there are fewer."""
    check_labels(labels, len(labels), n_categories)
    order, counts = labels.argsort(stable=True), labels.bincount(minlength=n_categories)
    of_each = order.split(counts.tolist())
    return torch.cat([_spread(of_each[category], _LATENTS) for category in _spread(counts.nonzero(), _CATEGORIES)])


def _spread(things: Tensor, most: int) -> Tensor:
    """At most ``most`` of the rows of ``things``, evenly spaced."""
    count = min(len(things), most)
    return things[torch.arange(count, device=things.device) * len(things) // count]


def _eigenvectors(poles: Tensor, z: Tensor, first: int, last: int) -> Tensor:
    """Eigenvectors ``first`` to ``last - 1``, [s, R, M], of length 1, of each ``diag(poles) - z z^T``, the leading one first.

    Args:
        poles: [M], falling, not negative.
        z: [s, M].
    """
    smallest = 1e-12 * poles[0].clamp_min(1e-18)  # keeps poles apart and z from 0: where they are, nothing moves
    poles = poles + smallest * torch.arange(len(poles), 0, -1, device=poles.device)
    z = torch.where(z < 0, -1.0, 1.0) * (z.square() + 0.01 * smallest).sqrt()
    vectors = z[:, None] * _inverse_gaps(poles, z.square(), first, last)
    return vectors / vectors.norm(dim=2, keepdim=True)


def _inverse_gaps(poles: Tensor, squares: Tensor, first: int, last: int) -> Tensor:
    """``1 / (poles - x_i)`` [s, R, M] for roots ``first`` to ``last - 1``, falling, of ``f(x) = 1 - sum(squares / (poles - x))``.

    Root i lies between pole i and the pole below it (or 0). The poles on either side of it are fitted by one each (the
    "middle way" of Li, "Solving secular equations stably and efficiently", 1993), which leaves a quadratic equation.
    """
    below = torch.cat([poles[1:], poles.new_zeros(1)])[first:last]
    width = poles[first:last] - below
    gaps = poles - below[:, None]  # [R, M]
    is_above = (gaps >= width[:, None]).to(squares)
    x = (width / 2).expand(len(squares), last - first)  # above the pole below [s, R]
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
