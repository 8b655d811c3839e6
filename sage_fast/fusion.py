"""Give generated images back what inversion lost of the real one, in pixels or frequencies ([SAGE], Eq. 21-23)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.ops import gaussian_low_pass

__all__ = ["fuse_frequencies", "fuse_pixels", "fusion_mask", "gaussian_low_pass"]

_BLENDS = ("residual", "convex", "printed")
_READINGS = ("paper", "released", "default")
_BLUR = 1.3  # px, standard deviation of the 3 x 3 Gaussian of Eq. 21: the released code's, the paper gives none


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
    mask = fusion_mask(real, inverted, edited, beta, reading)
    if blend not in _BLENDS:
        raise InputError(f"blend must be one of {', '.join(_BLENDS)}, got '{blend}'.")
    if blend == "residual":
        return edited + mask * (real - inverted)
    if blend == "convex":
        return edited + mask * (real - edited)
    return edited + mask * (real + 1)  # in [0, 1]: edited + M real


def fusion_mask(real: Tensor, inverted: Tensor, edited: Tensor, beta: float = 0.5, reading: str = "default") -> Tensor:
    """Where the real image has something to give: [N, 1, H, W] in [0, 1].

    Implements Eq. 21 of [SAGE]. ``"paper"`` and ``"default"``: norms over the channels of images in [0, 1], 3 x 3
    Gaussian, clamped to [0, 1]. ``"released"``: absolute differences summed over channels and stretched to [0, 1] in
    each image, clamped at 0, then the Gaussian.
    Deviation: the released code takes the differences in 8 bits, where they wrap around; here they do not.
    """
    _check_images(real, inverted, edited)
    if reading not in _READINGS:
        raise InputError(f"reading must be one of {', '.join(_READINGS)}, got '{reading}'.")
    lost, changed = (real - inverted) / 2, (edited - inverted) / 2  # differences of images in [0, 1]
    if reading == "released":
        lost, changed = (_stretch(d.abs().sum(1, keepdim=True)) for d in (lost, changed))
        return _blur((lost - beta * changed).clamp_min(0))
    lost, changed = (d.square().sum(1, keepdim=True).sqrt() for d in (lost, changed))
    return _blur(lost - beta * changed).clamp(0, 1)


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
    _check_images(real, inverted, edited)
    if reading not in _READINGS:
        raise InputError(f"reading must be one of {', '.join(_READINGS)}, got '{reading}'.")
    if reading == "released":
        return 2 * _stretch(gamma1 * edited + gaussian_low_pass(real - gamma2 * inverted, sigma)) - 1
    source = real - gamma2 * inverted
    change = source if gamma1 == 1 else (gamma1 - 1) * edited + source
    return edited + gaussian_low_pass(change, sigma)


def _stretch(images: Tensor) -> Tensor:
    """Each channel of each image to [0, 1]; a constant one to 0."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return (images - low) / torch.where(high > low, high - low, torch.ones_like(high))


def _blur(mask: Tensor) -> Tensor:
    """3 x 3 Gaussian of a mask [N, 1, H, W]; beyond the border the mask is mirrored about its outermost pixels."""
    side = torch.exp(torch.tensor(-1 / (2 * _BLUR**2), device=mask.device, dtype=mask.dtype))
    row = torch.stack([side, torch.ones_like(side), side]) / (2 * side + 1)
    mode = "reflect" if min(mask.shape[2:]) > 1 else "replicate"
    return F.conv2d(F.pad(mask, (1, 1, 1, 1), mode=mode), torch.outer(row, row)[None, None])


def _check_images(real: Tensor, inverted: Tensor, edited: Tensor) -> None:
    for name, images in (("real", real), ("inverted", inverted), ("edited", edited)):
        if images.ndim != 4 or not images.is_floating_point():
            raise InputError(f"{name} must be floating point [N, C, H, W], got {images.dtype} {list(images.shape)}.")
        if images.shape[1:] != edited.shape[1:] or len(images) not in (1, len(edited)):
            raise InputError(
                f"{name} must have shape {list(edited.shape)}, as edited has, or one image for all, got "
                f"{list(images.shape)}."
            )
