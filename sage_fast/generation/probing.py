"""Before a long run: what it would make and take, and what its images look like."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sage_fast.arithmetic import float32_products
from sage_fast.data.writers import atomic_write, check_file, check_output, contact_sheet
from sage_fast.errors import InputError, counted
from sage_fast.generation.agreeing import choose_config_encoder, shape_of, shard_of
from sage_fast.generation.committing import line_of
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared, draw_images, draw_latents, draw_shard
from sage_fast.generation.encoding import Encoder, to_host
from sage_fast.generation.formats import choose_format
from sage_fast.generation.memory import Room, room_for
from sage_fast.generation.plan import Plan
from sage_fast.generation.run import check, load_pipeline, plan_of, ranks
from sage_fast.generation.stores import open_store
from sage_fast.pipeline import FewShotPipeline

__all__ = ["Estimate", "estimate", "preview"]

_CATEGORIES, _EACH = 8, 8  # of a preview


@dataclass(frozen=True)
class Estimate:
    """What a plan amounts to, by its first micro-batch: sizes in bytes, time in seconds for this machine.

    ``image_bytes`` are what an image takes in the output, in a tar file with its headers, label and description.
    """

    n_images: int
    n_categories: int
    n_shards: int
    images_per_s: float
    image_bytes: float
    line_bytes: float
    world_size: int
    room: Room

    @property
    def seconds(self) -> float:
        """Time, were every rank as fast as this process."""
        return self.n_images / self.images_per_s / self.world_size

    @property
    def bytes(self) -> float:
        """Space for images and manifest."""
        return self.n_images * (self.image_bytes + self.line_bytes)

    def __str__(self) -> str:
        hours, rest = divmod(round(self.seconds), 3600)
        return (
            f"{counted(self.n_images, 'image')} of {counted(self.n_categories, 'category')} in "
            f"{counted(self.n_shards, 'shard')}: about "
            f"{self.bytes / 1e6:.1f} MB ({self.image_bytes / 1e3:.1f} kB an image) and {hours} h {rest // 60} min "
            f"{rest % 60} s on {counted(self.world_size, 'rank')} "
            f"({self.images_per_s:.1f} images/s each). {self.room} Nothing was written."
        )


def estimate(
    model: FewShotPipeline | str | os.PathLike[str] | None,
    shots_dir: str | os.PathLike[str] | None,
    config: GenerateConfig = GenerateConfig(),
    plan: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Estimate:
    """What :func:`generate` would make of the same arguments; draws one micro-batch a few times and writes nothing.

    Args:
        out: where it would write; None: not said yet.
    Raises:
        InputError: as of :func:`generate`, so far as it can be told without writing.
    """
    pipeline = load_pipeline(model, config)
    made = plan_of(pipeline, shots_dir, config, plan)
    if out is not None:
        check(out, None if plan else shots_dir, made, model, config, ranks()[1])
        store = open_store(out)
        if store.local:
            check_output(str(store), config.resume, config.overwrite)
    encoder = choose_config_encoder(config, pipeline)
    with float32_products(pipeline.precision):
        return _estimate(pipeline, made, encoder, config)


def _estimate(pipeline: FewShotPipeline, made: Plan, encoder: Encoder | None, config: GenerateConfig) -> Estimate:
    if config.shard_mb is not None:
        made = replace(made, shard=shard_of(pipeline, made, encoder, config))
    room = room_for(pipeline, made, torch.get_num_threads())
    prepared = Prepared(pipeline, made)
    format, in_memory = (
        choose_format(name, open_store("."), made, encoder, shape_of(pipeline))
        for name in (config.format, "webdataset")
    )  # the second stores nothing
    positions = made.batches(0)[0]
    draw_images(pipeline, draw_latents(prepared, positions))  # to warm up
    start = time.monotonic()
    latents = draw_latents(prepared, positions)
    images = to_host(encoder, draw_images(pipeline, latents))
    drawn = time.monotonic()
    stored = [in_memory.store(*one) for one in zip(positions, in_memory.contents(images), latents.about())]
    seconds = drawn - start + (time.monotonic() - drawn) / (config.workers or max(2, torch.get_num_threads()))
    line_bytes = sum(len(line_of(image)) for image in stored) / len(stored)
    return Estimate(
        len(made), len(made.categories), made.n_shards, len(positions) / seconds,
        sum(format.taken(image) for image in stored) / len(stored), line_bytes, ranks()[1],
        room,
    )  # fmt: skip


def preview(
    model: FewShotPipeline | str | os.PathLike[str] | None,
    shots_dir: str | os.PathLike[str] | None,
    file: str | os.PathLike[str],
    config: GenerateConfig = GenerateConfig(),
    plan: str | os.PathLike[str] | None = None,
) -> Path:
    """A contact sheet of the first images of the first parts of a plan, as :func:`generate` would draw them.

    Raises:
        InputError: as of :func:`generate`; or ``file`` is no .png, or cannot be there.
    """
    if Path(file).suffix.lower() != ".png":
        raise InputError(f"preview must be a file that ends in .png, got {os.fspath(file)!r}; rename it.")
    check_file(file, "preview")
    pipeline = load_pipeline(model, config)
    made = plan_of(pipeline, shots_dir, config, plan)
    parts = tuple(replace(part, n=min(part.n, _EACH)) for part in made.parts[:_CATEGORIES])
    shown = replace(made, parts=parts, shard=_CATEGORIES * _EACH)
    labels = [f"{part.category}: {part.method}, fusion {part.fusion}" for part in parts for _ in range(part.n)]
    with float32_products(pipeline.precision):
        images = draw_shard(pipeline, shown, 0)
    sheet = contact_sheet(images, _EACH, labels, scale=max(1, 64 // pipeline.generator.resolution))
    with atomic_write(file) as target:
        sheet.save(target, format="PNG")
    return Path(file)
