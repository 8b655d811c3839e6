"""The pipeline at scale: a folder of shots in, a folder of generated images out, resumable at every image.

OUT/<category>/<category>_00000.png   the images
OUT/contact_sheet.png                 the shots of each category, then generated images
OUT/manifest.jsonl                    a line an image: how it came to be
OUT/config.json                       the resolved settings
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_fast import __version__
from sage_fast.data.folders import ImageSet, read_images, scan_image_folder
from sage_fast.data.images import load_image
from sage_fast.data.resuming import check_resumed
from sage_fast.data.splits import take_shots
from sage_fast.data.writers import (
    ManifestWriter,
    atomic_write,
    check_apart,
    contact_sheet,
    prepare_output,
    save_png,
    to_uint8,
    write_json,
)
from sage_fast.editing.editor import PRESETS
from sage_fast.errors import InputError
from sage_fast.pipeline import FUSIONS, METHODS, FewShotPipeline, NovelCategory

__all__ = ["GenerateConfig", "Summary", "generate"]

_FREE = ("n", "batch", "device", "shots_dir", "version")  # may differ between a run and its continuation
_SHEET_CATEGORIES, _SHEET_COLUMNS, _SHEET_ROWS, _SHEET_SIDE = 40, 12, 2, 128


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of :func:`generate`.

    ``method``: age, sage-q, sage-i, sage, or inversion. ``fusion``: none, pixel, frequency, or both.
    ``preset``: the reading of the method: paper, released or default.
    """

    n: int = 128  # images per category
    alpha: float | None = None  # strength of the edit, Eq. 20; None: the preset's, 1 (paper: 2)
    method: str = "sage"
    fusion: str = "none"
    seed: int = 0
    preset: str = "default"
    n_shots: int | None = None  # images of each category to use, chosen by the seed; None: all
    n_components: int | None = None  # t_B; None: the preset's, or all that the model has
    n_similar: int | None = None  # t_C; None: the preset's
    n_directions: int | None = None  # t_A; None: the preset's
    batch: int = 64  # images the generator draws at a time
    device: str = "auto"  # "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
    resume: bool = False  # go on where an earlier run stopped
    overwrite: bool = False  # empty the output folder first; only one that sage-fast made

    def __post_init__(self) -> None:
        for name in ("n", "batch", "n_shots", "n_components", "n_similar", "n_directions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        for name, known in (("method", METHODS), ("fusion", FUSIONS), ("preset", tuple(PRESETS))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got '{getattr(self, name)}'.")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise InputError(f"alpha must be a finite number, got {self.alpha}.")
        if self.method == "inversion" and (self.alpha is not None or self.editor_options()):
            named = ("alpha", "n_components", "n_similar", "n_directions")
            given = [name for name in named if getattr(self, name) is not None]
            raise InputError(f"method 'inversion' edits nothing, so {', '.join(given)} has no effect; leave it out.")
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other; give one of them.")

    def editor_options(self) -> dict[str, int]:
        """The editor's settings that were given."""
        values = {name: getattr(self, name) for name in ("n_components", "n_similar", "n_directions")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Summary:
    """What :func:`generate` did: ``n_new`` images drawn, ``n_kept`` found finished, of ``categories``."""

    out: Path
    categories: list[str]
    n_new: int
    n_kept: int

    def __str__(self) -> str:
        kept = f", {self.n_kept} were there already" if self.n_kept else ""
        count = f"{len(self.categories)} categor{'y' if len(self.categories) == 1 else 'ies'}"
        return f"{self.n_new} images of {count} were drawn{kept}; see {self.out / 'contact_sheet.png'}."


def generate(
    model: FewShotPipeline | str | os.PathLike[str] | None,
    shots_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: GenerateConfig = GenerateConfig(),
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Generate ``config.n`` images of every category in ``shots_dir``.

    The same settings give the same latents to the last bit and the same images to one grey level, whatever ``batch``,
    and whether or not the run was interrupted. Everything is checked before the first file is written.

    Args:
        model: a pipeline, a bundle folder, or None for the model shipped with the package.
        shots_dir: ``<category>/<image>`` with one to a few images each, or one flat folder for one category.
        out: the output folder; new or empty, unless ``config.resume`` or ``config.overwrite``.
        progress: called with (images done, images in all).
    Raises:
        InputError: a model, shots, settings or an output folder that cannot be used, or a full disk; every image that
            is there then is whole and a resumed run goes on.
    """
    pipeline = _pipeline(model, config)
    shots = _read_shots(pipeline, shots_dir, config)
    check_apart(out, {"the shots": shots_dir}, [None if isinstance(model, FewShotPipeline) else model])
    _prepare(pipeline, shots, shots.categories[0], config)  # raises what any setting can raise
    folder = prepare_output(out, config.resume, config.overwrite)
    resolved = _resolve(pipeline, shots, config)
    _check_resumed(folder, resolved)
    done, n_new = 0, 0
    write_json(folder / "config.json", resolved)  # before the manifest: no line without its settings
    with ManifestWriter(folder / "manifest.jsonl", resume=True) as manifest:
        listed = {entry.get("file") for entry in manifest.entries}
        for category in shots.categories:
            _make_folder(folder / category)
            missing = [j for j in range(config.n) if not _finished(folder, _file(category, j), listed)]
            done += config.n - len(missing)
            for numbers, images in _draw(pipeline, shots, category, missing, config):
                for number, image in zip(numbers, images, strict=True):
                    save_png(folder / _file(category, number), image, durable=False)
                    if _file(category, number) not in listed:
                        manifest.append(_entry(resolved, category, number))
                done, n_new = done + len(numbers), n_new + len(numbers)
                if progress is not None:
                    progress(done, config.n * len(shots.categories))
    _write_sheet(folder, shots, config)
    return Summary(folder, list(shots.categories), n_new, done - n_new)


def _pipeline(model: FewShotPipeline | str | os.PathLike[str] | None, config: GenerateConfig) -> FewShotPipeline:
    if isinstance(model, FewShotPipeline):
        if model.preset != config.preset:
            raise InputError(
                f"the pipeline has preset '{model.preset}' and the config '{config.preset}'; give both the same."
            )
        return model
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return FewShotPipeline.from_bundle(model, auto if config.device == "auto" else config.device, config.preset)


def _read_shots(pipeline: FewShotPipeline, folder: str | os.PathLike[str], config: GenerateConfig) -> ImageSet:
    listing = scan_image_folder(folder, flat_ok=True)
    if config.n_shots is not None:
        listing, _ = take_shots(listing, config.n_shots, config.seed)
    images = read_images(listing, pipeline.generator.resolution, pipeline.generator.n_channels)
    return images if config.n_shots is None else take_shots(images, config.n_shots, config.seed)[0]


def _of(shots: ImageSet, category: str) -> tuple[Tensor, list[str]]:
    """The images [K, C, R, R] and files of one category."""
    index = torch.nonzero(shots.labels == shots.categories.index(category)).flatten()
    return shots.images[index], [shots.files[i] for i in index.tolist()]


def _prepare(pipeline: FewShotPipeline, shots: ImageSet, category: str, config: GenerateConfig) -> NovelCategory:
    images, _ = _of(shots, category)
    return pipeline.prepare(images, config.method, config.batch, **config.editor_options())


def _draw(
    pipeline: FewShotPipeline, shots: ImageSet, category: str, numbers: Sequence[int], config: GenerateConfig
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Numbers and images uint8 [n, C, R, R], at most ``config.batch`` at a time."""
    if not numbers:
        return
    novel = _prepare(pipeline, shots, category, config)
    for start in range(0, len(numbers), config.batch):
        part = numbers[start : start + config.batch]
        result = pipeline.draw(novel, part, config.alpha, config.seed, category, config.fusion, config.batch)
        yield part, to_uint8(result.images if config.fusion == "none" else result.fused[config.fusion])


def _resolve(pipeline: FewShotPipeline, shots: ImageSet, config: GenerateConfig) -> dict[str, Any]:
    """Every setting with its value, the model and the shots: the content of config.json."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("resume", "overwrite")}
    if config.method != "inversion":
        settings["alpha"] = PRESETS[config.preset]["alpha"] if config.alpha is None else config.alpha
    return {
        **settings,
        "device": str(pipeline.device),
        "model": pipeline.hash,
        "shots": {category: _of(shots, category)[1] for category in shots.categories},
        "shots_dir": shots.root,
        "shots_sha256": hashlib.sha256(shots.images.numpy().tobytes()).hexdigest(),
        "version": __version__,
    }


def _entry(resolved: dict[str, Any], category: str, number: int) -> dict[str, Any]:
    """The manifest's line of one image; ``source`` is the shot it is fused with or reconstructs."""
    sources = resolved["shots"][category]
    kept = ("seed", "method", "alpha", "fusion", "preset", "model")
    return {
        "category": category,
        "file": _file(category, number),
        "number": number,
        "sources": sources,
        "source": sources[number % len(sources)],
        **{key: resolved[key] for key in kept},
    }


def _check_resumed(folder: Path, resolved: dict[str, Any]) -> None:
    """Raise InputError unless the images in ``folder``, if any, are the ones these settings give."""
    old = check_resumed(folder, resolved, command="generate", mark="shots_sha256", free=_FREE)
    if old is not None and resolved["n"] < old["n"]:
        raise InputError(
            f"Output folder {str(folder)!r} was made with n {old['n']}, got n {resolved['n']}; ask for more."
        )


def _file(category: str, number: int) -> str:
    return f"{category}/{category}_{number:05d}.png"


def _finished(folder: Path, file: str, listed: set[Any]) -> bool:
    path = folder / file
    return file in listed and path.is_file() and path.stat().st_size > 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"Folder {str(folder)!r} cannot be made ({error.strerror}); give another place.") from error


def _write_sheet(folder: Path, shots: ImageSet, config: GenerateConfig) -> None:
    """Two sections a category: shots, then generated images; the first of each, and the first categories."""
    side, channels = min(shots.images.shape[3], _SHEET_SIDE), shots.images.shape[1]
    images, labels = [], []
    for category in shots.categories[:_SHEET_CATEGORIES]:
        given = [Path(shots.root) / file for file in _of(shots, category)[1][:_SHEET_COLUMNS]]
        drawn = [folder / _file(category, j) for j in range(min(config.n, _SHEET_COLUMNS * _SHEET_ROWS))]
        images += [load_image(path, side, channels) for path in (*given, *drawn)]
        fused = "" if config.fusion == "none" else f", fusion {config.fusion}"
        labels += [f"{category}: given"] * len(given) + [f"{category}: {config.method}{fused}"] * len(drawn)
    sheet = contact_sheet(torch.stack(images), _SHEET_COLUMNS, labels, scale=max(1, 64 // side))
    with atomic_write(folder / "contact_sheet.png") as file:
        sheet.save(file, format="PNG")
