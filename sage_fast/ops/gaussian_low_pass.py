"""Gaussian low-pass filter with its width in the frequency domain (Eq. 23)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError

__all__ = ["gaussian_low_pass", "gaussian_low_pass_reference"]


def gaussian_low_pass(images: Tensor, sigma: float = 5.0) -> Tensor:
    """Multiply the spectrum of each channel by ``exp(-d^2 / (2 sigma^2))``, d in cycles per image.

    Implements the low-pass of Eq. 23 of [SAGE]. Images are taken as periodic and the mean is kept exactly. It equals a circular
    Gaussian blur of ``H / (2 pi sigma)`` pixels (8.1 at 256 px for sigma 5). Differentiable any number of times.

    Args:
        images: [N, C, H, W], floating, any range.
        sigma: width of the pass band, cycles per image, positive; infinity returns the images.
    Returns:
        The shape and dtype of images.
    Raises:
        InputError: not images, or a sigma that is not positive.
    """
    _check(images, sigma)
    if math.isinf(sigma) or images.numel() == 0:
        return images.clone()
    if _kernel_pays(images, sigma) and _native.has_kernel("gaussian_low_pass", images.device.type):
        return torch.ops.sage_fast.gaussian_low_pass(images, float(sigma))
    return gaussian_low_pass_reference(images, sigma)


def _kernel_pays(images: Tensor, sigma: float) -> bool:
    """On the CPU the blur's work grows with its width; beyond about 60 pixels to each side the FFT is ahead."""
    side = max(images.shape[2:])
    reach = min(side / 2, 6 * side / (2 * math.pi * sigma))
    return images.dtype in (torch.float32, torch.float64) and (images.device.type != "cpu" or reach <= 60)


def gaussian_low_pass_reference(images: Tensor, sigma: float = 5.0) -> Tensor:
    """The same with PyTorch's FFT (in float32 at least)."""
    _check(images, sigma)
    h, w = images.shape[2:]
    x = images if images.dtype == torch.float64 else images.float()
    fy = torch.fft.fftfreq(h, 1 / h, device=x.device, dtype=x.dtype)[:, None]
    fx = torch.fft.rfftfreq(w, 1 / w, device=x.device, dtype=x.dtype)[None]
    response = torch.exp(-(fy.square() + fx.square()) / (2 * sigma**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=(h, w)).to(images.dtype)


def _check(images: Tensor, sigma: float) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images must be floating point [N, C, H, W], got {images.dtype} {list(images.shape)}.")
    if not sigma > 0:
        raise InputError(f"sigma must be positive, in cycles per image, got {sigma}.")


def _setup_context(ctx, inputs, output):
    ctx.sigma = inputs[1]


def _backward(ctx, grad):
    """A symmetric linear map: its own transpose."""
    return gaussian_low_pass(grad.contiguous(), ctx.sigma), None


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::gaussian_low_pass", lambda images, sigma: images.new_empty(images.shape))
    torch.library.register_autograd("sage_fast::gaussian_low_pass", _backward, setup_context=_setup_context)
