"""Give generated images back what inversion lost of the real one, in pixels or frequencies ([SAGE], Eq. 21-23)."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast import ops
from sage_fast.errors import InputError
from sage_fast.ops import gaussian_low_pass
from sage_fast.ops.fuse_frequencies import check_images
from sage_fast.ops.fuse_pixels import BLENDS, blend_images, blur_mask, difference_mask

__all__ = ["fuse_both", "fuse_frequencies", "fuse_pixels", "fusion_mask", "gaussian_low_pass"]

_READINGS = ("paper", "released", "default")


def fuse_pixels(
    real: Tensor,
    inverted: Tensor,
    edited: Tensor,
    beta: float = 0.5,
    blend: str = "residual",
    reading: str = "default",
) -> Tensor:
    """Bring details of the real image into the edited one where inversion lost more than editing changed.

    Implements Eq. 21 and 22 of [SAGE] on images in [0, 1].

    * ``"residual"``: ``edited + M (real - inverted)``, what the text says ("this loss is added to the edited image
      according to the mask");
    * ``"convex"``: ``(1 - M) edited + M real``, what the released code computes;
    * ``"printed"``: ``edited + M real``, which brightens.

    Args:
        real: the given image [N or 1, C, H, W] in [-1, 1].
        inverted: its reconstruction G(E(real)), same shape.
        edited: generated images [N, C, H, W] in [-1, 1].
        beta: weight of the change by editing in the mask.
        blend: ``"residual"``, ``"convex"`` or ``"printed"``.
        reading: of the mask, see :func:`fusion_mask`.
    Returns:
        [N, C, H, W], nominally in [-1, 1], not clamped.
    Raises:
        InputError: images of unequal shape, or an unknown blend or reading.
    """
    _check_reading(reading)
    if reading != "released":
        return ops.fuse_pixels(real, inverted, edited, beta, blend)
    if not isinstance(blend, str) or blend not in BLENDS:
        raise InputError(f"blend must be one of {', '.join(BLENDS)}, got '{blend}'.")
    return blend_images(real, inverted, edited, fusion_mask(real, inverted, edited, beta, reading), blend)


def fusion_mask(real: Tensor, inverted: Tensor, edited: Tensor, beta: float = 0.5, reading: str = "default") -> Tensor:
    """Where the real image has something to give: [N, 1, H, W] in [0, 1].

    Implements Eq. 21 of [SAGE]. ``"paper"`` and ``"default"``: norms over the channels of images in [0, 1], 3 x 3
    Gaussian, clamped to [0, 1]. ``"released"``: absolute differences summed over channels and stretched to [0, 1] in
    each image, clamped at 0, then the Gaussian.
    Deviation: the released code takes the differences in 8 bits, where they wrap around; here they do not.
    """
    check_images(real, inverted, edited)
    _check_reading(reading)
    if reading != "released":
        return difference_mask(real, inverted, edited, beta)
    lost, changed = (_stretch((image - inverted).abs().sum(1, keepdim=True) / 2) for image in (real, edited))
    return blur_mask((lost - beta * changed).clamp_min(0))


def fuse_frequencies(
    real: Tensor,
    inverted: Tensor,
    edited: Tensor,
    gamma1: float = 1.0,
    gamma2: float = 1.0,
    sigma: float = 5.0,
    reading: str = "default",
) -> Tensor:
    """Give the edited image the low frequencies that inversion took from the real one.

    Implements Eq. 23 of [SAGE] on the tensors as given; the high frequencies stay those of ``edited``. The low-pass is
    linear, so one of ``(gamma1 - 1) edited + real - gamma2 inverted`` is enough, and with ``gamma1`` 1 it is that of
    the source alone, shared by all its edits. ``reading="released"`` leaves ``gamma1 edited`` unfiltered and stretches
    each channel to the full range; its weights are 0.8 and 0.3.

    Args:
        real: the given image [N or 1, C, H, W] in [-1, 1].
        inverted: its reconstruction G(E(real)), same shape.
        edited: generated images [N, C, H, W] in [-1, 1].
        gamma1, gamma2: weights of the edited and the inverted image's low frequencies.
        sigma: width of the low-pass, cycles per image.
        reading: ``"paper"``, ``"released"`` or ``"default"``.
    Returns:
        [N, C, H, W], nominally in [-1, 1], not clamped.
    Raises:
        InputError: images of unequal shape, an unknown reading, or a sigma that is not positive.
    """
    _check_reading(reading)
    if reading != "released":
        return ops.fuse_frequencies(real, inverted, edited, gamma1, gamma2, sigma)
    check_images(real, inverted, edited)
    return 2 * _stretch(gamma1 * edited + gaussian_low_pass(real - gamma2 * inverted, sigma)) - 1


def fuse_both(
    real: Tensor,
    inverted: Tensor,
    edited: Tensor,
    gamma1: float = 1.0,
    gamma2: float = 1.0,
    sigma: float = 5.0,
    beta: float = 0.5,
    blend: str = "residual",
    reading: str = "default",
) -> Tensor:
    """:func:`fuse_frequencies`, clamped to [-1, 1], then :func:`fuse_pixels`, with the arguments of both.

    Where one source serves all edits and ``gamma1`` is 1, its low frequencies are made once and the rest is one pass.
    """
    if reading != "released" and gamma1 == 1 and len(real) == len(inverted) == 1:
        check_images(real, inverted, edited)
        _check_reading(reading)
        low = gaussian_low_pass(torch.sub(real, inverted, alpha=gamma2), sigma)
        return ops.fuse_pixels(real, inverted, edited, beta, blend, low)
    edited = fuse_frequencies(real, inverted, edited, gamma1, gamma2, sigma, reading).clamp(-1, 1)
    return fuse_pixels(real, inverted, edited, beta, blend, reading)


def _stretch(images: Tensor) -> Tensor:
    """Each channel of each image to [0, 1]; a constant one to 0."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return (images - low) / torch.where(high > low, high - low, torch.ones_like(high))


def _check_reading(reading: str) -> None:
    if reading not in _READINGS:
        raise InputError(f"reading must be one of {', '.join(_READINGS)}, got '{reading}'.")
