"""A shard to pixels: a pure function of the pipeline, the plan and the shard's number."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast import __version__
from sage_fast.arithmetic import one_thread
from sage_fast.data.images import load_image
from sage_fast.data.writers import to_uint8
from sage_fast.editing.distribution import sample_together
from sage_fast.errors import InputError
from sage_fast.generation.memory import KEPT, images_at_once
from sage_fast.generation.plan import Part, Plan, Span
from sage_fast.pipeline import FewShotPipeline, NovelCategory, normals

__all__ = [
    "Category", "Latents", "Prepared", "about_image", "about_images", "about_part", "draw_images", "draw_latents",
    "draw_shard",
]  # fmt: skip

_SHOTS = 8  # whose reconstructions are drawn at a time, fewer of large ones


@dataclass(frozen=True, eq=False)
class Category:
    """A part of the plan, ready to be drawn from; ``about`` is what all lines of its manifest share."""

    part: Part
    novel: NovelCategory
    about: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        novel = self.novel
        tensors = [
            novel.shots,
            novel.w_plus,
            novel.inverted,
            *(delta for delta in novel.weight_deltas or () if delta is not None),
        ]
        if novel.distribution is not None:
            d = novel.distribution
            tensors += [d.class_embedding, d.bases, d.mean, d.direction_mask, d.rows]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Prepared:
    """The parts of a plan as categories: shots encoded and distributions computed once, while they are in use.

    Images are drawn part after part, so what was dropped to save memory is not asked for again.
    """

    def __init__(self, pipeline: FewShotPipeline, plan: Plan) -> None:
        self.pipeline, self.plan = pipeline, plan
        self._kept: OrderedDict[int, Category] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, number: int) -> Category:
        """Part number ``number``.

        Raises:
            InputError: a shot is not the file that it was, or a setting is none that the model allows.
        """
        found = self._kept.pop(number, None)
        if found is None:
            found = self._prepare(self.plan.parts[number])
            self._bytes += found.size
        self._kept[number] = found
        while self._bytes > KEPT and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].size
        return found

    def _prepare(self, part: Part) -> Category:
        pipeline = self.pipeline
        resolution, n_channels = pipeline.generator.resolution, pipeline.generator.n_channels
        for file, digest in zip(part.shots, part.hashes):
            self._check_unchanged(file, digest)
        shots = torch.stack([load_image(self.plan.root / file, resolution, n_channels) for file in part.shots])
        batch = min(_SHOTS, images_at_once(pipeline))
        fused = part.fusion != "none"
        novel = pipeline.prepare(shots, part.method, batch, fused=fused, **part.editor_options())
        return Category(part, novel, _about(pipeline, part, novel))

    def _check_unchanged(self, file: str, digest: str) -> None:
        path = self.plan.root / file
        try:
            same = hashlib.sha256(path.read_bytes()).hexdigest() == digest
        except OSError as error:
            raise InputError(
                f"Shot {str(path)!r} cannot be read any more ({error.strerror}); bring it back."
            ) from error
        if not same:
            raise InputError(f"Shot {str(path)!r} is not the file that the plan was made with; bring that one back.")


@dataclass(frozen=True, eq=False)
class Latents:
    """What one micro-batch is drawn from: offsets [n, L, D], and the categories of its stretches."""

    positions: range
    spans: list[Span]
    categories: list[Category]
    w_plus: Tensor

    def about(self) -> Iterator[dict[str, Any]]:
        """How each image comes to be: what its line in the manifest says."""
        return (line for span, category in zip(self.spans, self.categories) for line in _lines(span, category))

    def cut(self, size: int) -> Iterator[Latents]:
        """The same in stretches of at most ``size`` images."""
        begins = [0, *accumulate(span.n for span in self.spans)]
        for start in range(0, len(self.positions), size):
            positions = self.positions[start : start + size]
            spans, categories = [], []
            for span, category, begin in zip(self.spans, self.categories, begins):
                low, high = max(begin, start), min(begin + span.n, start + len(positions))
                if low < high:
                    spans.append(Span(span.part, span.first + low - begin, high - low))
                    categories.append(category)
            yield Latents(positions, spans, categories, self.w_plus[start : start + len(positions)])


def about_images(prepared: Prepared, positions: range) -> Iterator[dict[str, Any]]:
    """:meth:`Latents.about` of neighbouring images of a plan, without their latents."""
    return (line for span in prepared.plan.spans(positions) for line in _lines(span, prepared[span.part]))


def _lines(span: Span, category: Category) -> Iterator[dict[str, Any]]:
    return (about_image(category.part, index, category.about) for index in range(span.first, span.first + span.n))


def about_image(part: Part, index: int, shared: dict[str, Any]) -> dict[str, Any]:
    """How an image comes to be; ``shared`` is :func:`about_part` of its part."""
    return {"category": part.category, "index": index, "source": part.shots[index % len(part.shots)]} | shared


def draw_latents(prepared: Prepared, positions: range) -> Latents:
    """The latents of neighbouring images of a plan; those of each are a function of the image's category and index alone."""
    spans = prepared.plan.spans(positions)
    categories = [prepared[span.part] for span in spans]
    edited = [i for i, category in enumerate(categories) if category.novel.distribution is not None]
    drawn: list[Tensor] = [
        category.novel.w_plus[torch.arange(span.first, span.first + span.n) % len(category.novel.w_plus)]
        if category.novel.distribution is None
        else torch.empty(0)
        for span, category in zip(spans, categories)
    ]
    if edited:
        distributions = [distribution for c in categories if (distribution := c.novel.distribution) is not None]
        noise = [_noise(categories[i].part, spans[i], d.n_random) for i, d in zip(edited, distributions)]
        alphas = [categories[i].part.alpha for i in edited]
        with one_thread():
            together = sample_together(distributions, noise, alphas, [spans[i].first for i in edited])
        for i, w_plus in zip(edited, together.split([spans[i].n for i in edited])):
            drawn[i] = w_plus
    return Latents(positions, spans, categories, torch.cat(drawn))


def _noise(part: Part, span: Span, count: int) -> Tensor:
    numbers = range(span.first, span.first + span.n)
    return torch.stack([normals(part.seed, part.category, number, count) for number in numbers])


@torch.inference_mode()
def draw_images(pipeline: FewShotPipeline, latents: Latents) -> Tensor:
    """The images of a micro-batch, uint8 [n, C, R, R], on the pipeline's device; all categories are drawn together.

    What would take too much memory is drawn in parts: see :func:`sage_fast.generation.memory.images_at_once`.
    """
    most = images_at_once(pipeline)
    if len(latents.positions) <= most:
        return _draw_together(pipeline, latents)
    return torch.cat([_draw_together(pipeline, part) for part in latents.cut(most)])


def _draw_together(pipeline: FewShotPipeline, latents: Latents) -> Tensor:
    own_weights = any(category.novel.weight_deltas is not None for category in latents.categories)
    images = None if own_weights else pipeline.synthesize(latents.w_plus)
    drawn, at = [], 0
    for span, category in zip(latents.spans, latents.categories):
        stretch, at = slice(at, at + span.n), at + span.n
        novel, fusion = category.novel, category.part.fusion
        sources = torch.arange(span.first, span.first + span.n) % len(novel.w_plus)
        if images is None:
            w_plus = latents.w_plus[stretch]
            part = pipeline.render(w_plus, len(w_plus), novel.weight_deltas, sources).to(pipeline.device)
        else:
            part = images[stretch]
        drawn.append(part if fusion == "none" else pipeline.fuse(fusion, novel, sources, part))
    return to_uint8(torch.cat(drawn))


def draw_shard(pipeline: FewShotPipeline, plan: Plan, shard: int, prepared: Prepared | None = None) -> np.ndarray:
    """The images of a shard, uint8 [n, C, R, R]: the same bytes on one kind of device, whatever else was drawn.

    Args:
        prepared: categories of the plan that are kept from shard to shard.
    """
    prepared = prepared or Prepared(pipeline, plan)
    drawn = [draw_images(pipeline, draw_latents(prepared, positions)) for positions in plan.batches(shard)]
    return torch.cat(drawn).cpu().numpy()


def _about(pipeline: FewShotPipeline, part: Part, novel: NovelCategory) -> dict[str, Any]:
    similar = None
    if novel.distribution is not None:
        names = pipeline.codes.categories
        similar = [names[label] for label in novel.distribution.similar_categories.tolist()]
    return about_part(part, pipeline.preset, pipeline.hash, similar, __version__, pipeline.precision)


def about_part(
    part: Part, preset: str, model: str, similar: list[str] | None, version: str, precision: str = "float32"
) -> dict[str, Any]:
    """What all images of a part share in the manifest.

    Args:
        similar: the seen categories that were found similar; None: the method looks for none.
        precision: in the manifest where it is not float32.
    """
    about: dict[str, Any] = {
        "shots": [{"file": file, "sha256": digest} for file, digest in zip(part.shots, part.hashes)],
        "seed": part.seed,
        "method": part.method,
        "alpha": part.alpha,
        "fusion": part.fusion,
        "preset": preset,
        **part.editor_options(),
    }
    if precision != "float32":
        about["precision"] = precision
    if similar is not None:
        about["similar"] = similar
    return about | {"model": model, "version": version}
