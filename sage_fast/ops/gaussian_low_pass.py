"""Gaussian low-pass filter, its width in frequencies (Eq. 23) or in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import of_one_float, takes_arrays
from sage_fast.ops.inputs import number, require_floats

__all__ = ["gaussian_low_pass", "gaussian_low_pass_reference"]

BORDERS, UNITS = ("circular", "reflect"), ("frequency", "pixels")
_TAIL = 9.0  # standard deviations at which the reference's Gaussian in pixels ends: exp(-40)


@takes_arrays("images")
def gaussian_low_pass(images: Tensor, sigma: float = 5.0, border: str = "circular", unit: str = "frequency") -> Tensor:
    """Multiply the spectrum of each channel by ``exp(-d^2 / (2 sigma^2))``, d in cycles per image.

    Implements the low-pass of Eq. 23 of [SAGE]; a constant is kept exactly. With the defaults images are periodic, as
    for the FFT, and it equals a circular Gaussian blur of ``H / (2 pi sigma)`` pixels (8.1 at 256 px for sigma 5).
    Differentiable any number of times.

    Args:
        images: [N, C, H, W], floating, any range.
        sigma: positive. Width of the pass band, where infinity returns the images; with ``unit="pixels"`` the standard
            deviation of the blur.
        border: ``"circular"``, or ``"reflect"``: mirrored about the outermost pixels, which are not repeated. That is
            PyTorch's ``reflect``, OpenCV's ``BORDER_REFLECT_101`` and SciPy's ``mirror`` (not its ``reflect``).
        unit: ``"frequency"``, cycles per image of H (of W) pixels; or ``"pixels"``, the sampled Gaussian with sum one
            of SciPy and OpenCV, in full where they cut it at 4 sigma.
    Returns:
        The shape and dtype of images.
    Raises:
        InputError: not images, a sigma that is not positive (in pixels: nor finite), an unknown border or unit.
    """
    sigma = _check(images, sigma, border, unit)
    if math.isinf(sigma) or images.numel() == 0:
        return images.clone()
    if kernel_pays("gaussian_low_pass", images, sigma, unit):
        op = torch.ops.sage_fast.gaussian_low_pass.default
        return _native.call(op, (images,), sigma, border == "reflect", unit == "pixels")
    return gaussian_low_pass_reference(images, sigma, border, unit)


def kernel_pays(op: str, images: Tensor, sigma: float, unit: str = "frequency") -> bool:
    """Whether a kernel of ``op`` takes the images, and is ahead of the FFT."""
    takes = images.dtype in (torch.float32, torch.float64) and not fft_is_ahead(images.shape[2:], sigma, unit)
    return takes and _native.has_kernel(op, images.device.type)


def fft_is_ahead(size: Sequence[int], sigma: float, unit: str = "frequency") -> bool:
    """On large images with a pass band up to the highest frequency, which needs all the pixels of a row for each."""
    return unit == "frequency" and max(size) > 512 and 12 * sigma > max(size)


def _on_host(host, images, sigma, border, unit):
    takes = of_one_float(images) and images.ndim == 4 and border in BORDERS and unit in UNITS and sigma < math.inf
    if not takes or fft_is_ahead(images.shape[2:], sigma, unit):
        return None
    return host.gaussian_low_pass(images, sigma, border == "reflect", unit == "pixels")


def gaussian_low_pass_reference(
    images: Tensor, sigma: float = 5.0, border: str = "circular", unit: str = "frequency"
) -> Tensor:
    """The same with PyTorch's FFT (in float32 at least), of the mirrored image where the border reflects."""
    sigma = _check(images, sigma, border, unit)
    if images.numel() == 0:
        return images.clone()
    h, w = images.shape[2:]
    x = images if images.dtype == torch.float64 else images.float()
    if border == "reflect":  # rows 0 to H - 1, then H - 2 to 1: as periodic as mirrored
        x = torch.cat([x, x[..., 1:-1, :].flip(-2)], -2)
        x = torch.cat([x, x[..., 1:-1].flip(-1)], -1)
    down, across = (
        _response(period, sigma * period / n if unit == "frequency" else sigma, unit)
        for period, n in zip(x.shape[2:], (h, w), strict=True)
    )
    response = (down[:, None] * across[: x.shape[3] // 2 + 1]).to(x)
    return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=x.shape[2:])[..., :h, :w].to(images.dtype)


def _response(n: int, sigma: float, unit: str) -> Tensor:
    """[n], float64: of each frequency of a circle of n pixels."""
    if unit == "frequency":
        return torch.exp(-(torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) / sigma).square() / 2)
    sigma = min(sigma, 2.0 * n)  # beyond it only the mean is left
    x = torch.arange(-math.ceil(_TAIL * sigma), math.ceil(_TAIL * sigma) + 1)
    taps = torch.zeros(n, dtype=torch.float64).index_add_(0, x % n, torch.exp(-(x.double() / sigma).square() / 2))
    return torch.fft.fft(taps / taps.sum()).real


def _check(images: Tensor, sigma: float, border: str, unit: str) -> float:
    require_floats("images", images, 4, "[N, C, H, W]")
    sigma = number("sigma", sigma)
    if not isinstance(border, str) or border not in BORDERS:
        raise InputError(f"border must be one of {', '.join(BORDERS)}, got '{border}'.")
    if not isinstance(unit, str) or unit not in UNITS:
        raise InputError(f"unit must be one of {', '.join(UNITS)}, got '{unit}'.")
    if not sigma > 0 or (unit == "pixels" and math.isinf(sigma)):
        kind = "positive, in cycles per image" if unit == "frequency" else "positive and finite, in pixels"
        raise InputError(f"sigma must be {kind}, got {sigma}.")
    return sigma


def _setup_context(ctx, inputs, output):
    ctx.settings = inputs[1:]


def _backward(ctx, grad):
    """On a circle a symmetric map; mirrored, one after its columns for the outermost pixels are halved."""
    sigma, reflect, pixels = ctx.settings
    share = _outermost_halved(grad) if reflect else 1
    low = gaussian_low_pass(grad.contiguous() / share, sigma, BORDERS[reflect], UNITS[pixels])
    return low * share, None, None, None


def _outermost_halved(images: Tensor) -> Tensor:
    """[H, W]: 1, half of it at the ends of each axis; they stand once in a period of the mirrored line, others twice."""
    h, w = (torch.ones(n, dtype=images.dtype, device=images.device) for n in images.shape[2:])
    for line in (h, w):
        if len(line) > 1:
            line[[0, -1]] = 0.5
    return torch.outer(h, w)


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::gaussian_low_pass", lambda images, *_, **__: images.new_empty(images.shape))
    _native.register_autograd("gaussian_low_pass", _backward, _setup_context)
