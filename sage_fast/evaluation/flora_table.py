"""The flora table: ``python -m sage_fast.evaluation.flora_table --model RUN --out docs/flora_table``.

For the unseen categories of flora, from one and from three given drawings of each: other drawings of them, plain
inversion, AGE, SAGE-Q, SAGE-I, SAGE in every preset over a sweep of alpha, and SAGE with every fusion, judged by the
oracle.

A stronger edit (alpha) is more varied and leaves the category more often, so one alpha each compares nothing. The table
therefore also compares the methods *at equal diversity*: category retention along each sweep, interpolated at the same
diversity, once measured as the distance of features and once as the spread of the category-irrelevant factors.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast.data import flora
from sage_fast.editing.editor import PRESETS
from sage_fast.errors import InputError
from sage_fast.evaluation.oracle import Oracle, load_oracle
from sage_fast.evaluation.protocol import Judge, Measurements, Scores, bootstrap_interval, join, measure, score
from sage_fast.evaluation.report import markdown_table, percent, run_table, table, write_page
from sage_fast.pipeline import FUSIONS, FewShotPipeline

__all__ = ["FloraTableConfig", "Match", "Row", "flora_table", "matched_retention", "measure_rows"]

_FIRST_SHOT, _FIRST_REFERENCE, _FIRST_OTHER = 400_000, 500_000, 600_000  # indices that no training draws
_N_TARGETS = 5  # diversities at which two sweeps are compared
_SWEEPS = (("age", "default"), ("sage-q", "default"), ("sage-i", "default"), *(("sage", preset) for preset in PRESETS))
_MEASURES = {"diversity": "distance of features", "spread": "spread of the factors"}


@dataclass(frozen=True)
class FloraTableConfig:
    """Settings of :func:`flora_table`."""

    model: Path | None = None  # bundle trained on flora; None: the model that comes with the package
    out: Path = Path("flora_table")  # writes <out>.md and <out>.json
    oracle: Path | None = None  # folder of an oracle of the model's resolution; None: the one of the package
    n: int = 64  # images of each category in every row
    shots: tuple[int, ...] = (1, 3)  # given images of each category, one table for each number
    alphas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # the sweep; the preset's own alpha is added
    n_categories: int = flora.N_UNSEEN  # unseen categories; fewer for a quick look
    seed: int = 0
    batch: int = 64  # images in a network at a time
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 2 <= self.n_categories <= flora.N_UNSEEN:
            raise InputError(f"n_categories must be 2 to {flora.N_UNSEEN}, got {self.n_categories}.")
        if self.n < 2 or self.batch < 1:
            raise InputError(f"n must be at least 2 and batch at least 1, got {self.n} and {self.batch}.")
        if not self.shots or min(self.shots) < 1 or not self.alphas or min(self.alphas) <= 0:
            raise InputError(f"shots and alphas must be lists of positive numbers, got {self.shots} and {self.alphas}.")


@dataclass(frozen=True, eq=False)
class Row:
    """Scores of one way to make images; ``alpha`` is None and ``preset`` empty where they have no meaning."""

    n_shots: int
    method: str
    preset: str
    alpha: float | None
    fusion: str
    scores: Scores

    @property
    def series(self) -> str:
        """The row's name without alpha."""
        preset = f" ({self.preset})" if self.preset not in ("default", "") else ""
        return f"{_title(self.method)}{preset}" + (f" + {self.fusion}" if self.fusion != "none" else "")

    @property
    def name(self) -> str:
        """The row's name with alpha."""
        return self.series if self.alpha is None else f"{self.series}, α = {self.alpha:g}"

    def as_dict(self) -> dict[str, Any]:
        """Plain content for a JSON file."""
        names = ("n_shots", "method", "preset", "alpha", "fusion", "name")
        return {name: getattr(self, name) for name in names} | {"scores": self.scores.as_dict()}


@dataclass(frozen=True)
class Match:
    """Retention of two sweeps at one diversity, both interpolated linearly between neighbouring values of alpha.

    Attributes:
        target: the common diversity, in the unit of the measure.
        alphas: where each sweep reaches it (for the first time).
        retentions: of the two sweeps there, 0 to 1.
        by_category: second minus first retention of each category.
    """

    target: float
    alphas: tuple[float, float]
    retentions: tuple[float, float]
    by_category: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Second minus first retention."""
        return self.retentions[1] - self.retentions[0]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the difference over categories, paired."""
        return bootstrap_interval(torch.tensor(self.by_category))


def flora_table(
    config: FloraTableConfig, oracle: Oracle | Judge | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """Measure every row, write ``<out>.md`` and ``<out>.json`` and return the path of the former.

    Args:
        config: what to measure.
        oracle: the judge; that of ``config`` when absent.
        progress: called with one line after every series of rows.

    Raises:
        InputError: a model or an oracle that cannot be read, a model of other images, or files that cannot be written.
    """
    start = time.monotonic()
    pipeline = FewShotPipeline.from_bundle(config.model, config.device)
    if pipeline.generator.n_channels != 3:
        raise InputError(f"The flora table needs a model of RGB images, got {pipeline.generator.n_channels} channels.")
    rows = measure_rows(pipeline, oracle or load_oracle(config.oracle), config, progress)
    setting = _setting(pipeline, config, rows) + f" Measured in {time.monotonic() - start:.0f} s."
    return write_page(config.out, _page(rows, setting), _content(pipeline, config, rows))


def measure_rows(
    pipeline: FewShotPipeline,
    oracle: Oracle | Judge,
    config: FloraTableConfig,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Every row of the table; arguments as :func:`flora_table`."""
    reference = _measure_drawings(pipeline, oracle, config, _FIRST_REFERENCE)
    other = score(_measure_drawings(pipeline, oracle, config, _FIRST_OTHER), reference)
    rows = []
    for n_shots in config.shots:
        shots = [_draw(label, _FIRST_SHOT, n_shots, pipeline.generator.resolution) for label in _labels(config)]
        rows.append(Row(n_shots, "real", "", None, "none", other))
        for method, preset, alphas, fusions in _series(config):
            start = time.monotonic()
            of_preset = _with_preset(pipeline, preset)
            measured = _measure_series(of_preset, oracle, shots, config, method, alphas, fusions)
            for (alpha, fusion), measurements in measured.items():
                rows.append(Row(n_shots, method, preset, alpha, fusion, score(measurements, reference)))
            if progress is not None:
                progress(
                    f"{n_shots} shot{'s' if n_shots > 1 else ''}, {rows[-1].series}: {time.monotonic() - start:.1f} s"
                )
    return rows


def matched_retention(first: Sequence[Row], second: Sequence[Row], measured: str = "diversity") -> list[Match]:
    """Category retention of two sweeps of alpha at equal diversity.

    Args:
        first, second: rows of two methods at several alphas.
        measured: ``"diversity"`` (distance of features) or ``"spread"`` (of the category-irrelevant factors).

    Returns:
        A match at each of five diversities, evenly spaced inside the range that both sweeps cover; empty when their
        ranges do not overlap.
    """
    curves = [sorted(rows, key=lambda row: row.alpha or 0.0) for rows in (first, second)]
    values = [[_value(row, measured) for row in curve] for curve in curves]
    low, high = max(map(min, values)), min(map(max, values))
    if not low < high:
        return []
    targets = torch.linspace(low, high, _N_TARGETS + 2, dtype=torch.float64)[1:-1].tolist()
    return [_match(curves[0], curves[1], measured, target) for target in targets]


def _match(first: Sequence[Row], second: Sequence[Row], measured: str, target: float) -> Match:
    (alpha_a, kept_a), (alpha_b, kept_b) = (_at(curve, measured, target) for curve in (first, second))
    difference = tuple((kept_b - kept_a).tolist())
    return Match(target, (alpha_a, alpha_b), (float(kept_a.mean()), float(kept_b.mean())), difference)


def _at(curve: Sequence[Row], measured: str, target: float) -> tuple[float, Tensor]:
    """Alpha and the retention of each category [S] where the sweep first reaches a diversity within its range."""
    for a, b in pairwise(curve):
        x, y = _value(a, measured), _value(b, measured)
        if min(x, y) <= target <= max(x, y):
            t = (target - x) / (y - x) if y != x else 0.0
            kept = [torch.tensor(row.scores.retention_by_category, dtype=torch.float64) for row in (a, b)]
            return (a.alpha or 0.0) * (1 - t) + (b.alpha or 0.0) * t, torch.lerp(kept[0], kept[1], t)
    raise AssertionError("the target lies within the sweep")


def _value(row: Row, measured: str) -> float:
    value = getattr(row.scores, measured)
    return 0.0 if value is None else value


def _series(config: FloraTableConfig) -> list[tuple[str, str, tuple[float | None, ...], tuple[str, ...]]]:
    """Method, preset, alphas and fusions of every series of rows."""
    own = {preset: float(settings["alpha"]) for preset, settings in PRESETS.items()}
    sweeps = [(m, p, tuple(sorted({*config.alphas, own[p]})), ("none",)) for m, p in _SWEEPS]
    fused = ("sage", "default", (own["default"],), tuple(fusion for fusion in FUSIONS if fusion != "none"))
    return [("inversion", "default", (None,), ("none",)), *sweeps, fused]


def _measure_series(
    pipeline: FewShotPipeline,
    oracle: Oracle | Judge,
    shots: Sequence[Tensor],
    config: FloraTableConfig,
    method: str,
    alphas: Sequence[float | None],
    fusions: Sequence[str],
) -> dict[tuple[float | None, str], Measurements]:
    """Measurements of every alpha and fusion, over all categories; images are kept for one category at a time."""
    parts: dict[tuple[float | None, str], list[Measurements]] = defaultdict(list)
    for label, given in zip(_labels(config), shots, strict=True):
        novel = pipeline.prepare(given, method, config.batch)
        name = flora.categories()[label].name
        for alpha in alphas:
            result = pipeline.draw(novel, range(config.n), alpha, config.seed, name, fusions, config.batch)
            for fusion in fusions:
                images = result.images if fusion == "none" else result.fused[fusion]
                parts[alpha, fusion].append(_measure_one(images, label, oracle, config))
    return {key: join(measurements) for key, measurements in parts.items()}


def _measure_drawings(
    pipeline: FewShotPipeline, oracle: Oracle | Judge, config: FloraTableConfig, first_index: int
) -> Measurements:
    resolution = pipeline.generator.resolution
    drawn = ((label, _draw(label, first_index, config.n, resolution)) for label in _labels(config))
    return join([_measure_one(images, label, oracle, config) for label, images in drawn])


def _measure_one(images: Tensor, label: int, oracle: Oracle | Judge, config: FloraTableConfig) -> Measurements:
    return measure(images, torch.full((len(images),), label), oracle, "oracle", max(config.batch, 256))


def _draw(label: int, first_index: int, n: int, resolution: int) -> Tensor:
    """Drawings of one category: uint8 [n, 3, R, R]."""
    return flora.render(np.full(n, label), np.arange(first_index, first_index + n), resolution)[0]


def _labels(config: FloraTableConfig) -> range:
    return range(flora.N_SEEN, flora.N_SEEN + config.n_categories)


def _with_preset(pipeline: FewShotPipeline, preset: str) -> FewShotPipeline:
    if preset == pipeline.preset:
        return pipeline
    p = pipeline
    return FewShotPipeline(p.generator, p.encoder, p.relevant, p.irrelevant, p.codes, preset, p.noise, p.hash)


def _title(method: str) -> str:
    return {"real": "real drawings"}.get(method, method.upper() if method != "inversion" else method)


# ---- the page ----


def _page(rows: Sequence[Row], setting: str) -> str:
    parts = ["# Flora: unseen categories from a few images", setting]
    for n_shots in dict.fromkeys(row.n_shots for row in rows):
        part = [row for row in rows if row.n_shots == n_shots]
        parts += [
            f"## {n_shots} given image{'s' if n_shots > 1 else ''}",
            table({r.name: r.scores for r in _main(part)}),
        ]
        parts += ["### At equal diversity", _EQUAL, _equal_table(part)]
        parts += ["### Along alpha", _sweep_table(part), "### Spread of each factor", _factor_table(_main(part))]
    return "\n\n".join(parts) + "\n"


_EQUAL = (
    "Retention of each method minus that of AGE where both sweeps of alpha have the same diversity: mean over five "
    "diversities evenly spaced inside the common range, with the 95 % interval (paired bootstrap over categories), and "
    "the two retentions at the middle one. Above zero, the method keeps the category more often than AGE."
)


def _setting(pipeline: FewShotPipeline, config: FloraTableConfig, rows: Sequence[Row]) -> str:
    return (
        f"{config.n_categories} categories that the model has not seen, {config.n} images of each in every row, "
        f"{pipeline.generator.resolution} px, model {pipeline.hash[:12] or 'without a hash'}, seed {config.seed}. "
        f"Every number rests on the oracle, which puts {percent(rows[0].scores.retention_real)} of the real drawings "
        "into their category; distances and diversity are of its features. *Real drawings* are others of the same "
        "categories: the best that any row can reach. Diversity and spread in per cent are shares of those of real "
        "drawings."
    )


def _main(rows: Sequence[Row]) -> list[Row]:
    """Of every sweep the row at the preset's own alpha; every other row."""
    return [row for row in rows if row.alpha is None or row.alpha == PRESETS[row.preset]["alpha"]]


def _sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Name of a method -> its rows over alpha."""
    sweeps: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.alpha is not None and row.fusion == "none":
            sweeps[row.series].append(row)
    return sweeps


def _equal_table(rows: Sequence[Row]) -> str:
    sweeps, lines = _sweeps(rows), []
    for name, sweep in sweeps.items():
        for measured, title in _MEASURES.items():
            if name != "AGE":
                lines.append([name, title, *_equal_cells(matched_retention(sweeps["AGE"], sweep, measured), measured)])
    return markdown_table(
        ["", "diversity as", "mean difference", "at", "AGE", "the method", "α of AGE", "α of the method"], lines
    )


def _equal_cells(matches: Sequence[Match], measured: str) -> list[str]:
    if not matches:
        return ["ranges do not overlap", *["–"] * 5]
    mean, (low, high) = mean_difference(matches)
    middle = matches[len(matches) // 2]
    at = f"{middle.target:.3f}" if measured == "diversity" else percent(middle.target, 0)
    kept = [percent(value) for value in middle.retentions]
    return [f"{_points(mean)} ({_points(low)} to {_points(high)})", at, *kept, *(f"{a:.2f}" for a in middle.alphas)]


def mean_difference(matches: Sequence[Match]) -> tuple[float, tuple[float, float]]:
    """Mean difference over the matches, and its 95 % paired bootstrap interval over categories."""
    by_category = torch.tensor([match.by_category for match in matches], dtype=torch.float64).mean(0)
    return float(by_category.mean()), bootstrap_interval(by_category)


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _sweep_table(rows: Sequence[Row]) -> str:
    header = ["", "α", "category retention", "FD-oracle", "diversity", "spread"]
    lines = []
    for name, sweep in _sweeps(rows).items():
        for row in sweep:
            s = row.scores
            numbers = [percent(s.retention), f"{s.frechet:.3f}", percent(s.diversity_relative, 0), percent(s.spread, 0)]
            lines.append([name, f"{row.alpha:g}", *numbers])
    return markdown_table(header, lines)


def _factor_table(rows: Sequence[Row]) -> str:
    factors = list(rows[0].scores.spreads)
    lines = [[row.name, *(percent(row.scores.spreads[factor], 0) for factor in factors)] for row in rows]
    return markdown_table(["", *(factor.replace("_", " ") for factor in factors)], lines)


def _content(pipeline: FewShotPipeline, config: FloraTableConfig, rows: Sequence[Row]) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in ("n", "shots", "alphas", "n_categories", "seed")}
    matches = []
    for n_shots in config.shots:
        sweeps = _sweeps([row for row in rows if row.n_shots == n_shots])
        for name, sweep in sweeps.items():
            for measured in _MEASURES if name != "AGE" else ():
                found = matched_retention(sweeps["AGE"], sweep, measured)
                matches.append({"n_shots": n_shots, "method": name, "diversity_as": measured, **_match_content(found)})
    return {
        "model": pipeline.hash,
        "resolution": pipeline.generator.resolution,
        "config": settings,
        "rows": [row.as_dict() for row in rows],
        "at_equal_diversity_to_age": matches,
    }


def _match_content(matches: Sequence[Match]) -> dict[str, Any]:
    if not matches:
        return {"matches": []}
    mean, interval = mean_difference(matches)
    names = ("target", "alphas", "retentions", "difference", "interval")
    each = [{name: getattr(match, name) for name in names} for match in matches]
    return {"mean_difference": mean, "interval": interval, "matches": each}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 for a mistake in what was given."""
    return run_table(flora_table, FloraTableConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
