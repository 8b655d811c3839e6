"""Scores as a page for people and a file for programs, and the scores of a folder of generated images.

Every number stands beside the name of the network it rests on and one sentence that says what it means.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sage_fast.data import flora
from sage_fast.data.folders import ImageFolder, read_images
from sage_fast.data.sources import open_source
from sage_fast.data.writers import atomic_write, make_output, write_json
from sage_fast.errors import InputError, SageFastWarning, counted
from sage_fast.evaluation.oracle import Oracle, load_oracle
from sage_fast.evaluation.protocol import Measurements, Scores, as_written, measure, score
from sage_fast.evaluation.quality import image_features, load_features
from sage_fast.factorization.category_irrelevant import layer_groups
from sage_fast.models.bundles import bundle_hash, read_index
from sage_fast.models.hyperstyle import codes_of
from sage_fast.models.stylegan2 import Discriminator
from sage_fast.models.weights import Bundle, load_bundle, load_discriminator, load_encoder

__all__ = [
    "evaluate_folder",
    "markdown_table",
    "nearest_class_mean",
    "run_table",
    "table",
    "write_page",
    "write_report",
]

StrPath = str | os.PathLike[str]

_MEANING = {
    "Category retention": "share of the generated images that the network puts into the category they were made for, "
    "mean over categories; in brackets the 95 % bootstrap interval over categories, where there are several: too narrow for "
    "fewer than twenty. The share for real images, above, is what can be reached. Higher is better. It takes real images of two "
    "categories at least.",
    "FD-{network}": "Fréchet distance between the features of generated and of real images: how far the two clouds of "
    "images lie apart, in place and in shape. Lower is better. Comparable only for this network, these categories and "
    "sets of these sizes; it is not the FID, which is defined by another network.",
    "KD-{network}": "kernel distance (unbiased squared maximum mean discrepancy, cubic kernel) between the same "
    "features. Lower is better; about 0 when the sets agree; it does not depend on the sizes of the sets.",
    "Diversity": "mean distance between two generated images of one category in the same features, in brackets as a "
    "share of the real images'. Higher is more varied, but images that leave their category are varied too: read it "
    "together with retention.",
    "Spread": "standard deviation of each category-irrelevant factor (pose, light, background ...) within a category, "
    "as a share of the real images'; mean over the factors. 100 % varies as much as real images do.",
}


def evaluate_folder(
    model: StrPath | None,
    generated: StrPath,
    real: StrPath,
    batch: int = 128,
    oracle: Oracle | None = None,
    features: StrPath | None = None,
) -> Scores:
    """Scores of a folder of generated images against a folder of real ones.

    When every category is one of flora's, the oracle that knows all of flora judges, at its own resolution. Otherwise
    the features are those of the network named by ``features``, or of the model's own discriminator, or of its encoder
    when it has none, and an image counts as of the category whose real images' mean feature is nearest, among all
    categories of ``real`` (a real image is left out of its own category's mean). Features of the model that is judged
    compare settings of one model, not models; a warning says so where another model drew the images.

    Args:
        model: bundle folder; None: the model that comes with the package.
        generated: an output of ``generate`` in any format, or another source that ``open_source`` takes.
        real: ``<category>/<image>.png``, or another such source, with at least the generated categories. It should not hold
            the shots.
        batch: images in the network at a time.
        oracle: judge of flora's categories; the one that comes with the package when absent.
        features: who judges in place of the rule above: "oracle", "discriminator" (the model's), "lpips-..." or a weights
            file, see :func:`sage_fast.evaluation.quality.load_features`.

    Raises:
        InputError: a folder, model or network that cannot be used, a generated category without real images, or too few
            images.
    """
    if os.path.exists(generated) and os.path.exists(real) and os.path.samefile(generated, real):
        raise InputError(f"The generated and the real images are both {str(real)!r}; give two folders.")
    encoder = load_encoder(model)
    ours, theirs = open_source(generated, flat_ok=True), open_source(real, flat_ok=True)
    missing = sorted(set(ours.categories) - set(theirs.categories))
    if missing:
        raise InputError(
            f"Real folder {str(real)!r} has no images of {', '.join(map(repr, missing[:3]))}; add a sub-folder of real "
            "images for each generated category."
        )
    _check_pairs(ours, ours.categories, "Generated", "generate more")
    _check_pairs(theirs, ours.categories, "Real", "add real images")
    spec = None if features is None else str(features)
    known = encoder.n_channels == 3 and set(theirs.categories) <= _flora_numbers().keys()
    if (spec == "oracle" or oracle is not None) and not (known and spec in (None, "oracle")):
        raise InputError(
            "The oracle judges RGB images of flora's categories alone, without other features; leave it out."
        )
    if known and spec in (None, "oracle"):
        measured = _by_oracle(oracle or load_oracle(), ours, theirs, batch)
    elif spec in (None, "discriminator"):
        _warn_of_another_model(model, generated)
        own = _judge_of(model) if spec is None else _judge_by_maps(load_discriminator(model))
        measured = _by_class_means(own, ours, theirs, batch)
    else:
        network = load_features(spec, partial(load_discriminator, model))
        assert not isinstance(network, Oracle)
        judge = _Judge(partial(image_features, network), network.name, encoder.resolution, encoder.n_channels)
        measured = _by_class_means(judge, ours, theirs, batch)
    return dataclasses.replace(score(*measured), categories=tuple(ours.categories))


def _warn_of_another_model(model: StrPath | None, generated: StrPath) -> None:
    """Warn where a network of ``model`` is to judge what another model drew, as far as both say who they are."""
    try:
        drawn_by = json.loads((Path(generated) / "config.json").read_bytes())["model"]
        judge = bundle_hash(read_index(model))
    except (OSError, ValueError, LookupError, TypeError):  # no output of generate, or a file of networks
        return
    if drawn_by != judge:
        name = "the model that comes with the package" if model is None else f"the model {str(model)!r}"
        warnings.warn(
            f"{str(generated)!r} was drawn by another model than {name}, whose own network judges it here; give the model that drew "
            "it (--model), or a network of neither (--features).",
            SageFastWarning,
            stacklevel=3,
        )


def _check_pairs(folder: ImageFolder, categories: list[str], name: str, remedy: str) -> None:
    """Raise InputError unless one of the categories has two images, which a mean distance within a category takes."""
    counts = Counter(folder.labels)
    if all(counts[folder.categories.index(category)] < 2 for category in categories):
        raise InputError(
            f"{name} folder {str(folder.root)!r} must have two images of at least one generated category, got single images; "
            f"{remedy}."
        )


def write_report(folder: StrPath, scores: Scores | Mapping[str, Scores], title: str = "Evaluation") -> Path:
    """Write ``report.md`` and ``report.json`` into ``folder``, which is made when it is not there.

    Args:
        folder: where; earlier reports in it are replaced.
        scores: one row, or name -> row; all of one network.
        title: heading of the page.

    Returns:
        The path of ``report.md``.

    Raises:
        InputError: no rows, rows of several networks, or files that cannot be written.
    """
    rows = {"generated": scores} if isinstance(scores, Scores) else dict(scores)
    network = _network_of(rows)
    parts = [f"# {title}", _sizes(rows), table(rows), _explanations(rows), _by_factor(rows), _by_category(rows)]
    page = "\n\n".join(part for part in parts if part) + "\n"
    return write_page(
        Path(folder, "report"), page, {"network": network, "rows": {k: v.as_dict() for k, v in rows.items()}}
    )


def write_page(out: Path, page: str, content: Any) -> Path:
    """Write ``<out>.md`` for people and ``<out>.json`` for programs, into a folder that is made when it is not there.

    Args:
        out: where; it may end in .md or .json.

    Returns:
        The path of ``<out>.md``.

    Raises:
        InputError: the folder cannot be made, or a file not be written.
    """
    stem = out.with_suffix("") if out.suffix in (".md", ".json") else out
    make_output(stem.parent, "Folder")
    write_json(f"{stem}.json", content)
    with atomic_write(f"{stem}.md") as file:
        file.write(page.encode("utf-8"))
    return Path(f"{stem}.md")


def run_table(measure: Callable[..., Path], config: type, argv: Sequence[str] | None) -> int:
    """The command of a table: its exit code, 0, or 2 for a mistake in what was given.

    ``measure`` bears the name of its file and takes an instance of the dataclass ``config``, and ``progress``.
    """
    import tyro

    try:
        settings: Any = tyro.cli(config, prog=f"python -m sage_fast.evaluation.{measure.__name__}", args=argv)
        print(measure(settings, progress=lambda line: print(line, file=sys.stderr, flush=True)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def table(rows: Mapping[str, Scores]) -> str:
    """The rows as a Markdown table; shares as percentages, undefined numbers as a dash.

    Raises:
        InputError: no rows, or rows of several networks.
    """
    network = _network_of(rows)
    header = ["", "category retention", f"FD-{network}", f"KD-{network}", "diversity", "spread"]
    return markdown_table(header, [[name, *_cells(scores)] for name, scores in rows.items()])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def nearest_class_mean(
    features: Tensor, means: Tensor, counts: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """The category whose mean feature is nearest in Euclidean distance: int64 [N].

    Args:
        features: [N, F].
        means: [S, F], mean feature of each category.
        counts: int64 [S], images in each mean. With ``labels`` [N]: the features are themselves in the means, and each
            is left out of its own category's mean (which moves that mean away by n / (n - 1); a category of one image
            has no mean left and is not found).
    """
    distances = torch.cdist(features.double(), means.double())
    if counts is not None and labels is not None:
        own = counts[labels].double()
        rows = torch.arange(len(labels))
        left_out = distances[rows, labels] * own / (own - 1)
        distances[rows, labels] = torch.where(own > 1, left_out, torch.inf)
    return distances.argmin(1)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash when it is not known."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


def _flora_numbers() -> dict[str, int]:
    return {category.name: label for label, category in enumerate(flora.categories())}


def _by_oracle(oracle: Oracle, ours: ImageFolder, theirs: ImageFolder, batch: int) -> tuple[Measurements, ...]:
    sets = []
    for folder in (ours, theirs):
        part = read_images(folder, oracle.resolution)
        labels = torch.tensor([_flora_numbers()[name] for name in part.categories])[part.labels]
        sets.append(measure(part.images, labels, oracle, "oracle", batch))
    return tuple(sets)


def _by_class_means(judge: _Judge, ours: ImageFolder, theirs: ImageFolder, batch: int) -> tuple[Measurements, ...]:
    """Measurements with labels in the numbering of ``theirs``; no predictions when there is a single category."""
    (labels, features), (real_labels, real_features) = (judge.describe(folder, batch) for folder in (ours, theirs))
    labels = torch.tensor([theirs.categories.index(name) for name in ours.categories])[labels]
    predictions: tuple[Tensor | None, Tensor | None] = (None, None)
    if len(theirs.categories) > 1:
        counts = torch.bincount(real_labels, minlength=len(theirs.categories))
        means = torch.zeros(len(counts), real_features.shape[1]).index_add_(0, real_labels, real_features)
        means /= counts[:, None]
        real_predictions = nearest_class_mean(real_features, means, counts, real_labels)
        predictions = nearest_class_mean(features, means), real_predictions
    sets = ((labels, features), (real_labels, real_features))
    return tuple(
        Measurements(y, seen, x, x.new_zeros(len(x), 0), (), judge.name)
        for (y, x), seen in zip(sets, predictions, strict=True)
    )


class _Judge(NamedTuple):
    """A network's features of images in [-1, 1], and the size and channels it is shown them at."""

    features: Callable[[Tensor], Tensor]
    name: str
    resolution: int
    n_channels: int

    @torch.no_grad()
    def describe(self, folder: ImageFolder, batch: int) -> tuple[Tensor, Tensor]:
        """Labels [N] and features [N, F] of the images of a folder."""
        part = read_images(folder, self.resolution, self.n_channels)
        features = [self.features(as_written(images)) for images in part.images.split(batch)]
        return part.labels, torch.cat(features)


def _judge_of(model: StrPath | None) -> _Judge:
    """The model's own network: discriminator (mean of every map), or encoder (mean offset of coarse, middle, fine layers)."""
    if "discriminator.safetensors" in read_index(model)["files"]:  # a bundle need not hold one
        return _judge_by_maps(load_discriminator(model))
    bundle = load_bundle(model)
    G = bundle.generator
    return _Judge(partial(_encoded, bundle), "encoder", G.resolution, G.n_channels)


def _judge_by_maps(D: Discriminator) -> _Judge:
    return _Judge(partial(_judged_by_maps, D), "discriminator", D.resolution, D.n_channels)


def _judged_by_maps(D: Discriminator, images: Tensor) -> Tensor:
    return torch.cat([x.mean((2, 3)) for x in D.features(images)], 1)


def _encoded(bundle: Bundle, images: Tensor) -> Tensor:
    w_plus = codes_of(bundle.encoder).invert(images, bundle.generator, bundle.noise).offsets
    return torch.cat([w_plus[:, list(group)].mean(1) for group in layer_groups(w_plus.shape[1])], 1)


def _network_of(rows: Mapping[str, Scores]) -> str:
    networks = sorted({scores.network for scores in rows.values()})
    if len(networks) != 1:
        raise InputError(f"A table needs rows of one network, got rows of {networks}; make one table for each.")
    return networks[0]


def _cells(scores: Scores) -> list[str]:
    retention = percent(scores.retention)
    if scores.retention_interval is not None:
        low, high = scores.retention_interval
        retention += f" ({100 * low:.1f} to {100 * high:.1f})"
    diversity = f"{scores.diversity:.3f} ({percent(scores.diversity_relative, 0)})"
    return [retention, f"{scores.frechet:.3f}", f"{scores.kernel:.4f}", diversity, percent(scores.spread, 0)]


def _sizes(rows: Mapping[str, Scores]) -> str:
    first = next(iter(rows.values()))
    sizes = f"{counted(first.n_images, 'generated image')} of {counted(first.n_categories, 'category')}"
    text = f"{sizes}, judged by the {first.network}."
    if first.retention_real is not None:
        text += f" It puts {percent(first.retention_real)} of the real images into their own category."
    return text


def _explanations(rows: Mapping[str, Scores]) -> str:
    network = _network_of(rows)
    known = [name for name in _MEANING if name != "Spread" or any(scores.spreads for scores in rows.values())]
    return "\n".join(f"- **{name.format(network=network)}**: {_MEANING[name]}" for name in known)


def _by_factor(rows: Mapping[str, Scores]) -> str:
    """Spread of each factor, a column per row of the table."""
    factors = list(next(iter(rows.values())).spreads)
    if not factors:
        return ""
    body = [[name, *(percent(scores.spreads[name], 0) for scores in rows.values())] for name in factors]
    return "## Spread of each factor, relative to real images\n\n" + markdown_table(["factor", *rows], body)


def _by_category(rows: Mapping[str, Scores]) -> str:
    """Retention of each category, a column per row of the table."""
    names = next(iter(rows.values())).categories
    if not names or any(len(scores.retention_by_category) != len(names) for scores in rows.values()):
        return ""
    body = [[n, *(percent(s.retention_by_category[i]) for s in rows.values())] for i, n in enumerate(names)]
    return "## Category retention by category\n\n" + markdown_table(["category", *rows], body)
