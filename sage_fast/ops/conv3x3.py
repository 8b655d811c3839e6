"""3 x 3 convolutions of stride 1 and 2 with fewer multiplications, and their transposes: for training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops.convolution import conv2d, conv_transpose2d
from sage_fast.ops.inputs import number, require_floats, require_same_device

__all__ = ["conv3x3", "conv3x3_reference", "conv3x3_transposed", "conv3x3_transposed_reference"]

_MIN_TILES = 16  # of 4 x 4 outputs in a batch; below, the transforms of the weights cost more than they save


def conv3x3(x: Tensor, weight: Tensor, stride: int = 1, scale: float = 1.0) -> Tensor:
    """``F.conv2d(x, scale * weight, padding=1)``, with stride 2 ``F.conv2d(x, scale * weight, stride=2)``.

    Differentiable any number of times.

    On the CPU, square images whose results have sides that are multiples of 4, with channels that are multiples of 16, go
    through the transform's domain, in the forward pass and in both gradients: 2.25 multiplications a pixel instead of 9 by
    Winograd's F(4 x 4, 3 x 3), 5.06 with stride 2 by Toom-Cook. bfloat16 images at stride 2 are multiplied as they are, by
    weights rounded to bfloat16, where the processor has such products and channels are multiples of 32. Weights and sums are
    float32, images float32 or bfloat16; the result is channels last. Under autocast to bfloat16 the images are bfloat16, as
    PyTorch's are. Everything else is PyTorch's convolution.

    Args:
        x: [N, C_in, H, W], floating; with stride 2, sides are odd for the fewer multiplications.
        weight: [C_out, C_in, 3, 3].
        stride: 1, or 2.
        scale: of the weight (an equalised learning rate), which the kernels apply on their way.
    Returns:
        [N, C_out, H, W], or with stride 2 [N, C_out, (H - 1) // 2, (W - 1) // 2].
    Raises:
        InputError: shapes, dtypes or devices that do not belong together, images too small for a result, another stride, or a scale
            that is no number.
    """
    _check(x, weight, 1, stride)
    x, scale = _autocast(x), number("scale", scale)
    side = x.shape[2] if stride == 1 else (x.shape[2] - 1) / 2
    if not _kernel_pays(x, weight, side, stride):
        return conv2d(x, _scaled(weight, scale, x), stride, 2 - stride)
    return _native.call(torch.ops.sage_fast.conv3x3.default, (_last(x), _taps_together(weight)), stride, scale)


def conv3x3_reference(x: Tensor, weight: Tensor, stride: int = 1, scale: float = 1.0) -> Tensor:
    """The same in plain PyTorch."""
    _check(x, weight, 1, stride)
    return F.conv2d(x, weight * scale, stride=stride, padding=2 - stride)


def conv3x3_transposed(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """``F.conv_transpose2d(x, scale * weight, stride=2)``; derivatives, kernels and dtypes as :func:`conv3x3`.

    Args:
        x: [N, C_in, H, W], floating.
        weight: [C_in, C_out, 3, 3].
        scale: of the weight.
    Returns:
        [N, C_out, 2 H + 1, 2 W + 1].
    Raises:
        InputError: shapes, dtypes or devices that do not belong together, or images without pixels.
    """
    _check(x, weight, 0, 2)
    x, scale = _autocast(x), number("scale", scale)
    if not _kernel_pays(x, weight, x.shape[2], 2):
        return conv_transpose2d(x, _scaled(weight, scale, x), 2)
    return _native.call(torch.ops.sage_fast.conv3x3_transposed.default, (_last(x), _taps_together(weight)), 2, scale)


def conv3x3_transposed_reference(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """The same in plain PyTorch."""
    _check(x, weight, 0, 2)
    return F.conv_transpose2d(x, weight * scale, stride=2)


def _scaled(weight: Tensor, scale: float, x: Tensor) -> Tensor:
    """As PyTorch takes it: scaled at the wider of both precisions, rounded to that of ``x``."""
    return (weight if scale == 1 else weight.to(torch.promote_types(weight.dtype, x.dtype)) * scale).to(x.dtype)


def _autocast(x: Tensor) -> Tensor:
    """Images as PyTorch's convolution would take them; the weights may stay as they are."""
    if x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _kernel_pays(x: Tensor, weight: Tensor, side: float, stride: int) -> bool:
    """``side``: of the smaller of the two images, without what stride 2 adds."""
    if x.device.type != "cpu" or not _native.has_kernel("conv3x3", "cpu"):  # cuDNN has such transforms of its own
        return False
    # a graph is to serve every batch, so it is captured without a look at this one
    enough = torch.compiler.is_compiling() or _enough_tiles(x.shape[0] * int(side * side) // 16)
    by_bf16 = x.dtype == torch.bfloat16 and stride == 2
    channels = 32 if by_bf16 else 16
    return (
        (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and (stride == 1 or _native.has_bf16_products())))
        and weight.dtype == torch.float32
        and x.shape[2] == x.shape[3]
        and side % 4 == weight.shape[0] % channels == weight.shape[1] % channels == 0
        and enough
        and max(weight.shape) <= 4096
    )


def _enough_tiles(tiles: int) -> bool:
    return tiles >= _MIN_TILES or tiles == 0


def _check(x: Tensor, weight: Tensor, axis: int, stride: int) -> None:
    """``axis``: that of the weight which goes over the channels of ``x``; 0 for the transposed convolution."""
    require_floats("x", x, 4, "[N, C_in, H, W]")
    require_floats("weight", weight, 4, "[C_out, C_in, 3, 3]" if axis == 1 else "[C_in, C_out, 3, 3]")
    require_same_device("weight", weight, x, "x")
    if weight.shape[2:] != (3, 3) or weight.shape[axis] != x.shape[1]:
        shape = f"[C_out, {x.shape[1]}, 3, 3]" if axis == 1 else f"[{x.shape[1]}, C_out, 3, 3]"
        raise InputError(f"weight must have shape {shape}, as x has channels, got {list(weight.shape)}.")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise InputError(f"weight must have at least one channel on either side, got {list(weight.shape)}.")
    if type(stride) is not int or stride not in (1, 2):
        raise InputError(f"stride must be 1 or 2, got {stride!r:.60}.")
    least = 3 if axis == 1 and stride == 2 else 1
    if x.shape[2] < least or x.shape[3] < least:
        raise InputError(f"x must have at least {least} rows and columns, got {list(x.shape)}.")


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _last_of_gradient(grad: Tensor) -> Tensor:
    """The same by axes: batches of gradients (``is_grads_batched``) know no memory formats."""
    return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _taps_together(weight: Tensor) -> Tensor:
    """The 9 taps of a filter side by side in memory, filters in any order."""
    return weight if weight.stride()[2:] == (3, 1) else weight.contiguous()


# Three products, linear in each of two factors; every derivative of one is another.


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad = _last_of_gradient(grad)
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    grad_x = (
        _native.call(torch.ops.sage_fast.conv3x3_transposed.default, (grad, weight), *ctx.settings) if needs_x else None
    )
    grad_weight = (
        _native.call(torch.ops.sage_fast.conv3x3_taps.default, (x, grad), *ctx.settings) if needs_weight else None
    )
    return grad_x, grad_weight, None, None


def _backward_transposed(ctx, grad):
    y, weight = ctx.saved_tensors
    grad = _last_of_gradient(grad)
    needs_y, needs_weight, *_ = ctx.needs_input_grad
    grad_y = _native.call(torch.ops.sage_fast.conv3x3.default, (grad, weight), *ctx.settings) if needs_y else None
    grad_weight = (
        _native.call(torch.ops.sage_fast.conv3x3_taps.default, (grad, y), *ctx.settings) if needs_weight else None
    )
    return grad_y, grad_weight, None, None


def _backward_taps(ctx, grad):
    x, y = ctx.saved_tensors
    grad = grad.contiguous()
    needs_x, needs_y, *_ = ctx.needs_input_grad
    grad_x = _native.call(torch.ops.sage_fast.conv3x3_transposed.default, (y, grad), *ctx.settings) if needs_x else None
    grad_y = _native.call(torch.ops.sage_fast.conv3x3.default, (x, grad), *ctx.settings) if needs_y else None
    return grad_x, grad_y, None, None


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.settings = inputs[2:]  # stride and scale, the same for all three


def _fake_images(like: Tensor, channels: int, side: int) -> Tensor:
    return like.new_empty(like.shape[0], channels, side, side).contiguous(memory_format=torch.channels_last)


def _fake(x, weight, stride, scale=1.0):
    return _fake_images(x, weight.shape[0], x.shape[2] if stride == 1 else (x.shape[2] - 1) // 2)


def _fake_transposed(y, weight, stride, scale=1.0):
    return _fake_images(y, weight.shape[1], y.shape[2] if stride == 1 else 2 * y.shape[2] + 1)


def _fake_taps(x, y, stride, scale=1.0):
    return x.new_empty(y.shape[1], x.shape[1], 3, 3, dtype=torch.float32)


@_native.when_loaded
def _register() -> None:
    for name, fake, backward in (
        ("conv3x3", _fake, _backward),
        ("conv3x3_transposed", _fake_transposed, _backward_transposed),
        ("conv3x3_taps", _fake_taps, _backward_taps),
    ):
        torch.library.register_fake(f"sage_fast::{name}", fake)
        _native.register_autograd(name, backward, _setup_context)
