"""The transforms of adaptive discriminator augmentation: what is drawn, and how it is applied in one pass.

[ADA] is Karras et al. 2020, "Training generative adversarial networks with limited data", appendix B. All of it is here: pixel
blitting, general geometric and colour transforms ("b", "g", "c"), image-space filtering, noise and cutout ("f", "n", "c").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sage_fast.training.corruptions import add_noise, cut_out, filter_bands
from sage_fast.training.draws import Draws
from sage_fast.training.resample import resample, source_margins

__all__ = ["AMOUNTS", "PIPELINES", "apply_ada", "colour_maps", "draw_ada", "inverse_maps"]

#: how many of the columns a pipeline uses
PIPELINES = {"b": 4, "bg": 10, "bgc": 15, "bgcf": 19, "bgcfn": 21, "bgcfnc": 24}
#: the columns of the draws; zero leaves an image as it is
AMOUNTS = (
    ("flip", "turns", "shift_x", "shift_y")  # pixel blitting: 0 or 1, quarter turns, shares of the side
    + ("scale", "rotate_before", "stretch", "rotate_after", "move_x", "move_y")  # log2, radians, log2, radians, shares
    + ("brightness", "contrast", "luma_flip", "hue", "saturation")  # added, log2, 0 or 1, radians, log2
    + ("band_0", "band_1", "band_2", "band_3")  # image-space filtering: log2, lowest frequencies first
    + ("noise", "noise_number")  # deviation, which noise
    + ("cut_size", "cut_x", "cut_y")  # cutout: share of the sides, place of its centre
)
_GEOMETRIC, _COLOUR, _FILTER, _NOISE = 10, 15, 19, 21  # columns up to the end of each group


def _columns(**values: float) -> Tensor:
    return torch.tensor([values.get(name, 0) for name in AMOUNTS], dtype=torch.float64)


#: half the range of a uniform amount, deviation of a normal one, number of choices, the one value
_UNIFORM = _columns(
    shift_x=1 / 8, shift_y=1 / 8, rotate_before=math.pi, rotate_after=math.pi, hue=math.pi, cut_x=0.5, cut_y=0.5
)
_NORMAL = _columns(
    **dict(scale=0.2, stretch=0.2, move_x=1 / 8, move_y=1 / 8, brightness=0.2, contrast=0.5, saturation=1.0),
    **dict(band_0=1.0, band_1=1.0, band_2=1.0, band_3=1.0, noise=0.1),
)
_CHOICES = _columns(flip=2, turns=4, luma_flip=2, noise_number=2**31)
_FIXED = _columns(cut_size=0.5)
_WITH = dict(shift_y="shift_x", move_y="move_x", noise_number="noise", cut_x="cut_size", cut_y="cut_size")
_GATE = [AMOUNTS.index(_WITH.get(name, name)) for name in AMOUNTS]  # by whose number a column is on
_IS_ROTATION = torch.tensor([name.startswith("rotate") for name in AMOUNTS])


def draw_ada(n: int, p: float, pipeline: str, rng: torch.Generator) -> Draws:
    """Draw for n images: each transform is on with probability ``p``, independently.

    Implements the distributions of [ADA], appendix B: flip 0 or 1, 0 to 3 quarter turns, integer shifts U(-1/8, 1/8) of the side,
    scales 2^N(0, 0.2^2), angles U(-pi, pi), moves N(0, (1/8)^2), brightness N(0, 0.2^2), contrast 2^N(0, 0.5^2), luma flip 0 or 1,
    hue U(-pi, pi), saturation 2^N(0, 1), gains of four bands 2^N(0, 1), noise of deviation |N(0, 0.1^2)|, a rectangle of half the
    sides cut out. The rotations before and after stretching are each on with 1 - sqrt(1 - p).

    Args:
        pipeline: one of ``PIPELINES``.
        rng: on the CPU; the same numbers are taken from it whatever p and the pipeline are.
    """
    gates, uniform = torch.rand(2, n, len(AMOUNTS), generator=rng, dtype=torch.float64)
    normal = torch.randn(n, len(AMOUNTS), generator=rng, dtype=torch.float64)
    amounts = (uniform * 2 - 1) * _UNIFORM + normal * _NORMAL + (uniform * _CHOICES).floor() + _FIXED
    on = gates[:, _GATE] < torch.where(_IS_ROTATION, 1 - math.sqrt(1 - p), p)
    on[:, PIPELINES[pipeline] :] = False
    return Draws.of(torch.where(on, amounts, 0))


def apply_ada(images: Tensor, draws: Draws) -> Tensor:
    """Transform images [N, C, H, W] by their draws: all geometry as one map of places, all colour as one of values.

    An image that no transform touches comes back bit for bit. Alpha, the last of 2 or 4 channels, is only moved.
    Grey images are taken as red, green and blue of one value, which hue and saturation leave as they are.
    """
    images = _move(images, draws)
    amounts = draws.amounts[draws.chosen]
    if not amounts[:, _GEOMETRIC:].any():
        return images
    n_colours = 1 if images.shape[1] < 3 else 3
    colours = _corrupt(_recolour(images[:, :n_colours], amounts), amounts)
    return colours if images.shape[1] == n_colours else torch.cat([colours, images[:, n_colours:]], 1)


def _move(images: Tensor, draws: Draws) -> Tensor:
    height, width = images.shape[2:]
    inverse = inverse_maps(draws.amounts, height, width)
    chosen = inverse[draws.chosen]
    moved = (chosen != torch.eye(2, 3, dtype=torch.float64)).flatten(1).any(1)
    margins = source_margins(inverse, height, width)  # of the global batch: each rank pads alike
    return _only(moved, images, lambda some: resample(some, chosen[moved], margins))


def _only(on: Tensor, images: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The images with those that are ``on`` [N] transformed; the others keep their bits."""
    if not on.any():
        return images
    if on.all():
        return transform(images)
    index = on.nonzero()[:, 0].to(images.device, non_blocking=True)
    return images.index_copy(0, index, transform(images[index]))


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


def _recolour(images: Tensor, amounts: Tensor) -> Tensor:
    if not amounts[:, _GEOMETRIC:_COLOUR].any():
        return images
    matrix, offset = (part.to(images, non_blocking=True) for part in colour_maps(amounts, images.shape[1]))
    return torch.baddbmm(offset, matrix, images.flatten(2)).view(images.shape)


def _corrupt(images: Tensor, amounts: Tensor) -> Tensor:
    log_gains, (sigma, number) = amounts[:, _COLOUR:_FILTER], amounts[:, _FILTER:_NOISE].unbind(1)
    filtered, noisy = log_gains.any(1), sigma != 0
    images = _only(filtered, images, lambda some: filter_bands(some, log_gains[filtered]))
    images = _only(noisy, images, lambda some: add_noise(some, sigma[noisy], number[noisy]))
    return cut_out(images, *amounts[:, _NOISE:].unbind(1)) if amounts[:, _NOISE:].any() else images


def colour_maps(amounts: Tensor, n_colours: int) -> tuple[Tensor, Tensor]:
    """Linear part [N, C, C] and offset [N, C, 1], float64, of the colour transforms, C = 1 or 3.

    Brightness b, contrast c, luma flip, hue and saturation s, in this order ([ADA], appendix B), multiplied out: with the luma
    axis v = (1, 1, 1) / sqrt 3, luma is scaled by c (by -c when flipped), and what is orthogonal to v is turned about v
    and scaled by c s.
    """
    brightness, contrast, flip, hue, saturation = amounts[:, _GEOMETRIC:_COLOUR, None, None].unbind(1)
    luma = torch.exp2(contrast) * (1 - 2 * flip)  # [N, 1, 1]
    if n_colours == 1:
        return luma, luma * brightness
    chroma = torch.exp2(contrast + saturation)
    along = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    across = torch.eye(3, dtype=torch.float64) - along
    turn = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    matrix = luma * along + chroma * (hue.cos() * across + hue.sin() * turn)
    return matrix, (luma * brightness).expand(-1, 3, 1)
