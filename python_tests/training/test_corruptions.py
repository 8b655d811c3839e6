"""Image-space filtering, noise and cutout of ADA, against scipy and the words of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from sage_fast.training.corruptions import add_noise, band_taps, cut_out, filter_bands


def test_the_bands_are_octaves_that_sum_to_one():
    taps = band_taps()
    assert taps.shape == (4, 43)
    np.testing.assert_allclose(taps, taps[:, ::-1], atol=1e-12)  # zero phase
    np.testing.assert_allclose(taps.sum(0), np.arange(43) == 21, atol=1e-12)
    response = np.fft.rfft(np.roll(np.pad(taps, ((0, 0), (0, 213))), -21, axis=1)).real  # [4, 129], 0 to pi
    for band, middle in enumerate((8, 24, 48, 96)):  # of 0 to pi / 8, to pi / 4, to pi / 2, to pi
        assert response[:, middle].argmax() == band and response[band, middle] > 0.7


@pytest.mark.parametrize("height, width", [(30, 24), (7, 5), (1, 3)])
def test_filtering_is_that_of_scipy(height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    log_gains = torch.tensor([[0.5, -1.0, 0.3, 2.0], [0, 0, 1.5, 0]], dtype=torch.float64)
    ours = filter_bands(x, log_gains)
    power = np.array([10, 1, 1, 1]) / 13
    for i in range(2):
        gains = np.ones(4)
        for band in range(4):
            one = np.ones(4)
            one[band] = 2.0 ** log_gains[i, band].item()
            gains *= one / np.sqrt(np.sum(power * one**2))
        expected = ndimage.correlate1d(x[i].numpy(), gains @ band_taps(), axis=1, mode="mirror")
        expected = ndimage.correlate1d(expected, gains @ band_taps(), axis=2, mode="mirror")
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=1e-10)


def test_no_gain_changes_nothing():
    x = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    assert (filter_bands(x, torch.zeros(2, 4, dtype=torch.float64)) - x).abs().max() < 1e-12


def test_noise_has_its_deviation_and_depends_on_its_number():
    x = torch.ones(3, 3, 40, 40, dtype=torch.float64)
    sigma, number = torch.tensor([0.1, -0.3, 0.1], dtype=torch.float64), torch.tensor([7.0, 8, 7], dtype=torch.float64)
    noise = add_noise(x, sigma, number) - x
    assert torch.equal(noise[0], noise[2]) and torch.equal(add_noise(x[1:2], sigma[1:2], number[1:2]) - 1, noise[1:2])
    for one, deviation in zip(noise[:2], (0.1, 0.3)):
        assert stats.kstest(one.flatten().numpy() / deviation, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.05


def test_cutout():
    x = torch.ones(3, 2, 8, 12)
    half, none = 0.5, 0.0
    y = cut_out(x, torch.tensor([half, none, half]), torch.tensor([0.0, 0.0, 0.5]), torch.tensor([0.0, 0.0, -0.25]))
    expected = np.ones((3, 8, 12))
    expected[0, 2:6, 3:9] = 0
    expected[2, 0:4, 9:12] = 0  # what is beyond the border is lost
    np.testing.assert_array_equal(y.numpy(), expected[:, None].repeat(2, 1))


def test_first_and_second_derivatives():
    x = torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    gains = torch.tensor([[0.5, -1.0, 0.3, 2.0], [0, 0, 1.5, 0]], dtype=torch.float64)
    apply = lambda x: cut_out(add_noise(filter_bands(x, gains), half, half), half, half, half).sin()  # noqa: E731
    assert torch.autograd.gradcheck(apply, x)
    assert torch.autograd.gradgradcheck(apply, x)
