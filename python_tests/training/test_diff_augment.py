"""DiffAugment: each policy against its published steps in numpy, and its derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sage_fast.training.diff_augment import apply_diff_augment, draw_diff_augment
from sage_fast.training.draws import Draws


def applied(images: Tensor, policy: str, *uniform: float) -> Tensor:
    amounts = torch.tensor([uniform], dtype=torch.float64).repeat(len(images), 1)
    return apply_diff_augment(images, Draws.of(amounts), policy.split(","))


@pytest.mark.parametrize("channels", [1, 3])
def test_colour(channels):
    x = torch.randn(2, channels, 5, 6, dtype=torch.float64)
    y = x.numpy() + (0.9 - 0.5)
    mean = y.mean(1, keepdims=True)
    y = (y - mean) * 2 * 0.3 + mean
    mean = y.mean((1, 2, 3), keepdims=True)
    y = (y - mean) * (0.8 + 0.5) + mean
    np.testing.assert_allclose(applied(x, "color", 0.9, 0.3, 0.8, 0, 0, 0, 0).numpy(), y, atol=1e-12)


def test_alpha_keeps_its_values():
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    y = applied(x, "color", 0.9, 0.3, 0.8, 0, 0, 0, 0)
    assert torch.equal(y[:, 3], x[:, 3])
    assert (y[:, :3] - applied(x[:, :3], "color", 0.9, 0.3, 0.8, 0, 0, 0, 0)).abs().max() < 1e-12


@pytest.mark.parametrize("shift_x, shift_y", [(0, 0), (2, -3), (-2, 1)])
def test_translation(shift_x, shift_y):
    x = torch.randn(2, 3, 20, 17)  # shifts up to 2.5, rounded up, down and 2 to the right
    y = applied(x, "translation", 0, 0, 0, (shift_x + 2.5) / 5, (shift_y + 3.5) / 7, 0, 0)
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (3, 3), (2, 2)))
    expected = wide[:, :, 3 - shift_y : 23 - shift_y, 2 - shift_x : 19 - shift_x]
    np.testing.assert_array_equal(y.numpy(), expected)


def test_translations_cover_their_range_evenly():
    draws = draw_diff_augment(7000, torch.Generator().manual_seed(0))
    x = torch.zeros(1, 1, 24, 24)
    x[0, 0, 12, 12] = 1
    y = apply_diff_augment(x.expand(7000, -1, -1, -1), draws, ["translation"])
    for axis in (1, 2):
        counts = y[:, 0].sum((0, 3 - axis)).numpy()
        assert np.flatnonzero(counts).tolist() == list(range(9, 16))
        assert np.abs(counts[9:16] - 1000).max() < 150


@pytest.mark.parametrize("height, width", [(8, 8), (9, 6)])
def test_cutout(height, width):
    size_y, size_x = int(height / 2 + 0.5), int(width / 2 + 0.5)
    for share_x, share_y in ((0.0, 0.999), (0.5, 0.31), (0.999, 0.0)):
        centre_x = int(share_x * (width + 1 - size_x % 2))
        centre_y = int(share_y * (height + 1 - size_y % 2))
        expected = np.ones((height, width))
        top, left = centre_y - size_y // 2, centre_x - size_x // 2
        expected[max(top, 0) : max(top + size_y, 0), max(left, 0) : max(left + size_x, 0)] = 0
        y = applied(torch.ones(1, 3, height, width), "cutout", 0, 0, 0, 0, 0, share_x, share_y)
        np.testing.assert_array_equal(y[0].numpy(), expected[None].repeat(3, 0))


def test_the_policy_gives_the_order():
    x, uniform = torch.rand(2, 3, 8, 8) + 1, (0.9, 0.3, 0.8, 0.9, 0.1, 0.4, 0.6)
    one, other = applied(x, "color,cutout", *uniform), applied(x, "cutout,color", *uniform)
    assert torch.equal(one, applied(applied(x, "color", *uniform), "cutout", *uniform))
    assert torch.equal(other, applied(applied(x, "cutout", *uniform), "color", *uniform))
    assert not torch.equal(one, other)


def test_first_and_second_derivatives():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    draws = draw_diff_augment(2, torch.Generator().manual_seed(4))
    apply = lambda x: apply_diff_augment(x, draws, ["color", "translation", "cutout"]).sin()  # noqa: E731
    assert torch.autograd.gradcheck(apply, x)
    assert torch.autograd.gradgradcheck(apply, x)
