"""The resampling of ADA: its filter from first principles, its geometry against scipy, its derivatives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from sage_fast.training.resample import SYM6, resample, source_margins


def orthonormal_filters(moments: int) -> list[np.ndarray]:
    """Every real orthonormal low-pass of that many vanishing moments: the spectral factors of Daubechies' polynomial."""
    roots = np.roots([math.comb(moments - 1 + k, k) for k in range(moments - 1, -1, -1)])
    groups = [[y] for y in roots if abs(y.imag) < 1e-9] + [[y, y.conj()] for y in roots if y.imag > 1e-9]
    filters = []
    for signs in itertools.product((1, -1), repeat=len(groups)):
        zeros = [-1.0] * moments
        for sign, group in zip(signs, groups):
            for y in group:
                z = max(np.roots([1, 4 * y - 2, 1]), key=abs)  # y = (2 - z - 1/z) / 4
                zeros.append(z**sign)
        taps = np.poly(zeros).real
        filters.append(taps * math.sqrt(2) / taps.sum())
    return filters


def departure_from_linear_phase(taps: np.ndarray) -> float:
    """The most that the phase differs from the straight line nearest to it, over the pass band, in radians."""
    w = np.linspace(0.01, math.pi / 2, 200)
    phase = np.unwrap(np.angle(np.exp(-1j * np.outer(w, np.arange(len(taps)))) @ taps))
    return float(np.abs(phase - (phase @ w) / (w @ w) * w).max())


def test_the_low_pass_is_the_symlet_of_six_moments():
    filters = orthonormal_filters(6)
    departures = [departure_from_linear_phase(taps) for taps in filters]
    least = [taps for taps, d in zip(filters, departures) if d < min(departures) + 1e-6]
    assert len(filters) == 8 and len(least) == 2  # and its mirror image
    assert min(np.abs(taps - SYM6).max() for taps in least) < 1e-12


def smooth_images(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Sums of slow waves, float64."""
    rng = torch.Generator().manual_seed(0)
    amplitude, phase, speed = torch.rand(3, n, channels, 4, 1, 1, generator=rng, dtype=torch.float64)
    y, x = torch.arange(height).view(-1, 1), torch.arange(width)
    return (amplitude * torch.sin(6 * phase + (0.5 * speed - 0.25) * x + (0.25 - 0.5 * phase) * y)).sum(2)


@pytest.mark.parametrize("height, width", [(32, 32), (21, 30)])
def test_smooth_images_are_moved_as_scipy_does(height, width):
    x = smooth_images(3, 2, height, width)
    a, b = math.cos(0.4), math.sin(0.4)
    inverse = torch.tensor(
        [[[a, -b, 2.3], [b, a, -1.7]], [[1.2, 0, -0.4], [0.1, 0.8, 0.0]], [[0, -1, 0], [1, 0, 0]]], dtype=torch.float64
    )
    y = resample(x, inverse, source_margins(inverse, height, width))
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    for i, m in enumerate(inverse.numpy()):
        linear, offset = m[::-1, [1, 0]], m[::-1, 2]  # scipy's places are (row, column)
        start = centre - linear @ centre + offset
        for plane, ours in zip(x[i].numpy(), y[i].numpy()):
            theirs = ndimage.affine_transform(plane, linear, start, order=3, mode="mirror")
            assert np.abs(ours - theirs).max() < 0.12  # edges of the mirror, where a wave has a corner
            assert np.sqrt(np.square(ours - theirs).mean()) < 0.02


def test_the_identity_and_whole_shifts_are_exact():
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    inverse = torch.eye(2, 3, dtype=torch.float64).repeat(2, 1, 1)
    inverse[1, :, 2] = torch.tensor([2.0, -3.0])
    y = resample(x, inverse, source_margins(inverse, 9, 12))
    assert (y[0] - x[0]).abs().max() < 1e-12
    mirrored = torch.nn.functional.pad(x[1:], (0, 2, 3, 0), mode="reflect")
    assert (y[1] - mirrored[0, :, :9, 2:]).abs().max() < 1e-12


def test_margins_end_after_one_reflection_and_black_follows():
    far = torch.eye(2, 3, dtype=torch.float64)[None].clone()
    far[0, 0, 2] = 100
    assert source_margins(far, 8, 10) == (0, 9, 6, 6)
    assert resample(torch.ones(1, 1, 8, 10), far, (0, 9, 6, 6)).abs().max() == 0


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (1, 7), (5, 4)])
def test_the_smallest_images(height, width):
    inverse = torch.tensor([[[0.8, 0.3, 0.2], [-0.3, 0.9, 1.0]]], dtype=torch.float64)
    y = resample(torch.ones(1, 1, height, width), inverse, source_margins(inverse, height, width))
    assert y.shape == (1, 1, height, width) and y.isfinite().all()


def test_a_result_depends_on_its_own_map_and_the_margins():
    x = torch.randn(4, 3, 16, 16)
    inverse = torch.eye(2, 3, dtype=torch.float64) + 0.2 * torch.randn(4, 2, 3, dtype=torch.float64)
    margins = source_margins(inverse, 16, 16)
    whole = resample(x, inverse, margins)
    assert torch.equal(whole[1:3], resample(x[1:3], inverse[1:3], margins))


def test_first_and_second_derivatives():
    inverse = torch.tensor([[[0.8, 0.3, 0.2], [-0.3, 0.9, 1.0]], [[0, 1, 0], [1, 0, -2.3]]], dtype=torch.float64)
    x = torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    margins = source_margins(inverse, 4, 3)
    assert torch.autograd.gradcheck(lambda x: resample(x, inverse, margins).sin(), x)
    assert torch.autograd.gradgradcheck(lambda x: resample(x, inverse, margins).sin(), x)
