"""Precision and recall against scikit-learn's neighbours, a plain double loop and cases known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from sage_fast.errors import InputError
from sage_fast.evaluation.precision_recall import Manifold, precision_recall


def cloud(n, f, seed, shift=0.0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, f)) * scale + shift)


def by_scikit_learn(real, generated, k):
    def share(points, queries):
        radii = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)[0][:, k]
        distances = np.sqrt(np.square(queries[:, None] - points[None]).sum(2))
        return float((distances <= radii).any(1).mean())

    real, generated = real.numpy(), generated.numpy()
    return share(real, generated), share(generated, real)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "f"), [(80, 80, 4), (120, 50, 8), (30, 90, 1)])
def test_the_shares_are_those_of_scikit_learns_neighbours(n, m, f, k):
    real, generated = cloud(n, f, 1), cloud(m, f, 2, shift=0.5, scale=0.8)
    got = precision_recall(real, generated, k)
    assert got == by_scikit_learn(real, generated, k)
    assert 0 < got[0] <= 1 and 0 < got[1] <= 1


def test_more_rows_than_a_block_give_the_same(monkeypatch):
    real, generated = cloud(70, 5, 3), cloud(60, 5, 4, shift=0.4)
    whole = precision_recall(real, generated)
    monkeypatch.setattr("sage_fast.evaluation.precision_recall._BLOCK", 7)
    assert precision_recall(real, generated) == whole == by_scikit_learn(real, generated, 3)


def test_one_set_has_full_precision_and_recall_and_a_far_one_has_none():
    x = cloud(40, 6, 5)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_a_generator_of_half_the_modes_is_precise_and_recalls_half():
    real = torch.cat([cloud(50, 3, 6), cloud(50, 3, 7, shift=50)])
    precision, recall = precision_recall(real, cloud(400, 3, 8) * 0.3)
    assert precision == 1
    assert 0.05 < recall <= 0.5


def test_ratings_do_not_change_with_a_shift_or_the_scale_of_the_features():
    real, generated = cloud(60, 5, 9), cloud(60, 5, 10, shift=0.6)
    assert precision_recall(real * 7 + 1e4, generated * 7 + 1e4) == precision_recall(real, generated)


def test_equal_rows_are_at_distance_zero_even_far_from_the_origin():
    # five copies: the third neighbour of each is at distance zero, and the balls hold their own copies only
    copies = (cloud(1, 64, 11) + 1e3).expand(5, -1)
    manifold = Manifold(torch.cat([copies, cloud(5, 64, 12)]), k=3)
    assert manifold.radii2[:5].tolist() == [0] * 5
    assert bool(manifold.covers(copies[:1]).all())


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(9, 4), r"greater than the number of neighbours 3.*got \[3, 4\]"),
        (torch.zeros(9), torch.zeros(9, 4), r"got \[9\]"),
        (torch.zeros(9, 4), torch.zeros(9, 5), "features of one length, got 4 and 5"),
        (torch.zeros(9, 4), torch.full((9, 4), float("nan")), "finite"),
    ],
)
def test_what_cannot_be_compared_is_said(real, generated, message):
    with pytest.raises(InputError, match=message):
        precision_recall(real, generated)
