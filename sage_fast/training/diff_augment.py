"""Differentiable augmentation: colour, translation and cutout, always on, for real and generated images alike.

[DiffAugment] is Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 3 and appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sage_fast.training.draws import Draws

__all__ = ["POLICIES", "apply_diff_augment", "draw_diff_augment"]

POLICIES = ("color", "translation", "cutout")
_COLUMNS = 7  # brightness, saturation, contrast; translation in x, y; cutout in x, y


def draw_diff_augment(n: int, rng: torch.Generator) -> Draws:
    """Draw U(0, 1) for n images and every transform; ``rng`` is on the CPU and gives the same numbers for any policy."""
    return Draws.of(torch.rand(n, _COLUMNS, generator=rng, dtype=torch.float64))


def apply_diff_augment(images: Tensor, draws: Draws, policy: Sequence[str]) -> Tensor:
    """Transform images [N, C, H, W] by their draws, in the order of the policy.

    Implements [DiffAugment] with its published ranges. Deviation: alpha, the last of 2 or 4 channels, is not coloured.
    """
    uniform = draws.amounts[draws.chosen]
    transforms = {"color": _colour, "translation": _translate, "cutout": _cut_out}
    for word in policy:
        images = transforms[word](images, uniform)
    return images


def _colour(images: Tensor, uniform: Tensor) -> Tensor:
    """Brightness x + b, saturation m + s (x - m) about the pixel's mean m, contrast M + c (x - M) about the image's mean M.

    b = U(-1/2, 1/2), s = U(0, 2), c = U(1/2, 3/2). The three are one product per pixel: neither mean is changed by the
    transform that keeps it, so y = c S x + b + (1 - c) M with S = s I + (1 - s) / C.
    """
    n_colours = 1 if images.shape[1] < 3 else 3
    x = images[:, :n_colours].flatten(2)
    brightness, saturation, contrast = (uniform[:, :3, None, None] * torch.tensor([1.0, 2, 1]).view(3, 1, 1)).unbind(1)
    mixing = saturation * torch.eye(n_colours) + (1 - saturation) / n_colours
    contrast = contrast + 0.5
    matrix, offset, rest = (
        part.to(images, non_blocking=True) for part in (contrast * mixing, brightness - 0.5, 1 - contrast)
    )
    offset = offset + rest * x.mean((1, 2), keepdim=True)
    y = torch.baddbmm(offset.expand(-1, n_colours, 1), matrix, x).view(len(images), n_colours, *images.shape[2:])
    return y if images.shape[1] == n_colours else torch.cat([y, images[:, n_colours:]], 1)


def _translate(images: Tensor, uniform: Tensor) -> Tensor:
    """Whole shifts to the right and down, uniform up to an eighth of the side; black comes in."""
    for axis, share in ((3, uniform[:, 3]), (2, uniform[:, 4])):
        side = images.shape[axis]
        most = int(side / 8 + 0.5)
        source = torch.arange(side) - ((share * (2 * most + 1)).floor() - most)[:, None]  # [N, side]
        shape = (-1, 1, 1, side) if axis == 3 else (-1, 1, side, 1)
        inside = ((source >= 0) & (source < side)).view(shape).to(images.device, non_blocking=True)
        index = source.clamp(0, side - 1).long().view(shape).to(images.device, non_blocking=True)
        images = images.gather(axis, index.expand_as(images)) * inside
    return images


def _cut_out(images: Tensor, uniform: Tensor) -> Tensor:
    """A black rectangle of half the sides, its centre uniform over the image; what is beyond the border is lost."""
    inside = []
    for share, side in ((uniform[:, 5], images.shape[3]), (uniform[:, 6], images.shape[2])):
        size = int(side / 2 + 0.5)
        first = (share * (side + 1 - size % 2)).floor()[:, None] - size // 2  # [N, 1]
        at = torch.arange(side)
        inside.append((at >= first) & (at < first + size))  # [N, side]
    hole = (inside[1][:, None, :, None] & inside[0][:, None, None, :]).to(
        images.device, non_blocking=True
    )  # [N, 1, H, W]
    return images.masked_fill(hole, 0)
