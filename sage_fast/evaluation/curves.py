"""Loss and quality curves of a training run as a picture, from the JSONL log of a stage."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError
from sage_fast.training.logs import read_log

__all__ = ["Series", "draw_curves", "read_series", "write_curves"]

Series = dict[str, tuple[list[float], list[float]]]
"""Name -> positions (kimg where the log has them, else steps) and values."""

_SKIPPED = {"step", "kimg", "seconds", "time"}
_WIDTH, _HEIGHT, _COLUMNS = 420, 260, 3  # pixels of a panel, panels side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 28  # margins of a panel, the top one where two names fit
_NAME = 13  # height of a series' name
_COLOURS = (("#1f5fa8", "#c3d5ea"), ("#c8502d", "#f3d0c5"), ("#3b8a3e", "#cae3cb"), ("#7b4fa3", "#ddcfe9"))
_MANY = 60  # values: more are drawn pale, with their running mean on top
_GREY, _LIGHT = "#555555", "#dddddd"


def write_curves(run: str | os.PathLike[str], stage: str | None = None) -> list[Path]:
    """Draw the curves of each stage of a run (or of one) into ``RUN/grids/<stage>_curves.png``.

    Raises:
        InputError: the folder holds no log, or a log without numbers.
    """
    logs = sorted((Path(run) / "logs").glob(f"{stage or '*'}.jsonl"))
    if not logs:
        raise InputError(
            f"{str(run)!r} must be a run folder with logs/{stage or '<stage>'}.jsonl in it, got none; train first."
        )
    written = []
    for log in logs:
        path = Path(run) / "grids" / f"{log.stem}_curves.png"
        path.parent.mkdir(exist_ok=True)
        axis = "kimg" if any("kimg" in line for line in read_log(log)) else "steps"
        picture = draw_curves(read_series(log), log.stem, axis)
        with atomic_write(path) as file:
            picture.save(file, format="png")
        written.append(path)
    return written


def read_series(path: str | os.PathLike[str]) -> Series:
    """The numbers of a log, each against thousands of images, or steps where there are none.

    Steps that a continued run repeats count once, as they came last.

    Raises:
        InputError: there are no numbers.
    """
    lines: list[dict[str, float]] = []
    for logged in read_log(Path(path)):
        line = {k: v for k, v in logged.items() if isinstance(v, int | float)}
        while lines and line["step"] < lines[-1]["step"]:
            lines.pop()
        lines.append(line)
    series: Series = {}
    for line in lines:
        x = line.get("kimg", line["step"])
        for name, value in line.items():
            if name not in _SKIPPED and math.isfinite(value):
                xs, ys = series.setdefault(name, ([], []))
                if xs and xs[-1] == x:
                    ys[-1] = value
                else:
                    xs.append(x)
                    ys.append(value)
    if not series:
        raise InputError(f"{str(path)!r} must hold numbers to draw, got none; wait for the first logged step.")
    return series


def draw_curves(series: Series, title: str = "", axis: str = "") -> Image.Image:
    """One panel for the losses, one for each score, and one for every other value; ``axis``: what the positions count."""
    panels: dict[str, list[str]] = {}
    for name in sorted(series, key=_order):
        panels.setdefault(_panel(name), []).append(name)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    picture = Image.new("RGB", (columns * _WIDTH, rows * _HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    for i, (panel, names) in enumerate(panels.items()):
        corner = (i % columns * _WIDTH, i // columns * _HEIGHT)
        words = f"{title} {panel if len(names) > 1 else names[0]}".strip() + (f" over {axis}" if axis else "")
        _draw_panel(pen, corner, words, {name: series[name] for name in names})
    return picture


def _panel(name: str) -> str:
    if "loss" in name:
        return "losses"
    score = name.partition("_")[0]
    if score in ("precision", "recall"):
        return "precision and recall"
    return score if score in ("fd", "kd") else name


def _order(name: str) -> tuple[int, str]:
    """Losses first, then scores, then the rest by name."""
    panel = _panel(name)
    first = ("losses", "fd", "kd", "precision and recall")
    return (first.index(panel) if panel in first else len(first)), name


def _draw_panel(pen: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, series: Series) -> None:
    """Axes with round numbers, grid lines, one line a series and their names."""
    font = ImageFont.load_default(12)
    x0, y0 = corner[0] + _LEFT, corner[1] + max(_TOP, 4 + _NAME * len(series))
    x1, y1 = corner[0] + _WIDTH - _RIGHT, corner[1] + _HEIGHT - _BOTTOM
    x_ticks = round_ticks(*_extent([x for xs, _ in series.values() for x in xs]))
    y_ticks = round_ticks(*_extent([y for _, ys in series.values() for y in ys]))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            x0 + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (x1 - x0),
            y1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (y1 - y0),
        )

    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        pen.line((x0, y, x1, y), fill=_LIGHT)
        pen.text((x0 - 6, y), f"{tick:g}", fill=_GREY, font=font, anchor="rm")
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        pen.line((x, y1, x, y1 + 4), fill=_GREY)
        pen.text((x, y1 + 6), f"{tick:g}", fill=_GREY, font=font, anchor="ma")
    pen.line((x0, y0, x0, y1, x1, y1), fill=_GREY)
    pen.text((x0, corner[1] + 8), title, fill="black", font=font)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour, pale = _COLOURS[i % len(_COLOURS)]
        if len(ys) > _MANY:
            pen.line([place(x, y) for x, y in zip(xs, ys)], fill=pale)
        points = [place(x, y) for x, y in zip(xs, _smoothed(ys))]
        pen.line(points, fill=colour, width=2)
        for x, y in points if len(points) <= _MANY else ():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        if len(series) > 1:
            pen.text((x1, corner[1] + 1 + _NAME * i), name, fill=colour, font=font, anchor="ra")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a thirtieth of the values around each; few values stay as they are."""
    if len(values) <= _MANY:
        return list(values)
    reach = len(values) // 60
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers at equal distances, at most ``most`` of them, the first at most ``low`` and the last at least ``high``."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50, 100):
        first, last = math.floor(low / (step * factor)), math.ceil(high / (step * factor))
        if last - first < most:
            break
    return [i * step * factor for i in range(first, last + 1)]


def _extent(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, kept apart where they are one."""
    low, high = min(values), max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return low - max(1e-3, abs(low) / 10), high + max(1e-3, abs(high) / 10)
