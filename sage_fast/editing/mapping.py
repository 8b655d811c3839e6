"""Whether the seen categories are enough for the class embedding mapping of SAGE ([SAGE], Eq. 17)."""

from __future__ import annotations

from torch import Tensor

from sage_fast.editing.editor import PRESETS
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.factorization.held_shares import fewest_components, mean_held_share

__all__ = ["ENOUGH", "mapping_warning", "usual_components"]

ENOUGH = 0.9
"""Share of an image that the mapping is to keep; from five models, of which it cost two their new categories: docs/results.md."""


def usual_components(relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor) -> int:
    """t_B of the preset ``"default"``: its 40, or more where these keep less than ``ENOUGH`` of an image of a new category.

    The fewest that keep as much, or all that there are, min(S, D). Measured on the seen categories, each left out in turn
    (:func:`sage_fast.factorization.held_shares.fewest_components`); arguments as of :func:`mapping_warning`.
    """
    return fewest_components(relevant, w_plus, labels, ENOUGH, int(PRESETS["default"]["n_components"]))


def mapping_warning(
    relevant: CategoryRelevantDictionary, w_plus: Tensor, labels: Tensor, n_components: int
) -> str | None:
    """One sentence where the mapping keeps less than ``ENOUGH`` of an image of a category that is new; else None.

    Args:
        relevant: fitted dictionary of the seen categories.
        w_plus: offsets of seen images [N, L, D].
        labels: int64 [N], 0 to S - 1.
        n_components: t_B, 1 to min(S, D).
    """
    share = mean_held_share(relevant, w_plus, labels, n_components)
    if share >= ENOUGH:
        return None
    S, _, D = relevant.class_embeddings_.shape
    fewest = fewest_components(relevant, w_plus, labels, ENOUGH, min(n_components + 1, S, D))
    by_more = mean_held_share(relevant, w_plus, labels, fewest)
    more = f"--n-components {fewest}, which keeps {int(100 * by_more)} %, or " if by_more >= ENOUGH else ""
    return (
        f"The class embedding mapping of sage and sage-q keeps {int(100 * share)} % of what sets an image of a new category "
        f"apart ({S} seen categories, {n_components} components of {D} dimensions), and where it keeps less than "
        f"{100 * ENOUGH:.0f} % it can lose the category; take {more}--method sage-i."
    )
