"""gaussian_low_pass (Eq. 23) on batches of images of 32, 256 and 1024 px, and in pixels with mirrored borders.

The floor is memory, one read and one write; about 35 products a value come on top, however wide the blur. Rivals:
PyTorch's FFT with the response made beforehand, two circular convolutions of PyTorch, FFT and blur of NumPy and SciPy (on a
GPU CuPy's), and OpenCV and kornia where they are installed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from array_rivals import array_library, imported
from torch.nn import functional as F

from sage_fast.ops import gaussian_low_pass

SIGMA = 5.0
BATCHES = {
    "32 px, N 1": (1, 3, 32, 32),
    "32 px, N 128": (128, 3, 32, 32),
    "256 px, N 1": (1, 3, 256, 256),
    "1024 px, N 1": (1, 3, 1024, 1024),
    "256 px, N 64": (64, 3, 256, 256),
    "1024 px, N 16": (16, 3, 1024, 1024),
}


@pytest.mark.parametrize("case", BATCHES)
def test_low_pass(compare, case):
    if compare.device.type == "cpu" and math.prod(BATCHES[case]) > 1 << 22:
        pytest.skip("for a GPU")
    x = torch.randn(BATCHES[case], device=compare.device)
    rivals = {"FFT": fft(x), "circular convolutions": convolutions(x), **others(x)}
    compare.tolerance = 1e-4  # the blurs cut their kernel
    compare(case, lambda: gaussian_low_pass(x, SIGMA), rivals, 8 * x.numel())


@pytest.mark.parametrize("side, sigma", [(256, 8.1), (1024, 8.1), (1024, 32.6)])
def test_pixels(compare, side, sigma):
    """OpenCV's own call, cut at 5 standard deviations; and SciPy's or CuPy's."""
    x, rivals = torch.rand(1, 3, side, side, device=compare.device), {}
    arrays, cv2 = array_library(x.device), x.is_cpu and imported("cv2")
    if arrays and arrays.ndimage:
        planes, filtered = arrays.of(x[0]), arrays.ndimage.gaussian_filter
        blurred = lambda: filtered(planes, (0, sigma, sigma), mode="mirror", truncate=5)  # noqa: E731
        rivals[scipy_of(arrays)] = lambda: torch.from_dlpack(blurred())[None]
    if cv2:
        rivals["OpenCV"] = lambda: opencv_pixels(cv2, x[0].numpy(), sigma)
    if not rivals:
        pytest.skip("neither OpenCV nor SciPy nor CuPy for this device")
    compare.tolerance = 1e-5
    ours = lambda: gaussian_low_pass(x, sigma, "reflect", "pixels")  # noqa: E731
    compare(f"{side} px, sigma {sigma} px", ours, rivals, 8 * x.numel())


def opencv_pixels(cv2, planes, sigma):
    cv2.setNumThreads(torch.get_num_threads())
    size = 2 * math.ceil(5 * sigma) + 1
    blurred = [cv2.GaussianBlur(p, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101) for p in planes]
    return torch.from_numpy(np.stack(blurred))[None]


def scipy_of(arrays):
    return "CuPy" if arrays.name == "CuPy" else "scipy"


def fft(x):
    h, w = x.shape[2:]
    fy, fx = torch.fft.fftfreq(h, 1 / h, device=x.device)[:, None], torch.fft.rfftfreq(w, 1 / w, device=x.device)
    response = torch.exp(-(fy.square() + fx.square()) / (2 * SIGMA**2))
    return lambda: torch.fft.irfft2(torch.fft.rfft2(x).mul_(response), s=(h, w))


def taps_of(n):
    """The row of pixels [2 radius + 1] that has the response on a circle of ``n``, as far as it is above 1e-6."""
    half = np.fft.irfft(np.exp(-(np.fft.rfftfreq(n, 1 / n) ** 2) / (2 * SIGMA**2)), n)[: n // 2 + 1]
    radius = int((np.abs(half) > 1e-6 * half[0]).nonzero()[0].max())
    half[-1] /= 2 - n % 2  # the pixel opposite is reached from both sides
    taps = np.concatenate([half[radius:0:-1], half[: radius + 1]])
    return radius, (taps / taps.sum()).astype(np.float32)


def convolutions(x):
    n, c, h, w = x.shape
    radius, taps = taps_of(h)
    taps = torch.tensor(taps, device=x.device)

    def run():
        y = F.conv2d(F.pad(x.view(n * c, 1, h, w), (radius, radius, 0, 0), mode="circular"), taps.view(1, 1, 1, -1))
        return F.conv2d(F.pad(y, (0, 0, radius, radius), mode="circular"), taps.view(1, 1, -1, 1)).view(x.shape)

    return run


def others(x):
    """NumPy and SciPy or CuPy, OpenCV and kornia, as far as they are installed."""
    found = {}
    radius, taps = taps_of(x.shape[2])
    if arrays := array_library(x.device):
        found |= array_forms(arrays, x, taps)
    if cv2 := x.is_cpu and imported("cv2"):
        cv2.setNumThreads(torch.get_num_threads())
        planes = x.numpy().reshape(-1, *x.shape[2:])

        def opencv(p):
            wide = cv2.copyMakeBorder(p, *[radius] * 4, cv2.BORDER_WRAP)
            return cv2.sepFilter2D(wide, -1, taps, taps)[radius:-radius, radius:-radius]

        found["OpenCV"] = lambda: torch.from_numpy(np.stack([opencv(p) for p in planes])).view(x.shape)
    if filters := imported("kornia.filters"):
        row = torch.tensor(taps, device=x.device)[None]
        found["kornia"] = lambda: filters.filter2d_separable(x, row, row, border_type="circular")
    return found


def array_forms(arrays, x, taps):
    """An FFT, and two rows of taps."""
    fft, images, (h, w) = arrays.xp.fft, arrays.of(x), x.shape[2:]
    fy, fx = fft.fftfreq(h, 1 / h)[:, None], fft.rfftfreq(w, 1 / w)
    response = arrays.xp.exp(-(fy**2 + fx**2) / (2 * SIGMA**2)).astype(images.dtype)
    forms = {f"{arrays.name} FFT": lambda: torch.from_dlpack(fft.irfft2(fft.rfft2(images) * response, s=(h, w)))}
    if arrays.ndimage:
        row, filtered = arrays.xp.asarray(taps), arrays.ndimage.correlate1d
        blurred = lambda: filtered(filtered(images, row, axis=2, mode="wrap"), row, axis=3, mode="wrap")  # noqa: E731
        forms[scipy_of(arrays)] = lambda: torch.from_dlpack(blurred())
    return forms
