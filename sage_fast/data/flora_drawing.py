"""A flower drawn from the numbers that describe it: vectorised over images, anti-aliased, any resolution.

The outline is tested per pixel by its distance to the edge, which an edge one to three pixels wide turns into coverage;
layers are painted from back to front. What the numbers may be, category-relevant (``LEVELS``) and category-irrelevant
(``FACTORS``), is listed first. Which numbers make a category is told in :mod:`sage_fast.data.flora`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

__all__ = ["CIRCULAR", "FACTORS", "FACTOR_RANGES", "LEVELS", "draw"]

_COLOURS = {  # red, green, blue in [0, 1]
    "white": (0.96, 0.94, 0.90), "yellow": (0.98, 0.84, 0.12), "orange": (0.97, 0.52, 0.08), "red": (0.84, 0.10, 0.12),
    "pink": (0.97, 0.55, 0.70), "magenta": (0.80, 0.12, 0.58), "violet": (0.45, 0.20, 0.72), "blue": (0.20, 0.32, 0.85),
    "sky": (0.52, 0.74, 0.97), "maroon": (0.40, 0.04, 0.14),
}  # fmt: skip
_DISC_COLOURS = {  # red, green, blue in [0, 1]
    "gold": (0.93, 0.70, 0.10), "brown": (0.32, 0.17, 0.07), "lime": (0.62, 0.78, 0.20), "dark": (0.08, 0.06, 0.10),
    "cream": (0.97, 0.93, 0.78),
}  # fmt: skip
_LEAF_COLOUR = (0.20, 0.45, 0.14)
_ANTHER_COLOUR = (0.99, 0.93, 0.55)

#: category-relevant factors: name -> what each level means
LEVELS: dict[str, tuple[Any, ...]] = {
    "petals": (3, 4, 5, 6, 8, 12),
    "width": (0.62, 1.0),
    "length": (0.80, 1.0),
    "notch": (0.0, 0.32),  # depth of the cut in a petal's tip, share of its length
    "point": (0.30, 1.0),  # exponent of the outline near the tip: 1 is pointed
    "layers": (1, 2),
    "base": tuple(_COLOURS),
    "tip": tuple(_COLOURS),
    "disc": (0.15, 0.30),  # radius
    "disc_colour": tuple(_DISC_COLOURS),
    "stamens": (0, 6),
    "leaves": (0, 3, 5),
}

#: category-irrelevant factors: name -> range; angles in radians, lengths in half image widths
FACTOR_RANGES = {
    "rotation": (0.0, 2 * math.pi),
    "tilt_x": (-0.40, 0.40),
    "tilt_y": (-0.40, 0.40),
    "scale": (0.84, 1.08),
    "x": (-0.08, 0.08),
    "y": (-0.08, 0.08),
    "openness": (0.88, 1.0),
    "light": (0.0, 2 * math.pi),  # direction that the light comes from
    "brightness": (0.80, 1.12),
    "warmth": (-0.12, 0.12),
    "background_hue": (0.0, 1.0),
    "background_light": (0.15, 0.75),
    "background_slope": (0.0, 2 * math.pi),  # direction in which the background grows lighter
    "blur": (0.0, 1.0),
}
FACTORS = tuple(FACTOR_RANGES)  # their names
#: the factors that return to where they began, with their period
CIRCULAR = {name: FACTOR_RANGES[name][1] for name in ("rotation", "light", "background_hue", "background_slope")}

_COLOUR_TABLES = {
    "base": np.array(list(_COLOURS.values()), np.float32),
    "tip": np.array(list(_COLOURS.values()), np.float32),
    "disc_colour": np.array(list(_DISC_COLOURS.values()), np.float32),
}
_CHUNK_PIXELS = 16_384  # pixels drawn at once: an array of them takes 64 KiB, so that the dozen in use fit in L2


def draw(levels: np.ndarray, factors: np.ndarray, resolution: int) -> np.ndarray:
    """Draw flowers from their factors.

    Args:
        levels: integers [N, 12], indices into ``LEVELS``.
        factors: float32 [N, F], in the order of ``FACTORS``.
        resolution: R.

    Returns:
        uint8 [N, 3, R, R].
    """
    images = np.empty((len(levels), 3, resolution, resolution), np.uint8)
    step = max(1, _CHUNK_PIXELS // resolution**2)
    for start in range(0, len(levels), step):
        chunk = slice(start, start + step)
        images[chunk] = _draw_chunk(levels[chunk], factors[chunk], resolution)
    return images


def _level_values(levels: np.ndarray, name: str) -> np.ndarray:
    """What the levels [N, 12] of one factor mean: float32 [N]."""
    return np.array(LEVELS[name], np.float32)[levels[:, list(LEVELS).index(name)]]


@dataclass(frozen=True)
class _View:
    """Where the pixels of a chunk lie, as seen from the flower's centre; all float32.

    x, y: image plane, y upward [n, R, R]. u, v, radius, angle: the flower's own plane [n, R, R].
    lit: how far a pixel lies towards the light [n, R, R]. pixel: width of an edge, blur included [n, 1, 1].
    """

    x: np.ndarray
    y: np.ndarray
    u: np.ndarray
    v: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    lit: np.ndarray
    pixel: np.ndarray

    def rows(self, chosen: np.ndarray) -> _View:
        """The view of the chosen images (booleans [n])."""
        if chosen.all():
            return self
        return _View(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class _Ring:
    """A ring of equal petals on the pixels of a chunk.

    coverage: share of the pixel that a petal covers [n, R, R]. along, across: place on the petal, 0 at the centre to 1
    at the tip, and -1 to 1 from side to side [n, R, R]. axis: direction of that petal [n, R, R].
    """

    coverage: np.ndarray
    along: np.ndarray
    across: np.ndarray
    axis: np.ndarray


def _draw_chunk(levels: np.ndarray, factors: np.ndarray, resolution: int) -> np.ndarray:
    """Paint from back to front: uint8 [n, 3, R, R] of levels [n, 12] and factors [n, F]."""
    trait = {name: _column(_level_values(levels, name)) for name in LEVELS if name not in _COLOUR_TABLES}
    colour = {name: table[levels[:, list(LEVELS).index(name)]] for name, table in _COLOUR_TABLES.items()}
    factor = {name: _column(factors[:, i]) for i, name in enumerate(FACTORS)}
    grid = ((np.arange(resolution, dtype=np.float32) + 0.5) / resolution * 2 - 1)[None, :]
    view = _project(factor, grid)
    canvas = _paint_background(factor, grid)
    _paint_leaves(canvas, view, trait["leaves"])
    _paint_petals(canvas, view, trait, colour, factor, layer=0)
    _paint_petals(canvas, view, trait, colour, factor, layer=1)
    _paint_disc(canvas, view, trait["disc"], colour["disc_colour"], factor["openness"])
    _paint_stamens(canvas, view, trait, factor["openness"])
    return _develop(canvas, factor["brightness"], factor["warmth"])


def _project(factor: dict[str, np.ndarray], grid: np.ndarray) -> _View:
    """Undo position, tilt (with perspective), scale and rotation for every pixel."""
    x, y = np.broadcast_arrays(grid[:, None, :] - factor["x"], -grid[:, :, None] - factor["y"])
    u, v = x / np.cos(factor["tilt_x"]), y / np.cos(factor["tilt_y"])
    nearness = 1 + 0.25 * (np.sin(factor["tilt_x"]) * u + np.sin(factor["tilt_y"]) * v)
    nearness *= factor["scale"]
    u /= nearness
    v /= nearness
    cos, sin = np.cos(factor["rotation"]), np.sin(factor["rotation"])
    u, v = cos * u + sin * v, cos * v - sin * u
    lit = np.cos(factor["light"]) * x + np.sin(factor["light"]) * y
    pixel = (2.0 / grid.size) * (1.1 + 1.6 * factor["blur"]) / factor["scale"]
    return _View(x, y, u, v, np.sqrt(u * u + v * v) + 1e-6, np.arctan2(v, u), lit, pixel)


def _paint_background(factor: dict[str, np.ndarray], grid: np.ndarray) -> np.ndarray:
    """A tinted plane with a slope of light: the canvas, float32 [3, n, R, R] of nominal range [0, 1]."""
    direction = factor["background_slope"]
    slope = grid[:, None, :] * np.cos(direction) - grid[:, :, None] * np.sin(direction)
    light = factor["background_light"] * (1 + 0.35 * slope)
    tints = (0.5 + 0.5 * np.cos(2 * math.pi * (factor["background_hue"] + channel / 3)) for channel in range(3))
    return np.stack([light * (0.72 + 0.28 * tint) for tint in tints])


def _paint_leaves(canvas: np.ndarray, view: _View, n_leaves: np.ndarray) -> None:
    """Green leaves with a pale vein, behind the petals."""
    chosen = n_leaves[:, 0, 0] > 0
    if not chosen.any():
        return
    view, n_leaves = view.rows(chosen), n_leaves[chosen]
    one = np.ones_like(n_leaves)
    leaf = _ring(view, n_leaves, 0.35 * one, 1.12 * one, 0.8 * one, 0 * one, 0.9 * one)
    shade = (0.8 + 0.5 * leaf.along + 0.25 * (np.abs(leaf.across) < 0.12)) * (1 + 0.16 * view.lit)
    _paint(canvas, chosen, (value * shade for value in _LEAF_COLOUR), leaf.coverage)


def _paint_petals(
    canvas: np.ndarray,
    view: _View,
    trait: dict[str, np.ndarray],
    colour: dict[str, np.ndarray],
    factor: dict[str, np.ndarray],
    layer: int,
) -> None:
    """One ring of petals; the second is smaller and stands in the gaps of the first."""
    chosen = trait["layers"][:, 0, 0] > layer
    if not chosen.any():
        return
    view = view.rows(chosen)
    n, width, length, notch, point = (trait[name][chosen] for name in ("petals", "width", "length", "notch", "point"))
    length = 1.02 * length * factor["openness"][chosen] * (1 - 0.36 * layer)
    petal = _ring(view, n, layer * math.pi / n, length, width, notch, point)
    facing = np.cos(petal.axis + (factor["rotation"] - factor["light"])[chosen])
    shade = 1 + 0.10 * facing - 0.22 * np.square(np.clip(petal.across, -1, 1)) - 0.10 * (1 - petal.along)
    shade *= (1 + 0.16 * view.lit) * (1 + 0.06 * layer)
    blend = np.clip(petal.along * 1.5 - 0.25, 0, 1)
    base, tip = (np.moveaxis(colour[name][chosen], 1, 0)[..., None, None] for name in ("base", "tip"))  # [3, n, 1, 1]
    _paint(canvas, chosen, ((b + (t - b) * blend) * shade for b, t in zip(base, tip)), petal.coverage)


def _ring(
    view: _View,
    n: np.ndarray,
    offset: np.ndarray,
    length: np.ndarray,
    width: np.ndarray,
    notch: np.ndarray,
    point: np.ndarray,
) -> _Ring:
    """``n`` petals, the gap before the first at angle ``offset``; every shape number is [n, 1, 1].

    All petals are folded onto one along the first axis; its half-width there is t^(3/4) (1 - t)^point times a constant.
    """
    sector = 2 * math.pi / n
    turns = (view.angle - offset) * (1 / sector)
    turned = (turns - np.floor(turns) - 0.5) * sector  # angle from the petal's axis
    px, py = view.radius * np.cos(turned), view.radius * np.sin(turned)
    half = np.minimum(0.78 * length * np.tan(np.minimum(sector / 2, 1.1)), 0.55 * length) * (1.15 * width)
    reach = length * (1 - notch * np.exp(-np.square(py / (0.38 * half))))
    along = np.clip(px / reach, 0, 1)
    root = np.sqrt(along + 1e-6)
    outline = (1.45 * half) * root * np.sqrt(root) * np.power(1 + 1e-6 - along, point)
    inside = np.minimum(outline - np.abs(py), 0.8 * (reach - px))  # distance to the edge, roughly
    coverage = np.clip(inside / view.pixel + 0.5, 0, 1) * (px > 0)
    return _Ring(coverage, along, py / (outline + 1e-3), view.angle - turned)


def _paint_disc(canvas: np.ndarray, view: _View, radius: np.ndarray, colour: np.ndarray, openness: np.ndarray) -> None:
    """The grainy dome in the middle."""
    grain = np.sin(8.4 / radius * view.u) * np.sin(8.4 / radius * view.v)
    shade = 1.07 - 0.25 / (radius * openness) * view.radius + 0.12 * grain + 0.15 / radius * view.lit
    coverage = np.clip((radius * openness - view.radius) / view.pixel + 0.5, 0, 1)
    colours = (value[:, None, None] * shade for value in colour.T)
    _paint(canvas, np.ones(len(radius), bool), colours, coverage)


def _paint_stamens(canvas: np.ndarray, view: _View, trait: dict[str, np.ndarray], openness: np.ndarray) -> None:
    """Six pale dots around the disc."""
    chosen = trait["stamens"][:, 0, 0] > 0
    if not chosen.any():
        return
    view, n = view.rows(chosen), trait["stamens"][chosen]
    turns = view.angle * (n / (2 * math.pi))
    turned = (turns - np.floor(turns) - 0.5) * (2 * math.pi / n)
    dx = view.radius * np.cos(turned) - ((trait["disc"] + 0.10) * openness)[chosen]
    dy = view.radius * np.sin(turned)
    coverage = np.clip((0.052 - np.sqrt(dx * dx + dy * dy)) / view.pixel + 0.5, 0, 1)
    _paint(canvas, chosen, (np.array(value, np.float32) for value in _ANTHER_COLOUR), coverage)


def _paint(canvas: np.ndarray, chosen: np.ndarray, colours: Iterable[np.ndarray], coverage: np.ndarray) -> None:
    """Lay a paint of three channels, each [n', R, R] or one number, over the chosen images of the canvas."""
    everywhere = chosen.all()
    for channel, value in zip(canvas, colours):
        below = channel if everywhere else channel[chosen]
        below += coverage * (np.clip(value, 0, 1) - below)
        if not everywhere:
            channel[chosen] = below


def _develop(canvas: np.ndarray, brightness: np.ndarray, warmth: np.ndarray) -> np.ndarray:
    """Brightness, then warmth (more red, less blue): canvas [3, n, R, R] -> uint8 [n, 3, R, R]."""
    images = np.empty((canvas.shape[1], 3, *canvas.shape[2:]), np.uint8)
    for channel, gain in enumerate((brightness * (1 + warmth), brightness, brightness * (1 - warmth))):
        images[:, channel] = np.clip(canvas[channel] * gain, 0, 1) * 255 + 0.5
    return images


def _column(values: np.ndarray) -> np.ndarray:
    """[n] -> float32 [n, 1, 1], to meet pixels [n, R, R]."""
    return values.astype(np.float32)[:, None, None]
