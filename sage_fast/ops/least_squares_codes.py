"""Codes of least squares: one pseudo-inverse per layer applied to residuals (Eq. 18)."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import of_one_float, takes_arrays
from sage_fast.ops.inputs import require_floats, require_tensor

__all__ = ["least_squares_codes", "least_squares_codes_reference"]


@takes_arrays("delta_w", "pseudo_inverse")
def least_squares_codes(delta_w: Tensor, pseudo_inverse: Tensor) -> Tensor:
    """``A+ delta_w`` per layer, of all layers in one pass: ``codes[n, l, k] = sum over d of A+[l, k, d] delta_w[n, l, d]``.

    Implements Eq. 18 of [SAGE], given the pseudo-inverse. Differentiable any number of times in both arguments.

    Args:
        delta_w: [N, L, D], floating.
        pseudo_inverse: A+ [L, K, D], as ``torch.linalg.pinv`` gives for directions [L, D, K].
    Returns:
        codes [N, L, K].
    Raises:
        InputError: shapes or dtypes that do not belong together.
    """
    _check(delta_w, pseudo_inverse)
    native = delta_w.dtype in (torch.float32, torch.float64)
    if native and _native.has_kernel("least_squares_codes", "cpu" if delta_w.is_cpu else delta_w.device.type):
        return _native.call(torch.ops.sage_fast.least_squares_codes.default, (delta_w, pseudo_inverse))
    return least_squares_codes_reference(delta_w, pseudo_inverse)


def _on_host(host, delta_w, pseudo_inverse):
    takes = of_one_float(delta_w, pseudo_inverse) and delta_w.ndim == 3 and pseudo_inverse.ndim == 3
    return host.least_squares_codes(delta_w, pseudo_inverse) if takes else None


def least_squares_codes_reference(delta_w: Tensor, pseudo_inverse: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    _check(delta_w, pseudo_inverse)
    return torch.einsum("lkd,nld->nlk", pseudo_inverse, delta_w)


def _check(delta_w: Tensor, pseudo_inverse: Tensor) -> None:
    require_floats("delta_w", delta_w, 3, "[N, L, D]")
    require_tensor("pseudo_inverse", pseudo_inverse)
    (_, n_latent, dim), inverse = delta_w.shape, pseudo_inverse.shape
    if len(inverse) != 3 or inverse[0] != n_latent or inverse[2] != dim:
        raise InputError(
            f"pseudo_inverse must have shape [L, K, D] with L = {n_latent}, D = {dim}, got {list(inverse)}."
        )
    if pseudo_inverse.dtype != delta_w.dtype or pseudo_inverse.device != delta_w.device:
        raise InputError(
            f"pseudo_inverse must be {delta_w.dtype} on {delta_w.device}, as delta_w is, got {pseudo_inverse.dtype} on "
            f"{pseudo_inverse.device}."
        )


def _fake(delta_w, pseudo_inverse):
    return delta_w.new_empty(*delta_w.shape[:2], pseudo_inverse.shape[1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """The codes are linear in each argument; the derivatives are products again, not einsums: those know no batches of gradients."""
    delta_w, pseudo_inverse = ctx.saved_tensors
    of_w, of_inverse = ctx.needs_input_grad
    by_layer = grad.transpose(0, 1)  # [L, N, K]
    grad_w = torch.bmm(by_layer, pseudo_inverse).transpose(0, 1) if of_w else None
    return grad_w, torch.bmm(by_layer.mT, delta_w.transpose(0, 1)) if of_inverse else None


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::least_squares_codes", _fake)
    _native.register_autograd("least_squares_codes", _backward, _setup_context)
