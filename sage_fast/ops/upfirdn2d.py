"""Pad, upsample, filter and downsample images: the resampling of StyleGAN2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import takes_arrays
from sage_fast.ops.inputs import FLOATS, number, require_floats, require_real, require_same_device

__all__ = ["check_filter", "upfirdn2d", "upfirdn2d_reference"]

Padding = int | Sequence[int]
_MOST_PADDING = 2**16  # kMostPadding of csrc/upfirdn2d.h


@takes_arrays("x", "f")
def upfirdn2d(
    x: Tensor,
    f: Tensor,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample by zeros, pad, convolve with ``f`` and keep every ``down``-th pixel.

    In this order: (1) ``up - 1`` zeros after each pixel, (2) ``padding`` zeros around (negative: crop), (3) a true
    convolution with ``f`` (a correlation with ``flip_filter``), valid positions only, (4) every ``down``-th row and column,
    (5) times ``gain``. Implements the resampling of Karras et al. 2020 [StyleGAN2]. Differentiable any number of times in x;
    ``f`` gets no gradient.

    Args:
        x: images [N, C, H, W], floating.
        f: filter [kh, kw], or [k] for the outer product of itself; at most 32 a side, of any real dtype, where x is.
        up, down: integer factors, the same for rows and columns.
        padding: one integer, or (left, right, top, bottom), counted in upsampled pixels; each at most 2^16.
        gain: factor on the result; ``up ** 2`` keeps the brightness of a filter that sums to one.
    Returns:
        [N, C, OH, OW] with OH = (H * up + top + bottom - kh) // down + 1, in the dtype and memory format of x.
    Raises:
        InputError: a shape, factor or padding that leaves no output, or a filter that is not real or elsewhere than x.
    """
    pad, gain = _tidy(x, f, up, down, padding, flip_filter, gain)
    if _native.has_kernel("upfirdn2d", x.device.type):
        if x.device.type != "cpu":  # where a kernel cannot look at the filter first
            f = (torch.outer(f, f) if f.ndim == 1 else f).to(x.dtype)
        elif f.dtype not in FLOATS:
            f = f.to(x.dtype)
        return _native.call(torch.ops.sage_fast.upfirdn2d.default, (x, f), up, down, *pad, flip_filter, gain)
    return upfirdn2d_reference(x, f, up, down, pad, flip_filter, gain)


def _on_host(host, x, f, up, down, padding, flip_filter, gain):
    if x.dtype.name not in ("float32", "float64", "float16"):
        return None
    if f.dtype.kind not in "fiub":
        return None
    padding, gain = _settings(up, down, padding, flip_filter, gain)  # the host module would cut fractions off
    if f.dtype.kind != "f":
        f = f.astype(x.dtype)
    return host.upfirdn2d(x, f, up, down, padding, flip_filter, gain)


def upfirdn2d_reference(
    x: Tensor,
    f: Tensor,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """The same in plain PyTorch, step by step."""
    (left, right, top, bottom), gain = _tidy(x, f, up, down, padding, flip_filter, gain)
    f = (torch.outer(f, f) if f.ndim == 1 else f).to(x.dtype)
    n, c, h, w = x.shape
    # 1. zeros after each pixel
    x = x.reshape(n, c, h, 1, w, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    # 2. pad, then crop, which may take off more than there was
    for change in (max, min):
        sides = [change(side, 0) for side in (left, right, top, bottom)]
        x = F.pad(x, sides) if any(sides) else x
    # 3. convolve: conv2d correlates, so the filter is flipped for a convolution
    taps = f if flip_filter else f.flip((0, 1))
    height, width = x.shape[2:]
    x = F.conv2d(x.reshape(n * c, 1, height, width), taps[None, None])
    # 4. decimate, 5. scale
    return x[:, :, ::down, ::down].reshape(n, c, *_out_size(height, width, f, down)) * gain


def _tidy(
    x: Tensor, f: Tensor, up: int, down: int, padding: Padding, flip_filter: bool, gain: float
) -> tuple[tuple[int, int, int, int], float]:
    require_floats("x", x, 4, "images [N, C, H, W]")
    check_filter("f", f, x)
    shape, sides = x.shape, f.shape
    pad, gain = _settings(up, down, padding, flip_filter, gain)
    height, width = shape[2] * up + pad[2] + pad[3], shape[3] * up + pad[0] + pad[1]
    if shape[2] < 1 or shape[3] < 1 or height < sides[0] or width < sides[-1]:
        raise InputError(
            f"padding {list(pad)} leaves images of {height} x {width} px, expected at least the filter's "
            f"{sides[0]} x {sides[-1]}; x is {list(shape)}."
        )
    return pad, gain


def _settings(
    up: int, down: int, padding: Padding, flip_filter: bool, gain: float
) -> tuple[tuple[int, int, int, int], float]:
    """The four sides of the padding and the gain, once all settings are found right."""
    for name, factor in (("up", up), ("down", down)):
        if type(factor) is not int or not 1 <= factor < 2**31:
            raise InputError(f"{name} must be a positive integer below 2^31, got {factor!r}.")
    if not isinstance(flip_filter, int):  # bool is one
        raise InputError(f"flip_filter must be True or False, got {flip_filter!r:.60}.")
    pad = (padding,) * 4 if isinstance(padding, int) else tuple(padding) if isinstance(padding, Sequence) else ()
    if len(pad) != 4 or not all(isinstance(p, int) and -(2**31) < p <= _MOST_PADDING for p in pad):
        raise InputError(
            f"padding must be one integer or (left, right, top, bottom), each at most {_MOST_PADDING}, got {padding!r:.100}."
        )
    return pad, number("gain", gain)


def check_filter(name: str, f: Tensor, x: Tensor) -> None:
    """Raise InputError unless ``f``, which the caller calls ``name``, is a filter for images ``x``."""
    require_real(name, f)
    require_same_device(name, f, x, "x")
    if f.ndim not in (1, 2) or not all(1 <= k <= 32 for k in f.shape):
        raise InputError(f"{name} must have shape [k] or [kh, kw] with sides from 1 to 32, got {list(f.shape)}.")
    if f.requires_grad:
        raise InputError(
            f"{name} must not require a gradient: upfirdn2d does not learn its filter; pass {name}.detach()."
        )


def _out_size(height: int, width: int, f: Tensor, down: int) -> tuple[int, int]:
    return (height - f.shape[0]) // down + 1, (width - f.shape[-1]) // down + 1


def _fake(x, f, up, down, left, right, top, bottom, flip_filter, gain):
    height, width = x.shape[2] * up + top + bottom, x.shape[3] * up + left + right
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    y = x.new_empty(*x.shape[:2], *_out_size(height, width, f, down))
    return torch.empty_like(y, memory_format=torch.channels_last) if last else y


def _setup_context(ctx, inputs, output):
    x, f, *ctx.settings = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(f)


def _backward(ctx, grad):
    """The transpose swaps up and down, flips the filter, and pads so that the size comes back."""
    (f,) = ctx.saved_tensors
    up, down, left, _, top, _, flip_filter, gain = ctx.settings
    kh, kw = f.shape[0], f.shape[-1]
    height, width = ctx.size
    left, top = kw - 1 - left, kh - 1 - top
    # one less than a multiple of `up` more rows would do too: take those that give exactly `height` rows
    bottom = (height - 1) * up + kh - grad.shape[2] * down - top
    right = (width - 1) * up + kw - grad.shape[3] * down - left
    op = torch.ops.sage_fast.upfirdn2d.default
    grad_x = _native.call(op, (grad, f), down, up, left, right, top, bottom, not flip_filter, gain)
    return grad_x, *[None] * 9


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::upfirdn2d", _fake)
    _native.register_autograd("upfirdn2d", _backward, _setup_context)
