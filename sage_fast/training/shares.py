"""Who takes which samples of a batch: ranks, micro-batches within a rank, and the groups of the discriminator."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.discriminator import Discriminator, group_size

__all__ = ["logits_of_both", "path_share", "share_out"]


def share_out(batch: int, group: int, rank: int = 0, n_ranks: int = 1, accumulate: int = 1) -> list[Tensor]:
    """The samples of a batch that ``rank`` takes: ``accumulate`` micro-batches of indices.

    The discriminator compares samples n, n + M, n + 2M, ... of a batch in its M groups (minibatch standard deviation),
    so a micro-batch takes whole groups, in an order in which it groups them again the same way.

    Args:
        group: ``mbstd_group`` of the discriminator.
    Raises:
        InputError: the groups cannot be shared out evenly.
    """
    unit = n_ranks * accumulate * group
    if batch % unit:
        batches = [str(n) for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
        groups = [str(n) for n in _fitting_groups(batch, n_ranks * accumulate, group)]
        raise InputError(
            f"batch must be a multiple of {unit} ({n_ranks} ranks x {accumulate} micro-batches x mbstd_group {group}, the images "
            f"that share a standard deviation), got {batch}; give batch {' or '.join(batches)}"
            + (f", or mbstd_group {' or '.join(groups)}." if groups else ".")
        )
    rows = torch.arange(batch).view(group, n_ranks, accumulate, -1)
    return [rows[:, rank, part].flatten() for part in range(accumulate)]


def _fitting_groups(batch: int, parts: int, group: int) -> list[int]:
    """The sizes of groups nearest to ``group`` that divide each of ``parts`` of a batch, of two images at least."""
    if batch % parts:
        return []
    sizes = [n for n in range(2, batch // parts + 1) if batch // parts % n == 0]
    return [n for n in sizes if n < group][-1:] + [n for n in sizes if n > group][:1]


def path_share(share: Tensor, group: int) -> Tensor:
    """The part of a micro-batch that the path-length penalty is taken over: half of each group (one of one)."""
    return share[: len(share) * max(1, group // 2) // group]


def logits_of_both(
    D: Discriminator, reals: Tensor, fakes: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [N, 1] of reals and of fakes, as many of them, in one pass: weights are transformed once, their gradients are one product.

    They are laid so that the minibatch standard deviation compares reals with reals and fakes with fakes, as in a pass for
    each; where the size of its groups would change with the batch, or there are more of one kind, there are two passes.
    """
    n = len(reals)
    size = group_size(n, D.mbstd_group)
    if len(fakes) != n or group_size(2 * n, D.mbstd_group) != size:
        return D(reals, labels), D(fakes, labels)

    def together(*both: Tensor) -> Tensor:  # two of [N, ...] -> [size, 2, N / size, ...]
        return torch.stack([one.unflatten(0, (size, -1)) for one in both], 1).flatten(0, 2)

    logits = D(together(reals, fakes), None if labels is None else together(labels, labels))
    of_reals, of_fakes = logits.unflatten(0, (size, 2, -1)).unbind(1)
    return of_reals.flatten(0, 1), of_fakes.flatten(0, 1)
