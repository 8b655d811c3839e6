"""Which latents and which real images a training's pictures show: the same at every step, a row a class."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Generator

__all__ = ["grid_latents", "grid_reals"]


def grid_latents(generator: Generator, rows: int = 8, columns: int = 8, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """z [rows * columns, z_dim] of a fixed grid, and of a class-conditional generator one-hot labels, a row a class.

    With classes a column is one z in all of them, and the rows are the first, ..., last class at equal distances where
    there are more classes than rows, and as many as there are classes where there are fewer.

    Returns:
        (z, c): on the generator's device; c is None without classes.
    """
    _check(rows, columns)
    rng, like = torch.Generator().manual_seed(seed), generator.input.input
    if not generator.c_dim:
        return torch.randn(rows * columns, generator.style.z_dim, generator=rng).to(like), None
    classes = _spread(generator.c_dim, rows)
    z = torch.randn(columns, generator.style.z_dim, generator=rng).repeat(len(classes), 1)
    c = torch.nn.functional.one_hot(classes.repeat_interleave(columns), generator.c_dim)
    return z.to(like), c.to(like)


def grid_reals(labels: Tensor, rows: int = 8, columns: int = 8) -> Tensor:
    """Indices int64 of real images for a grid of the same classes: ``columns`` of each row's class, repeated where it has fewer.

    Args:
        labels: int64 [M], classes 0 to S - 1 of the images; classes without images are passed over.
    """
    _check(rows, columns)
    found = labels.unique()
    chosen = [torch.nonzero(labels == label).flatten() for label in found[_spread(len(found), rows)]]
    return torch.cat([members[torch.arange(columns) % len(members)] for members in chosen])


def _spread(n: int, rows: int) -> Tensor:
    """At most ``rows`` of 0, ..., n - 1 at equal distances, both ends among them."""
    return torch.linspace(0, n - 1, min(n, rows)).round().long()


def _check(rows: int, columns: int) -> None:
    if min(rows, columns) < 1:
        raise InputError(f"rows and columns must be at least 1, got {rows} and {columns}.")
