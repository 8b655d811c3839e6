"""Cached features are those that would be computed, and stay within their budget."""

from __future__ import annotations

import torch

from sage_fast.models.perceptual import DiscriminatorFeatures, normalised_features, perceptual_distance
from sage_fast.models.stylegan2 import Discriminator
from sage_fast.training.batches import to_pixels
from sage_fast.training.feature_cache import cached_features

LIKE = torch.zeros(1)


def _network():
    torch.manual_seed(0)
    return DiscriminatorFeatures(Discriminator(8, 3, channel_base=64, channel_max=8))


def test_features_of_every_image():
    network, images = _network(), torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8)
    cached = cached_features(network, images, LIKE, budget_gb=1.0)
    index = torch.tensor([149, 3, 64])
    real = to_pixels(images, index, None, LIKE)
    for whole, part in zip(cached, normalised_features(network, real), strict=True):
        assert len(whole) == 150 and not whole.requires_grad
        torch.testing.assert_close(whole[index], part)
    other = torch.rand_like(real)
    expected = perceptual_distance(network, other, real)
    torch.testing.assert_close(perceptual_distance(network, other, [m[index] for m in cached]), expected)


def test_the_same_bits_at_every_call():
    network, images = _network(), torch.randint(0, 256, (70, 3, 8, 8), dtype=torch.uint8)
    first, second = (cached_features(network, images, LIKE, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_more_than_the_budget_is_not_kept():
    network, images = _network(), torch.zeros(70, 3, 8, 8, dtype=torch.uint8)
    n_bytes = sum(m.nbytes for m in cached_features(network, images, LIKE, 1.0))
    assert cached_features(network, images, LIKE, n_bytes / 1e9) is not None
    assert cached_features(network, images, LIKE, 0.99 * n_bytes / 1e9) is None
