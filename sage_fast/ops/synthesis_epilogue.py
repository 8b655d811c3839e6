"""What happens behind the convolution of a styled layer, one pass over its output, for inference on a GPU.

Activations are [N, H, W, C] and contiguous, which is what ``channels_last`` convolutions give; sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native

__all__ = ["activated", "blur_epilogue", "blur_epilogue_reference", "styled_epilogue", "styled_epilogue_reference"]


def styled_epilogue(
    x: Tensor,
    factor: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: float,
    next_style: Tensor | None,
    image_weight: Tensor,
    image_bias: Tensor,
    skip: Tensor | None,
    slope: float,
    gain: float,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """Finish a layer that keeps its size, and take its image from it while it is at hand.

    The activation is ``clamp(gain * leaky_relu(x * factor + strength * noise + bias))``. Rows of ``factor``,
    ``next_style`` and ``image_weight`` may be longer than C, all alike; what is behind C is not read.

    Args:
        x: [N, H, W, C] float32, float16 or bfloat16; C a multiple of 8.
        factor: [N, >= C] demodulation, float32 like all that follows.
        bias: [C].
        noise: [1 or N, 1, H, W] or None.
        next_style: [N, >= C] of the layer that reads ``y``, or None when nobody does.
        image_weight: [N, channels, >= C] weight of the layer to the image times its style, 1 to 4 channels.
        image_bias: [channels].
        skip: [N, channels, H / 2, W / 2], the image of half the size, upsampled by [1, 3, 3, 1] and added; or None.
        slope: of the leaky ReLU below zero, 0 to 1.
        gain: factor behind it, above 0.
        clamp: largest magnitude of the activation, and of the image before ``skip``; negative: none.
    Returns:
        ``y`` [N, H, W, C] in the dtype of ``x``, the activation times ``next_style`` (empty without one), and the image
        [N, channels, H, W] float32.
    """
    arguments = (x, factor, bias, noise, strength, next_style, image_weight, image_bias, skip, slope, gain, clamp)
    if not _native.has_kernel("styled_epilogue", x.device.type):
        return styled_epilogue_reference(*arguments)
    return torch.ops.sage_fast.styled_epilogue(*arguments)


def styled_epilogue_reference(
    x, factor, bias, noise, strength, next_style, image_weight, image_bias, skip, slope, gain, clamp
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    c = x.shape[-1]
    y = activated(x.float(), factor, bias, noise, strength, slope, gain, clamp)
    image = torch.einsum("nhwc,nkc->nkhw", y, image_weight[..., :c]) + image_bias[:, None, None]
    image = image if clamp < 0 else image.clamp(-clamp, clamp)
    if skip is not None:
        k = skip.shape[1]
        image = image + F.conv_transpose2d(skip, _fir(skip).expand(k, 1, 4, 4), stride=2, padding=1, groups=k)
    if next_style is None:
        return x.new_empty(0), image
    return (y * next_style[:, None, None, :c]).to(x.dtype), image


def blur_epilogue(
    x: Tensor,
    factor: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: float,
    next_style: Tensor,
    slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """Blur the output of a transposed convolution of stride 2 by [1, 3, 3, 1] / 4 on both axes and finish the layer.

    Args:
        x: [N, 2 H + 1, 2 W + 1, C]; the others as for :func:`styled_epilogue`, noise [1 or N, 1, 2 H, 2 W].
    Returns:
        [N, 2 H, 2 W, C] in the dtype of ``x``: the activation times ``next_style``.
    """
    arguments = (x, factor, bias, noise, strength, next_style, slope, gain, clamp)
    if not _native.has_kernel("blur_epilogue", x.device.type):
        return blur_epilogue_reference(*arguments)
    return torch.ops.sage_fast.blur_epilogue(*arguments)


def blur_epilogue_reference(x, factor, bias, noise, strength, next_style, slope, gain, clamp) -> Tensor:
    """The same in plain PyTorch."""
    c = x.shape[-1]
    wide = x.float().permute(0, 3, 1, 2)
    wide = F.conv2d(wide, _fir(wide).expand(c, 1, 4, 4), padding=1, groups=c).permute(0, 2, 3, 1)
    y = activated(wide, factor, bias, noise, strength, slope, gain, clamp)
    return (y * next_style[:, None, None, :c]).to(x.dtype).contiguous()


def activated(x, factor, bias, noise, strength, slope, gain, clamp) -> Tensor:
    """The activation of a convolution's output [N, H, W, C] in plain PyTorch."""
    x = x * factor[:, None, None, : x.shape[-1]]
    if noise is not None:
        x = x + strength * noise[:, 0, :, :, None]
    x = F.leaky_relu(x + bias, slope) * gain
    return x if clamp < 0 else x.clamp(-clamp, clamp)


def _fir(like: Tensor) -> Tensor:
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25], device=like.device, dtype=like.dtype)
    return torch.outer(taps, taps)


@_native.when_loaded
def _register() -> None:
    def styled(x, factor, bias, noise, strength, next_style, image_weight, image_bias, *_):
        n, h, w, _c = x.shape
        y = x.new_empty(0) if next_style is None else torch.empty_like(x)
        return y, factor.new_empty(n, len(image_bias), h, w)

    def blur(x, *_):
        n, h, w, c = x.shape
        return x.new_empty(n, h - 1, w - 1, c)

    torch.library.register_fake("sage_fast::styled_epilogue", styled)
    torch.library.register_fake("sage_fast::blur_epilogue", blur)
