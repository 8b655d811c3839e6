"""The dictionary B_f of category-relevant directions ([SAGE], Eq. 16, 17)."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.factorization.class_embeddings import check_w_plus, class_embeddings
from sage_fast.factorization.singular_vectors import left_singular_vectors
from sage_fast.ops import project_onto_basis

__all__ = ["CategoryRelevantDictionary"]


class CategoryRelevantDictionary:
    """Leading singular directions of the class embeddings of the seen categories, one basis per layer.

    Implements Eq. 16 of [SAGE] in the frame of offsets from ``latent_avg``, uncentred: the first direction is close
    to the mean embedding.

    Args:
        n_components: R, or t_B in the paper; at most min(S, D).

    Attributes:
        class_embeddings_: e [S, L, D].
        basis_: B_f [L, D, R], orthonormal columns in each layer, by falling singular value.
        singular_values_: [L, min(S, D)], falling.

    Raises:
        InputError: ``n_components`` below 1.
    """

    class_embeddings_: Tensor
    basis_: Tensor
    singular_values_: Tensor

    def __init__(self, n_components: int = 10) -> None:
        if n_components < 1:
            raise InputError(f"n_components must be at least 1, got {n_components}.")
        self.n_components = n_components

    def fit(self, w_plus: Tensor, labels: Tensor) -> CategoryRelevantDictionary:
        """Learn from offsets ``w_plus`` [N, L, D] with ``labels`` int64 [N] in 0 to S - 1.

        Raises:
            InputError: tensors that do not belong together, an empty category, or ``n_components`` above min(S, D).
        """
        return self._decompose(class_embeddings(w_plus, labels))

    @classmethod
    def from_class_embeddings(cls, class_embeddings: Tensor, n_components: int = 10) -> CategoryRelevantDictionary:
        """The dictionary of given class embeddings e [S, L, D]. Raises as :meth:`fit`."""
        check_w_plus(class_embeddings)
        return cls(n_components)._decompose(class_embeddings.detach())

    def project(self, w_plus: Tensor, n_components: int | None = None) -> Tensor:
        """``B_f B_f^T w`` [N, L, D]: the category-relevant part of each latent (Eq. 17 before its mean).

        Args:
            w_plus: offsets [N, L, D].
            n_components: directions to use, 1 to min(S, D), if not those of ``basis_``.
        Raises:
            InputError: not fitted, another L or D, or too many components.
        """
        return project_onto_basis(w_plus, self.leading(n_components))

    def coordinates(self, w_plus: Tensor, n_components: int | None = None) -> Tensor:
        """``B_f^T w`` [N, L, n_components]: distances between them are those of the projections."""
        return torch.einsum("ldr,nld->nlr", self.leading(n_components), w_plus)

    def leading(self, n_components: int | None = None) -> Tensor:
        """The first ``n_components`` directions [L, D, n_components]; ``basis_`` when absent.

        Raises:
            InputError: not fitted, or too many components.
        """
        self._check_fitted()
        if n_components is None:
            return self.basis_
        if not 1 <= n_components <= self._directions.shape[2]:
            raise InputError(self._too_many(n_components))
        return self._directions[:, :, :n_components]

    def _decompose(self, embeddings: Tensor) -> CategoryRelevantDictionary:
        if self.n_components > min(embeddings.shape[0], embeddings.shape[2]):
            raise InputError(self._too_many(self.n_components, embeddings))
        U, S = left_singular_vectors(embeddings.permute(1, 2, 0))  # of B [L, D, S], Eq. 16
        self.class_embeddings_, self.singular_values_, self._directions = embeddings, S, U
        self.basis_ = U[:, :, : self.n_components].contiguous()
        return self

    def _too_many(self, n_components: int, embeddings: Tensor | None = None) -> str:
        S, _, D = (self.class_embeddings_ if embeddings is None else embeddings).shape
        return (
            f"n_components must be 1 to {min(S, D)}, the smaller of {S} seen categories and style_dim {D}, got "
            f"{n_components}; ask for fewer or give more categories."
        )

    def _check_fitted(self) -> None:
        if not hasattr(self, "basis_"):
            raise InputError("this CategoryRelevantDictionary is not fitted; call fit(w_plus, labels) first.")
