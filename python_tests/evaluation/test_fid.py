"""Frechet and kernel distance against scipy, a closed form and plain double loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sage_fast.errors import InputError
from sage_fast.evaluation.fid import (
    feature_statistics,
    frechet_distance,
    frechet_distance_of_statistics,
    kernel_distance,
)


def features(n, f, seed, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(f, f)) / np.sqrt(f)
    return torch.from_numpy(rng.normal(size=(n, f)) @ mixing * scale + shift)


def frechet_by_scipy(a, b):
    a, b = a.numpy(), b.numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root))


def mmd2_by_loops(a, b):
    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    a, b = a.numpy(), b.numpy()
    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(kernel(x, y) for x in a for y in b) / (n * m)
    return within_a + within_b - 2 * across


@pytest.mark.parametrize(("n", "m", "f"), [(200, 150, 6), (60, 60, 24), (100, 37, 1)])
def test_frechet_distance_equals_the_matrix_square_root_of_scipy(n, m, f):
    a, b = features(n, f, 1), features(m, f, 2, shift=0.3, scale=1.4)
    if f == 1:
        want = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)  # closed form of one dimension
    else:
        want = frechet_by_scipy(a, b)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


def test_covariances_without_full_rank_keep_their_precision():
    # 8 and 11 images of 40 features: rank 7 and 10. The trace term is the nuclear norm of the cross product.
    a, b = features(8, 40, 3), features(11, 40, 4, shift=0.1)
    ca, cb = (a - a.mean(0)) / np.sqrt(7), (b - b.mean(0)) / np.sqrt(10)
    cross = np.linalg.svd((ca @ cb.T).numpy(), compute_uv=False).sum()
    want = float((a.mean(0) - b.mean(0)).square().sum() + ca.square().sum() + cb.square().sum() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-10)


def test_frechet_distance_of_gaussians_with_one_eigenbasis_is_the_closed_form():
    rng = np.random.default_rng(5)
    basis = torch.from_numpy(np.linalg.qr(rng.normal(size=(5, 5)))[0])
    va, vb = torch.from_numpy(rng.uniform(0.1, 3, 5)), torch.from_numpy(rng.uniform(0.1, 3, 5))
    ma, mb = torch.zeros(5, dtype=torch.float64), torch.full((5,), 0.5, dtype=torch.float64)
    got = frechet_distance_of_statistics(ma, basis * va @ basis.T, mb, basis * vb @ basis.T)
    assert got == pytest.approx(float((ma - mb).square().sum() + (va.sqrt() - vb.sqrt()).square().sum()), rel=1e-10)


def test_frechet_distance_is_symmetric_and_zero_for_one_set():
    a, b = features(50, 9, 6), features(70, 9, 7, shift=0.2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) < 1e-10
    assert frechet_distance(a, a[torch.randperm(50)]) < 1e-10


def test_frechet_distance_ignores_a_rotation_and_scales_with_the_square_of_the_features():
    a, b = features(80, 6, 8), features(80, 6, 9, shift=0.4)
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0])
    plain = frechet_distance(a, b)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(plain, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * plain, rel=1e-9)


def test_statistics_are_those_of_numpy_and_of_float32_input_in_float64():
    x = features(30, 4, 10).float()
    mean, covariance = feature_statistics(x)
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


def test_kernel_distance_equals_a_plain_double_loop():
    a, b = features(17, 5, 11), features(23, 5, 12, shift=0.5)
    assert kernel_distance(a, b) == pytest.approx(mmd2_by_loops(a, b), rel=1e-11)


def test_kernel_distance_in_blocks_is_the_same(monkeypatch):
    a, b = features(40, 5, 13), features(33, 5, 14, shift=0.5)
    whole = kernel_distance(a, b)
    monkeypatch.setattr("sage_fast.evaluation.fid._BLOCK", 7)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-12)


def test_kernel_distance_is_unbiased_for_equal_distributions():
    # the mean over many draws of small sets is zero within three standard errors; the biased estimate is not
    draws = [kernel_distance(torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=g)) for g in _generators(400)]
    mean, error = np.mean(draws), np.std(draws) / np.sqrt(len(draws))
    assert abs(mean) < 3 * error
    assert min(draws) < 0 < max(draws)


def test_subsets_as_large_as_the_sets_are_exact_and_smaller_ones_are_near():
    a, b = features(60, 5, 15), features(60, 5, 16, shift=0.8)
    exact = kernel_distance(a, b)
    assert kernel_distance(a, b, subset_size=60, n_subsets=2) == pytest.approx(exact, rel=1e-11)
    assert kernel_distance(a, b, subset_size=30, n_subsets=200) == pytest.approx(exact, rel=0.1)
    assert kernel_distance(a, b, subset_size=10, n_subsets=3) == kernel_distance(a, b, subset_size=10, n_subsets=3)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_sets_that_cannot_be_compared_are_refused(distance):
    a = features(5, 4, 17)
    with pytest.raises(InputError, match="N at least 2"):
        distance(a, a[:1])
    with pytest.raises(InputError, match=r"got \[5, 3\]"):
        distance(a, a[:, :3])
    with pytest.raises(InputError, match="finite"):
        distance(a, a * float("nan"))


def test_a_subset_larger_than_a_set_is_refused():
    a = features(5, 4, 18)
    with pytest.raises(InputError, match="subset_size must be 2 to 5"):
        kernel_distance(a, a, subset_size=6)


def _generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]
