"""Settings of the editor compared on *seen* flora categories: ``python -m sage_fast.evaluation.flora_validation --model RUN``.

Some seen categories are held out of both dictionaries' statistics (class embeddings, basis, codes) and play the novel
ones, with drawings that no training has seen. One setting is changed at a time; every setting runs over a sweep of alpha, and
is compared with the first one at equal spread of the category-irrelevant factors. Defaults are chosen here, never on the
unseen categories of the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sage_fast.data import flora
from sage_fast.data.images import to_float
from sage_fast.data.latent_table import LatentTable
from sage_fast.editing.editor import METHODS, unused_settings
from sage_fast.errors import InputError
from sage_fast.evaluation.flora_table import Row, matched_retention
from sage_fast.evaluation.oracle import load_oracle
from sage_fast.evaluation.protocol import join, measure, score
from sage_fast.evaluation.report import markdown_table, percent, run_table, write_page
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.models.weights import load_bundle
from sage_fast.pipeline import FewShotPipeline

__all__ = ["FloraValidationConfig", "flora_validation", "hold_out"]

_FIRST_SHOT, _FIRST_REFERENCE = 200_000, 300_000  # indices of no training, and not those of the flora table
_STEM = "flora_validation"


@dataclass(frozen=True)
class FloraValidationConfig:
    """Settings of :func:`flora_validation`."""

    model: Path | None = None  # bundle trained on flora; None: the model that comes with the package
    out: Path = Path(_STEM)  # writes <out>.md and <out>.json
    n_categories: int = 24  # seen categories that are held out
    n_shots: int = 3
    n: int = 32  # images of each category and setting
    alphas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    methods: tuple[str, ...] = ("sage", "age", "sage-q", "sage-i")  # the first is compared with
    n_components: tuple[int, ...] = (40, 10, 20, 64)  # t_B; the first value of each is the base
    n_similar: tuple[int, ...] = (20, 5, 10, 50)  # t_C
    n_directions: tuple[int, ...] = (16, 8)  # t_A; the model that comes with the package has 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.n_categories <= flora.N_SEEN // 2:
            raise InputError(f"n_categories must be 2 to {flora.N_SEEN // 2}, got {self.n_categories}.")
        for name in ("alphas", "methods", "n_components", "n_similar", "n_directions"):
            if not getattr(self, name):
                raise InputError(f"{name} must hold at least one value, got none.")
        if not set(self.methods) <= set(METHODS):
            raise InputError(f"methods must be among {', '.join(METHODS)}, got {', '.join(self.methods)}.")


def hold_out(codes: LatentTable, n: int, seed: int) -> tuple[LatentTable, list[str]]:
    """The table without ``n`` categories drawn with ``seed``, labels renumbered, and the names of those left out."""
    order = np.random.default_rng(seed).permutation(len(codes.categories)).tolist()
    out, kept = sorted(order[:n]), sorted(order[n:])
    number = torch.full((len(codes.categories),), -1, dtype=torch.int64)
    number[kept] = torch.arange(len(kept))
    rows = (number[codes.labels] >= 0).nonzero().flatten()
    table = LatentTable(codes.w_plus[rows], number[codes.labels[rows]], [codes.categories[i] for i in kept])
    return table, [codes.categories[i] for i in out]


def flora_validation(config: FloraValidationConfig, progress: Callable[[str], None] | None = None) -> Path:
    """Measure every setting on held-out seen categories, write ``<out>.md`` and ``<out>.json`` and return the path of the former.

    Args:
        config: what to measure.
        progress: called with one line after every setting.
    Raises:
        InputError: a model that cannot be read or was not trained on flora, or files that cannot be written.
    """
    bundle, oracle = load_bundle(config.model), load_oracle()
    number = {category.name: label for label, category in enumerate(flora.categories())}
    if unknown := set(bundle.codes.categories) - number.keys():
        raise InputError(
            f"model must have been trained on flora, got one that knows {min(unknown)!r}; leave out --model."
        )
    codes, names = hold_out(bundle.codes, config.n_categories, config.seed)
    rank = min(max(config.n_components), len(codes.categories), codes.w_plus.shape[2])
    relevant = CategoryRelevantDictionary(rank).fit(codes.w_plus, codes.labels)
    irrelevant = CategoryIrrelevantDictionary(*bundle.dictionary)
    pipeline = FewShotPipeline(bundle.generator, bundle.encoder, relevant, irrelevant, codes, noise=bundle.noise)
    labels = [number[name] for name in names]
    size = bundle.generator.resolution

    def draw(label: int, first: int, n: int) -> torch.Tensor:
        return to_float(flora.render(np.full(n, label), np.arange(first, first + n), size)[0])

    def judged(images: torch.Tensor, label: int):
        return measure(images, torch.full((len(images),), label), oracle, "oracle", 256)

    shots = {label: draw(label, _FIRST_SHOT, config.n_shots) for label in labels}
    reference = join([judged(draw(label, _FIRST_REFERENCE, config.n), label) for label in labels])
    sweeps: dict[str, list[Row]] = {}
    for name, method, options in _settings(config):
        parts: dict[float | None, list[Any]] = {}
        for label in labels:
            novel = pipeline.prepare(shots[label], method, **options)
            for alpha in (None,) if method == "inversion" else config.alphas:
                result = pipeline.draw(novel, range(config.n), alpha, config.seed, str(label))
                parts.setdefault(alpha, []).append(judged(result.images, label))
        sweeps[name] = [
            Row(config.n_shots, method, "default", alpha, "none", score(join(p), reference))
            for alpha, p in parts.items()
        ]
        if progress is not None:
            progress(f"{name}: {', '.join(f'{row.scores.retention:.3f}' for row in sweeps[name])}")
    content = {name: [row.as_dict() for row in rows] for name, rows in sweeps.items()}
    return write_page(config.out, _page(sweeps, config), content)


def _settings(config: FloraValidationConfig) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, method and options: the first value of everything, then one change at a time."""
    base = {
        "n_components": config.n_components[0],
        "n_similar": config.n_similar[0],
        "n_directions": config.n_directions[0],
    }
    found: list[tuple[str, str, dict[str, Any]]] = [("inversion", "inversion", {})]
    for method in config.methods:
        idle = unused_settings(method)
        found += [(method, method, {key: value for key, value in base.items() if key not in idle})]
    for key in base:
        values: Sequence[int] = getattr(config, key)
        found += [(f"sage, {key} {value}", "sage", {**base, key: value}) for value in values[1:]]
    found += [("sage, mean of the shots", "sage", {**base, "each_shot": False})]
    found += [("sage, keep_fine_residual", "sage", {**base, "keep_fine_residual": True})]
    found += [(f"sage, {kind}", "sage", {**base, "covariance": kind}) for kind in ("per_layer", "diagonal")]
    return found


def _page(sweeps: dict[str, list[Row]], config: FloraValidationConfig) -> str:
    """Every row, and retention against the first method at the middle of the common range of spreads."""
    header = ["setting", "alpha", "retention", "diversity", "spread", "FD-oracle"]
    cells = []
    for name, rows in sweeps.items():
        for row in rows:
            s = row.scores
            spread = "" if s.spread is None else f"{s.spread:.2f}"
            alpha = "" if row.alpha is None else f"{row.alpha:g}"
            cells.append([name, alpha, percent(s.retention), f"{s.diversity:.2f}", spread, f"{s.frechet:.2f}"])
    first = config.methods[0]
    matched = []
    for name, rows in sweeps.items():
        for match in matched_retention(sweeps[first], rows, "spread")[2:3] if name != "inversion" else []:
            low, high = match.interval
            matched.append([name, f"{match.target:.2f}", *map(percent, match.retentions), f"{low:+.3f} to {high:+.3f}"])
    return "\n".join(
        [
            f"Held out: {config.n_categories} seen categories, {config.n_shots} shots, {config.n} images of each.",
            "",
            markdown_table(header, cells),
            "",
            f"At equal spread of the factors, against '{first}':",
            "",
            markdown_table(["setting", "spread", f"retention of {first}", "retention", "difference, 95 %"], matched),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 for a mistake in what was given."""
    return run_table(flora_validation, FloraValidationConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
