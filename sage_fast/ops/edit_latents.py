"""New latents of a category from codes over the irrelevant directions (Eq. 15, 20)."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError

__all__ = ["edit_latents", "edit_latents_reference"]


def edit_latents(
    class_embedding: Tensor, codes: Tensor, directions: Tensor, alpha: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """``e + alpha * A (mask * n)`` per layer.

    Implements Eq. 15 and Eq. 20 of [SAGE]; differentiable any number of times. The mask is folded into A, so it costs one
    pass over [L, D, K], not over the samples.

    Args:
        class_embedding: e [N, L, D], or [1, L, D] for all.
        codes: n [N, L, K].
        directions: A [L, D, K].
        alpha: strength of the edit.
        mask: [L, K] of zeros and ones, or bool: directions that are used; None uses all.
    Returns:
        [N, L, D].
    Raises:
        InputError: shapes that do not belong together.
    """
    _check(class_embedding, codes, directions, mask)
    if mask is not None:
        directions = directions * mask.to(directions.dtype).unsqueeze(1)
    # [L, N, K] x [L, K, D]: one batched product over the layers
    edits = torch.bmm(codes.transpose(0, 1), directions.transpose(1, 2)).transpose(0, 1)
    return torch.add(class_embedding, edits, alpha=alpha)


def edit_latents_reference(
    class_embedding: Tensor, codes: Tensor, directions: Tensor, alpha: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """The same, as the equation is printed."""
    _check(class_embedding, codes, directions, mask)
    kept = codes if mask is None else codes * mask.to(codes.dtype)
    return class_embedding + alpha * torch.einsum("ldk,nlk->nld", directions, kept)


def _check(class_embedding: Tensor, codes: Tensor, directions: Tensor, mask: Tensor | None) -> None:
    if directions.ndim != 3:
        raise InputError(f"directions must have shape [L, D, K], got {list(directions.shape)}.")
    n_latent, dim, k = directions.shape
    if codes.ndim != 3 or codes.shape[1:] != (n_latent, k):
        raise InputError(f"codes must have shape [N, {n_latent}, {k}], as directions have, got {list(codes.shape)}.")
    if class_embedding.ndim != 3 or class_embedding.shape[1:] != (n_latent, dim):
        raise InputError(
            f"class_embedding must have shape [N, {n_latent}, {dim}], as directions have, got {list(class_embedding.shape)}."
        )
    if len(class_embedding) not in (1, len(codes)):
        raise InputError(f"class_embedding must hold 1 or {len(codes)} rows, as codes do, got {len(class_embedding)}.")
    if mask is not None and mask.shape != (n_latent, k):
        raise InputError(f"mask must have shape [{n_latent}, {k}], got {list(mask.shape)}.")
