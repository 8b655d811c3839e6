"""From a few latents of a novel category to its distribution: AGE, SAGE-Q, SAGE-I, SAGE ([SAGE], Eq. 15-20)."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sage_fast.editing.distribution import COVARIANCES, ClassDistribution
from sage_fast.errors import InputError, counted
from sage_fast.factorization.category_irrelevant import (
    READINGS,
    CategoryIrrelevantDictionary,
    commonality_of,
    layer_groups,
)
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.factorization.class_embeddings import check_labels, check_w_plus

__all__ = ["METHODS", "PRESETS", "FewShotEditor", "check_used", "unused_settings"]

METHODS: dict[str, dict[str, bool]] = {
    "age": {"class_embedding_mapping": False, "adaptive_editing": False},
    "sage-q": {"class_embedding_mapping": True, "adaptive_editing": False},
    "sage-i": {"class_embedding_mapping": False, "adaptive_editing": True},
    "sage": {"class_embedding_mapping": True, "adaptive_editing": True},
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"reading": "paper", "covariance": "joint", "alpha": 2.0, "n_components": 10},
    "released": {"reading": "released", "covariance": "per_layer", "alpha": 1.0, "n_components": 10},
    # t_B, alpha and editing each shot as measured on held-out seen categories: docs/results.md
    "default": {"reading": "default", "covariance": "joint", "alpha": 1.0, "n_components": 40, "each_shot": True},
}

_N_SIMILAR, _N_DIRECTIONS = 20, 50  # t_C of more than one shot, t_A
_FIRST_FINE_LAYER = 7  # layers 7 and up are the fine ones of [SAGE] and pSp
_QUERY_COMPONENTS = 10  # t_B of the retrieval, whatever that of the embedding


def unused_settings(method: str) -> tuple[str, ...]:
    """Which of ``n_components``, ``n_similar`` and ``n_directions`` no image of a method depends on; all where none is edited."""
    switches = METHODS.get(method, {"class_embedding_mapping": False, "adaptive_editing": False})
    mapping = () if switches["class_embedding_mapping"] else ("n_components",)
    return mapping if switches["adaptive_editing"] else (*mapping, "n_similar", "n_directions")


def check_used(method: str, given: Iterable[str]) -> None:
    """Raise InputError where a method makes no use of a setting that was given; one that edits nothing, of none."""
    idle = [name for name in given if method not in METHODS or name in unused_settings(method)]
    if idle:
        raise InputError(
            f"method '{method}' makes no use of {' and '.join(idle)}; leave out what has no effect, or choose another method."
        )


class _Pool(NamedTuple):
    """Codes of the seen categories that one novel category draws on."""

    categories: Tensor  # [T]
    mean: Tensor  # [L, K]
    rows: Tensor  # int64 [m], of the codes of the seen categories
    mask: Tensor  # bool [L, K]


class _Seen(NamedTuple):
    """What ``fit`` keeps of the seen categories for the retrieval and for Eq. 19."""

    coordinates: Tensor  # of the class embeddings on the basis of the query [S, L, R]
    rest: Tensor  # squared length of what lies outside that basis [S, L]
    counts: Tensor  # latents [S]
    sums: Tensor  # of their codes [S, L, K]
    sizes: Tensor  # of the absolute values of their codes [S, L, K]


class FewShotEditor:
    """Estimates the distribution of a novel category from one to a few of its latents.

    ``class_embedding_mapping`` edits from the estimate of the class embedding (Eq. 17) instead of from the shots
    themselves; ``adaptive_editing`` takes the codes and directions of the ``n_similar`` nearest seen categories (Eq.
    18-20) instead of those of all (Eq. 15). AGE has neither, SAGE-Q the first, SAGE-I the second, SAGE both: see
    ``METHODS``.

    Args:
        relevant: fitted dictionary of the seen categories.
        irrelevant: dictionary of the directions.
        n_similar: T, or t_C, at most S; None: 20, or all S when there are fewer. Used by adaptive editing.
        n_directions: t_A, directions used in each layer, at most K; None: 50, or all K when there are fewer. Used by
            adaptive editing.
        class_embedding_mapping, adaptive_editing: the two switches.
        covariance: ``"joint"``, ``"per_layer"`` or ``"diagonal"``; see :class:`ClassDistribution`.
        shrinkage: 0 to 1, towards the diagonal.
        n_components: t_B of Eq. 17, or several, over which the samples are spread; those of ``relevant`` when absent.
        each_shot: edit from the projection of each shot in turn instead of from that of their mean (Eq. 17); needs
            ``class_embedding_mapping``. The released code does so too, beside the mean.
        keep_fine_residual: leave layers 7 and up at the shots' own latents, where Eq. 17 loses texture.
        beta: threshold of Eq. 15 on mean |n|, without adaptive editing.
        alpha: strength of the edit that the distribution samples with.
        reading: ``"paper"``: distance of all layers together, seen embeddings unprojected. ``"released"``: distances
            summed over layers, seen embeddings unprojected; commonality pooled over images; layers 0-5 edited.
            ``"default"``: distances summed over layers, both sides projected.

    Raises:
        InputError: a setting out of its range, unknown, or without effect; dictionaries that do not belong together.
    """

    def __init__(
        self,
        relevant: CategoryRelevantDictionary,
        irrelevant: CategoryIrrelevantDictionary,
        *,
        n_similar: int | None = None,
        n_directions: int | None = None,
        class_embedding_mapping: bool = True,
        adaptive_editing: bool = True,
        covariance: str = "joint",
        shrinkage: float = 0.0,
        n_components: int | tuple[int, ...] | None = None,
        each_shot: bool = False,
        keep_fine_residual: bool = False,
        beta: float = 0.005,
        alpha: float = 2.0,
        reading: str = "default",
    ) -> None:
        self.relevant, self.irrelevant = relevant, irrelevant
        most = self._most()
        n_similar = min(_N_SIMILAR, most["n_similar"]) if n_similar is None else n_similar
        n_directions = min(_N_DIRECTIONS, most["n_directions"]) if n_directions is None else n_directions
        self.n_similar, self.n_directions = _whole("n_similar", n_similar), _whole("n_directions", n_directions)
        self.class_embedding_mapping, self.adaptive_editing = class_embedding_mapping, adaptive_editing
        self.covariance, self.shrinkage = covariance, shrinkage
        if n_components is None:
            n_components = relevant.n_components
        several = n_components if isinstance(n_components, Iterable) else (n_components,)
        self.n_components = tuple(_whole("n_components", t_b) for t_b in several)
        self.each_shot = each_shot
        self.keep_fine_residual, self.beta, self.alpha, self.reading = keep_fine_residual, beta, alpha, reading
        self._check()

    @classmethod
    def preset(
        cls,
        name: str,
        relevant: CategoryRelevantDictionary,
        irrelevant: CategoryIrrelevantDictionary,
        n_shots: int = 3,
        method: str = "sage",
        **changes: Any,
    ) -> FewShotEditor:
        """An editor with the settings of one reading and method.

        Args:
            name: ``"paper"``, ``"released"`` or ``"default"``.
            n_shots: given images per category; the paper takes t_C = 30 for one and 20 for more.
            method: ``"age"``, ``"sage-q"``, ``"sage-i"`` or ``"sage"``.
            changes: other arguments of the constructor, applied last.
        Raises:
            InputError: as of the constructor, or a change that the method makes no use of.
        """
        if name not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got '{name}'.")
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got '{method}'.")
        check_used(method, changes)
        own, (n_seen, _, dim) = dict(PRESETS[name]), relevant.class_embeddings_.shape
        own["n_components"] = min(own["n_components"], n_seen, dim)
        own["n_similar"] = min(30 if n_shots == 1 else _N_SIMILAR, n_seen)
        if not METHODS[method]["class_embedding_mapping"]:
            own.pop("each_shot", None)  # without the mapping each shot is edited anyway
        return cls(relevant, irrelevant, **{**own, **METHODS[method], **changes})

    def fit(self, w_plus: Tensor, labels: Tensor) -> FewShotEditor:
        """Back-project the latents of the seen categories to codes (Eq. 18).

        A+ is linear, so ``A+ (w - e) = A+ w - A+ e``: the residuals of Eq. 7 are never stored.

        Args:
            w_plus: offsets [N, L, D], those that ``relevant`` was fitted on, or others of its categories.
            labels: int64 [N], 0 to S - 1.
        Raises:
            InputError: tensors that do not belong together, or fewer than two latents.
        """
        embeddings = self.relevant.class_embeddings_
        _, n_latent, style_dim = embeddings.shape
        check_w_plus(w_plus, n_latent, style_dim, embeddings.dtype)
        check_labels(labels, len(w_plus), len(embeddings))
        self.codes_ = self.irrelevant.transform(
            w_plus.detach(), self.irrelevant.transform(embeddings), labels
        )  # [N, L, K]
        self.labels_ = labels
        self._seen = self._statistics()
        single = self._seen.counts[labels] == 1  # whose codes are zero, unless the embeddings are of other latents too
        self._single_are_embeddings = torch.equal(w_plus[single], embeddings[labels[single]])
        self._all = None if self.adaptive_editing else self._pool_all()
        return self

    def adapt(self, shots_w_plus: Tensor) -> ClassDistribution:
        """The distribution of a novel category from its shots, offsets [K, L, D] with K >= 1.

        Implements Eq. 17 to 19 of [SAGE] (Eq. 15 without the switches).

        Raises:
            InputError: not fitted, another L or D, or too few codes to estimate a covariance from.
        """
        if not hasattr(self, "codes_"):
            raise InputError("this FewShotEditor is not fitted; call fit(w_plus, labels) first.")
        embeddings = self.relevant.class_embeddings_
        _, n_latent, style_dim = embeddings.shape
        check_w_plus(shots_w_plus, n_latent, style_dim, embeddings.dtype)
        shots = shots_w_plus.detach()
        pool = self._all or self._pool_similar(self._nearest(shots))
        estimates = self._estimates(shots)
        return ClassDistribution(
            class_embedding=estimates[0],
            bases=self._bases(estimates, shots),
            similar_categories=pool.categories,
            mean=pool.mean,
            direction_mask=pool.mask,
            directions=self.irrelevant.directions,
            codes=self.codes_,
            rows=pool.rows,
            kind=self.covariance,
            shrinkage=self.shrinkage,
            alpha=self.alpha,
        )

    def _nearest(self, shots: Tensor) -> Tensor:
        """Labels [T] of the seen categories nearest to the shots' class embedding, nearest first."""
        query = self.relevant.coordinates(shots.mean(0, keepdim=True), self._query_rank)  # [1, L, R]
        seen, rest = self._seen.coordinates, self._seen.rest
        distances = (seen - query).square().sum(2)  # [S, L]; the query lies in the span
        if self.reading != "default":
            distances = distances + rest
        distances = distances.sum(1) if self.reading == "paper" else distances.sqrt().sum(1)
        return distances.argsort(stable=True)[: self.n_similar]

    @property
    def _query_rank(self) -> int:
        return min(_QUERY_COMPONENTS, *self.relevant.class_embeddings_.shape[::2])

    def _statistics(self) -> _Seen:
        """What every novel category asks of the seen ones, once."""
        embeddings = self.relevant.class_embeddings_
        rest = embeddings - self.relevant.project(embeddings, self._query_rank)
        counts = torch.bincount(self.labels_, minlength=len(embeddings))
        order = self.labels_.argsort(stable=True)
        sums, sizes = embeddings.new_zeros(2, len(embeddings), *self.codes_.shape[1:]).unbind()
        for label, rows in enumerate(order.split(counts.tolist())):  # a category at a time stays in the cache
            codes = self.codes_[rows]
            torch.sum(codes, 0, out=sums[label])
            torch.sum(codes.abs_(), 0, out=sizes[label])
        coordinates = self.relevant.coordinates(embeddings, self._query_rank)
        return _Seen(coordinates, rest.square().sum(2), counts, sums, sizes)

    def _estimates(self, shots: Tensor) -> Tensor:
        """The class embedding for each t_B [B, L, D]: the projection of the mean is the mean projection of Eq. 17."""
        mean = shots.mean(0, keepdim=True)
        return torch.cat([self.relevant.project(mean, t_b) for t_b in self.n_components])

    def _bases(self, estimates: Tensor, shots: Tensor) -> Tensor:
        """What is edited [B, L, D]; where shots enter, base b comes from shot b mod K."""
        if not self.class_embedding_mapping:
            return shots  # Eq. 15
        if self.each_shot:
            bases = torch.cat([self.relevant.project(shots, t_b) for t_b in self.n_components])
        elif self.keep_fine_residual:
            bases = estimates.repeat_interleave(len(shots), 0)
        else:
            return estimates  # Eq. 20
        if self.keep_fine_residual:
            bases[:, _FIRST_FINE_LAYER:] = shots.repeat(len(estimates), 1, 1)[:, _FIRST_FINE_LAYER:]
        return bases

    def _pool_all(self) -> _Pool:
        """The pooled codes of all seen categories (Eq. 15)."""
        categories = self._seen.counts.nonzero().flatten()
        return self._pool(categories, self._commonality(categories) > self.beta)

    def _pool_similar(self, categories: Tensor) -> _Pool:
        """The codes of some categories, and the directions that are commonest in them (Eq. 19)."""
        if not self._seen.counts[categories].any():
            raise InputError("none of the similar categories has a latent; fit the editor on all seen categories.")
        ranking = self._commonality(categories).argsort(dim=1, descending=True, stable=True)
        used = torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, ranking[:, : self.n_directions], True)
        return self._pool(categories, used)

    def _commonality(self, categories: Tensor) -> Tensor:
        return commonality_of(self._seen.sizes[categories], self._seen.counts[categories], self.reading)

    def _pool(self, categories: Tensor, used: Tensor) -> _Pool:
        rows = torch.isin(self.labels_, categories).nonzero().flatten()
        if len(rows) < 2:
            raise InputError("a covariance needs at least 2 latents of seen categories, got 1; embed more images.")
        if self._single_are_embeddings and int(self._seen.counts[categories].max()) < 2:
            raise InputError(
                "edits are drawn from how the latents of a seen category differ, and each of the "
                f"{counted(len(categories), 'category')} to draw on has one; keep the codes of more images of each, or raise n_similar."
            )
        edited = torch.zeros(len(used), 1, dtype=torch.bool, device=used.device)
        edited[self._edited_layers()] = True
        mean = self._seen.sums[categories].sum(0) / len(rows)
        return _Pool(categories, mean, rows, used & edited)

    def _edited_layers(self) -> list[int]:
        """Layers of the reading that the dictionary knows."""
        groups = layer_groups(len(self.irrelevant.directions), self.reading)
        known = {layer for group in self.irrelevant.groups for layer in group}
        return [layer for group in groups for layer in group if layer in known]

    def _most(self) -> dict[str, int]:
        """S and K, above which the two settings cannot be."""
        self.relevant.leading()  # raises when not fitted
        return {"n_similar": len(self.relevant.class_embeddings_), "n_directions": self.irrelevant.directions.shape[2]}

    def _check(self) -> None:
        both = self.relevant.leading(), self.irrelevant.directions
        kinds = [(*tensor.shape[:2], tensor.dtype) for tensor in both]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"relevant and irrelevant must have the same L and D and one dtype, got {kinds[0]} and {kinds[1]}."
            )
        for name, most in self._most().items():
            if not 1 <= getattr(self, name) <= most:
                what = "seen categories" if name == "n_similar" else "directions of a layer"
                raise InputError(
                    f"{name} must be 1 to {most}, the number of {what}, got {getattr(self, name)}; ask for as many or leave it out."
                )
        if not self.n_components:
            raise InputError("n_components must hold at least one number of components, got ().")
        for t_b in self.n_components:
            self.relevant.leading(t_b)  # raises above min(S, D)
        for name, known in (("covariance", COVARIANCES), ("reading", READINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got '{getattr(self, name)}'.")
        if not 0 <= self.shrinkage <= 1 or (self.shrinkage and self.covariance == "diagonal"):
            raise InputError(
                f"shrinkage must be 0 to 1, and 0 with the diagonal covariance, got {self.shrinkage} with "
                f"'{self.covariance}'."
            )
        for name in ("keep_fine_residual", "each_shot"):
            if getattr(self, name) and not self.class_embedding_mapping:
                raise InputError(f"{name} has no effect without class_embedding_mapping; leave it out.")
        if not self.beta >= 0:
            raise InputError(f"beta must not be negative, got {self.beta}.")


def _whole(name: str, value: Any) -> int:
    """``value`` as an int, NumPy's among them; InputError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {value!r:.60}.") from None
