"""Fusion of generated images with their source (Eq. 21-23) at 32 and 256 px.

Rivals: the equations as printed, each low-pass an FFT of its own; and with one FFT, since the low-pass is linear.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sage_fast.fusion import fuse_frequencies, fuse_pixels

BATCHES = {"32 px, N 1": (1, 3, 32, 32), "32 px, N 128": (128, 3, 32, 32), "256 px, N 16": (16, 3, 256, 256)}


def images(shape):
    return [torch.rand(shape) * 2 - 1 for _ in range(3)]


def low_pass(x, sigma=5.0):
    h, w = x.shape[2:]
    fy, fx = torch.fft.fftfreq(h, 1 / h)[:, None], torch.fft.rfftfreq(w, 1 / w)
    response = torch.exp(-(fy.square() + fx.square()) / (2 * sigma**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=(h, w))


@pytest.mark.parametrize("gamma1", [1.0, 0.7])
@pytest.mark.parametrize("case", BATCHES)
def test_fuse_frequencies(compare, case, gamma1):
    real, inverted, edited = images(BATCHES[case])
    rivals = {
        "three FFTs": lambda: edited + (gamma1 - 1) * low_pass(edited) + low_pass(real) - 0.8 * low_pass(inverted),
        "one FFT": lambda: edited + low_pass((gamma1 - 1) * edited + real - 0.8 * inverted),
    }
    ours = lambda: fuse_frequencies(real, inverted, edited, gamma1, 0.8)  # noqa: E731
    compare(f"frequencies, gamma1 {gamma1}, {case}", ours, rivals, 16 * edited.numel())


@pytest.mark.parametrize("case", BATCHES)
def test_fuse_pixels(compare, case):
    real, inverted, edited = images(BATCHES[case])
    side = math.exp(-1 / (2 * 1.3**2))
    row = torch.tensor([side, 1, side]) / (2 * side + 1)
    kernel = torch.outer(row, row)[None, None]

    def plain():
        a, b, c = (image / 2 + 0.5 for image in (real, inverted, edited))
        mask = (a - b).norm(dim=1, keepdim=True) - 0.5 * (c - b).norm(dim=1, keepdim=True)
        mask = F.conv2d(F.pad(mask, (1, 1, 1, 1), mode="reflect"), kernel).clamp(0, 1)
        return (c + mask * (a - b)) * 2 - 1

    compare(f"pixels, {case}", lambda: fuse_pixels(real, inverted, edited), {"as printed": plain}, 16 * edited.numel())
