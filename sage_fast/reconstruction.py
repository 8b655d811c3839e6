"""A folder of images projected into a generator's latent space: ``sage-fast invert``, resumable batch by batch.

OUT/<category>/<name>.png                    the images as the generator draws them; in a flat folder OUT/<name>.png
OUT/latents/<category>/<name>.safetensors    ``w_plus`` [L, D], absolute; ``noise_0``, ... where noise maps were optimised
OUT/codes.safetensors                        all latents as one table of offsets from ``latent_avg``, as a bundle holds it
OUT/manifest.jsonl                           a line an image: loss, error, steps, seconds
OUT/config.json                              the resolved settings
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sage_fast import __version__
from sage_fast.data.folders import ImageSet, read_images, scan_image_folder
from sage_fast.data.images import load_image, to_float
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.resuming import check_resumed
from sage_fast.data.writers import (
    ManifestWriter,
    atomic_write,
    check_apart,
    make_output,
    prepare_output,
    save_png,
    to_uint8,
    write_json,
)
from sage_fast.errors import InputError
from sage_fast.inversion import Projection, ProjectionConfig, check_settings, project
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.perceptual import FeatureNetwork, load_perceptual
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weights import load_discriminator, load_encoder, load_generator, read_index

__all__ = ["InvertConfig", "InvertSummary", "invert"]

StrPath = str | os.PathLike[str]

_FREE = ("device", "images_dir", "mask_dir", "version")  # may differ between a run and its continuation


@dataclass(frozen=True)
class InvertConfig:
    """Settings of :func:`invert` beside those of the projection."""

    #: none (the absolute error alone), discriminator (the model's own), lpips-alex, lpips-vgg, lpips-squeeze, or a weights file
    #: of SqueezeNet 1.1 or a VGG
    perceptual: str = "none"
    batch: int = 8  # images projected at a time
    device: str = "auto"  # "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
    resume: bool = False  # go on where an earlier run stopped
    overwrite: bool = False  # empty the output folder first; only one that sage-fast made

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}.")
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other; give one of them.")


@dataclass(frozen=True)
class InvertSummary:
    """What :func:`invert` did: ``n_new`` images projected, ``n_kept`` found finished; ``loss``: the mean of all."""

    out: Path
    n_new: int
    n_kept: int
    loss: float

    def __str__(self) -> str:
        kept = f", {self.n_kept} were there already" if self.n_kept else ""
        were = "image was" if self.n_new == 1 else "images were"
        return f"{self.n_new} {were} projected{kept}, mean loss {self.loss:.4f}; see {self.out}."


@dataclass(frozen=True, eq=False)
class _Model:
    generator: Generator
    encoder: nn.Module | None
    perceptual: FeatureNetwork | None
    noise: str
    hash: str


def invert(
    model: StrPath | None,
    images_dir: StrPath,
    out: StrPath,
    config: InvertConfig = InvertConfig(),
    projection: ProjectionConfig = ProjectionConfig(),
    encoder: StrPath | None = None,
    mask_dir: StrPath | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InvertSummary:
    """Project every image of a folder, ``config.batch`` at a time.

    On one machine and number of threads the same settings give the same images and latents to the last bit, interrupted or
    not: batches are made by position, and one that was not written to its end is projected again. Everything is checked
    before the first file is written.

    Args:
        model: a bundle folder, a published generator file, or None for the model shipped with the package.
        images_dir: ``<category>/<image>``, or one flat folder.
        out: the output folder; new or empty, unless ``config.resume`` or ``config.overwrite``.
        encoder: a bundle or file with the encoder; None: a bundle's own, none for a generator file.
        mask_dir: for each image a grey one of the same path (any suffix); black hides a pixel from the loss.
        progress: called with (steps done or no longer needed, steps in all).
    Raises:
        InputError: a model, images, masks, settings or an output folder that cannot be used, or a full disk; every file
            that is there then is whole and a resumed run goes on.
    """
    loaded = _load(model, encoder, config)
    check_settings(projection, loaded.generator, loaded.encoder, loaded.perceptual)
    images = read_images(
        scan_image_folder(images_dir, flat_ok=True), loaded.generator.resolution, loaded.generator.n_channels
    )
    stems = _stems(images.files)
    masks = None if mask_dir is None else _read_masks(Path(mask_dir), stems, loaded.generator.resolution)
    read = {"the images": images_dir} | ({} if mask_dir is None else {"the masks": mask_dir})
    check_apart(out, read, (model, encoder))
    projection = replace(projection, noise=projection.noise or loaded.noise)
    folder = prepare_output(out, config.resume, config.overwrite)
    resolved = _resolve(loaded, images, masks, config, projection) | {
        "mask_dir": None if masks is None else str(mask_dir)
    }
    check_resumed(folder, resolved, command="invert", mark="images_sha256", free=_FREE)
    write_json(folder / "config.json", resolved)  # before the manifest: no line without its settings
    n_kept, n = 0, len(images)
    with ManifestWriter(folder / "manifest.jsonl", resume=True) as manifest:
        losses: dict[Any, Any] = {entry.get("file"): entry.get("loss") for entry in manifest.entries}
        for first in range(0, n, config.batch):
            rows = range(first, min(first + config.batch, n))
            if all(_finished(folder, stems[i], losses) for i in rows):
                n_kept += len(rows)
                continue
            start = time.monotonic()
            result = _project(loaded, images, masks, rows, projection, progress, n)
            seconds = (time.monotonic() - start) / len(rows)
            for position, i in enumerate(rows):
                _write(folder, stems[i], result, position)
                entry = _entry(images, stems, i, result, position, seconds)
                if entry["file"] not in losses:
                    manifest.append(entry)
                losses[entry["file"]] = entry["loss"]
    _write_codes(folder, images, stems, loaded.generator.latent_avg)
    mean = sum(losses[_image_file(stem)] for stem in stems) / n
    return InvertSummary(folder, n - n_kept, n_kept, mean)


def _load(path: StrPath | None, encoder_path: StrPath | None, config: InvertConfig) -> _Model:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder: ImageEncoder | None = None
    if path is None or Path(path).is_dir():
        generator, encoder, noise = load_generator(path, device), load_encoder(path, device), read_index(path)["noise"]
    else:
        generator, noise = load_generator(path, device), "const"
    if encoder_path is not None:
        encoder = load_encoder(encoder_path, device)
    own = load_discriminator(path) if config.perceptual == "discriminator" else None
    perceptual = load_perceptual(config.perceptual, own)
    if perceptual is not None:
        perceptual.to(device)
    return _Model(generator, encoder, perceptual, noise, _fingerprint(generator, encoder, perceptual))


def _fingerprint(*networks: nn.Module | None) -> str:
    """SHA-256 of the names and weights of all."""
    found = hashlib.sha256()
    for network in networks:
        state = {} if network is None else network.state_dict()
        for name, tensor in state.items():
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _stems(files: list[str]) -> list[str]:
    """The files without their suffixes, which name the results; two images may not differ in the suffix alone."""
    stems = [os.path.splitext(file)[0] for file in files]
    twice = min((stem for stem, count in Counter(stems).items() if count > 1), default=None)
    if twice is not None:
        same = [file for file, stem in zip(files, stems) if stem == twice]
        raise InputError(f"Images {' and '.join(map(repr, same))} would both be written as {twice}.png; rename one.")
    return stems


def _read_masks(folder: Path, stems: list[str], resolution: int) -> Tensor:
    """The masks uint8 [N, 1, R, R] of all images, cut and scaled as images are."""
    there: dict[str, list[str]] = {}
    for file in scan_image_folder(folder, flat_ok=True).files:
        there.setdefault(os.path.splitext(file)[0], []).append(file)
    masks = []
    for stem in stems:
        found = there.get(stem, [])
        if len(found) != 1:
            which = "several masks" if found else "no mask"
            raise InputError(f"Mask folder {str(folder)!r} has {which} for image {stem!r}; give one, as {stem}.png.")
        masks.append(load_image(folder / found[0], resolution, n_channels=1))
        if not bool(masks[-1].any()):
            raise InputError(
                f"Mask {str(folder / found[0])!r} is black and hides all of its image; leave that image out."
            )
    return torch.stack(masks)


def _resolve(
    model: _Model, images: ImageSet, masks: Tensor | None, config: InvertConfig, projection: ProjectionConfig
) -> dict[str, Any]:
    """Every setting with its value, the networks and the images: the content of config.json."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("resume", "overwrite")}
    pixels = hashlib.sha256(images.images.numpy().tobytes())
    if masks is not None:
        pixels.update(masks.numpy().tobytes())
    return {
        **settings,
        **asdict(projection),
        "device": str(model.generator.latent_avg.device),
        "images": images.files,
        "images_dir": images.root,
        "images_sha256": pixels.hexdigest(),
        "networks_sha256": model.hash,
        "version": __version__,
    }


def _project(
    model: _Model,
    images: ImageSet,
    masks: Tensor | None,
    rows: range,
    config: ProjectionConfig,
    progress: Callable[[int, int], None] | None,
    n: int,
) -> Projection:
    part = slice(rows.start, rows.stop)

    def report(done: int, _: int) -> None:
        assert progress is not None
        progress(rows.start * config.steps + done, n * config.steps)

    return project(
        to_float(images.images[part]),
        model.generator,
        model.encoder,
        None if masks is None else masks[part].float() / 255,
        perceptual=model.perceptual,
        progress=None if progress is None else report,
        **asdict(config),
    )


def _image_file(stem: str) -> str:
    return f"{stem}.png"


def _latent_file(stem: str) -> str:
    return f"latents/{stem}.safetensors"


def _finished(folder: Path, stem: str, listed: dict[Any, Any]) -> bool:
    files = [folder / _image_file(stem), folder / _latent_file(stem)]
    return _image_file(stem) in listed and all(path.is_file() and path.stat().st_size > 0 for path in files)


def _write(folder: Path, stem: str, result: Projection, position: int) -> None:
    """The image and the latent of one image of a batch."""
    tensors = {"w_plus": result.w_plus[position]}
    tensors |= {f"noise_{i}": maps[position] for i, maps in enumerate(result.noise or ())}
    latent, image = folder / _latent_file(stem), folder / _image_file(stem)
    make_output(latent.parent)
    make_output(image.parent)
    with atomic_write(latent, durable=False) as file:
        file.write(to_bytes({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    save_png(image, to_uint8(result.images[position]), durable=False)


def _entry(
    images: ImageSet, stems: list[str], i: int, result: Projection, position: int, seconds: float
) -> dict[str, Any]:
    """The manifest's line of one image; ``mse`` is over all pixels of images in [-1, 1], hidden or not."""
    drawn = result.images[position].clamp(-1, 1).cpu().float()
    return {
        "file": _image_file(stems[i]),
        "source": images.files[i],
        "category": images.categories[int(images.labels[i])],
        "latent": _latent_file(stems[i]),
        "loss": float(result.losses[position]),
        "mse": float((drawn - to_float(images.images[i])).square().mean()),
        "steps": int(result.n_steps[position]),
        "evaluations": int(result.n_evaluations[position]),
        "seconds": round(seconds, 3),
    }


def _write_codes(folder: Path, images: ImageSet, stems: list[str], latent_avg: Tensor) -> None:
    latents = [load_file(folder / _latent_file(stem))["w_plus"] for stem in stems]
    offsets = torch.stack(latents).float() - latent_avg.cpu().float()
    LatentTable(offsets, images.labels, images.categories, images.files).save(folder / "codes.safetensors")
