"""A styled layer in one kernel, for inference on a GPU: a 3 x 3 convolution on tensor cores with all that follows it.

Activations are [N, H, W, C] and contiguous, so the convolution is a product of matrices: pixels by the channels of their
neighbours, times weights. An up layer, which elsewhere is a transposed convolution of stride 2 and a blur, is four convolutions
at the size of its input with weights that hold the blur, one for each parity of the output's row and column: 4 times the
multiplications of the transposed convolution, and nothing that is written and read between.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.ops.synthesis_epilogue import activated, styled_epilogue_reference

__all__ = ["composed_weight", "styled_conv", "styled_conv_reference"]

_FIR = (0.25, 0.75, 0.75, 0.25)


def styled_conv(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: float,
    next_style: Tensor | None,
    image_weight: Tensor | None,
    image_bias: Tensor | None,
    skip: Tensor | None,
    up: bool,
    slope: float,
    gain: float,
    clamp: float,
    columns: int = 0,
) -> tuple[Tensor, Tensor]:
    """Convolve, and finish the layer as :func:`~sage_fast.ops.synthesis_epilogue.styled_epilogue` does.

    Products are those of x's dtype with sums in float32. Of float32 they are TF32's: ``x`` is rounded to its 10 bits of
    fraction, of ``weight`` further bits are dropped (:func:`composed_weight` has rounded them).

    Args:
        x: [N, H, W, C_in] float32, float16 or bfloat16, times the layer's style; C_in and C_out multiples of 8; less than
            2^31 pixels.
        weight: [1, C_out, 9, C_in], for ``up`` [4, C_out, 9, C_in], in the dtype of ``x``: :func:`composed_weight`.
        factor: [N, >= C_out] demodulation, float32 like all that follows; H' = H or, for ``up``, 2 H.
        bias: [C_out].
        noise: [1 or N, 1, H', W'] or None, times ``strength``.
        next_style: [N, >= C_out] of the layer that reads ``y``, or None when nobody does.
        image_weight: [N, channels, >= C_out] weight of the layer to the image times its style, 1 to 4 channels; None: no image.
        image_bias: [channels], with ``image_weight``.
        skip: [N, channels, H' / 2, W' / 2], the image of half the size, upsampled and added; or None.
        clamp: largest magnitude of the activation, and of the image before ``skip``; negative: none.
        columns: output channels that a block of the kernel works on, 32, 64 or 128; 0: chosen by the shape.
    Returns:
        ``y`` [N, H', W', C_out] in the dtype of ``x``, the activation times ``next_style`` (empty without one), and the image
        [N, channels, H', W'] float32 (empty without weights).
    Raises:
        ValueError: what the kernel cannot take, by its own check.
    """
    tensors = (x, weight, factor, bias, noise, strength, next_style, image_weight, image_bias, skip)
    if not _native.has_kernel("styled_conv", x.device.type):
        return styled_conv_reference(*tensors, up, slope, gain, clamp)
    return torch.ops.sage_fast.styled_conv(*tensors, up, slope, gain, clamp, columns)


def styled_conv_reference(
    x, weight, factor, bias, noise, strength, next_style, image_weight, image_bias, skip, up, slope, gain, clamp
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, products in float32."""
    n, h, w, c_in = x.shape
    phases, c_out = weight.shape[:2]
    filters = weight.float().view(phases * c_out, 3, 3, c_in).permute(0, 3, 1, 2)
    wide = F.conv2d(x.float().permute(0, 3, 1, 2), filters, padding=1)
    wide = wide.view(n, phases, c_out, h, w)
    if up:
        wide = wide.view(n, 2, 2, c_out, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, 1, c_out, 2 * h, 2 * w)
    wide = wide[:, 0].permute(0, 2, 3, 1)
    if image_weight is None:
        y = activated(wide, factor, bias, noise, strength, slope, gain, clamp)
        y = wide.new_empty(0) if next_style is None else y * next_style[:, None, None, :c_out]
        image = wide.new_empty(0)
    else:
        rule = (skip, slope, gain, clamp)
        y, image = styled_epilogue_reference(
            wide, factor, bias, noise, strength, next_style, image_weight, image_bias, *rule
        )
    return y.to(x.dtype).contiguous(), image


def composed_weight(weight: Tensor, up: bool, dtype: torch.dtype) -> Tensor:
    """The weight of :func:`styled_conv` from that of a 3 x 3 convolution.

    For ``up``, output 2 i + p of one axis is made of inputs i - 1, i and i + 1: the transposed convolution brings input i + d
    by its tap t to place 2 (i + d) + t, and the blur brings that place to the output by its tap 2 d + t - p + 1.

    Args:
        weight: [C_out, C_in, 3, 3] float32.
        up: as for :func:`styled_conv`; the blur is [1, 3, 3, 1] / 4 on both axes.
        dtype: of the products. float32: rounded to TF32, to the nearest, ties away from zero.
    Returns:
        [1 or 4, C_out, 9, C_in].
    """
    wide = weight[None].double()
    if up:
        axis = torch.zeros(2, 3, 3, dtype=torch.float64)  # parity, tap of the composition, tap of the weight
        for p in range(2):
            for d in range(3):
                for t in range(3):
                    k = 2 * (d - 1) + t - p + 1
                    axis[p, d, t] = _FIR[k] if 0 <= k < 4 else 0.0
        axis = axis.to(weight.device)
        wide = torch.einsum("oiyx,pdy,qex->pqoide", weight.double(), axis, axis).flatten(0, 1)
    wide = wide.permute(0, 1, 3, 4, 2).flatten(2, 3)
    rounded = _rounded_to_tf32(wide.float()) if dtype == torch.float32 else wide.to(dtype)
    return rounded.contiguous()


def _rounded_to_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@_native.when_loaded
def _register() -> None:
    def fake(x, weight, factor, bias, noise, strength, next_style, image_weight, image_bias, skip, up, *_):
        n, h, w, _c_in = x.shape
        size = (2 * h, 2 * w) if up else (h, w)
        y = x.new_empty(0) if next_style is None else x.new_empty(n, *size, weight.shape[1])
        image = factor.new_empty(0) if image_bias is None else factor.new_empty(n, len(image_bias), *size)
        return y, image

    torch.library.register_fake("sage_fast::styled_conv", fake)
