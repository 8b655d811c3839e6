"""The transforms of adaptive discriminator augmentation: what is drawn, and how it is applied in one pass.

[ADA] is Karras et al. 2020, "Training generative adversarial networks with limited data", appendix B. Here are its pixel
blitting, general geometric and colour transforms ("b", "g", "c"); its image-space filtering, noise and cutout are not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sage_fast.training.draws import Draws
from sage_fast.training.resample import resample, source_margins

__all__ = ["AMOUNTS", "PIPELINES", "apply_ada", "colour_maps", "draw_ada", "inverse_maps"]

PIPELINES = ("b", "bg", "bgc")
#: the columns of the draws; zero leaves an image as it is
AMOUNTS = (
    ("flip", "turns", "shift_x", "shift_y")  # pixel blitting: 0 or 1, quarter turns, shares of the side
    + ("scale", "rotate_before", "stretch", "rotate_after", "move_x", "move_y")  # log2, radians, log2, radians, shares
    + ("brightness", "contrast", "luma_flip", "hue", "saturation")  # added, log2, 0 or 1, radians, log2
)
_BLIT, _GEOMETRIC = 4, 10  # columns before the general geometric transforms; before colour
_RANGES = dict(shift_x=1 / 8, shift_y=1 / 8, rotate_before=math.pi, rotate_after=math.pi, hue=math.pi)
_DEVIATIONS = dict(scale=0.2, stretch=0.2, move_x=1 / 8, move_y=1 / 8, brightness=0.2, contrast=0.5, saturation=1.0)
_IS_NORMAL = torch.tensor([name in _DEVIATIONS for name in AMOUNTS])
_IS_ROTATION = torch.tensor([name.startswith("rotate") for name in AMOUNTS])
_SPREAD = torch.tensor([(_DEVIATIONS | _RANGES).get(name, 0) for name in AMOUNTS], dtype=torch.float64)
_WHOLE = [AMOUNTS.index(name) for name in ("flip", "turns", "luma_flip")]
_CHOICES = torch.tensor([2, 4, 2])
_GATE = [AMOUNTS.index(name.replace("_y", "_x")) for name in AMOUNTS]  # x and y are on together


def draw_ada(n: int, p: float, pipeline: str, rng: torch.Generator) -> Draws:
    """Draw for n images: each transform is on with probability ``p``, independently.

    Implements the distributions of [ADA], appendix B: flip 0 or 1, 0 to 3 quarter turns, integer shifts U(-1/8, 1/8) of the side,
    scales 2^N(0, 0.2^2), angles U(-pi, pi), moves N(0, (1/8)^2), brightness N(0, 0.2^2), contrast 2^N(0, 0.5^2), luma flip 0 or 1,
    hue U(-pi, pi), saturation 2^N(0, 1). The rotations before and after stretching are each on with 1 - sqrt(1 - p).

    Args:
        pipeline: one of ``PIPELINES``.
        rng: on the CPU; the same numbers are taken from it whatever p and the pipeline are.
    """
    gates = torch.rand(n, len(AMOUNTS), generator=rng, dtype=torch.float64)
    uniform = torch.rand(n, len(AMOUNTS), generator=rng, dtype=torch.float64)
    normal = torch.randn(n, len(AMOUNTS), generator=rng, dtype=torch.float64)
    amounts = torch.where(_IS_NORMAL, normal * _SPREAD, (uniform * 2 - 1) * _SPREAD)
    amounts[:, _WHOLE] = (uniform[:, _WHOLE] * _CHOICES).floor()
    gates = gates[:, _GATE]
    on = gates < torch.where(_IS_ROTATION, 1 - math.sqrt(1 - p), p)
    on[:, {"b": _BLIT, "bg": _GEOMETRIC, "bgc": len(AMOUNTS)}[pipeline] :] = False
    return Draws.of(torch.where(on, amounts, 0))


def apply_ada(images: Tensor, draws: Draws) -> Tensor:
    """Transform images [N, C, H, W] by their draws: all geometry as one map of places, all colour as one of values.

    An image that no transform touches comes back bit for bit. Alpha, the last of 2 or 4 channels, is moved but not coloured.
    Grey images are taken as red, green and blue of one value, which hue and saturation leave as they are.
    """
    return _recolour(_move(images, draws), draws)


def _move(images: Tensor, draws: Draws) -> Tensor:
    height, width = images.shape[2:]
    inverse = inverse_maps(draws.amounts, height, width)
    chosen = inverse[draws.chosen]
    moved = (chosen != torch.eye(2, 3, dtype=torch.float64)).flatten(1).any(1)
    if not moved.any():
        return images
    margins = source_margins(inverse, height, width)  # of the global batch: each rank pads alike
    if moved.all():
        return resample(images, chosen, margins)
    index = moved.nonzero()[:, 0].to(images.device)
    return images.index_copy(0, index, resample(images[index], chosen[moved], margins))


def inverse_maps(amounts: Tensor, height: int, width: int) -> Tensor:
    """From places in the result to places in the image, in pixels from the centre: [N, 2, 3] float64.

    The transforms are flip, quarter turns, whole shift, scale, rotation, stretch, rotation, move, in this order, so their
    inverses stand here from left to right ([ADA], appendix B). Positive angles turn the image counterclockwise on the screen.
    """
    flip, turns, shift_x, shift_y, scale, before, stretch, after, move_x, move_y = amounts[:, :_GEOMETRIC].unbind(1)
    size = torch.tensor([width, height], dtype=torch.float64)
    blit = _diagonal(1 - 2 * flip, torch.ones_like(flip)) @ _rotation(turns * (math.pi / 2))
    shrink = torch.exp2(-scale)[:, None, None] * _rotation(before)
    linear = blit @ shrink @ _diagonal(torch.exp2(-stretch), torch.exp2(stretch)) @ _rotation(after)
    shift = (torch.stack([shift_x, shift_y], 1) * size).round()[:, :, None]
    move = (torch.stack([move_x, move_y], 1) * size)[:, :, None]
    return torch.cat([linear, -(blit @ shift) - linear @ move], 2)


def _rotation(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return torch.stack([c, -s, s, c], 1).view(-1, 2, 2)


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y], 1))


def _recolour(images: Tensor, draws: Draws) -> Tensor:
    amounts = draws.amounts[draws.chosen]
    if not amounts[:, _GEOMETRIC:].any():
        return images
    n_channels = images.shape[1]
    n_colours = 1 if n_channels < 3 else 3
    matrix, offset = (part.to(images) for part in colour_maps(amounts, n_colours))
    coloured = _map_colours(images[:, :n_colours], matrix, offset)
    return coloured if n_channels == n_colours else torch.cat([coloured, images[:, n_colours:]], 1)


def _map_colours(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """``matrix @ colour + offset`` at each pixel: [N, C, H, W], [N, C, C] and [N, C, 1]."""
    return torch.baddbmm(offset, matrix, images.flatten(2)).view(images.shape)


def colour_maps(amounts: Tensor, n_colours: int) -> tuple[Tensor, Tensor]:
    """Linear part [N, C, C] and offset [N, C, 1], float64, of the colour transforms, C = 1 or 3.

    Brightness b, contrast c, luma flip, hue and saturation s, in this order ([ADA], appendix B), multiplied out: with the luma
    axis v = (1, 1, 1) / sqrt 3, luma is scaled by c (by -c when flipped), and what is orthogonal to v is turned about v
    and scaled by c s.
    """
    brightness, contrast, flip, hue, saturation = amounts[:, _GEOMETRIC:, None, None].unbind(1)
    luma = torch.exp2(contrast) * (1 - 2 * flip)  # [N, 1, 1]
    if n_colours == 1:
        return luma, luma * brightness
    chroma = torch.exp2(contrast + saturation)
    along = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    across = torch.eye(3, dtype=torch.float64) - along
    turn = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    matrix = luma * along + chroma * (hue.cos() * across + hue.sin() * turn)
    return matrix, (luma * brightness).expand(-1, 3, 1)
