"""Fusion of generated images with their source (Eq. 21-23), in frequencies, in pixels and in both, at 32 and 256 px.

The floor is memory: three images read and one written, or one and one where all edits share a source. Rivals: the
equations in plain PyTorch, each low-pass an FFT of its own, or one FFT for all; the same on arrays (NumPy, or CuPy on a GPU);
OpenCV's blurs with NumPy around them; kornia. The blurs of the last two are cut at 5 standard deviations, and OpenCV's gets
the periodic border laid around the image first, up to three times where the image is small. A row of a library that is not
importable is left out. On a GPU there are batches too that fill it.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from array_rivals import array_library, imported
from torch.nn import functional as F

from sage_fast.fusion import fuse_both, fuse_frequencies, fuse_pixels

GAMMA2, BETA = 0.8, 0.5
CASES = {  # images of the source, edits, side
    "32 px, N 128": (128, 128, 32),
    "256 px, N 1": (1, 1, 256),
    "256 px, 16 edits of one": (1, 16, 256),
}
LARGE = {"256 px, N 64": (64, 64, 256), "256 px, 64 edits of one": (1, 64, 256), "1024 px, N 16": (16, 16, 1024)}
SIDE = math.exp(-1 / (2 * 1.3**2))
ROW = np.array([SIDE, 1, SIDE], np.float32) / np.float32(2 * SIDE + 1)


cases = pytest.mark.parametrize("case", [*CASES, *LARGE])


def images(case, device):
    if case in LARGE and device.type == "cpu":
        pytest.skip("for a GPU")
    sources, edits, side = (CASES | LARGE)[case]
    return [torch.rand(n, 3, side, side, device=device) * 2 - 1 for n in (sources, sources, edits)]


def moved(real, edited):
    return 4 * (2 * real.numel() + 2 * edited.numel())


@cases
def test_fuse_frequencies(compare, case):
    real, inverted, edited = images(case, compare.device)
    compare.tolerance = 1e-4
    rivals = {name: lambda f=form: f(real, inverted, edited) for name, form in frequency_forms(edited).items()}
    ours = lambda: fuse_frequencies(real, inverted, edited, gamma2=GAMMA2)  # noqa: E731
    compare(f"frequencies, {case}", ours, rivals, moved(real, edited))


def test_weighted_edits_are_filtered_too(compare):
    real, inverted, edited = images("256 px, 16 edits of one", compare.device)
    one_fft = lambda: edited + torch_low_pass((0.7 - 1) * edited + real - GAMMA2 * inverted)  # noqa: E731
    ours = lambda: fuse_frequencies(real, inverted, edited, 0.7, GAMMA2)  # noqa: E731
    compare("frequencies, gamma1 0.7, 16 edits of one", ours, {"one FFT": one_fft}, moved(real, edited))


@cases
def test_fuse_pixels(compare, case):
    real, inverted, edited = images(case, compare.device)
    rivals = {name: lambda f=form: f(real, inverted, edited) for name, form in pixel_forms(edited).items()}
    compare(f"pixels, {case}", lambda: fuse_pixels(real, inverted, edited), rivals, moved(real, edited))


@cases
def test_fuse_both(compare, case):
    """Frequencies, then pixels, as the pipeline does for ``fusion="both"``."""
    real, inverted, edited = images(case, compare.device)
    compare.tolerance = 1e-4
    first, second = frequency_forms(edited), pixel_forms(edited)
    second |= dict.fromkeys(("torch, as printed", "torch, one FFT"), second["torch"])
    names = [name for name in first if name in second]
    rivals = {n: lambda n=n: second[n](real, inverted, first[n](real, inverted, edited).clamp_(-1, 1)) for n in names}
    ours = lambda: fuse_both(real, inverted, edited, gamma2=GAMMA2)  # noqa: E731
    compare(f"both, {case}", ours, rivals, moved(real, edited))


def torch_low_pass(x, sigma=5.0):
    h, w = x.shape[2:]
    fy, fx = torch.fft.fftfreq(h, 1 / h, device=x.device)[:, None], torch.fft.rfftfreq(w, 1 / w, device=x.device)
    response = torch.exp(-(fy.square() + fx.square()) / (2 * sigma**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=(h, w))


def torch_frequencies(real, inverted, edited):
    return edited + torch_low_pass(real) - GAMMA2 * torch_low_pass(inverted)


def torch_one_low_pass(real, inverted, edited):
    return edited + torch_low_pass(real - GAMMA2 * inverted)


def torch_pixels(kernel, real, inverted, edited):
    a, b, c = (image / 2 + 0.5 for image in (real, inverted, edited))
    mask = (a - b).norm(dim=1, keepdim=True) - BETA * (c - b).norm(dim=1, keepdim=True)
    mask = F.conv2d(F.pad(mask, (1, 1, 1, 1), mode="reflect"), kernel).clamp(0, 1)
    return (c + mask * (a - b)) * 2 - 1


def frequency_forms(edited):
    side, forms = edited.shape[2], {"torch, as printed": torch_frequencies, "torch, one FFT": torch_one_low_pass}
    if arrays := array_library(edited.device):
        forms[arrays.name] = lambda *three: array_frequencies(arrays, *three)
    cv2 = edited.is_cpu and imported("cv2")
    if cv2 and side > 32:  # a blur of 1 px, sampled, is 3e-3 from the pass band of Eq. 23
        forms["OpenCV"] = lambda *three: opencv_frequencies(cv2, *three)
    filters = imported("kornia.filters")
    if filters and side > 32:
        forms["kornia"] = lambda real, inverted, edited: edited + kornia_low_pass(filters, real - GAMMA2 * inverted)
    return forms


def pixel_forms(edited):
    kernel = torch.tensor(np.outer(ROW, ROW), device=edited.device)[None, None]  # not in a call: it waits for a GPU
    forms = {"torch": functools.partial(torch_pixels, kernel)}
    arrays = array_library(edited.device)
    if arrays and arrays.ndimage:
        forms[arrays.name] = lambda *three: array_pixels(arrays, *three)
    if cv2 := edited.is_cpu and imported("cv2"):
        forms["OpenCV"] = lambda *three: opencv_pixels(cv2, *three)
    return forms


def array_frequencies(arrays, real, inverted, edited, sigma=5.0):
    fft, (h, w) = arrays.xp.fft, edited.shape[2:]
    a, b, c = map(arrays.of, (real, inverted, edited))
    fy, fx = fft.fftfreq(h, 1 / h)[:, None], fft.rfftfreq(w, 1 / w)
    response = arrays.xp.exp(-(fy**2 + fx**2) / (2 * sigma**2)).astype(c.dtype)
    return torch.from_dlpack(c + fft.irfft2(fft.rfft2(a - GAMMA2 * b) * response, s=(h, w)))


def array_pixels(arrays, real, inverted, edited):
    xp, row = arrays.xp, arrays.xp.asarray(ROW)
    a, b, c = (arrays.of(image) / 2 + 0.5 for image in (real, inverted, edited))
    mask = xp.sqrt(xp.square(a - b).sum(1)) - BETA * xp.sqrt(xp.square(c - b).sum(1))  # [N, H, W]
    for axis in (1, 2):
        mask = arrays.ndimage.correlate1d(mask, row, axis=axis, mode="mirror")
    return torch.from_dlpack((c + xp.clip(mask, 0, 1)[:, None] * (a - b)) * 2 - 1)


def opencv_frequencies(cv2, real, inverted, edited, sigma=5.0):
    cv2.setNumThreads(torch.get_num_threads())
    s = edited.shape[2] / (2 * math.pi * sigma)
    radius = math.ceil(5 * s)
    size = 2 * radius + 1
    low = []
    for a, b in zip(real.numpy(), inverted.numpy(), strict=True):
        wide = np.pad(a - np.float32(GAMMA2) * b, ((0, 0), (radius, radius), (radius, radius)), mode="wrap")
        low.append([cv2.GaussianBlur(p, (size, size), s)[radius:-radius, radius:-radius] for p in wide])
    return torch.from_numpy(edited.numpy() + np.asarray(low))


def opencv_pixels(cv2, real, inverted, edited):
    cv2.setNumThreads(torch.get_num_threads())
    out = np.empty_like(edited.numpy())
    for i, e in enumerate(edited.numpy()):
        a, b = (image.numpy()[i % len(image)] for image in (real, inverted))
        d, change = a - b, e - b
        mask = cv2.sqrt(np.einsum("chw,chw->hw", d, d)) - np.float32(BETA) * cv2.sqrt(
            np.einsum("chw,chw->hw", change, change)
        )
        mask = np.clip(cv2.GaussianBlur(mask, (3, 3), 1.3) / 2, 0, 1)
        np.multiply(d, mask, out=out[i])
        out[i] += e
    return torch.from_numpy(out)


def kornia_low_pass(filters, x, sigma=5.0):
    s = x.shape[2] / (2 * math.pi * sigma)
    size = 2 * math.ceil(5 * s) + 1
    return filters.gaussian_blur2d(x, (size, size), (s, s), border_type="circular")
