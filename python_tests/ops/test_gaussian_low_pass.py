"""gaussian_low_pass (Eq. 23): kernel against reference, reference against SciPy, derivatives, and bad input."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

from sage_fast.errors import InputError
from sage_fast.ops import gaussian_low_pass, gaussian_low_pass_reference

SIGMAS = [0.05, 0.7, 5.0, 13.0, 300.0]


def images(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("size", [(59, 97), (97, 32), (1, 1), (1, 2), (2, 5), (3, 1), (8, 8)])
def test_kernel_equals_reference(device, size, sigma, dtype):
    x = images(2, 3, *size, dtype=dtype, device=device)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    expected = gaussian_low_pass_reference(x, sigma)
    kernel = torch.ops.sage_fast.gaussian_low_pass(x, sigma)
    torch.testing.assert_close(kernel, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gaussian_low_pass(x, sigma), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("border", ["circular", "reflect"])
@pytest.mark.parametrize("unit", ["frequency", "pixels"])
@pytest.mark.parametrize("size", [(59, 97), (97, 32), (1, 1), (1, 2), (2, 5), (3, 1), (130, 70)])
def test_borders_and_units(device, size, unit, border, dtype):
    x = images(2, 3, *size, dtype=dtype, device=device)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for sigma in (0.05, 0.9, 4.0, 13.0, 300.0):
        expected = gaussian_low_pass_reference(x, sigma, border, unit)
        actual = gaussian_low_pass(x, sigma, border, unit)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("op", [gaussian_low_pass, gaussian_low_pass_reference])
@pytest.mark.parametrize("border, mode", [("circular", "wrap"), ("reflect", "mirror")])
@pytest.mark.parametrize("sigma", [0.4, 2.0, 7.5, 40.0])
def test_pixels_are_those_of_scipy(op, border, mode, sigma):
    x = images(1, 1, 64, 48, dtype=torch.float64)
    blurred = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), sigma, mode=mode, truncate=9)
    np.testing.assert_allclose(op(x, sigma, border, "pixels")[0, 0], blurred, atol=1e-12)


def test_pixels_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    x = images(1, 1, 80, 90)
    blurred = cv2.GaussianBlur(x[0, 0].numpy(), (49, 49), 4.0, borderType=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(gaussian_low_pass(x, 4.0, "reflect", "pixels")[0, 0], blurred, atol=2e-6)


@pytest.mark.parametrize("sigma", [1e-300, 1e-3, 1e300])
@pytest.mark.parametrize("border", ["circular", "reflect"])
@pytest.mark.parametrize("unit", ["frequency", "pixels"])
def test_extreme_widths(device, unit, border, sigma):
    """The image itself, or its mean; the mirrored one counts the outermost pixels once in 2 n - 2."""
    x = images(1, 1, 6, 5, dtype=torch.float64, device=device)
    low = gaussian_low_pass(x, sigma, border, unit)
    if (sigma < 1) == (unit == "pixels"):
        torch.testing.assert_close(low, x)
    else:
        weights = [torch.ones(n, dtype=x.dtype, device=device) for n in (6, 5)]
        for line in weights if border == "reflect" else ():
            line[[0, -1]] = 0.5
        mean = torch.einsum("nchw,h,w->nc", x, *weights) / (weights[0].sum() * weights[1].sum())
        torch.testing.assert_close(low, mean[..., None, None].expand_as(x))


def test_memory_layouts(device, laid_out):
    x = laid_out(images(3, 4, 12, 9, device=device))
    torch.testing.assert_close(gaussian_low_pass(x), gaussian_low_pass_reference(x), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("op", [gaussian_low_pass, gaussian_low_pass_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("border", ["circular", "reflect"])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_empty(device, shape, border, dtype, op):
    x = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
    y = op(x, border=border)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and y.dtype == dtype


@pytest.mark.skipif("SAGE_FAST_LARGE_TESTS" not in os.environ, reason="needs 18 GiB; set SAGE_FAST_LARGE_TESTS=1")
def test_more_than_2_to_the_31_values(device):
    """The last image is blurred as it would be alone, and nothing comes to its neighbour."""
    x = torch.zeros(1, 32800, 256, 256, device=device)
    x[0, -1] = images(256, 256, device=device)
    y = gaussian_low_pass(x, 20.0)
    assert (
        torch.equal(y[:, -1:], gaussian_low_pass(x[:, -1:], 20.0)) and y[0, -2].abs().max() == 0 == y[0, 0].abs().max()
    )


@pytest.mark.parametrize("op", [gaussian_low_pass, gaussian_low_pass_reference])
@pytest.mark.parametrize("size", [(16, 16), (31, 20)])
def test_equals_scipy(op, size):
    """SciPy's filter of a Fourier transform takes the width in pixels: H / (2 pi sigma)."""
    x = images(1, 1, *size, dtype=torch.float64)
    for sigma in SIGMAS[1:]:
        widths = [n / (2 * math.pi * sigma) for n in size]
        spectrum = scipy.ndimage.fourier_gaussian(scipy.fft.fft2(x[0, 0].numpy()), widths)
        np.testing.assert_allclose(op(x, sigma)[0, 0], scipy.fft.ifft2(spectrum).real, atol=1e-13)


@pytest.mark.parametrize("op", [gaussian_low_pass, gaussian_low_pass_reference])
def test_equals_a_periodic_blur(op):
    x = images(1, 1, 64, 48, dtype=torch.float64)
    widths = [n / (2 * math.pi * 2.5) for n in (64, 48)]
    blurred = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), widths, mode="wrap", truncate=8)
    np.testing.assert_allclose(op(x, 2.5)[0, 0], blurred, atol=1e-7)


def test_a_wave_keeps_its_share(device):
    """d cycles per image come out times exp(-d^2 / (2 sigma^2)), whichever way they run."""
    t = torch.arange(32, dtype=torch.float64, device=device) * (2 * math.pi / 32)
    for down, across in ((0, 3), (4, 0), (2, 5), (16, 0)):
        wave = torch.cos(down * t[:, None] + across * t)[None, None]
        share = math.exp(-(down**2 + across**2) / (2 * 5.0**2))
        torch.testing.assert_close(gaussian_low_pass(wave, 5.0), share * wave)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_mean_stays(device, sigma):
    x = images(2, 3, 31, 20, device=device) + 3
    torch.testing.assert_close(gaussian_low_pass(x, sigma).mean((2, 3)), x.mean((2, 3)), atol=1e-5, rtol=1e-6)
    constant = torch.full((1, 1, 31, 20), 0.7, device=device)
    torch.testing.assert_close(gaussian_low_pass(constant, sigma), constant, atol=1e-6, rtol=1e-6)


def test_infinite_sigma_gives_a_copy():
    x = images(1, 2, 5, 5)
    y = gaussian_low_pass(x, math.inf)
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()


@pytest.mark.parametrize("border", ["circular", "reflect"])
@pytest.mark.parametrize("unit", ["frequency", "pixels"])
@pytest.mark.parametrize("sigma", [0.7, 5.0])
def test_gradcheck(device, sigma, unit, border):
    x = images(1, 2, 4, 5, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gaussian_low_pass(x, sigma, border, unit), x)
    assert torch.autograd.gradgradcheck(lambda x: gaussian_low_pass(x, sigma, border, unit) ** 2, x)


def test_gradient_equals_that_of_the_reference(device):
    x = images(2, 3, 17, 20, device=device).requires_grad_()
    grad = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(op(x), x, grad)[0] for op in (gaussian_low_pass, gaussian_low_pass_reference))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


def test_opcheck(device):
    op, x = torch.ops.sage_fast.gaussian_low_pass.default, images(2, 3, 5, 6, device=device)
    torch.library.opcheck(op, (x.requires_grad_(), 2.0))
    torch.library.opcheck(op, (x.detach().mT, 2.0))
    torch.library.opcheck(op, (x, 2.0, True, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(no_worse_than_plain, dtype):
    """Plain PyTorch has no FFT in low precision on the CPU; its best is the exact result, rounded once."""
    x = images(2, 3, 32, 32).to(dtype)
    exact = gaussian_low_pass_reference(x.double())
    no_worse_than_plain(gaussian_low_pass(x), exact.to(dtype), exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_show_and_stay_in_their_channel(device, value):
    """An FFT spreads them over the whole channel, the blur over what it reaches: never less than the pixel."""
    x = images(2, 3, 32, 32, device=device)
    x[1, 2, 7, 9] = value
    for op in (gaussian_low_pass, gaussian_low_pass_reference):
        finite = op(x).isfinite()
        assert not finite[1, 2, 5:10, 7:12].any()
        finite[1, 2] = True
        assert finite.all()


def test_threads(same_bits_for_all_thread_counts):
    x = images(3, 3, 59, 97)
    same_bits_for_all_thread_counts(lambda: gaussian_low_pass(x))


@pytest.mark.parametrize("op", [gaussian_low_pass, gaussian_low_pass_reference])
@pytest.mark.parametrize(
    "x, sigma, message",
    [
        (torch.zeros(3, 8, 8), 5.0, r"images must be floating point \[N, C, H, W\], got torch.float32 \[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 5.0, "got torch.uint8"),
        (torch.zeros(1, 3, 8, 8), 0.0, "sigma must be positive, in cycles per image, got 0.0"),
        (torch.zeros(1, 3, 8, 8), -2, "got -2"),
        (torch.zeros(1, 3, 8, 8), float("nan"), "got nan"),
    ],
)
def test_bad_input(op, x, sigma, message):
    with pytest.raises(InputError, match=message):
        op(x, sigma)


def test_bad_settings():
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match="border must be one of circular, reflect, got 'zero'"):
        gaussian_low_pass(x, border="zero")
    with pytest.raises(InputError, match="unit must be one of frequency, pixels, got 'cm'"):
        gaussian_low_pass(x, unit="cm")
    with pytest.raises(InputError, match="sigma must be positive and finite, in pixels, got inf"):
        gaussian_low_pass(x, math.inf, unit="pixels")
