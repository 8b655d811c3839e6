"""Diversity against scipy's distances and against the perceptual distance of explicit pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from sage_fast.errors import InputError
from sage_fast.evaluation.diversity import (
    category_diversity,
    category_perceptual_diversity,
    pairwise_diversity,
    perceptual_diversity,
)
from sage_fast.models.perceptual import DiscriminatorFeatures, perceptual_distance
from sage_fast.models.stylegan2 import Discriminator


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return DiscriminatorFeatures(Discriminator(8, channel_max=8))


def images_and_labels(counts=(5, 3, 4), seed=0):
    labels = torch.tensor([label for label, n in enumerate(counts) for _ in range(n)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1, labels[order]


def test_pairwise_diversity_is_the_mean_over_categories_of_scipys_mean_distance():
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([7, 7, 2, 2, 2, 9, 9, 9, 9, 2, 7, 9])
    want = [pdist(features[labels == label].double().numpy()).mean() for label in (2, 7, 9)]
    np.testing.assert_allclose(category_diversity(features, labels), want, rtol=1e-6)
    assert pairwise_diversity(features, labels) == pytest.approx(np.mean(want), rel=1e-6)


def test_distances_between_categories_do_not_count():
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(10) % 2
    apart = features + 100.0 * labels[:, None]
    assert pairwise_diversity(apart, labels) == pytest.approx(pairwise_diversity(features, labels), rel=1e-5)


def test_a_block_of_rows_at_a_time_gives_the_same(monkeypatch):
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.zeros(20, dtype=torch.int64)
    whole = pairwise_diversity(features, labels)
    monkeypatch.setattr("sage_fast.evaluation.diversity._BLOCK", 3)
    assert pairwise_diversity(features, labels) == pytest.approx(whole, rel=1e-12)


def test_perceptual_diversity_equals_the_distance_of_every_explicit_pair(network):
    images, labels = images_and_labels()
    want = []
    for label in range(3):
        members = (labels == label).nonzero().flatten().tolist()
        pairs = [perceptual_distance(network, images[i][None], images[j][None]) for i, j in combinations(members, 2)]
        want.append(float(torch.stack(pairs).mean()))
    np.testing.assert_allclose(category_perceptual_diversity(images, labels, network, batch=2), want, rtol=1e-4)
    assert perceptual_diversity(images, labels, network, batch=2) == pytest.approx(np.mean(want), rel=1e-4)


def test_channel_weights_count_as_in_the_perceptual_distance(network):
    class Weighted:
        name = "weighted"
        channel_weights = [torch.linspace(0, 2, f.shape[1]) for f in network(torch.zeros(1, 3, 8, 8))]

        def __call__(self, images):
            return network(images)

    images, _ = images_and_labels((2,))
    got = perceptual_diversity(images, torch.zeros(2, dtype=torch.int64), Weighted())
    assert got == pytest.approx(float(perceptual_distance(Weighted(), images[:1], images[1:])), rel=1e-4)
    assert got != pytest.approx(perceptual_diversity(images, torch.zeros(2, dtype=torch.int64), network), rel=1e-2)


def test_copies_of_one_image_have_no_diversity(network):
    images, labels = images_and_labels((4,))
    same = images[:1].expand(4, -1, -1, -1)
    assert perceptual_diversity(same, labels, network) == pytest.approx(0, abs=1e-6)
    assert pairwise_diversity(same.flatten(1), labels) == 0


def test_the_batch_size_does_not_change_perceptual_diversity(network):
    images, labels = images_and_labels()
    one, all_at_once = (category_perceptual_diversity(images, labels, network, batch=b) for b in (1, 64))
    np.testing.assert_allclose(one, all_at_once, rtol=1e-5)


def test_single_images_have_no_pair_and_do_not_count(network):
    images, labels = images_and_labels((4, 1))
    assert category_diversity(images.flatten(1), labels).isnan().tolist() == [False, True]
    assert category_perceptual_diversity(images, labels, network).isnan().tolist() == [False, True]
    rest = labels == 0
    assert pairwise_diversity(images.flatten(1), labels) == pairwise_diversity(images[rest].flatten(1), labels[rest])
    with pytest.raises(InputError, match="two images"):
        pairwise_diversity(images[:1].flatten(1), labels[:1])


def test_shapes_that_do_not_fit_are_refused(network):
    images, labels = images_and_labels()
    with pytest.raises(InputError, match=r"\[N, F\]"):
        pairwise_diversity(images, labels)
    with pytest.raises(InputError, match="labels"):
        perceptual_diversity(images, labels[:-1], network)
