"""gaussian_low_pass (Eq. 23) on batches of images of 32, 256 and 1024 px, and in pixels with mirrored borders.

The floor is memory, one read and one write; about 35 products a value come on top, however wide the blur. Rivals:
PyTorch's FFT with the response made beforehand, two circular convolutions of PyTorch, SciPy's blur, and OpenCV and kornia
where they are installed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sage_fast.ops import gaussian_low_pass

SIGMA = 5.0
BATCHES = {
    "32 px, N 1": (1, 3, 32, 32),
    "32 px, N 128": (128, 3, 32, 32),
    "256 px, N 1": (1, 3, 256, 256),
    "1024 px, N 1": (1, 3, 1024, 1024),
}


@pytest.mark.parametrize("case", BATCHES)
def test_low_pass(compare, case):
    x = torch.randn(BATCHES[case])
    rivals = {"FFT": fft(x), "circular convolutions": convolutions(x), **others(x)}
    compare.tolerance = 1e-4  # the blurs cut their kernel
    compare(case, lambda: gaussian_low_pass(x, SIGMA), rivals, 8 * x.numel())


@pytest.mark.parametrize("side, sigma", [(256, 8.1), (1024, 8.1), (1024, 32.6)])
def test_pixels(compare, side, sigma):
    """OpenCV's own call, cut at 5 standard deviations; and SciPy's."""
    cv2, ndimage = pytest.importorskip("cv2"), pytest.importorskip("scipy.ndimage")
    cv2.setNumThreads(torch.get_num_threads())
    x = torch.rand(1, 3, side, side)
    size, planes = 2 * math.ceil(5 * sigma) + 1, x[0].numpy()

    def opencv():
        blurred = [cv2.GaussianBlur(p, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101) for p in planes]
        return torch.from_numpy(np.stack(blurred))[None]

    def scipy():
        return torch.from_numpy(ndimage.gaussian_filter(planes, sigma, mode="mirror", truncate=5, axes=(1, 2)))[None]

    compare.tolerance = 1e-5
    ours = lambda: gaussian_low_pass(x, sigma, "reflect", "pixels")  # noqa: E731
    compare(f"{side} px, sigma {sigma} px", ours, {"OpenCV": opencv, "scipy": scipy}, 8 * x.numel())


def fft(x):
    h, w = x.shape[2:]
    fy, fx = torch.fft.fftfreq(h, 1 / h)[:, None], torch.fft.rfftfreq(w, 1 / w)
    response = torch.exp(-(fy.square() + fx.square()) / (2 * SIGMA**2))
    return lambda: torch.fft.irfft2(torch.fft.rfft2(x).mul_(response), s=(h, w))


def taps_of(n):
    """The row of pixels [2 radius + 1] that has the response on a circle of ``n``, as far as it is above 1e-6."""
    half = torch.fft.irfft(torch.exp(-torch.fft.rfftfreq(n, 1 / n).square() / (2 * SIGMA**2)), n)[: n // 2 + 1]
    radius = int((half.abs() > 1e-6 * half[0]).nonzero().max())
    half[-1] /= 2 - n % 2  # the pixel opposite is reached from both sides
    taps = torch.cat([half[: radius + 1].flip(0), half[1 : radius + 1]])
    return radius, taps / taps.sum()


def convolutions(x):
    n, c, h, w = x.shape
    radius, taps = taps_of(h)

    def run():
        y = F.conv2d(F.pad(x.view(n * c, 1, h, w), (radius, radius, 0, 0), mode="circular"), taps.view(1, 1, 1, -1))
        return F.conv2d(F.pad(y, (0, 0, radius, radius), mode="circular"), taps.view(1, 1, -1, 1)).view(x.shape)

    return run


def others(x):
    """SciPy, OpenCV and kornia, as far as they are installed."""
    found, planes = {}, x.numpy().reshape(-1, *x.shape[2:])
    radius, taps = taps_of(x.shape[2])
    try:
        from scipy.ndimage import correlate1d

        blurred = lambda: correlate1d(correlate1d(planes, taps, axis=1, mode="wrap"), taps, axis=2, mode="wrap")  # noqa: E731
        found["scipy"] = lambda: torch.from_numpy(blurred()).view(x.shape)
    except ImportError:
        pass
    try:
        import cv2

        cv2.setNumThreads(torch.get_num_threads())

        def opencv(p):
            wide = cv2.copyMakeBorder(p, *[radius] * 4, cv2.BORDER_WRAP)
            return cv2.sepFilter2D(wide, -1, taps.numpy(), taps.numpy())[radius:-radius, radius:-radius]

        found["OpenCV"] = lambda: torch.from_numpy(np.stack([opencv(p) for p in planes])).view(x.shape)
    except ImportError:
        pass
    try:
        from kornia.filters import filter2d_separable

        found["kornia"] = lambda: filter2d_separable(x, taps[None], taps[None], border_type="circular")
    except ImportError:
        pass
    return found
