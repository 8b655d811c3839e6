"""3 x 3 convolution with fewer multiplications, for training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError

__all__ = ["conv3x3", "conv3x3_reference"]

_MIN_SIDE = 8  # below, a tile is the whole image and the transforms of the weights cost more than they save


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight, padding=1)``; differentiable any number of times.

    On the CPU in float32, square images with sides that are multiples of 4 from 8 px up and channels that are multiples of 16
    take Winograd's F(4 x 4, 3 x 3), with 2.25 multiplications a pixel instead of 9, in the forward pass and in both
    gradients; the result is channels last. Everything else is PyTorch's convolution, bfloat16 too: its products are as fast as
    these transforms and the conversions that they would need.

    Args:
        x: [N, C_in, H, W], floating.
        weight: [C_out, C_in, 3, 3].
    Returns:
        [N, C_out, H, W].
    Raises:
        InputError: shapes that do not belong together.
    """
    _check(x, weight)
    if not _kernel_pays(x, weight):
        return F.conv2d(x, weight, padding=1)
    return torch.ops.sage_fast.conv3x3(_last(x), weight.permute(2, 3, 1, 0).contiguous())


def conv3x3_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    _check(x, weight)
    return F.conv2d(x, weight, padding=1)


def _kernel_pays(x: Tensor, weight: Tensor) -> bool:
    c_out, c_in, _, _ = weight.shape
    return (
        x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled(x.device.type)
        and x.shape[2] == x.shape[3] >= _MIN_SIDE
        and x.shape[2] % 4 == c_in % 16 == c_out % 16 == 0
        and max(c_in, c_out) <= 4096
        and x.device.type == "cpu"  # cuDNN has such transforms of its own
        and _native.has_kernel("conv3x3", "cpu")
    )


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"x must be floating point [N, C_in, H, W], got {x.dtype} {list(x.shape)}.")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise InputError(f"weight must have shape [C_out, {x.shape[1]}, 3, 3], as x has it, got {list(weight.shape)}.")


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _turned(taps: Tensor) -> Tensor:
    """Taps [3, 3, C_in, C_out] of the transposed convolution: turned round, channels exchanged."""
    return taps.flip((0, 1)).transpose(2, 3).contiguous()


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """With respect to x a convolution with the turned taps; with respect to the taps a product of x and grad."""
    x, taps = ctx.saved_tensors
    grad = _last(grad)
    grad_x = torch.ops.sage_fast.conv3x3(grad, _turned(taps)) if ctx.needs_input_grad[0] else None
    grad_taps = torch.ops.sage_fast.conv3x3_taps(x, grad) if ctx.needs_input_grad[1] else None
    return grad_x, grad_taps


def _backward_taps(ctx, grad_taps):
    """The product is linear in each of its factors, and either derivative is a convolution again."""
    x, grad = ctx.saved_tensors
    grad_taps = grad_taps.contiguous()
    grad_x = torch.ops.sage_fast.conv3x3(grad, _turned(grad_taps)) if ctx.needs_input_grad[0] else None
    grad_grad = torch.ops.sage_fast.conv3x3(x, grad_taps) if ctx.needs_input_grad[1] else None
    return grad_x, grad_grad


def _fake(x, taps):
    shape = (x.shape[0], taps.shape[3], x.shape[2], x.shape[3])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::conv3x3", _fake)
    torch.library.register_fake("sage_fast::conv3x3_taps", lambda x, grad: x.new_empty(3, 3, x.shape[1], grad.shape[1]))
    torch.library.register_autograd("sage_fast::conv3x3", _backward, setup_context=_setup_context)
    torch.library.register_autograd("sage_fast::conv3x3_taps", _backward_taps, setup_context=_setup_context)
