"""The category-relevant basis: orthonormal, a true projection, scikit-learn's subspace, and of limited rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD

from sage_fast.errors import InputError
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.factorization.class_embeddings import class_embeddings

S, L, D, R = 9, 4, 12, 5


@pytest.fixture
def codes():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % S
    return torch.randn(S, L, D, generator=rng)[labels] + 0.3 * torch.randn(60, L, D, generator=rng), labels


@pytest.fixture
def relevant(codes):
    return CategoryRelevantDictionary(R).fit(*codes)


def test_columns_are_orthonormal(relevant):
    identity = torch.eye(R).expand(L, R, R)
    torch.testing.assert_close(relevant.basis_.mT @ relevant.basis_, identity, atol=1e-5, rtol=0)


def test_projecting_twice_is_projecting_once(relevant, codes):
    once = relevant.project(codes[0])
    assert (once - codes[0]).abs().max() > 0.1
    torch.testing.assert_close(relevant.project(once), once, atol=1e-5, rtol=0)


def test_what_projection_leaves_is_orthogonal_to_what_it_keeps(relevant, codes):
    kept = relevant.project(codes[0])
    left = codes[0] - kept
    assert torch.einsum("ldr,nld->nlr", relevant.basis_, left).abs().max() < 1e-4
    torch.testing.assert_close(kept.square().sum() + left.square().sum(), codes[0].square().sum())


def test_subspace_and_singular_values_are_those_of_scikit_learn(relevant, codes):
    embeddings = class_embeddings(*codes).double().numpy()
    for layer in range(L):
        svd = TruncatedSVD(R, algorithm="arpack").fit(embeddings[:, layer])
        theirs = svd.components_.T @ svd.components_
        ours = (relevant.basis_[layer] @ relevant.basis_[layer].T).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        np.testing.assert_allclose(relevant.singular_values_[layer, :R], svd.singular_values_, rtol=1e-4)


def test_all_components_leave_the_class_embeddings_as_they_are(relevant):
    embeddings = relevant.class_embeddings_
    torch.testing.assert_close(relevant.project(embeddings, min(S, D)), embeddings, atol=1e-5, rtol=0)
    errors = [(relevant.project(embeddings, r) - embeddings).norm().item() for r in range(1, S + 1)]
    assert all(a > b for a, b in zip(errors, errors[1:], strict=False))


def test_fewer_components_are_the_leading_ones(relevant, codes):
    smaller = CategoryRelevantDictionary(2).fit(*codes)
    torch.testing.assert_close(relevant.project(codes[0], 2), smaller.project(codes[0]))
    assert torch.equal(relevant.leading(2), relevant.basis_[:, :, :2])
    torch.testing.assert_close(relevant.project(codes[0], R), relevant.project(codes[0]))


def test_from_class_embeddings_is_fit(relevant, codes):
    given = class_embeddings(*codes).requires_grad_()
    other = CategoryRelevantDictionary.from_class_embeddings(given, R)
    assert torch.equal(other.basis_, relevant.basis_)
    assert not (other.basis_.requires_grad or other.class_embeddings_.requires_grad or other.leading(1).requires_grad)
    assert torch.equal(other.singular_values_, relevant.singular_values_)


def test_equal_categories_still_give_an_orthonormal_basis():
    embeddings = torch.randn(1, L, D, generator=torch.Generator().manual_seed(0)).expand(S, L, D)
    relevant = CategoryRelevantDictionary.from_class_embeddings(embeddings, 3)
    torch.testing.assert_close(relevant.basis_.mT @ relevant.basis_, torch.eye(3).expand(L, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(relevant.project(embeddings, 1), embeddings, atol=1e-5, rtol=0)


def test_more_categories_than_dimensions():
    embeddings = torch.randn(3 * D, L, D, generator=torch.Generator().manual_seed(0))
    relevant = CategoryRelevantDictionary.from_class_embeddings(embeddings, D)
    assert relevant.singular_values_.shape == (L, D)
    torch.testing.assert_close(relevant.project(embeddings), embeddings, atol=1e-5, rtol=1e-5)


def test_refuses(relevant, codes):
    with pytest.raises(InputError, match="at least 1, got 0"):
        CategoryRelevantDictionary(0)
    with pytest.raises(
        InputError, match="n_components must be 1 to 9, the smaller of 9 seen categories and style_dim 12"
    ):
        CategoryRelevantDictionary(10).fit(*codes)
    with pytest.raises(InputError, match="1 to 9.*got 10; ask for fewer"):
        relevant.project(codes[0], 10)
    with pytest.raises(InputError, match="got 0"):
        relevant.project(codes[0], 0)
    with pytest.raises(InputError, match="not fitted; call fit"):
        CategoryRelevantDictionary(2).project(codes[0])
    with pytest.raises(InputError, match=r"L = 3"):
        relevant.project(codes[0][:, :3])
