"""Singular vectors against NumPy, for tall, square and wide matrices of full and of lower rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sage_fast.factorization.singular_vectors import left_singular_vectors


@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.parametrize("shape", [(30, 9), (9, 30), (9, 9), (7, 1), (1, 7)])
def test_singular_vectors_are_those_of_numpy(shape, rank):
    d, m = shape
    rank = min(rank, d, m)
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(3, d, rank, generator=rng) @ torch.randn(3, rank, m, generator=rng)
    vectors, values = left_singular_vectors(X)
    theirs, sigma, _ = np.linalg.svd(X.double().numpy(), full_matrices=False)
    assert vectors.dtype == torch.float32
    np.testing.assert_allclose(values, sigma, atol=1e-6 * sigma.max())
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(min(d, m)).expand(3, -1, -1), atol=1e-5, rtol=0)
    cosines = np.abs((vectors.numpy() * theirs).sum(1))
    np.testing.assert_allclose(cosines[:, :rank], 1, atol=1e-5)


def test_the_scale_does_not_matter():
    X = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1e-15, 1e15):
        vectors, values = left_singular_vectors(X * scale)
        torch.testing.assert_close(values / scale, left_singular_vectors(X)[1])
        torch.testing.assert_close(vectors.abs(), left_singular_vectors(X)[0].abs(), atol=1e-5, rtol=1e-4)
