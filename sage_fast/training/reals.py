"""The real images of adversarial training: batches in [-1, 1] with their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.data.folders import ImageSet
from sage_fast.errors import InputError
from sage_fast.training.batches import to_pixels
from sage_fast.training.grids import grid_reals

if TYPE_CHECKING:
    from sage_fast.training.gan import GANConfig

__all__ = ["Reals", "as_reals"]


@dataclass(frozen=True, eq=False)
class Reals:
    """Real images in memory, or mapped from a file.

    Attributes:
        pixels: uint8 [M, C, R, R].
        labels: int64 [M], or None where they are not known.
        n_classes: length of a label vector; 0 where the networks take none.
    """

    pixels: Tensor
    labels: Tensor | None
    n_classes: int

    def __len__(self) -> int:
        return len(self.pixels)

    def spread(self, n: int) -> Tensor:
        """At most n indices at equal distances, of the first image on."""
        n = min(n, len(self))
        return torch.arange(n) * len(self) // n

    def examples(self) -> Tensor:
        """Indices of images for a grid 8 wide: of classes a row each, else at equal distances."""
        return grid_reals(self.labels) if self.n_classes and self.labels is not None else self.spread(64)

    def batch(self, index: Tensor, like: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images [N, C, R, R] in [-1, 1], mirrored where ``flips`` [N], and their labels, with ``like``'s dtype and device."""
        return to_pixels(self.pixels, index, flips, like), self.one_hot(index, like)

    def one_hot(self, index: Tensor, like: Tensor) -> Tensor | None:
        """Labels [N, n_classes] of the images at ``index``; None where the networks take none."""
        if not self.n_classes:
            return None
        assert self.labels is not None
        return F.one_hot(self.labels[index], self.n_classes).to(like, non_blocking=True)


def as_reals(images: Tensor | ImageSet, config: GANConfig, least: int | None = None) -> Reals:
    """Images [M, C, R, R], checked against the config; ``least`` of them at least, a batch unless told otherwise.

    Raises:
        InputError: another shape, too few images, or labels that are needed and missing, or all the same.
    """
    pixels, labels = (images.images, images.labels) if isinstance(images, ImageSet) else (images, None)
    expected = (config.n_channels, config.resolution, config.resolution)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise InputError(
            f"images must be uint8 [M, {expected[0]}, {expected[1]}, {expected[2]}], got {pixels.dtype} {list(pixels.shape)}."
        )
    if len(pixels) < (config.batch if least is None else least):
        n = len(pixels)
        remedy = f"a batch of at most {n} (--batch, of all stages in one --gan.batch)" if n > 1 else "more images"
        raise InputError(f"training needs at least one batch of {config.batch} images, got {n}; give {remedy}.")
    for name in ("conditional", "balance"):
        if getattr(config, name) and labels is None:
            raise InputError(f"{name} training needs labels, got images alone; pass an ImageSet.")
    n_classes = 0
    if config.conditional:
        assert isinstance(images, ImageSet)
        n_classes = len(images.categories)
        if n_classes < 2:
            raise InputError(
                f"conditional training needs at least two categories, got {n_classes}; leave out --conditional."
            )
    return Reals(pixels, labels, n_classes)
