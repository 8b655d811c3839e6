"""The category-irrelevant dictionary: least squares at any rank, groups of layers, code networks and their losses."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from sage_fast.errors import InputError
from sage_fast.factorization.category_irrelevant import (
    CategoryIrrelevantDictionary,
    CodeMLP,
    commonality,
    layer_groups,
    orthogonal_loss,
    pca_directions,
    sparse_loss,
)

L, D, K = 4, 12, 6


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 20), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_codes_are_least_squares_of_minimal_norm_at_any_rank(k, rank, seed):
    rank = min(rank, k)
    directions = _random(L, D, rank, seed=seed) @ _random(L, rank, k, seed=seed + 1)
    delta_w = _random(5, L, D, seed=seed + 2)
    codes = CategoryIrrelevantDictionary(directions).transform(delta_w).double().numpy()
    for layer in range(L):
        A, b = directions[layer].double().numpy(), delta_w[:, layer].double().numpy()
        # the rank of float32 data is judged at float32's precision, as scipy's driver does when told so
        theirs, _, found, _ = scipy.linalg.lstsq(A, b.T, cond=max(D, k) * 1.2e-7, lapack_driver="gelsd")
        assert found == rank
        np.testing.assert_allclose(codes[:, layer], theirs.T, atol=2e-3 * max(1, np.abs(theirs).max()))


def test_transform_inverts_inverse_transform_when_directions_are_independent():
    dictionary = CategoryIrrelevantDictionary(_random(L, D, K))
    codes = _random(7, L, K, seed=1)
    torch.testing.assert_close(dictionary.transform(dictionary.inverse_transform(codes)), codes, atol=1e-4, rtol=1e-4)


def test_inverse_of_transform_is_the_nearest_point_of_the_span():
    dictionary = CategoryIrrelevantDictionary(_random(L, D, K))
    delta_w = _random(7, L, D, seed=1)
    left = delta_w - dictionary.inverse_transform(dictionary.transform(delta_w))
    assert left.abs().max() > 0.1
    assert torch.einsum("ldk,nld->nlk", dictionary.directions, left).abs().max() < 1e-3


def test_no_codes_have_nothing_in_common():
    with pytest.raises(InputError, match="one latent at least"):
        commonality(torch.zeros(0, L, K), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_in_16_bits_are_those_of_float32_rounded(dtype):
    directions, delta_w = _random(L, D, K).to(dtype), _random(7, L, D, seed=1).to(dtype)
    codes = CategoryIrrelevantDictionary(directions).transform(delta_w)
    wide = CategoryIrrelevantDictionary(directions.float()).transform(delta_w.float())
    assert codes.dtype == dtype and (codes.float() - wide).abs().max() < 0.05 * wide.abs().max()


def test_unedited_layers_get_zero_codes():
    directions = _random(L, D, K)
    directions[3] = 0
    dictionary = CategoryIrrelevantDictionary(directions, [[0, 1], [2]])
    codes = dictionary.transform(_random(5, L, D, seed=1))
    assert (codes[:, 3] == 0).all() and (codes[:, :3] != 0).all()
    assert dictionary.groups == ((0, 1), (2,)) and dictionary.n_directions == K


def test_scale_of_the_directions_does_not_change_the_rank():
    delta_w = _random(5, L, D, seed=1)
    plain = CategoryIrrelevantDictionary(_random(L, D, K)).transform(delta_w)
    small = CategoryIrrelevantDictionary(_random(L, D, K) * 1e-8).transform(delta_w)
    torch.testing.assert_close(small * 1e-8, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("n_latent", "reading", "expected"),
    [
        (18, "paper", ((0, 1, 2), (3, 4, 5, 6), tuple(range(7, 18)))),
        (18, "released", ((0, 1, 2), (3, 4, 5))),
        (8, "default", ((0, 1, 2), (3, 4, 5, 6), (7,))),
        (7, "default", ((0, 1, 2), (3, 4, 5, 6))),
        (4, "released", ((0, 1, 2), (3,))),
        (2, "default", ((0, 1),)),
    ],
)
def test_layer_groups(n_latent, reading, expected):
    assert layer_groups(n_latent, reading) == expected


def test_mlp_gives_one_code_to_a_group_and_reads_only_its_layers():
    groups = ((0, 1), (2,))
    mlp = CodeMLP(groups, L, D, K)
    delta_w = _random(5, L, D).requires_grad_()
    codes = mlp(delta_w)
    assert codes.shape == (5, L, K)
    assert torch.equal(codes[:, 0], codes[:, 1]) and (codes[:, 3] == 0).all()
    assert not torch.equal(codes[:, 0], codes[:, 2])
    (gradient,) = torch.autograd.grad(codes[:, 0].sum(), delta_w)
    assert (gradient[:, :2] != 0).any() and (gradient[:, 2:] == 0).all()


def test_one_network_reads_all_groups():
    mlp = CodeMLP(((0, 1), (2,)), L, D, K, one_network=True)
    delta_w = _random(5, L, D).requires_grad_()
    codes = mlp(delta_w)
    assert len(mlp.networks) == 1 and torch.equal(codes[:, 0], codes[:, 1])
    (gradient,) = torch.autograd.grad(codes[:, 0].sum(), delta_w)
    assert (gradient[:, :3].abs().sum((0, 2)) > 0).all() and (gradient[:, 3] == 0).all()


def test_mlp_has_the_released_size():
    mlp = CodeMLP(layer_groups(18, "released"), 18, 512, 100, width=1024)
    assert sum(p.numel() for p in mlp.parameters()) == 2 * (
        1536 * 1024 + 1024 + 1024**2 + 1024 + 1024 * 512 + 512 + 512 * 100 + 100 + 100 * 100 + 100
    )


def test_orthogonal_loss_is_zero_exactly_when_no_direction_touches_a_category():
    embeddings = _random(3, L, D)
    normal = torch.stack([torch.linalg.svd(e)[2][3:].T for e in embeddings.transpose(0, 1)])  # [L, D, D - 3]
    for reading in ("paper", "released", "default"):
        assert orthogonal_loss(normal, embeddings, reading) < 1e-5
        assert orthogonal_loss(normal + 0.1 * embeddings[0].unsqueeze(2), embeddings, reading) > 1e-2


def test_only_the_default_orthogonality_ignores_the_length_of_the_embeddings():
    directions, embeddings = _random(L, D, K), _random(3, L, D, seed=1)
    ratio = {r: orthogonal_loss(directions, 3 * embeddings, r) / orthogonal_loss(directions, embeddings, r)
             for r in ("paper", "released", "default")}  # fmt: skip
    assert [round(float(ratio[r]), 3) for r in ("paper", "released", "default")] == [9.0, 3.0, 1.0]


def test_sparsity_is_least_at_zero_except_as_printed():
    codes = _random(5, L, K)
    for reading in ("released", "default"):
        assert sparse_loss(codes, reading=reading) > sparse_loss(torch.zeros_like(codes), reading=reading)
        assert sparse_loss(codes, reading=reading) == sparse_loss(-codes, reading=reading)
    assert sparse_loss(-100 * torch.ones_like(codes), reading="paper") < 1e-6


def test_sparsity_is_a_mean_over_the_batch_except_as_released():
    codes = _random(5, L, K)
    twice = torch.cat([codes, codes])
    for reading, factor in (("paper", 1), ("default", 1), ("released", 2)):
        torch.testing.assert_close(sparse_loss(twice, reading=reading), factor * sparse_loss(codes, reading=reading))


def test_released_losses_see_six_layers_only():
    codes, directions, embeddings = _random(5, 8, K), _random(8, D, K), _random(3, 8, D)
    before = sparse_loss(codes, reading="released"), orthogonal_loss(directions, embeddings, "released")
    codes[:, 6:], directions[6:] = 9, 9
    assert before == (sparse_loss(codes, reading="released"), orthogonal_loss(directions, embeddings, "released"))


@pytest.mark.parametrize("n", [40, 8])  # more and fewer residuals than dimensions
def test_pca_directions_are_those_of_scikit_learn(n):
    delta_w = _random(n, L, D) * torch.linspace(2, 0.3, D)
    delta_w = delta_w - delta_w.mean(0)
    ours = pca_directions(delta_w, 3)
    for layer in range(L):
        theirs = PCA(3).fit(delta_w[:, layer].double().numpy()).components_.T
        np.testing.assert_allclose(np.abs(ours[layer].numpy().T @ theirs), np.eye(3), atol=1e-4)
    signs = ours.gather(1, ours.abs().argmax(1, keepdim=True))
    assert (signs > 0).all()


def test_pca_directions_beyond_the_rank_are_zero():
    delta_w = torch.einsum("nr,rld->nld", _random(40, 2), _random(2, L, D, seed=1))
    directions = pca_directions(delta_w, 5)
    torch.testing.assert_close(directions.norm(dim=1), torch.tensor([1.0, 1, 0, 0, 0]).expand(L, 5))
    assert (pca_directions(torch.zeros(40, L, D), 2) == 0).all()
    with pytest.raises(InputError, match="n must be 1 to 12"):
        pca_directions(delta_w, 13)


def test_commonality_weighs_categories_or_images():
    codes = torch.cat([torch.full((9, L, K), -1.0), torch.full((1, L, K), 3.0)])
    labels = torch.tensor([4] * 9 + [7])
    assert (commonality(codes, labels) == 2).all()
    torch.testing.assert_close(commonality(codes, labels, "released"), torch.full((L, K), 1.2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CategoryIrrelevantDictionary(torch.zeros(3, 4)), r"\[L, D, K\]"),
        (lambda: CategoryIrrelevantDictionary(torch.full((1, 2, 3), torch.nan)), "not finite"),
        (lambda: CategoryIrrelevantDictionary(torch.zeros(2, 2, 2), [[0, 2]]), "groups must hold each layer 0 to 1"),
        (lambda: CategoryIrrelevantDictionary(torch.zeros(2, 2, 2), [[0], [0]]), "at most once"),
        (lambda: CategoryIrrelevantDictionary(torch.zeros(2, 2, 2)).transform(torch.zeros(1, 2, 3)), r"\[N, 2, 2\]"),
        (lambda: CategoryIrrelevantDictionary(torch.zeros(2, 2, 2)).inverse_transform(torch.zeros(1, 2, 3)), "codes"),
        (lambda: layer_groups(8, "mine"), "reading must be one of paper, released, default"),
        (lambda: layer_groups(0), "at least 1"),
        (lambda: CodeMLP((), 4, 4, 4), "groups must hold"),
        (lambda: sparse_loss(torch.zeros(1, 1, 1), reading="x"), "reading must be"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
