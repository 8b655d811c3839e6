"""Orthogonal projection of latents on one basis per layer (Eq. 17)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import of_one_float, takes_arrays
from sage_fast.ops.inputs import require_floats, require_tensor

__all__ = ["project_onto_basis", "project_onto_basis_reference"]


@takes_arrays("w_plus", "basis")
def project_onto_basis(w_plus: Tensor, basis: Tensor) -> Tensor:
    """``B (B^T w)`` per layer: what of ``w_plus`` lies in the span of the orthonormal columns of ``basis``.

    Implements Eq. 17 of [SAGE]. The inner product comes first, so the cost is N L D R, not N L D^2. Differentiable any number
    of times in both arguments.

    Args:
        w_plus: [N, L, D], floating.
        basis: [L, D, R], columns orthonormal in each layer (not checked).
    Returns:
        [N, L, D] in the dtype of ``w_plus``, under autocast too.
    Raises:
        InputError: shapes or dtypes that do not belong together.
    """
    _check(w_plus, basis)
    device_type, shape = "cpu" if w_plus.is_cpu else w_plus.device.type, basis.shape
    if _products_are_ahead(device_type, shape, w_plus.element_size()):
        # as the kernel, which autocast does not reach
        with torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext():
            return torch.bmm(torch.bmm(w_plus.transpose(0, 1), basis), basis.mT).transpose(0, 1)
    native = w_plus.dtype in (torch.float32, torch.float64) and shape[2] > 0
    if native and _native.has_kernel("project_onto_basis", device_type):
        return _native.call(torch.ops.sage_fast.project_onto_basis.default, (w_plus, basis))
    return project_onto_basis_reference(w_plus, basis)


def _on_host(host, w_plus, basis):
    takes = of_one_float(w_plus, basis) and w_plus.ndim == 3 and basis.ndim == 3 and basis.shape[2] > 0
    return host.project_onto_basis(w_plus, basis) if takes and not _products_are_ahead("cpu", basis.shape, 0) else None


def _products_are_ahead(device_type: str, basis: Sequence[int], size: int) -> bool:
    """Where two batched products of values of ``size`` bytes are ahead of the kernel.

    On a CPU wide bases of short rows, as measured. On a GPU what only the kernel for any sizes takes: more than 32 columns
    (it took 2.2 to 6.6 times as long with 40, on an H200), rows of no whole 16 bytes or of more than 4 KiB.
    """
    _, dim, rank = basis
    if device_type == "cpu":
        return dim <= 128 and rank > 16
    return device_type == "cuda" and (rank > 32 or dim * size % 16 != 0 or dim * size > 4096)


def project_onto_basis_reference(w_plus: Tensor, basis: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    _check(w_plus, basis)
    codes = torch.einsum("ldr,nld->nlr", basis, w_plus)
    return torch.einsum("ldr,nlr->nld", basis, codes)


def _check(w_plus: Tensor, basis: Tensor) -> None:
    require_floats("w_plus", w_plus, 3, "[N, L, D]")
    require_tensor("basis", basis)
    (_, n_latent, dim), of_basis = w_plus.shape, basis.shape
    if len(of_basis) != 3 or of_basis[0] != n_latent or of_basis[1] != dim:
        raise InputError(f"basis must have shape [L, D, R] with L = {n_latent}, D = {dim}, got {list(of_basis)}.")
    if basis.dtype != w_plus.dtype or basis.device != w_plus.device:
        raise InputError(
            f"basis must be {w_plus.dtype} on {w_plus.device}, as w_plus is, got {basis.dtype} on {basis.device}."
        )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """The projection is its own transpose; in B, d(B B^T w) pairs w with B^T grad and grad with B^T w.

    By products, not einsums: those know no batches of gradients.
    """
    w_plus, basis = ctx.saved_tensors
    grad_w = project_onto_basis(grad, basis) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return grad_w, None
    w_plus, grad = w_plus.transpose(0, 1), grad.transpose(0, 1)  # [L, N, D]
    grad_basis = torch.bmm(w_plus.mT, torch.bmm(grad, basis)) + torch.bmm(grad.mT, torch.bmm(w_plus, basis))
    return grad_w, grad_basis


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::project_onto_basis", lambda w_plus, basis: w_plus.new_empty(w_plus.shape))
    _native.register_autograd("project_onto_basis", _backward, _setup_context)
