"""Class embeddings are means, residuals are what is left, and odd labels are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_fast.errors import InputError
from sage_fast.factorization.class_embeddings import class_embeddings, residuals


def _codes(n=30, n_classes=4, n_latent=3, dim=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(n_classes), torch.randint(n_classes, (n - n_classes,), generator=rng)])
    return torch.randn(n, n_latent, dim, generator=rng), labels


def test_class_embeddings_are_the_means_of_numpy():
    w_plus, labels = _codes()
    expected = np.stack([w_plus.numpy()[labels.numpy() == s].mean(0) for s in range(4)])
    np.testing.assert_allclose(class_embeddings(w_plus, labels).numpy(), expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(n_classes=st.integers(1, 5), extra=st.integers(0, 20), seed=st.integers(0, 99))
def test_residuals_of_a_category_sum_to_zero_and_give_the_latent_back(n_classes, extra, seed):
    w_plus, labels = _codes(n_classes + extra, n_classes, seed=seed)
    embeddings = class_embeddings(w_plus, labels)
    delta_w = residuals(w_plus, labels, embeddings)
    torch.testing.assert_close(embeddings[labels] + delta_w, w_plus)
    sums = torch.zeros_like(embeddings).index_add_(0, labels, delta_w)
    assert sums.abs().max() < 1e-4
    assert class_embeddings(delta_w, labels).abs().max() < 1e-5


def test_the_order_of_the_latents_does_not_matter():
    w_plus, labels = _codes()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(class_embeddings(w_plus[order], labels[order]), class_embeddings(w_plus, labels))


def test_non_contiguous_latents():
    w_plus, labels = _codes()
    turned = w_plus.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(class_embeddings(turned, labels), class_embeddings(w_plus, labels))


W, Y = torch.zeros(4, 2, 3), torch.tensor([0, 1, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W[0], Y), r"floating point \[N, L, D\]"),
        ((W.int(), Y), "got torch.int32"),
        ((W[:0], Y[:0]), "N >= 1"),
        ((W + torch.nan, Y), "not finite"),
        ((W, Y[:3]), r"labels must be int64 \[4\]"),
        ((W, Y.int()), "got torch.int32"),
        ((W, Y - 1), "labels must be 0 to 1, got -1 to 1"),
        ((W, Y, 2), "labels must be 0 to 1, got 0 to 2"),
        ((W, Y, 5), r"none for label 3 \(2 such labels\)"),
        ((W, Y * 2), "none for label 1"),
    ],
)
def test_class_embeddings_refuse(arguments, message):
    with pytest.raises(InputError, match=message):
        class_embeddings(*arguments)


def test_residuals_refuse():
    with pytest.raises(InputError, match=r"embeddings must have shape \[S, 2, 3\]"):
        residuals(W, Y, torch.zeros(3, 2, 4))
    with pytest.raises(InputError, match="labels must be 0 to 1"):
        residuals(W, Y, torch.zeros(2, 2, 3))


def test_latents_in_float16_whose_sum_leaves_it_are_finite():
    w_plus = torch.full((40, 4, 512), 2.0, dtype=torch.float16)  # 163,840 in all, of at most 65,504
    assert torch.equal(class_embeddings(w_plus, torch.arange(40) % 4), w_plus[:4])
    w_plus[3, 1, 5] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        class_embeddings(w_plus, torch.arange(40) % 4)
