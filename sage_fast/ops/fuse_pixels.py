"""Pixels of one image for another where a third differs from them (Eq. 21, 22)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import of_one_float, takes_arrays
from sage_fast.ops.fuse_frequencies import alike, check_images, check_sources
from sage_fast.ops.inputs import number

__all__ = ["BLENDS", "blend_images", "blur_mask", "difference_mask", "fuse_pixels", "fuse_pixels_reference"]

BLENDS = ("residual", "convex", "printed")
_BLUR = 1.3  # px, standard deviation of the 3 x 3 Gaussian of Eq. 21: the released code's, the paper gives none


@takes_arrays("real", "inverted", "edited", "low")
def fuse_pixels(
    real: Tensor,
    inverted: Tensor,
    edited: Tensor,
    beta: float = 0.5,
    blend: str = "residual",
    low: Tensor | None = None,
) -> Tensor:
    """Bring ``real`` into ``edited`` where ``inverted`` is farther from the first than from the second.

    Implements Eq. 21 and 22 of [SAGE]. The kernel reads each image once. Differentiable any number of times: the
    derivative is that of the reference, computed anew.

    Args:
        real, inverted: [N or 1, C, H, W] in [-1, 1]; 1 for all.
        edited: [N, C, H, W] in [-1, 1].
        beta: weight of the difference to ``edited`` in the mask.
        blend: what the mask M, :func:`difference_mask`, weighs: ``"residual"`` adds ``M (real - inverted)``,
            ``"convex"`` ``M (real - edited)``, ``"printed"`` ``M real`` of images in [0, 1].
        low: [N or 1, C, H, W], low frequencies that edited gets first, and is clamped to [-1, 1] then: Eq. 23 and 22 in
            one pass.
    Returns:
        [N, C, H, W], not clamped.
    Raises:
        InputError: images of unequal shape, or an unknown blend.
    """
    beta = _check(real, inverted, edited, beta, blend, low)
    takes = edited.dtype in (torch.float32, torch.float64) and alike(
        real, inverted, edited if low is None else low, edited
    )
    if takes and _native.has_kernel("fuse_pixels", edited.device.type):
        op = torch.ops.sage_fast.fuse_pixels.default
        return _native.call(op, (real, inverted, edited, low), beta, BLENDS.index(blend), _BLUR)
    return fuse_pixels_reference(real, inverted, edited, beta, blend, low)


def _on_host(host, real, inverted, edited, beta, blend, low):
    if not of_one_float(real, inverted, edited, low) or blend not in BLENDS:
        return None
    return host.fuse_pixels(real, inverted, edited, low, beta, BLENDS.index(blend), _BLUR)


def fuse_pixels_reference(
    real: Tensor,
    inverted: Tensor,
    edited: Tensor,
    beta: float = 0.5,
    blend: str = "residual",
    low: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch."""
    beta = _check(real, inverted, edited, beta, blend, low)
    if low is not None:
        edited = (edited + low).clamp(-1, 1)
    return blend_images(real, inverted, edited, difference_mask(real, inverted, edited, beta), blend)


def difference_mask(real: Tensor, inverted: Tensor, edited: Tensor, beta: float) -> Tensor:
    """Eq. 21: norms over the channels of differences of images in [0, 1], 3 x 3 Gaussian, clamped; [N, 1, H, W]."""
    lost, changed = (real - inverted) / 2, (edited - inverted) / 2
    lost, changed = (d.square().sum(1, keepdim=True).sqrt() for d in (lost, changed))
    return blur_mask(lost - beta * changed).clamp(0, 1)


def blur_mask(mask: Tensor) -> Tensor:
    """3 x 3 Gaussian of a mask [N, 1, H, W]; beyond the border the mask is mirrored about its outermost pixels."""
    if mask.numel() == 0:
        return mask
    side = torch.exp(torch.tensor(-1 / (2 * _BLUR**2), device=mask.device, dtype=mask.dtype))
    row = torch.stack([side, torch.ones_like(side), side]) / (2 * side + 1)
    for length, padding in zip(mask.shape[:1:-1], ((1, 1, 0, 0), (0, 0, 1, 1)), strict=True):
        mask = F.pad(mask, padding, mode="reflect" if length > 1 else "replicate")
    return F.conv2d(mask, torch.outer(row, row)[None, None])


def blend_images(real: Tensor, inverted: Tensor, edited: Tensor, mask: Tensor, blend: str) -> Tensor:
    """Eq. 22, by the names of :func:`fuse_pixels`."""
    if blend == "residual":
        return edited + mask * (real - inverted)
    if blend == "convex":
        return edited + mask * (real - edited)
    return edited + mask * (real + 1)  # in [0, 1]: edited + M real


def _check(real: Tensor, inverted: Tensor, edited: Tensor, beta: float, blend: str, low: Tensor | None) -> float:
    check_images(real, inverted, edited)
    if low is not None:
        check_sources(edited, low=low)
    if not isinstance(blend, str) or blend not in BLENDS:
        raise InputError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r:.60}.")
    return number("beta", beta)


def _setup_context(ctx, inputs, output):
    *images, ctx.beta, ctx.blend, _ = inputs
    ctx.save_for_backward(*images)


def _backward(ctx, grad):
    images, again = ctx.saved_tensors, torch.is_grad_enabled()
    wanted = [needed and image is not None for needed, image in zip(ctx.needs_input_grad, images, strict=False)]
    with torch.enable_grad():
        if not again:
            images = [
                image.detach().requires_grad_() if want else image for image, want in zip(images, wanted, strict=True)
            ]
        real, inverted, edited, low = images
        y = fuse_pixels_reference(real, inverted, edited, ctx.beta, BLENDS[ctx.blend], low)
        sources = [image for image, want in zip(images, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, sources, grad, create_graph=again, materialize_grads=True))
    return *(next(found) if want else None for want in wanted), None, None, None


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake(
        "sage_fast::fuse_pixels", lambda real, inverted, edited, *_: edited.new_empty(edited.shape)
    )
    _native.register_autograd("fuse_pixels", _backward, _setup_context)
