"""The latents of one novel category as a distribution to draw from ([SAGE], Eq. 15, 20)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops import combine_rows, edit_latents

__all__ = ["COVARIANCES", "ClassDistribution", "sample_together"]

COVARIANCES = ("joint", "per_layer", "diagonal")
"""Over all layers at once; over the directions of a layer, layers independent; every entry independent."""

_BLOCK = 64  # samples to a matrix product; another size rounds otherwise, and the batch would show


@dataclass(frozen=True, eq=False)
class ClassDistribution:
    """``base + alpha * A (mask * n)`` with n ~ N(mean, covariance): what ``FewShotEditor.adapt`` returns.

    The covariance is that of the pooled codes of the similar categories and is never formed: with those m codes as rows
    of X, ``mean + (X - mean)^T eps / sqrt(m - 1)`` with eps ~ N(0, I_m) has exactly their sample covariance, over all
    layers at once. Offsets from ``latent_avg`` throughout. Immutable; do not write into its tensors, distributions
    share them.

    Attributes:
        class_embedding: the estimate of e of the novel category [L, D] (Eq. 17).
        bases: [B, L, D], what is edited: estimates of e, or the shots' own latents.
        similar_categories: [T] labels of the categories whose codes are pooled, nearest first.
        mean: [L, K].
        direction_mask: bool [L, K], directions that are used.
        directions: A [L, D, K].
        codes: codes of the seen categories [M, L, K], shared and never copied.
        rows: int64 [m], those of the similar categories, whose mean ``mean`` is.
        kind: ``"joint"``, ``"per_layer"`` or ``"diagonal"``.
        shrinkage: 0 to 1, weight of the covariance's own diagonal in place of it.
        alpha: strength of the edit unless ``sample`` is given another.
    """

    class_embedding: Tensor
    bases: Tensor
    similar_categories: Tensor
    mean: Tensor
    direction_mask: Tensor
    directions: Tensor = field(repr=False)
    codes: Tensor = field(repr=False)
    rows: Tensor = field(repr=False)
    kind: str = "joint"
    shrinkage: float = 0.0
    alpha: float = 2.0

    @property
    def pooled(self) -> Tensor:
        """The codes of the similar categories minus ``mean`` [m, L, K]."""
        return self.codes[self.rows] - self.mean

    @cached_property
    def _used(self) -> Tensor:
        """Numbers 0 to L K - 1 of the directions that are used."""
        return self.direction_mask.flatten().nonzero().flatten()

    @property
    def n_random(self) -> int:
        """Standard normal numbers that one sample takes."""
        m, (n_latent, k) = len(self.rows), self.mean.shape
        if self.kind == "diagonal":
            return n_latent * k
        return (m if self.kind == "joint" else n_latent * m) + (n_latent * k if self.shrinkage else 0)

    def covariance(self) -> Tensor:
        """Covariance of the codes before the mask: [L K, L K] in layer order for ``"joint"``, else [L, K, K]."""
        X = self.pooled.flatten(1)[None] if self.kind == "joint" else self.pooled.transpose(0, 1)  # [1 or L, m, .]
        full = X.mT @ X / (X.shape[1] - 1)
        own = torch.diag_embed(full.diagonal(dim1=1, dim2=2))
        mixed = own if self.kind == "diagonal" else torch.lerp(full, own, self.shrinkage)
        return mixed[0] if self.kind == "joint" else mixed

    def sample(self, n: int, alpha: float | None = None, rng: torch.Generator | None = None, first: int = 0) -> Tensor:
        """Draw ``n`` new latents of the category.

        Implements Eq. 20 of [SAGE] (Eq. 15 where the bases are the shots).

        Args:
            n: how many, 0 or more.
            alpha: strength of the edit; the distribution's own when absent.
            rng: source of the random numbers; torch's own when absent.
            first: number of the first sample; sample j edits base j mod B.
        Returns:
            offsets [n, L, D]. Drawn with one ``rng`` in batches of multiples of 16, the samples are those of one call.
        Raises:
            InputError: as :meth:`sample_with`, or a negative ``n``.
        """
        if n < 0:
            raise InputError(f"n, how many to draw, must be 0 or more, got {n}.")
        width = -(-self.n_random // 16) * 16  # torch draws in sixteens: so the stream does not depend on n
        noise = torch.randn(n, width, generator=rng, dtype=self.mean.dtype, device=rng.device if rng else None)
        return self.sample_with(noise[:, : self.n_random].to(self.mean.device), alpha, first)

    def sample_with(self, noise: Tensor, alpha: float | None = None, first: int = 0) -> Tensor:
        """The latents that given standard normal numbers stand for: Eq. 20 as a pure function.

        Sample j depends on its own row, on ``first + j`` and on nothing else, to the last bit.

        Args:
            noise: [n, n_random].
            alpha, first: as for :meth:`sample`.
        Returns:
            offsets [n, L, D].
        Raises:
            InputError: noise of another width, an ``alpha`` that is not finite, or a negative ``first``.
        """
        if noise.ndim != 2 or noise.shape[1] != self.n_random or noise.dtype != self.mean.dtype:
            raise InputError(
                f"noise must be {self.mean.dtype} [n, {self.n_random}] (see n_random), got {noise.dtype} "
                f"{list(noise.shape)}."
            )
        if first < 0:
            raise InputError(f"first, the number of the first sample, must be 0 or more, got {first}.")
        alpha = self.alpha if alpha is None else alpha
        if not math.isfinite(alpha):
            raise InputError(f"alpha must be a finite number, got {alpha}.")
        before = first % _BLOCK  # each sample keeps its row in its block
        after = -(before + len(noise)) % _BLOCK
        if not len(noise):
            return self.bases[:0]
        if self.kind == "joint" and not self.shrinkage and self.mean.device.type == "cpu":
            # each sample is summed by itself, so all can be drawn at once, and only the directions that are used
            codes = F.pad(self._draw(noise, self._used), (0, 0, 0, 0, before, after)).split(_BLOCK)
        else:
            codes = tuple(self.codes_with(block) for block in F.pad(noise, (0, 0, before, after)).split(_BLOCK))
        edited = [self._edit(block, alpha, first - before + i * _BLOCK) for i, block in enumerate(codes)]
        return torch.cat(edited)[before : before + len(noise)]

    def codes_with(self, noise: Tensor) -> Tensor:
        """Codes n ~ N(mean, covariance) [n, L, K] before the mask, from standard normals [n, n_random]."""
        m, (n_latent, k) = len(self.rows), self.mean.shape
        if self.kind == "joint" and not self.shrinkage:
            return self._draw(noise, torch.arange(n_latent * k, device=noise.device))
        pooled = self.pooled
        deviation = pooled.square().sum(0).div(m - 1).sqrt()  # [L, K]
        if self.kind == "diagonal":
            return self.mean + deviation * noise.view(-1, n_latent, k)
        scale = math.sqrt((1 - self.shrinkage) / (m - 1))
        if self.kind == "joint":
            spread = (noise[:, :m] @ pooled.flatten(1)).view(-1, n_latent, k)
        else:
            eps = noise[:, : n_latent * m].view(-1, n_latent, m)
            spread = torch.einsum("nlm,mlk->nlk", eps, pooled)
        codes = self.mean + scale * spread
        if self.shrinkage:
            codes = codes + math.sqrt(self.shrinkage) * deviation * noise[:, -n_latent * k :].view(-1, n_latent, k)
        return codes

    def _draw(self, noise: Tensor, used: Tensor) -> Tensor:
        """Joint codes [n, L, K] of the directions that are used; the others stay at zero."""
        mean = self.mean.flatten()
        spread = combine_rows(noise, self.codes.flatten(1), mean, self.rows, used)
        codes = noise.new_zeros(len(noise), len(mean))
        codes[:, used] = torch.add(mean[used], spread, alpha=1 / math.sqrt(len(self.rows) - 1))
        return codes.view(-1, *self.mean.shape)

    def _edit(self, codes: Tensor, alpha: float, first: int) -> Tensor:
        """Edit one block of samples; sample j takes base (first + j) mod B."""
        numbers = torch.arange(first, first + len(codes), device=self.bases.device)
        base = self.bases if len(self.bases) == 1 else self.bases[numbers % len(self.bases)]
        return edit_latents(base, codes, self.directions, alpha, self.direction_mask)


def sample_together(
    distributions: Sequence[ClassDistribution],
    noise: Sequence[Tensor],
    alphas: Sequence[float | None],
    firsts: Sequence[int],
) -> Tensor:
    """What :meth:`ClassDistribution.sample_with` gives of each, to the last bit, edited in one call.

    Args:
        distributions: of one editor, one for each stretch of samples.
        noise, alphas, firsts: the arguments of each.
    Returns:
        offsets [N, L, D], stretch after stretch.
    """
    parts = list(zip(distributions, noise, alphas, firsts))
    if not _one_call(distributions, alphas):
        return torch.cat([one.sample_with(rows, alpha, first) for one, rows, alpha, first in parts])
    n, directions = sum(map(len, noise)), distributions[0].directions
    alpha = distributions[0].alpha if alphas[0] is None else alphas[0]
    codes = [one._draw(rows, one._used) for one, rows, _, _ in parts]
    index, masks, start = [], [], 0
    for one, rows, _, first in parts:
        index.append(start + torch.arange(first, first + len(rows)) % len(one.bases))
        masks.append(one.direction_mask.expand(len(one.bases), -1, -1))
        start += len(one.bases)
    short = max(0, 4 - n)  # fewer samples would be summed in another order
    edited = edit_latents(
        torch.cat([one.bases for one in distributions]),
        F.pad(torch.cat(codes), (0, 0, 0, 0, 0, short)),
        directions,
        alpha,
        torch.cat(masks),
        F.pad(torch.cat(index), (0, short)),
    )
    return edited[:n]


def _one_call(distributions: Sequence[ClassDistribution], alphas: Sequence[float | None]) -> bool:
    """Whether samples of all can be edited together without its showing in a bit."""
    one = distributions[0]
    strengths = {one.alpha if alpha is None else alpha for one, alpha in zip(distributions, alphas)}
    alike = all(d.directions is one.directions and d.kind == "joint" and not d.shrinkage for d in distributions)
    return alike and len(strengths) == 1 and _native.has_kernel("edit_latents", "cpu") and one.mean.device.type == "cpu"
