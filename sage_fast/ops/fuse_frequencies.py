"""Low frequencies of one image for another, less those of a third (Eq. 23)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import of_one_float, takes_arrays
from sage_fast.ops.gaussian_low_pass import fft_is_ahead, gaussian_low_pass, gaussian_low_pass_reference, kernel_pays
from sage_fast.ops.inputs import number, require_floats, require_same_device

__all__ = ["check_images", "fuse_frequencies", "fuse_frequencies_reference"]


@takes_arrays("real", "inverted", "edited")
def fuse_frequencies(
    real: Tensor, inverted: Tensor, edited: Tensor, gamma1: float = 1.0, gamma2: float = 1.0, sigma: float = 5.0
) -> Tensor:
    """``edited - Low(edited) + gamma1 Low(edited) + Low(real) - gamma2 Low(inverted)``.

    Implements Eq. 23 of [SAGE]. The low-pass is linear, so one of the sum is enough; with ``gamma1`` 1 and one source it
    is shared by all edits. Differentiable any number of times.

    Args:
        real, inverted: [N or 1, C, H, W], floating; 1 for all.
        edited: [N, C, H, W].
        gamma1, gamma2: weights of the edited and the inverted image's low frequencies.
        sigma: width of the low-pass, cycles per image, positive; see :func:`sage_fast.ops.gaussian_low_pass`.
    Returns:
        [N, C, H, W], not clamped.
    Raises:
        InputError: images of unequal shape, or a sigma that is not positive.
    """
    check_images(real, inverted, edited)
    gamma1, gamma2, sigma = number("gamma1", gamma1), number("gamma2", gamma2), number("sigma", sigma)
    pays = edited.numel() and 0 < sigma < math.inf and kernel_pays("fuse_frequencies", edited, sigma)
    if pays and alike(real, inverted, edited):
        op = torch.ops.sage_fast.fuse_frequencies.default
        return _native.call(op, (real, inverted, edited), gamma1, gamma2, sigma)
    return _compose(gaussian_low_pass, real, inverted, edited, gamma1, gamma2, sigma)


def _on_host(host, real, inverted, edited, gamma1, gamma2, sigma):
    takes = of_one_float(real, inverted, edited) and edited.ndim == 4 and edited.size and 0 < sigma < math.inf
    if not takes or fft_is_ahead(edited.shape[2:], sigma):
        return None
    return host.fuse_frequencies(real, inverted, edited, gamma1, gamma2, sigma)


def fuse_frequencies_reference(
    real: Tensor, inverted: Tensor, edited: Tensor, gamma1: float = 1.0, gamma2: float = 1.0, sigma: float = 5.0
) -> Tensor:
    """The same in plain PyTorch."""
    check_images(real, inverted, edited)
    gamma1, gamma2 = number("gamma1", gamma1), number("gamma2", gamma2)
    return _compose(gaussian_low_pass_reference, real, inverted, edited, gamma1, gamma2, sigma)


def _compose(low_pass, real, inverted, edited, gamma1, gamma2, sigma) -> Tensor:
    source = real - gamma2 * inverted
    change = source if gamma1 == 1 else (gamma1 - 1) * edited + source
    return edited + low_pass(change, sigma)


def check_images(real: Tensor, inverted: Tensor, edited: Tensor) -> None:
    """Raise InputError unless all are [N, C, H, W], the first two perhaps with one image for all."""
    check_sources(edited, real=real, inverted=inverted)


def check_sources(edited: Tensor, /, **sources: Tensor) -> None:
    """Raise InputError unless the named images are [N or 1, C, H, W] of ``edited``, on its device."""
    require_floats("edited", edited, 4, "[N, C, H, W]")
    for name, images in sources.items():
        require_floats(name, images, 4, "[N, C, H, W]")
        require_same_device(name, images, edited, "edited")
        if images.shape[1:] != edited.shape[1:] or images.shape[0] not in (1, edited.shape[0]):
            raise InputError(
                f"{name} must have shape {list(edited.shape)}, as edited has, or one image for all, got "
                f"{list(images.shape)}."
            )


def alike(*images: Tensor) -> bool:
    """Whether all are of one dtype on one device, as the kernels want them."""
    return len({(image.dtype, image.device) for image in images}) == 1


def _setup_context(ctx, inputs, output):
    real, inverted, _, *ctx.settings = inputs
    ctx.shared = [images.shape[0] < output.shape[0] for images in (real, inverted)]


def _backward(ctx, grad):
    """Linear in each image, by the low-pass, which is its own transpose."""
    gamma1, gamma2, sigma = ctx.settings
    low = gaussian_low_pass(grad.contiguous(), sigma)
    real, inverted = (low.sum(0, keepdim=True) if shared else low for shared in ctx.shared)
    return real, -gamma2 * inverted, grad + (gamma1 - 1) * low, None, None, None


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake(
        "sage_fast::fuse_frequencies", lambda real, inverted, edited, *_: edited.new_empty(edited.shape)
    )
    _native.register_autograd("fuse_frequencies", _backward, _setup_context)
