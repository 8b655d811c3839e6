"""What was drawn at random for the augmentation of a global batch, and which images of it are at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_fast.errors import InputError

__all__ = ["Draws"]


@dataclass(frozen=True)
class Draws:
    """The amounts of every transform for each image of a global batch; ``draws[index]`` belongs to ``images[index]``.

    What is indexed away stays known, so that a rank with a share of the batch computes what one rank computes for all of it.

    Args:
        amounts: [N, k] float64 on the CPU, one column a transform.
        chosen: int64 [n], the images at hand as numbers of the global batch.
    """

    amounts: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, amounts: Tensor) -> Draws:
        """The draws of a whole batch."""
        return cls(amounts, torch.arange(len(amounts)))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> Draws:
        """Those of some images: a number, a slice, numbers or a mask, as tensors are indexed."""
        try:
            chosen = self.chosen[index.cpu() if isinstance(index, Tensor) else index]
        except IndexError as error:
            raise InputError(f"index does not fit draws for {len(self)} images: {error}.") from error
        return Draws(self.amounts, torch.atleast_1d(chosen))

    def check(self, images: Tensor) -> None:
        """Raise InputError unless the images are floating [N, C, H, W] with 1 to 4 channels, as many as the draws."""
        if images.ndim != 4 or not images.is_floating_point() or not 1 <= images.shape[1] <= 4:
            raise InputError(
                f"images must be floating point [N, C, H, W] with 1 to 4 channels, got {images.dtype} {list(images.shape)}."
            )
        if 0 in images.shape[2:]:
            raise InputError(f"images must have at least one pixel, got {list(images.shape)}.")
        if len(images) != len(self):
            raise InputError(
                f"draws must be for the {len(images)} images given, got {len(self)}; index them as the images: draws[index]."
            )
