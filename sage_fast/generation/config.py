"""Every setting of a generation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sage_fast.arithmetic import DRAWING_PRECISIONS
from sage_fast.editing.editor import PRESETS, check_used
from sage_fast.errors import InputError
from sage_fast.pipeline import FUSIONS, INVERSION_DEVICES, METHODS

__all__ = ["ENCODERS", "FORMATS", "IMAGES", "GenerateConfig"]

FORMATS = ("folder", "webdataset", "safetensors")
"""An ImageFolder, tar shards, or one file of uint8 arrays."""

IMAGES = ("png", "jpg", "webp")
ENCODERS = ("auto", "pillow", "opencv", "simplejpeg", "nvjpeg")

_JPG_ALONE = ("simplejpeg", "nvjpeg")
_COUNTS = ("n", "batch", "n_shots", "n_components", "n_similar", "n_directions", "shard", "workers")
_EDITOR = ("n_components", "n_similar", "n_directions")


MOST_ALPHA = 10_000.0
"""Bound of alpha: images are one colour long before, and far above it networks give no numbers."""


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of :func:`generate`."""

    n: int = 128  # images per category; -n for short
    alpha: float | None = None  # strength of the edit, Eq. 20; None: the preset's, 1 (paper: 2)
    method: str = "sage"  # sage, sage-q, sage-i, age, or inversion (plain reconstructions)
    fusion: str = "none"  # details of a given image carried over: none, pixel, frequency or both
    seed: int = 0  # the same one gives the same images
    preset: str = "default"  # the reading of the method: paper, released or default
    n_shots: int | None = None  # images of each category to use, chosen by the seed; None: all
    #: sage, sage-q: t_B, components of the seen categories that an image is projected onto; None: 40, or as many as keep
    #: 90 % of a new one, or all that there are (paper and released: 10)
    n_components: int | None = None
    #: sage, sage-i: t_C, nearest seen categories, whose edits are taken; None: 20, of one shot 30, or all that there are
    n_similar: int | None = None
    #: sage, sage-i: t_A, directions edited in each layer; None: 50, or all that there are
    n_directions: int | None = None
    batch: int | None = None  # images the generator draws at a time; None: 64, fewer of large ones
    device: str = "auto"  # "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
    #: products of the synthesis: float32; or faster, tf32 (a GPU's), which moves pixels by a grey level here and there, or
    #: bfloat16, by a few levels
    precision: str = "float32"
    #: where shots become latents: cpu, with the same bits whatever draws the images, or model: beside it, on a GPU in much less time
    inversion_device: str = "cpu"
    resume: bool = False  # go on where an earlier run stopped
    overwrite: bool = False  # empty the output folder first; only one that sage-fast made
    categories: tuple[str, ...] = ()  # "rose" or "rose=500": these alone, with that many images; none: all
    format: str = "folder"  # folder (an ImageFolder), webdataset (tar shards) or safetensors (one file of uint8 arrays)
    image: str = "png"  # png, jpg or webp; safetensors has none
    quality: int | None = None  # jpg, webp: 1 to 100, None: 95; png: zlib's level 0 to 9, None: the encoder's fast one
    encoder: str = "auto"  # pillow, opencv, simplejpeg, nvjpeg (on a GPU); auto: the fastest here of the first three
    shard: int | None = None  # images that are committed together; None: 512, in tar files 4096
    shard_mb: float | None = None  # size of a tar file instead, in MB
    workers: int | None = None  # threads that encode and write; None: as many as torch has, at least 2
    metrics: str | None = None  # file that gets a JSON line a shard: speed, and how busy each stage was
    parquet: bool = False  # the manifest as manifest.parquet too, kept by later runs; needs pyarrow

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        _check_one_of(self, method=METHODS, fusion=FUSIONS, preset=tuple(PRESETS), format=FORMATS)
        _check_one_of(self, image=IMAGES, encoder=ENCODERS, precision=DRAWING_PRECISIONS)
        _check_one_of(self, inversion_device=INVERSION_DEVICES)
        if self.alpha is not None and not abs(self.alpha) <= MOST_ALPHA:
            raise InputError(
                f"alpha must be a finite number of at most {MOST_ALPHA:,.0f}, got {self.alpha}; the paper takes 2, and images "
                "leave their category above."
            )
        check_used(self.method, [name for name in ("alpha", *_EDITOR) if getattr(self, name) is not None])
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other; give one of them.")
        self._check_output()

    def _check_output(self) -> None:
        if self.format == "safetensors" and (self.image, self.quality, self.encoder) != ("png", None, "auto"):
            raise InputError("format 'safetensors' stores plain arrays, so image, quality and encoder have no effect.")
        lowest, highest = (0, 9) if self.image == "png" else (1, 100)
        if self.quality is not None and not lowest <= self.quality <= highest:
            raise InputError(f"quality of {self.image} must be {lowest} to {highest}, got {self.quality}.")
        if self.encoder in _JPG_ALONE and self.image != "jpg":
            raise InputError(
                f"encoder '{self.encoder}' writes jpg alone, got image '{self.image}'; choose another encoder."
            )
        if self.shard_mb is not None:
            if self.format != "webdataset" or self.shard is not None:
                raise InputError("shard_mb is the size of a tar file: it goes with format 'webdataset', without shard.")
            if not 0 < self.shard_mb < math.inf:
                raise InputError(f"shard_mb must be above 0, got {self.shard_mb}.")


def _check_one_of(config: GenerateConfig, **known: tuple[str, ...]) -> None:
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got '{getattr(config, name)}'.")
