"""New latents of categories from codes over the irrelevant directions (Eq. 15, 20)."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import of_one_float, takes_arrays
from sage_fast.ops.combine_rows import pulled_in, require_below
from sage_fast.ops.inputs import number, require_floats, require_tensor

__all__ = ["edit_latents", "edit_latents_reference"]


@takes_arrays("class_embedding", "codes", "directions", "mask", "class_index")
def edit_latents(
    class_embedding: Tensor,
    codes: Tensor,
    directions: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    class_index: Tensor | None = None,
) -> Tensor:
    """``e + alpha * A (mask * n)`` per layer, for samples of one category or of several.

    Implements Eq. 15 and Eq. 20 of [SAGE]; differentiable any number of times in the embeddings, codes and directions.
    Masked directions are passed over, so that half of them take half the time.

    Args:
        class_embedding: e [N, L, D], or [1, L, D] for all; [B, L, D] with ``class_index``.
        codes: n [N, L, K].
        directions: A [L, D, K], finite.
        alpha: strength of the edit.
        mask: directions that are used, bool or numbers of which zero is no: [L, K] for all, or [B, L, K], one for each
            row of ``class_embedding``; None uses all.
        class_index: int64 [N], 0 to B - 1, the row of ``class_embedding`` that each sample edits. Sample i edits row i,
            or the only one, when absent.
    Returns:
        [N, L, D]. A sample's bits depend on its own row alone, except that up to three samples are summed in another order.
    Raises:
        InputError: shapes or dtypes that do not belong together; on a CPU, a ``class_index`` that is not there. Elsewhere a
            look at it would wait for the device, and the sample is NaN.
    """
    alpha = _check(class_embedding, codes, directions, alpha, mask, class_index)
    mask = _rows_of(mask)
    native = codes.dtype in (torch.float32, torch.float64)
    if native and _native.has_kernel("edit_latents", "cpu" if codes.is_cpu else codes.device.type):
        op = torch.ops.sage_fast.edit_latents.default
        return _native.call(op, (class_embedding, codes, directions), alpha, mask, class_index)
    # [L, N, K] x [L, K, D]: one batched product over the layers
    edits = torch.bmm(_kept(codes, mask, class_index).transpose(0, 1), directions.mT).transpose(0, 1)
    base = _base(class_embedding, class_index)
    return torch.add(base, edits, alpha=alpha)


def _on_host(host, class_embedding, codes, directions, alpha, mask, class_index):
    if not of_one_float(class_embedding, codes, directions):
        return None
    if mask is not None and (
        mask.dtype.kind not in "biuf" or mask.ndim == 3 and mask.shape[0] != class_embedding.shape[0]
    ):
        return None
    mask = mask if mask is None else mask.astype(bool, copy=False)
    return host.edit_latents(class_embedding, codes, directions, alpha, mask, class_index)


def edit_latents_reference(
    class_embedding: Tensor,
    codes: Tensor,
    directions: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    class_index: Tensor | None = None,
) -> Tensor:
    """The same, as the equation is printed."""
    alpha = _check(class_embedding, codes, directions, alpha, mask, class_index)
    base = _base(class_embedding, class_index)
    kept = _kept(codes, _rows_of(mask), class_index)
    return base + alpha * torch.einsum("ldk,nlk->nld", directions, kept)


def _base(class_embedding: Tensor, class_index: Tensor | None) -> Tensor:
    """The embedding of each sample, NaN where its class is not there."""
    if class_index is None:
        return class_embedding
    rows, known = pulled_in(class_index, class_embedding.shape[0])
    return torch.where(known[:, None, None], class_embedding[rows], torch.nan)


def _rows_of(mask: Tensor | None) -> Tensor | None:
    """The mask as bool [1 or B, L, K]."""
    return mask if mask is None else mask.bool().unsqueeze(0) if mask.ndim == 2 else mask.bool()


def _kept(codes: Tensor, mask: Tensor | None, class_index: Tensor | None) -> Tensor:
    """Codes with zeros where ``mask`` bool [1 or B, L, K] is off."""
    if mask is None:
        return codes
    if class_index is not None and mask.shape[0] > 1:
        mask = mask[pulled_in(class_index, mask.shape[0])[0]]
    return torch.where(mask, codes, 0)


def _check(
    class_embedding: Tensor,
    codes: Tensor,
    directions: Tensor,
    alpha: float,
    mask: Tensor | None,
    class_index: Tensor | None,
) -> float:
    require_floats("directions", directions, 3, "[L, D, K]")
    require_floats("codes", codes, 3, "[N, L, K]")
    require_tensor("class_embedding", class_embedding)
    for name, choice in (("mask", mask), ("class_index", class_index)):
        if choice is not None:
            require_tensor(name, choice)
    (n_latent, dim, k), of_codes, of_embedding = directions.shape, codes.shape, class_embedding.shape
    if of_codes[1] != n_latent or of_codes[2] != k:
        raise InputError(
            f"codes must be floating point [N, {n_latent}, {k}], as directions have, got {codes.dtype} {list(of_codes)}."
        )
    if len(of_embedding) != 3 or of_embedding[1] != n_latent or of_embedding[2] != dim:
        raise InputError(
            f"class_embedding must have shape [N, {n_latent}, {dim}], as directions have, got {list(of_embedding)}."
        )
    dtype, device = codes.dtype, codes.device
    for name, tensor in (("class_embedding", class_embedding), ("directions", directions)):
        if tensor.dtype != dtype or tensor.device != device:
            raise InputError(
                f"{name} must be {dtype} on {device}, as codes are, got {tensor.dtype} on {tensor.device}."
            )
    rows = of_embedding[0]
    if class_index is None and rows != 1 and rows != of_codes[0]:
        raise InputError(
            f"class_embedding must hold 1 or {len(codes)} rows, as codes do, got {rows}; name the row of each sample with "
            "class_index."
        )
    if class_index is not None and (class_index.shape != codes.shape[:1] or class_index.dtype != torch.int64):
        raise InputError(
            f"class_index must be int64 [{len(codes)}], one row of class_embedding a sample, got {class_index.dtype} "
            f"{list(class_index.shape)}."
        )
    if mask is not None and mask.shape not in ((n_latent, k), (rows, n_latent, k)):
        raise InputError(
            f"mask must have shape [{n_latent}, {k}] or [{rows}, {n_latent}, {k}], got {list(mask.shape)}."
        )
    for name, choice in (("mask", mask), ("class_index", class_index)):
        if choice is not None and choice.device != device:
            raise InputError(f"{name} must be on {device}, as codes are, got {choice.device}.")
    if class_index is not None:
        require_below("class_index", class_index, rows)
    return number("alpha", alpha)


def _setup_context(ctx, inputs, output):
    class_embedding, codes, directions, ctx.alpha, mask, class_index = inputs
    ctx.rows = class_embedding.shape[0]
    ctx.save_for_backward(codes, directions, mask, class_index)


def _backward(ctx, grad):
    codes, directions, mask, class_index = ctx.saved_tensors
    by_layer = grad.transpose(0, 1)  # [L, N, D]
    grad_embedding = grad_codes = grad_directions = None
    if ctx.needs_input_grad[0] and class_index is not None:
        inside, _ = pulled_in(class_index, ctx.rows)
        grad_embedding = grad.new_zeros(ctx.rows, *grad.shape[1:]).index_add(0, inside, grad)
    elif ctx.needs_input_grad[0]:
        grad_embedding = grad if ctx.rows == grad.shape[0] else grad.sum(0, keepdim=True)
    if ctx.needs_input_grad[1]:
        grad_codes = ctx.alpha * _kept(torch.bmm(by_layer, directions).transpose(0, 1), mask, class_index)
    if ctx.needs_input_grad[2]:
        grad_directions = ctx.alpha * torch.bmm(by_layer.mT, _kept(codes, mask, class_index).transpose(0, 1))
    return grad_embedding, grad_codes, grad_directions, None, None, None


def _fake(class_embedding, codes, directions, alpha, mask, class_index):
    return codes.new_empty(*codes.shape[:2], directions.shape[1])


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::edit_latents", _fake)
    _native.register_autograd("edit_latents", _backward, _setup_context)
