"""The convolution of StyleGAN2: its weight scaled per sample by a style, and normalised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.ops.conv3x3 import conv3x3, conv3x3_transposed
from sage_fast.ops.convolution import conv2d, conv_transpose2d
from sage_fast.ops.inputs import FLOATS, number, require_floats, seen
from sage_fast.ops.upfirdn2d import check_filter, upfirdn2d, upfirdn2d_reference

__all__ = ["modulated_conv2d", "modulated_conv2d_reference", "unscaled_conv2d"]


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    resample_filter: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Convolve with ``weight * style`` per sample, each output channel's weight scaled to unit norm.

    Implements Eq. 1 and 3 of Karras et al. 2020 [StyleGAN2]. One weight serves the whole batch: the style scales the input
    channels and the norm divides the output channels, which is the same sum in another order and needs no grouped
    convolution. Differentiable any number of times.

    Args:
        x: [N, C_in, H, W].
        weight: [C_out, C_in, k, k], k odd; [N, C_out, C_in, k, k] for a weight of each sample's own, convolved in groups.
        style: [N, C_in].
        demodulate: divide by the norm of the modulated weight (off in ToRGB).
        up: 1, or 2 for a transposed convolution of stride 2 followed by ``resample_filter`` (blur).
        down: 1, or 2 for ``resample_filter`` followed by a convolution of stride 2.
        resample_filter: [kh, kw] that sums to one, needed when ``up`` or ``down`` is 2.
    Returns:
        [N, C_out, H * up / down, W * up / down].
    Raises:
        InputError: shapes or devices that do not fit, no channels or pixels (two a side with ``down``), or a resample filter
            that is missing or without use.
    """
    y, factor = unscaled_conv2d(x, weight, style, demodulate, up, down, resample_filter, eps)
    return y if factor is None else y * factor[:, :, None, None].to(y.dtype)


def unscaled_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    resample_filter: Tensor | None = None,
    eps: float = 1e-8,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """:func:`modulated_conv2d` with ``scale * weight``, but for its last step: the result, and the factor [N, C_out] to
    multiply it by, or None.

    For who does more in the same pass (``ops.scaled_bias_act``), and whose weights have an equalised learning rate.
    """
    eps = _check(x, weight, style, up, down, resample_filter, eps)
    if weight.ndim == 5 and x.shape[0] == 0:
        weight = weight.sum(0)  # of no samples: groups cannot be none
    if weight.ndim == 5:
        weight = _modulated(weight * scale, style[:, None], demodulate, eps)
        return _convolve(x, weight, up, down, resample_filter), None
    if weight.shape[2] == up == down == 1 and not demodulate:  # a product of matrices: no pass over x for the style
        return _mix_channels(x, (weight[:, :, 0, 0] * scale * style[:, None]).to(x.dtype)), None
    style, factor = _demodulation(x, weight, style, eps, scale) if demodulate else (style, None)
    x = x * style[:, :, None, None].to(x.dtype)
    return _convolve(x, weight, up, down, resample_filter, scale), factor


def _mix_channels(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, C, H, W], weight [N, K, C] -> [N, K, H, W], which lies in memory as x does; and so do its gradients."""
    if x.stride(1) == 1:  # channels last
        n, _, h, w = x.shape
        pixels = torch.bmm(x.permute(0, 2, 3, 1).flatten(1, 2), weight.transpose(1, 2))
        return pixels.view(n, h, w, weight.shape[1]).permute(0, 3, 1, 2)
    return torch.einsum("nchw,nkc->nkhw", x, weight)


def _demodulation(x: Tensor, weight: Tensor, style: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """The style [N, C_in] and the factor [N, C_out] that scales the outputs to unit norm; at least in float32."""
    style = style.float() if style.dtype in (torch.float16, torch.bfloat16) else style
    norm = (scale * style).square() @ weight.to(style.dtype).square().sum((2, 3)).t()
    factor = torch.rsqrt(norm + eps)
    if x.dtype == torch.float16:  # a large style would leave float16 before the factor brings it back
        size = style.detach().abs().amax(1, keepdim=True).clamp_min(1e-12)
        style, factor = style / size, factor * size
    return style, factor


def modulated_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    resample_filter: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """The same, as the equations are printed: a weight for each sample, one convolution a sample."""
    eps = _check(x, weight, style, up, down, resample_filter, eps)
    weights = weight if weight.ndim == 5 else weight.expand(len(x), -1, -1, -1, -1)
    outputs = []
    for image, w, s in zip(x, weights, style):
        w = _modulated(w, s, demodulate, eps)
        outputs.append(_convolve(image[None], w, up, down, resample_filter, plain=True))
    if outputs:
        return torch.cat(outputs)
    return _convolve(x, weight.sum(0) if weight.ndim == 5 else weight, up, down, resample_filter, plain=True)


def _modulated(weight: Tensor, style: Tensor, demodulate: bool, eps: float) -> Tensor:
    """The weight [..., C_out, C_in, k, k] scaled by the style [..., C_in] and to unit norm."""
    w = weight * style[..., None, None]  # Eq. 1
    return w * torch.rsqrt(w.square().sum((-3, -2, -1), keepdim=True) + eps) if demodulate else w  # Eq. 3


def _convolve(
    x: Tensor, weight: Tensor, up: int, down: int, f: Tensor | None, scale: float = 1.0, plain: bool = False
) -> Tensor:
    """'Same' convolution with 2-fold up- or downsampling behind or before an FIR filter; ``plain``: by PyTorch alone."""
    k = weight.shape[-1]
    native = k == 3 and weight.ndim == 4 and not plain
    resample = upfirdn2d_reference if plain else upfirdn2d
    if not native:
        weight = (weight if scale == 1 else weight * scale).to(x.dtype)
    if up == 2 and f is not None:
        # Stride 2 and a k x k kernel give 2 H + k - 2 rows; the filter needs kh - 1 rows around 2 H.
        x = conv3x3_transposed(x, weight.transpose(0, 1), scale) if native else _transposed(x, weight, plain)
        pad = [f.shape[1] - k + 1, f.shape[0] - k + 1]  # in all, of columns and rows
        return resample(x, f, padding=[(pad[0] + 1) // 2, pad[0] // 2, (pad[1] + 1) // 2, pad[1] // 2], gain=4.0)
    if down == 2 and f is not None:
        pad = [f.shape[1] + k - 3, f.shape[0] + k - 3]
        x = resample(x, f, padding=[(pad[0] + 1) // 2, pad[0] // 2, (pad[1] + 1) // 2, pad[1] // 2])
        return conv3x3(x, weight, 2, scale) if native else _plain(x, weight, plain, stride=2)
    return conv3x3(x, weight, scale=scale) if native else _plain(x, weight, plain, padding=k // 2)


def _plain(x: Tensor, weight: Tensor, plain: bool, stride: int = 1, padding: int = 0) -> Tensor:
    """``conv2d`` with one weight for all samples or, with five dimensions, one for each, as groups."""
    if weight.ndim == 4:
        return (F.conv2d if plain else conv2d)(x, weight, stride=stride, padding=padding)
    n = x.shape[0]
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), stride=stride, padding=padding, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


def _transposed(x: Tensor, weight: Tensor, plain: bool) -> Tensor:
    """The transposed convolution of stride 2; weights as of :func:`_plain`."""
    weight = weight.transpose(-4, -3)
    if weight.ndim == 4:
        return (F.conv_transpose2d if plain else conv_transpose2d)(x, weight, stride=2)
    n = x.shape[0]
    y = F.conv_transpose2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), stride=2, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


def _check(x: Tensor, weight: Tensor, style: Tensor, up: int, down: int, f: Tensor | None, eps: float) -> float:
    require_floats("x", x, 4, "[N, C_in, H, W]")
    for name, tensor in (("weight", weight), ("style", style)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.device != x.device:
            where = f" on {tensor.device}" if isinstance(tensor, Tensor) else ""
            raise InputError(f"{name} must be floating point on {x.device}, as x is, got {seen(tensor)}{where}.")
    if weight.ndim not in (4, 5) or weight.shape[-2] != weight.shape[-1] or weight.shape[-1] % 2 == 0:
        raise InputError(f"weight must have shape [C_out, C_in, k, k] with k odd, got {list(weight.shape)}.")
    if weight.ndim == 5 and weight.shape[0] != x.shape[0]:
        raise InputError(f"weight must be one for each of the {len(x)} samples of x, got {len(weight)}.")
    if x.shape[1] != weight.shape[-3]:
        raise InputError(f"x must have the {weight.shape[-3]} channels of weight, got {x.shape[1]}.")
    if style.shape != x.shape[:2]:
        raise InputError(
            f"style must have shape {list(x.shape[:2])}, one factor per input channel, got {list(style.shape)}."
        )
    if 0 in weight.shape[-4:]:
        raise InputError(f"weight must have at least one channel on either side, got {list(weight.shape)}.")
    if type(up) is not int or type(down) is not int or (up, down) not in ((1, 1), (2, 1), (1, 2)):
        raise InputError(f"up and down must be 1 and 1, 2 and 1, or 1 and 2, got {up!r:.60} and {down!r:.60}.")
    if x.shape[2] < down or x.shape[3] < down:
        raise InputError(f"x must have at least {down} rows and columns with down={down}, got {list(x.shape)}.")
    if (f is None) == (up * down == 2):
        needed = "needed with up=2 or down=2" if f is None else "ignored without up=2 or down=2; leave it out"
        raise InputError(f"resample_filter is {needed}.")
    if f is not None:
        check_filter("resample_filter", f, x)
        if f.ndim != 2:
            raise InputError(f"resample_filter must have shape [kh, kw], got {list(f.shape)}.")
    return number("eps", eps)
