"""Generated images where a program needs them: as a stage that maps batches, or mixed into a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sage_fast.errors import InputError
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared, draw_images, draw_latents, draw_shard
from sage_fast.generation.run import load_pipeline, plan_of
from sage_fast.mixing import MixedDataset, to_pil
from sage_fast.pipeline import FewShotPipeline, stretches

__all__ = ["Augmenter"]


class Augmenter:
    """Images of a plan by their numbers; it can be pickled, and a copy draws the same images. See docs/scaling.md.

    A pickled copy holds the plan and where the model is, not its weights, unless a pipeline was given; shots are read where
    the images are drawn, so their folder must be there under the same name.

    Args:
        model: a bundle folder, None for the model shipped with the package, or a pipeline.
        shots: ``<category>/<image>``, or one flat folder for one category.
        config: ``n``, ``method``, ``alpha``, ``fusion``, ``seed``, ``shard``, ``device``, ...; what is about files has no effect.
        plan: a .yaml, .json or .csv file, see :mod:`sage_fast.generation.plan_files`.
    Raises:
        InputError: a model, shots or a setting that cannot be used.
    """

    def __init__(
        self,
        model: FewShotPipeline | str | os.PathLike[str] | None = None,
        shots: str | os.PathLike[str] | None = None,
        config: GenerateConfig = GenerateConfig(),
        plan: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model, self.config = _from_anywhere(model), config
        self._pipeline: FewShotPipeline | None = load_pipeline(self.model, config)
        made = plan_of(self._pipeline, shots, config, plan)
        self.plan = replace(made, root=made.root.absolute())
        self._prepared: Prepared | None = None

    @property
    def pipeline(self) -> FewShotPipeline:
        """The model, loaded at first use in each process."""
        if self._pipeline is None:
            self._pipeline = load_pipeline(self.model, self.config)
        return self._pipeline

    def __call__(self, batch: Mapping[str, Sequence[int] | np.ndarray]) -> dict[str, np.ndarray]:
        """The images of some numbers: a stage of ``map_batches`` of Ray Data, or of any loop.

        Args:
            batch: ``id``, numbers of images of the plan in any order; or ``shard``, numbers of its shards.
        Returns:
            ``image`` uint8 [n, C, R, R], ``label`` int64 [n] into the plan's categories, ``category`` [n], ``index`` int64 [n]
            in the category and ``id`` int64 [n]. Shards have the bytes of :func:`sage_fast.generation.draw_shard`; images by
            their ids may differ from them by one grey level on a GPU.
        Raises:
            InputError: neither column, or a number that the plan does not have.
        """
        column = next((name for name in ("shard", "id") if name in batch), None)
        if column is None:
            raise InputError(f"The batch must have a column 'id' or 'shard', got {sorted(batch)}.")
        given = np.asarray(batch[column])
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise InputError(f"{column} must be a list of whole numbers, got {batch[column]!r:.60}.")
        numbers = [int(number) for number in given]
        known = self.plan.n_shards if column == "shard" else len(self.plan)
        for number in numbers:
            if not 0 <= number < known:
                raise InputError(f"{column} must be 0 to {known - 1} in this plan, got {number}.")
        if self._prepared is None:
            self._prepared = Prepared(self.pipeline, self.plan)
        prepared = self._prepared
        if column == "shard":
            runs = [self.plan.positions(number) for number in numbers]
            drawn = [draw_shard(self.pipeline, self.plan, number, prepared) for number in numbers]
        else:
            runs = stretches(numbers, self.plan.batch)
            images = [draw_images(self.pipeline, draw_latents(prepared, run)) for run in runs]
            drawn = [part.cpu().numpy() for part in images]
        return self._columns(runs, drawn)

    def _columns(self, runs: list[range], drawn: list[np.ndarray]) -> dict[str, np.ndarray]:
        shape = (0, self.pipeline.generator.n_channels, *[self.pipeline.generator.resolution] * 2)
        about = [image for run in runs for image in self.plan.images(run)]
        return {
            "image": np.concatenate([np.empty(shape, np.uint8), *drawn]),
            "label": np.array([self.plan.labels[part.category] for part, _ in about], np.int64),
            "category": np.array([part.category for part, _ in about]),
            "index": np.array([index for _, index in about], np.int64),
            "id": np.array([number for run in runs for number in run], np.int64),
        }

    def dataset(
        self,
        real: torch.utils.data.Dataset[Any],
        ratio: float = 0.5,
        *,
        classes: Sequence[str] | Mapping[str, int] | None = None,
        transform: Callable[[Any], Any] | None = None,
        as_image: Callable[[np.ndarray], Any] = to_pil,
        seed: int = 0,
        cache: int = 1024,
        epochs_per_image: int = 1,
    ) -> MixedDataset:
        """A real dataset and generated images of its classes as one; arguments of :class:`sage_fast.mixing.MixedDataset`."""
        return MixedDataset(self, real, ratio, classes, transform, as_image, seed, cache, epochs_per_image)

    def __getstate__(self) -> dict[str, Any]:
        kept = self._pipeline if isinstance(self.model, FewShotPipeline) else None
        return self.__dict__ | {"_pipeline": kept, "_prepared": None}


def _from_anywhere(
    model: FewShotPipeline | str | os.PathLike[str] | None,
) -> FewShotPipeline | str | os.PathLike[str] | None:
    """A folder by its whole name: a copy may be at work in another folder."""
    return model if model is None or isinstance(model, FewShotPipeline) else os.path.abspath(model)
