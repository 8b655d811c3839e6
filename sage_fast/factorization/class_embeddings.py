"""Class embeddings and residuals: what a category has in common, and what sets one image apart ([SAGE], Eq. 4-7)."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError

__all__ = ["check_labels", "check_w_plus", "class_embeddings", "residuals"]


def class_embeddings(w_plus: Tensor, labels: Tensor, n_classes: int | None = None) -> Tensor:
    """Mean latent of each category.

    Implements Eq. 5 of [SAGE]. Every image counts: no batch is dropped.

    Args:
        w_plus: offsets from ``latent_avg`` [N, L, D].
        labels: int64 [N], 0 to S - 1, in any order.
        n_classes: S; one more than the largest label when absent.
    Returns:
        e [S, L, D].
    Raises:
        InputError: tensors that do not belong together, or a category without a latent.
    """
    check_w_plus(w_plus)
    n_classes = check_labels(labels, len(w_plus), n_classes)
    counts = torch.bincount(labels, minlength=n_classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"each of the {n_classes} categories needs at least one latent, got none for label {empty[0]} "
            f"({len(empty)} such labels); number the labels 0 to S - 1 without gaps."
        )
    sums = w_plus.new_zeros(n_classes, *w_plus.shape[1:]).index_add_(0, labels, w_plus.detach())
    return sums / counts.view(-1, 1, 1)


def residuals(w_plus: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """``w - e`` of the category of each latent.

    Implements Eq. 7 of [SAGE], which is Eq. 4 solved for the residual.

    Args:
        w_plus: offsets from ``latent_avg`` [N, L, D].
        labels: int64 [N], rows of ``embeddings``.
        embeddings: e [S, L, D].
    Returns:
        delta_w [N, L, D].
    Raises:
        InputError: tensors that do not belong together.
    """
    check_w_plus(w_plus)
    if embeddings.ndim != 3 or embeddings.shape[1:] != w_plus.shape[1:]:
        raise InputError(
            f"embeddings must have shape [S, {w_plus.shape[1]}, {w_plus.shape[2]}], as w_plus has, got "
            f"{list(embeddings.shape)}."
        )
    check_labels(labels, len(w_plus), len(embeddings))
    return w_plus - embeddings[labels]


def check_w_plus(
    w_plus: Tensor, n_latent: int | None = None, style_dim: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Raise InputError unless ``w_plus`` holds at least one finite latent [N, L, D], with these L, D and dtype where given."""
    shape = f"[N, {n_latent or 'L'}, {style_dim or 'D'}]"
    if w_plus.ndim != 3 or not w_plus.is_floating_point() or 0 in w_plus.shape:
        raise InputError(f"w_plus must be floating point {shape} with N >= 1, got {w_plus.dtype} {list(w_plus.shape)}.")
    if w_plus.shape[1] != (n_latent or w_plus.shape[1]) or w_plus.shape[2] != (style_dim or w_plus.shape[2]):
        raise InputError(
            f"w_plus must have shape {shape}, as the dictionaries have, got {list(w_plus.shape)}; embed the images "
            "with the encoder that these dictionaries were made with."
        )
    if w_plus.dtype != (dtype or w_plus.dtype):
        raise InputError(
            f"w_plus must be {dtype}, as the dictionaries are, got {w_plus.dtype}; convert it with .to({dtype})."
        )
    wide = torch.float32 if w_plus.dtype == torch.float16 else None  # a sum can leave float16 where no latent does
    if not bool(w_plus.sum(dtype=wide).isfinite()):
        raise InputError("w_plus holds values that are not finite; embed the images again.")


def check_labels(labels: Tensor, n: int, n_classes: int | None = None) -> int:
    """Raise InputError unless ``labels`` is int64 [n], n >= 1, in 0 to ``n_classes - 1``; returns the number of classes."""
    if n == 0:
        raise InputError("labels must name the category of one latent at least, got none; embed some images.")
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise InputError(f"labels must be int64 [{n}], one per latent, got {labels.dtype} {list(labels.shape)}.")
    low, high = int(labels.min()), int(labels.max())
    n_classes = high + 1 if n_classes is None else n_classes
    if low < 0 or high >= n_classes:
        raise InputError(f"labels must be 0 to {n_classes - 1}, got {low} to {high}.")
    return n_classes
