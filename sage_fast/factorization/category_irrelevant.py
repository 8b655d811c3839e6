"""The dictionary A of category-irrelevant directions, its codes and its losses ([SAGE], Eq. 8-13, 18, 19)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError
from sage_fast.factorization.class_embeddings import check_labels, check_w_plus
from sage_fast.factorization.singular_vectors import left_singular_vectors
from sage_fast.ops import least_squares_codes

__all__ = [
    "READINGS",
    "CategoryIrrelevantDictionary",
    "CodeMLP",
    "commonality",
    "commonality_of",
    "layer_groups",
    "orthogonal_loss",
    "pca_directions",
    "sparse_loss",
]

READINGS = ("paper", "released", "default")
"""What the paper prints, what its authors' code computes, and what is used here unless asked otherwise."""


_BLOCK = 512  # codes whose category's are gathered at once


class CategoryIrrelevantDictionary:
    """Directions A that change an image without changing its category (Eq. 8).

    Args:
        directions: A [L, D, K]; a layer of zeros is never edited.
        groups: layers that shared one code in training, as :func:`layer_groups` gives; layers in none are not edited.
            All layers in the default groups when absent.

    Raises:
        InputError: directions of another form or not finite, or groups that do not hold layers of theirs, each at most once.
    """

    def __init__(self, directions: Tensor, groups: Sequence[Sequence[int]] | None = None) -> None:
        if directions.ndim != 3 or not directions.is_floating_point() or 0 in directions.shape:
            raise InputError(
                f"directions must be floating point [L, D, K], got {directions.dtype} {list(directions.shape)}."
            )
        if not bool(directions.isfinite().all()):
            raise InputError("directions hold values that are not finite; train the dictionary again.")
        n_latent = len(directions)
        groups = layer_groups(n_latent) if groups is None else groups
        layers = [layer for group in groups for layer in group]
        if len(set(layers)) != len(layers) or not all(0 <= layer < n_latent for layer in layers):
            raise InputError(f"groups must hold each layer 0 to {n_latent - 1} at most once, got {groups}.")
        self.directions = directions.detach()
        self.groups = tuple(tuple(group) for group in groups)

    @classmethod
    def from_released(cls, edited: Tensor, n_latent: int) -> CategoryIrrelevantDictionary:
        """The directions [6, D, K] of AGE and SAGE, which edit styles 0-2 and 3-5 alone, for a generator of L styles."""
        directions = edited.new_zeros(max(n_latent, len(edited)), *edited.shape[1:])
        directions[: len(edited)] = edited
        return cls(directions, layer_groups(len(directions), "released"))

    @property
    def n_directions(self) -> int:
        """K."""
        return self.directions.shape[2]

    @cached_property
    def pseudo_inverse(self) -> Tensor:
        """A+ [L, K, D], rank-revealing: singular values below max(D, K) * eps of the layer's largest count as zero."""
        wide = torch.promote_types(self.directions.dtype, torch.float32)  # torch inverts nothing of 16 bits
        return torch.linalg.pinv(self.directions.to(wide)).to(self.directions.dtype)

    def transform(self, delta_w: Tensor, class_codes: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """``A+ delta_w`` per layer: the codes of least squares, of minimal norm where A does not have full rank.

        Implements Eq. 18 of [SAGE]; linear in ``delta_w``.

        Args:
            delta_w: [N, L, D].
            class_codes: [S, L, K], with ``labels`` int64 [N]: subtracted by category. With ``transform(e)`` the latents
                themselves give the codes of their residuals, which need not be stored.
        Returns:
            codes [N, L, K].
        Raises:
            InputError: another L or D.
        """
        check_w_plus(delta_w, *self.directions.shape[:2])
        codes = least_squares_codes(delta_w, self.pseudo_inverse)
        if class_codes is None or labels is None:
            return codes
        for block in range(0, len(codes), _BLOCK):
            rows = slice(block, block + _BLOCK)
            codes[rows] -= class_codes[labels[rows]]
        return codes

    def inverse_transform(self, codes: Tensor) -> Tensor:
        """``A n`` [N, L, D] of codes [N, L, K]: the edit that the codes stand for (Eq. 8).

        Raises:
            InputError: another L or K.
        """
        if codes.ndim != 3 or codes.shape[1:] != self.directions.shape[::2]:
            n_latent, _, k = self.directions.shape
            raise InputError(f"codes must have shape [N, {n_latent}, {k}], got {list(codes.shape)}.")
        return torch.einsum("ldk,nlk->nld", self.directions, codes)


def layer_groups(n_latent: int, reading: str = "default") -> tuple[tuple[int, ...], ...]:
    """Layers that share one code: 0-2, 3-6 and 7 to L - 1, clipped to L; ``"released"`` edits 0-2 and 3-5 only.

    The groups of [SAGE] and pSp: coarse, middle and fine styles.

    Raises:
        InputError: ``n_latent`` below 1, or an unknown reading.
    """
    _check_reading(reading)
    if n_latent < 1:
        raise InputError(f"n_latent must be at least 1, got {n_latent}.")
    bounds = (0, 3, 6) if reading == "released" else (0, 3, 7, n_latent)
    groups = [tuple(range(a, min(b, n_latent))) for a, b in zip(bounds, bounds[1:], strict=False)]
    return tuple(group for group in groups if group)


class CodeMLP(nn.Module):
    """Residuals to codes: implements Eq. 9 of [SAGE], five linear layers with LeakyReLU(0.2) between, signed output.

    One network per group reads the group's layers and gives one code that they share. With ``one_network`` a single
    network reads all grouped layers and gives the codes of all groups, as the paper prints it. Layers in no group get
    zeros.

    Args:
        groups: layers that share a code, as :func:`layer_groups` gives.
        n_latent, style_dim, n_directions: L, D, K.
        width: of the first two hidden layers; min(1024, 4 K), at least 64, when absent. The third has half of it, the
            fourth K, at least 64. The released code has 1024, 1024, 512 and K = 100.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        n_latent: int,
        style_dim: int,
        n_directions: int,
        width: int | None = None,
        one_network: bool = False,
    ) -> None:
        super().__init__()
        if not groups or not all(groups):
            raise InputError("groups must hold at least one layer each, got none; see layer_groups.")
        width = max(64, min(1024, 4 * n_directions)) if width is None else width
        self.groups = tuple(tuple(group) for group in groups)
        self.n_latent, self.n_directions = n_latent, n_directions
        self._reads = (sum(self.groups, ()),) if one_network else self.groups
        sizes = [len(read) * style_dim for read in self._reads]
        codes = len(self.groups) // len(self._reads) * n_directions
        self.networks = nn.ModuleList(_mlp(size, width, n_directions, codes) for size in sizes)

    def forward(self, delta_w: Tensor) -> Tensor:
        """Residuals [N, L, D] -> codes [N, L, K], equal within a group."""
        shared = [net(delta_w[:, read].flatten(1)) for net, read in zip(self.networks, self._reads, strict=True)]
        per_group = torch.cat(shared, 1).unflatten(1, (len(self.groups), self.n_directions))  # [N, groups, K]
        codes = delta_w.new_zeros(len(delta_w), self.n_latent, self.n_directions)
        for i, group in enumerate(self.groups):
            codes[:, list(group)] = per_group[:, i : i + 1]
        return codes


def _mlp(n_in: int, width: int, n_directions: int, n_out: int) -> nn.Sequential:
    sizes = (n_in, width, width, max(width // 2, 1), max(64, n_directions), n_out)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def orthogonal_loss(directions: Tensor, class_embeddings: Tensor, reading: str = "default") -> Tensor:
    """How far the directions A [L, D, K] are from not touching the categories, e [S, L, D]: a scalar.

    Implements Eq. 13 of [SAGE], the penalty for Eq. 12. ``"paper"``: squared Frobenius norm of B^T A, summed over
    layers. ``"released"``: mean absolute value of B^T A over its six layers. ``"default"``: as the paper, with the
    class embeddings of unit norm in each layer, so that it does not grow with their distance from ``latent_avg``.
    """
    _check_reading(reading)
    if reading == "default":
        class_embeddings = nn.functional.normalize(class_embeddings, dim=2)
    layers = _grouped_layers(len(directions), reading)
    products = torch.einsum("sld,ldk->lsk", class_embeddings[:, layers], directions[layers])  # B^T A
    return products.abs().mean() if reading == "released" else products.square().sum()


def sparse_loss(codes: Tensor, theta0: float = 0.5, theta1: float = -1.0, reading: str = "default") -> Tensor:
    """Smooth count of the directions in use, from codes [N, L, K]: a scalar.

    Implements Eq. 10 of [SAGE], summed over layers and directions. ``"paper"``: ``sigmoid(theta0 n - theta1)`` as
    printed, mean over the batch. ``"default"``: ``sigmoid(theta0 |n| + theta1)``, mean over the batch.
    ``"released"``: the same over its six layers, summed over the batch and divided by 32.
    Deviation: the printed form has no least value (it drives n to minus infinity) and the printed sign of theta1 does
    not go with its value of -1; the default is what the released code computes, without its constant.
    """
    _check_reading(reading)
    codes = codes[:, _grouped_layers(codes.shape[1], reading)]
    if reading == "paper":
        return torch.sigmoid(theta0 * codes - theta1).sum() / len(codes)
    return torch.sigmoid(theta0 * codes.abs() + theta1).sum() / (32 if reading == "released" else len(codes))


def pca_directions(delta_w: Tensor, n: int) -> Tensor:
    """Principal directions of residuals [N, L, D] in each layer, by falling variance: orthonormal columns [L, D, n].

    Uncentred, since the residuals of a category have mean zero. Columns beyond the numerical rank are zero; the sign
    is such that the entry of largest absolute value is positive.

    Raises:
        InputError: ``n`` above min(N, D).
    """
    check_w_plus(delta_w)
    N, _, D = delta_w.shape
    if not 1 <= n <= min(N, D):
        raise InputError(f"n must be 1 to {min(N, D)}, the smaller of {N} residuals and style_dim {D}, got {n}.")
    vectors, values = left_singular_vectors(delta_w.detach().permute(1, 2, 0))
    sign = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    rank = values > 1e-5 * values[:, :1]  # float32's noise is below
    return (vectors * sign * rank.unsqueeze(1))[:, :, :n]


def commonality(codes: Tensor, labels: Tensor, reading: str = "default") -> Tensor:
    """How much each direction is used: mean |n| over the images of a category, then over categories, [L, K].

    Implements Eq. 19 of [SAGE]. ``"released"`` pools all images instead, so that large categories weigh more.

    Args:
        codes: n [N, L, K].
        labels: int64 [N], 0 or more; a category without an image does not count.
    """
    check_labels(labels, len(codes))
    categories, classes = labels.unique(return_inverse=True)
    sizes = codes.new_zeros(len(categories), *codes.shape[1:]).index_add(0, classes, codes.abs())
    return commonality_of(sizes, torch.bincount(classes), reading)


def commonality_of(sizes: Tensor, counts: Tensor, reading: str = "default") -> Tensor:
    """:func:`commonality` from each category's sum of absolute codes [S, L, K] and number of codes [S]."""
    _check_reading(reading)
    if reading == "released":
        return sizes.sum(0) / counts.sum()
    held = counts > 0
    return (sizes[held] / counts[held].view(-1, 1, 1)).mean(0)


def _grouped_layers(n_latent: int, reading: str) -> list[int]:
    return [layer for group in layer_groups(n_latent, reading) for layer in group]


def _check_reading(reading: str) -> None:
    if reading not in READINGS:
        raise InputError(f"reading must be one of {', '.join(READINGS)}, got '{reading}'.")
