"""How much memory a run takes, whatever its plan: the sum of shares that each have a bound in bytes.

Beside the model (weights, their packed form, seen codes) a run holds at most :data:`LIMIT`: the libraries, prepared categories,
syntheses that go on at the same time, images between the stages, and the record of shards that are not committed yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from sage_fast.errors import InputError
from sage_fast.generation.plan import Plan
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.inference import choose_road
from sage_fast.pipeline import FewShotPipeline

__all__ = ["KEPT", "LIMIT", "Room", "images_at_once", "room_for"]

_MB = 1 << 20
LIMIT = 1536 * _MB
"""Bytes of memory on the host, beside the model."""

KEPT = 128 * _MB
"""Bytes of prepared categories; a larger one is kept alone."""

_LIBRARIES = 288 * _MB  # Python, PyTorch, NumPy and an encoder
_INVERSION = 64 * _MB  # one shot through the encoder
_RECORDS = 128 * _MB
_LINE, _SHOT = 2600, 120  # bytes of an image's record, and of each shot in it, until its shard is committed
_MOST_SHARDS = 1_000_000  # whose numbers are in memory
_SYNTHESIS = 192 * _MB  # largest of one call, where the batch may be cut
_CALL = 16 * _MB  # of a thread that draws, whatever it draws
_UNFUSED = 10  # times the activations of the fused kernels
_SLOTS = 2  # a layer's input and its output


@dataclass(frozen=True)
class Room:
    """Micro-batches that are drawn side by side, each on ``threads`` threads of torch; ``ahead`` more wait to be encoded.

    ``commits``: shards that wait to be committed. ``drawing``, ``waiting``: bytes of the syntheses, and of the images that
    are drawn and not stored; ``bytes``: of all beside the model.
    """

    drawers: int
    threads: int
    ahead: int
    commits: int
    drawing: int
    waiting: int
    bytes: int

    def __str__(self) -> str:
        side = f"{self.drawers} micro-batch{'es' if self.drawers > 1 else ''} drawn at a time"
        return (
            f"Memory: at most {self.bytes / _MB:.0f} MiB beside the model; {side}, {self.drawing / _MB:.0f} MiB, and "
            f"{self.waiting / _MB:.0f} MiB of images on their way to the files."
        )


def images_at_once(pipeline: FewShotPipeline) -> int:
    """How many images one call draws; a larger micro-batch is cut. A function of the model and the kind of device alone."""
    return 1 << 30 if pipeline.device.type != "cpu" else max(1, _SYNTHESIS // _synthesis_bytes(pipeline))


def room_for(pipeline: FewShotPipeline, plan: Plan, n_threads: int) -> Room:
    """As many micro-batches side by side as there are threads and memory for; on a GPU one.

    On a CPU micro-batches side by side wait less for one another than threads within one do, above all beside threads that
    encode.

    Raises:
        InputError: not even one micro-batch fits, or not the record of one shard.
    """
    kept = max(KEPT, *(_category_bytes(pipeline, len(part.shots)) for part in plan.parts))
    free = LIMIT - _LIBRARIES - KEPT - _INVERSION - _RECORDS
    drawing = 0
    if pipeline.device.type == "cpu":
        drawing = min(plan.batch, images_at_once(pipeline)) * _synthesis_bytes(pipeline) + _CALL
    ahead, n_drawers = 2, n_threads if pipeline.device.type == "cpu" else 1
    while n_drawers > 1 and (n_drawers + 1) * drawing + _waiting(pipeline, plan, n_drawers, ahead) > free:
        n_drawers -= 1
    more = max(0, _fused_together(pipeline, plan, n_drawers) - kept)
    while n_drawers > 1 and more + (n_drawers + 1) * drawing + _waiting(pipeline, plan, n_drawers, ahead) > free:
        n_drawers -= 1
        more = max(0, _fused_together(pipeline, plan, n_drawers) - kept)
    while ahead > 1 and 2 * drawing + _waiting(pipeline, plan, n_drawers, ahead) > free:
        ahead -= 1
    waiting = _waiting(pipeline, plan, n_drawers, ahead)
    _check_batch(pipeline, plan, waiting, max(free - 2 * drawing, free // 8))
    record = plan.shard * (_LINE + _SHOT * max(len(part.shots) for part in plan.parts))
    _check_shard(plan, record)
    syntheses = (n_drawers + 1) * drawing  # one more: the shots of the category that comes next
    return Room(
        n_drawers, max(1, n_threads // n_drawers), ahead, min(2, _RECORDS // record - 1), syntheses, waiting,
        LIMIT - free - KEPT + kept + more + syntheses + waiting,
    )  # fmt: skip


def _synthesis_bytes(pipeline: FewShotPipeline) -> int:
    """What one image takes while it is drawn on the CPU, about: activations, and the image in several forms."""
    G = pipeline.generator
    sizes = [4 << i for i in range(len(G.channels))]
    with torch.inference_mode():
        road, _ = choose_road(G, torch.empty(1, G.n_latent, G.style_dim))
    fused = road == "fused" and not isinstance(
        pipeline.encoder, HyperStyle
    )  # which has weights of its own for each shot
    activations = _SLOTS * 4 * max(size**2 * -(-width // 16) * 16 for size, width in zip(sizes, G.channels))
    return activations * (1 if fused else _UNFUSED) + 10 * 4 * G.n_channels * G.resolution**2


def _image_bytes(pipeline: FewShotPipeline) -> int:
    return pipeline.generator.n_channels * pipeline.generator.resolution**2


def _category_bytes(pipeline: FewShotPipeline, n_shots: int) -> int:
    """Shots and their reconstructions, as float32."""
    return n_shots * 2 * 4 * _image_bytes(pipeline)


def _fused_together(pipeline: FewShotPipeline, plan: Plan, n_drawers: int) -> int:
    """Shots and reconstructions of all categories whose latents wait, or whose images are being drawn, at the same time."""
    reach = plan.batch * (2 * n_drawers + 4)  # neighbouring images
    held = [0 if part.fusion == "none" else _category_bytes(pipeline, len(part.shots)) for part in plan.parts]
    ends = list(accumulate(part.n for part in plan.parts))
    first = together = most = 0
    for size, part, end in zip(held, plan.parts, ends):
        together += size
        while ends[first] + reach - 2 < end - part.n:
            together -= held[first]
            first += 1
        most = max(most, together)
    return most


def _waiting(pipeline: FewShotPipeline, plan: Plan, n_drawers: int, ahead: int) -> int:
    """Latents, pixels, and where images are being stored the encoder's own form and the file."""
    latent = 4 * pipeline.generator.n_latent * pipeline.generator.style_dim
    return plan.batch * ((n_drawers + 4) * latent + (n_drawers + 3 + 3 * (ahead + 1)) * _image_bytes(pipeline))


def _check_batch(pipeline: FewShotPipeline, plan: Plan, waiting: int, free: int) -> None:
    if waiting > free:
        raise InputError(
            f"batch must be at most {plan.batch * free // waiting} for images of {pipeline.generator.resolution} px, so that "
            f"the run fits into memory, got {plan.batch}."
        )


def _check_shard(plan: Plan, record: int) -> None:
    if plan.n_shards > _MOST_SHARDS:
        raise InputError(
            f"A plan has at most {_MOST_SHARDS:,} shards, got {plan.n_shards:,} of {plan.shard} images; give larger shards, or "
            "several plans."
        )
    if record > _RECORDS:
        raise InputError(
            f"A shard must have at most {plan.shard * _RECORDS // record} images in this plan, so that its record fits into "
            f"memory, got {plan.shard}; give a smaller shard or shard_mb."
        )
