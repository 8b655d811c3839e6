"""The inversion table: ``python -m sage_fast.evaluation.inversion_table --models RUN ... --out docs/inversion_table``.

What each way of inversion keeps of an image and what it leaves to edit ([SAGE], Tables 8 and 9): for every model, one row, and
one for optimisation from the first model's codes. Reconstruction is measured on images that nobody has learned from;
editability on SAGE edits of one image of each category; usefulness by a classifier that learns from reconstructions and is
tested on real images. A faithful inversion is not always an editable one: read the columns together.

Unseen categories of flora are drawn; ``--data`` takes any folder of categories that the models have not seen.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast.data import flora
from sage_fast.data.folders import ImageSet, read_images, scan_image_folder
from sage_fast.data.images import to_float
from sage_fast.data.splits import take_shots
from sage_fast.data.writers import to_uint8
from sage_fast.errors import InputError
from sage_fast.evaluation.diversity import perceptual_diversity
from sage_fast.evaluation.oracle import Oracle, load_oracle
from sage_fast.evaluation.projecting import projecting
from sage_fast.evaluation.protocol import Judge, Scores, bootstrap_interval, category_retention, measure, score
from sage_fast.evaluation.report import markdown_table, percent, run_table, write_page
from sage_fast.evaluation.ssim import ssim
from sage_fast.models.classifiers import SmallResNet
from sage_fast.models.perceptual import FeatureNetwork, load_perceptual, perceptual_distance
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weight_deltas import synthesize
from sage_fast.pipeline import FewShotPipeline
from sage_fast.settings import check_at_least_one
from sage_fast.training.classifier import ClassifierConfig, train_classifier

__all__ = ["InversionRow", "InversionTableConfig", "inversion_table", "main"]

_FIRST_TRAIN, _FIRST_TEST = 700_000, 500_000  # indices of flora that no training draws


@dataclass(frozen=True)
class InversionTableConfig:
    """Settings of :func:`inversion_table`."""

    models: tuple[Path, ...]  # bundles or run folders, one row each
    out: Path = Path("inversion_table")  # writes <out>.md and <out>.json
    data: Path | None = None  # <category>/<image> of unseen categories; None: those of flora
    oracle: Path | None = None  # folder of an oracle of flora of the models' resolution; None: the one of the package
    perceptual: str = "none"  # a weights file, or lpips-...: the network of the perceptual columns
    projection_steps: int = 500  # of the optimisation, at most; 0 leaves its row out
    n_categories: int | None = None  # the first categories only
    n_train: int = 30  # images of each category to invert and to learn from
    n_test: int = 10  # images of each category to reconstruct and to test on
    n_shots: int = 1  # images of each category that edits start from
    n_edits: int = 32  # edits of each category
    alpha: float | None = None  # strength of the edits; None: the preset's
    n_seeds: int = 3  # classifiers of each row
    classifier_steps: int = 600
    classifier_width: int = 24
    batch: int = 32  # images in a network at a time
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("models must name at least one bundle, got none.")
        check_at_least_one(self, "n_train", "n_shots", "n_seeds", "classifier_steps", "classifier_width", "batch")
        if self.n_test < 2 or self.n_edits < 2 or (self.n_categories is not None and self.n_categories < 2):
            raise InputError("n_test, n_edits and n_categories must be at least 2: some numbers are of pairs.")
        if self.n_shots > self.n_train or self.projection_steps < 0:
            raise InputError(
                f"n_shots must be at most n_train and projection_steps not negative, got {self.n_shots} and "
                f"{self.projection_steps}."
            )


@dataclass(frozen=True, eq=False)
class InversionRow:
    """What one way of inversion reaches; None where it has no meaning.

    Attributes:
        name, kind: of the row.
        mse: mean squared error of reconstructions in [-1, 1].
        perceptual: their perceptual distance.
        ssim: their structural similarity, 1 at best.
        seconds: for an image, in batches of the table's size.
        edits: scores of SAGE edits against real images.
        intra: mean perceptual distance between two edits of a category.
        accuracy: on real images, of classifiers that learned from reconstructions; mean over seeds and categories, 0 to 1.
        accuracy_interval: its 95 % bootstrap interval over categories.
    """

    name: str
    kind: str
    mse: float | None
    perceptual: float | None
    ssim: float | None
    seconds: float | None
    edits: Scores | None
    intra: float | None
    accuracy: float
    accuracy_interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain content for a JSON file."""
        plain = {key: value for key, value in vars(self).items() if key != "edits"}
        return plain | {"edits": None if self.edits is None else self.edits.as_dict()}


@dataclass(frozen=True, eq=False)
class _Setting:
    """The images of a table and who judges them.

    ``numbers`` int64 [S]: the judge's number of each category.
    """

    train: ImageSet
    test: ImageSet
    numbers: Tensor
    judge: Oracle | Judge
    judge_name: str
    perceptual: FeatureNetwork | None


def inversion_table(
    config: InversionTableConfig,
    judge: Oracle | Judge | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Measure every row, write ``<out>.md`` and ``<out>.json`` and return the path of the former.

    Args:
        config: what to measure.
        judge: says the category of edits; when absent the oracle of flora, or with ``data`` the classifier of the real images.
        progress: called with one line after every row.
    Raises:
        InputError: models or images that cannot be read or do not fit each other, or files that cannot be written.
    """
    pipelines = [FewShotPipeline.from_bundle(path, config.device) for path in config.models]
    _check_alike(pipelines, config)
    train, test = _images(pipelines[0].generator, config)
    accuracy, networks = _learn(train.images, train, test, config)
    setting = _setting(config, train, test, judge, networks[0])
    rows = [InversionRow("real images", "", None, None, None, None, None, None, *accuracy)]
    names = _names(pipelines, config.models)
    if config.projection_steps:
        pipelines.append(projecting(pipelines[0], setting.perceptual, config.projection_steps))
        names.append(f"optimisation from {names[0]}")
    for name, pipeline in zip(names, pipelines, strict=True):
        start = time.monotonic()
        rows.append(_row(name, pipeline, setting, config))
        if progress is not None:
            progress(f"{name}: {time.monotonic() - start:.0f} s")
    return _write(config, setting, rows, pipelines[0].generator)


def _row(name: str, pipeline: FewShotPipeline, setting: _Setting, config: InversionTableConfig) -> InversionRow:
    real = to_float(setting.test.images)
    rebuilt, seconds = _rebuild(pipeline, real, config.batch)
    inverted, _ = _rebuild(pipeline, to_float(setting.train.images), config.batch)
    accuracy, _ = _learn(to_uint8(inverted), setting.train, setting.test, config)
    edits, labels = _edit(pipeline, setting.train, config)
    judge = (setting.judge, setting.judge_name, config.batch)
    reference = measure(real, setting.numbers[setting.test.labels], *judge)
    scores = score(measure(edits, setting.numbers[labels], *judge), reference)
    network, intra = setting.perceptual, None
    if network is not None:
        intra = perceptual_diversity(edits, labels, network, config.batch)
    mse = float((rebuilt - real).square().mean())
    return InversionRow(
        name,
        pipeline.encoder.kind,
        mse,
        _mean_distance(network, rebuilt, real, config.batch),
        float(ssim(rebuilt, real).mean()),
        seconds,
        scores,
        intra,
        *accuracy,
    )


@torch.no_grad()
def _rebuild(pipeline: FewShotPipeline, images: Tensor, batch: int) -> tuple[Tensor, float]:
    """Images [N, C, R, R] in [-1, 1], inverted and drawn again, and the seconds that an inversion took for one of them."""
    G, device, parts, seconds = pipeline.generator, pipeline.device, [], 0.0
    pipeline.encoder.invert(images[:2].to(device), G, pipeline.noise)  # what is made once is not counted
    for part in images.split(batch):
        start = time.perf_counter()
        found = pipeline.encoder.invert(part.to(device), G, pipeline.noise)
        offsets = found.offsets.float().cpu()  # and waits for the device
        seconds += time.perf_counter() - start
        w_plus = offsets.to(device) + G.latent_avg
        parts.append(synthesize(G, w_plus, found.weight_deltas, pipeline.noise).float().clamp(-1, 1).cpu())
    return torch.cat(parts), seconds / len(images)


def _edit(pipeline: FewShotPipeline, train: ImageSet, config: InversionTableConfig) -> tuple[Tensor, Tensor]:
    """SAGE edits of the first images of each category [S n, C, R, R], and their labels."""
    images = []
    for label, name in enumerate(train.categories):
        shots = train.images[train.labels == label][: config.n_shots]
        novel = pipeline.prepare(shots, "sage", config.batch)
        drawn = pipeline.draw(novel, range(config.n_edits), config.alpha, config.seed, name, batch=config.batch)
        images.append(drawn.images)
    return torch.cat(images), torch.arange(len(train.categories)).repeat_interleave(config.n_edits)


def _learn(
    images: Tensor, train: ImageSet, test: ImageSet, config: InversionTableConfig
) -> tuple[tuple[float, tuple[float, float]], list[SmallResNet]]:
    """Accuracy on the real test images of classifiers of ``images`` (uint8, as those of ``train``), and the classifiers."""
    shares, networks = [], []
    for seed in range(config.n_seeds):
        steps = config.classifier_steps
        settings = ClassifierConfig(
            total_steps=steps,
            warmup=min(100, steps // 4),
            log_every=steps,
            save_every=steps,
            width=config.classifier_width,
            seed=config.seed + seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            network = train_classifier(settings, images, train.labels, folder, len(train.categories))
        with torch.no_grad():
            seen = torch.cat([network(to_float(x)).argmax(1) for x in test.images.split(config.batch)])
        shares.append(category_retention(test.labels, seen))
        networks.append(network)
    of_categories = torch.stack(shares).mean(0)
    return (float(of_categories.mean()), bootstrap_interval(of_categories)), networks


def _mean_distance(network: FeatureNetwork | None, a: Tensor, b: Tensor, batch: int) -> float | None:
    if network is None:
        return None
    with torch.no_grad():
        parts = [float(perceptual_distance(network, x, y)) * len(x) for x, y in zip(a.split(batch), b.split(batch))]
    return sum(parts) / len(a)


class _ClassifierJudge:
    """A classifier of the real images as the judge of edits; it knows no factors."""

    factor_names: Sequence[str] = ()

    def __init__(self, network: SmallResNet) -> None:
        self.network = network

    def predict(self, images: Tensor) -> Tensor:
        return self.network(images).argmax(1)

    def features(self, images: Tensor) -> Tensor:
        return self.network.features(images)

    def factors(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 0)


def _setting(
    config: InversionTableConfig, train: ImageSet, test: ImageSet, judge: Oracle | Judge | None, network: SmallResNet
) -> _Setting:
    numbers, name = torch.arange(len(train.categories)), "judge"
    if judge is None and config.data is None:
        judge, name = load_oracle(config.oracle), "oracle"
    if config.data is None:
        numbers = numbers + flora.N_SEEN
    if judge is None:
        judge, name = _ClassifierJudge(network), "classifier of the real images"
    perceptual = load_perceptual(config.perceptual)
    return _Setting(train, test, numbers, judge, name, perceptual)


def _images(generator: Generator, config: InversionTableConfig) -> tuple[ImageSet, ImageSet]:
    """Images to learn from and to test on, of the same categories."""
    if config.data is None:
        labels = range(flora.N_SEEN, flora.N_SEEN + min(config.n_categories or flora.N_UNSEEN, flora.N_UNSEEN))
        sizes = ((_FIRST_TRAIN, config.n_train), (_FIRST_TEST, config.n_test))
        train, test = (_drawn(labels, first, n, generator.resolution) for first, n in sizes)
        return train, test
    listing = scan_image_folder(config.data, min_categories=2)
    if config.n_categories is not None:
        listing = listing.select(listing.categories[: config.n_categories])
    given, rest = take_shots(listing, config.n_train, config.seed)
    tested, _ = take_shots(rest, config.n_test, config.seed)
    train, test = (read_images(part, generator.resolution, generator.n_channels) for part in (given, tested))
    return train, test


def _drawn(labels: range, first: int, n: int, resolution: int) -> ImageSet:
    names = [flora.categories()[label].name for label in labels]
    drawn = [flora.render(np.full(n, label), np.arange(first, first + n), resolution)[0] for label in labels]
    files = [f"{name}_{first + i}" for name in names for i in range(n)]
    return ImageSet(torch.cat(drawn), torch.arange(len(labels)).repeat_interleave(n), names, files, [])


def _check_alike(pipelines: Sequence[FewShotPipeline], config: InversionTableConfig) -> None:
    sizes = [(p.generator.resolution, p.generator.n_channels) for p in pipelines]
    if len(set(sizes)) > 1:
        raise InputError(f"models must be of one resolution and number of channels, got {sorted(set(sizes))}.")
    if config.data is None and sizes[0][1] != 3:
        raise InputError(f"Flora is in RGB, got models of {sizes[0][1]} channels; give --data.")


def _names(pipelines: Sequence[FewShotPipeline], models: Sequence[Path]) -> list[str]:
    """The kind of each model, with its folder where there are two of a kind."""
    kinds = [pipeline.encoder.kind for pipeline in pipelines]
    return [k if kinds.count(k) == 1 else f"{k} ({path.name})" for k, path in zip(kinds, models, strict=True)]


# ---- the page ----


def _write(config: InversionTableConfig, setting: _Setting, rows: Sequence[InversionRow], generator: Generator) -> Path:
    hidden = ("models", "out", "data", "oracle", "perceptual", "device")
    settings = {key: value for key, value in asdict(config).items() if key not in hidden}
    page = "\n\n".join(["# Inversion", _text(config, setting, rows, generator), _table(rows)]) + "\n"
    return write_page(config.out, page, {"config": settings, "rows": [row.as_dict() for row in rows]})


def _table(rows: Sequence[InversionRow]) -> str:
    header = ["", "L2", "perceptual", "SSIM", "ms an image", "retention of edits", "diversity of edits"]
    header += ["distance within a category", "accuracy of a classifier"]
    return markdown_table(header, [_cells(row) for row in rows])


def _cells(row: InversionRow) -> list[str]:
    low, high = row.accuracy_interval
    numbers = [(row.mse, ".4f"), (row.perceptual, ".3f"), (row.ssim, ".3f")]
    numbers.append((None if row.seconds is None else 1000 * row.seconds, ".2f"))
    edits = [row.edits.retention, row.edits.diversity_relative] if row.edits else [None, None]
    return [
        row.name,
        *(_number(value, form) for value, form in numbers),
        *(percent(value) for value in edits),
        _number(row.intra, ".3f"),
        f"{percent(row.accuracy)} ({100 * low:.1f} to {100 * high:.1f})",
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _text(config: InversionTableConfig, setting: _Setting, rows: Sequence[InversionRow], generator: Generator) -> str:
    network = "no network" if setting.perceptual is None else setting.perceptual.name
    kept = next((row.edits.retention_real for row in rows if row.edits), None)
    return (
        f"{len(setting.train.categories)} categories that no model has seen, {generator.resolution} px. L2, perceptual distance "
        f"({network}) and SSIM of reconstructions of {config.n_test} images of each category; the time of one inversion in "
        f"batches of {config.batch} on '{config.device}', with {torch.get_num_threads()} thread(s). Retention and diversity "
        f"(as a share of real images') of {config.n_edits} SAGE edits of {config.n_shots} image(s) of each category are the "
        f"word of the {setting.judge_name}, which puts {percent(kept)} of the real images into their category; the distance "
        f"within a category is the mean over pairs of edits by the network of the perceptual column. Accuracy on those real "
        f"images of a classifier that learned from {config.n_train} reconstructions of each category, mean of "
        f"{config.n_seeds} seeds, with the 95 % bootstrap interval over categories. Optimisation has at most "
        f"{config.projection_steps} steps an image."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 for a mistake in what was given."""
    return run_table(inversion_table, InversionTableConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
