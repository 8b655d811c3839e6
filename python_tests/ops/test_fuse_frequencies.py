"""fuse_frequencies (Eq. 23): kernel against reference, reference against NumPy, derivatives, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.ops import fuse_frequencies, fuse_frequencies_reference

SETTINGS = [(1.0, 1.0), (0.8, 0.3), (1.0, 0.0)]


def images(n: int, sources: int, size: tuple[int, int], dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(n + sources)
    return [torch.randn(k, 3, *size, generator=rng, dtype=dtype).to(device) for k in (sources, sources, n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("n, sources", [(3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("size", [(59, 97), (97, 32), (1, 7), (2, 2), (64, 64)])
def test_kernel_equals_reference(device, size, n, sources, settings, dtype):
    three = images(n, sources, size, dtype, device)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-12
    for sigma in (0.5, 5.0, 40.0):
        expected = fuse_frequencies_reference(*three, *settings, sigma)
        kernel = torch.ops.sage_fast.fuse_frequencies(*three, *settings, sigma)
        torch.testing.assert_close(kernel, expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(fuse_frequencies(*three, *settings, sigma), expected, atol=tolerance, rtol=tolerance)


def test_one_real_image_and_many_inversions(device):
    real, _, edited = images(3, 1, (12, 9), device=device)
    for three in ((real, edited.flip(0), edited), (edited.flip(0), real, edited)):
        expected = fuse_frequencies_reference(*three, 0.8, 0.3)
        torch.testing.assert_close(fuse_frequencies(*three, 0.8, 0.3), expected, atol=2e-6, rtol=2e-6)


def test_memory_layouts(device, laid_out):
    three = [laid_out(x) for x in images(3, 3, (12, 9), device=device)]
    torch.testing.assert_close(fuse_frequencies(*three), fuse_frequencies_reference(*three), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("op", [fuse_frequencies, fuse_frequencies_reference])
def test_equals_numpy(op):
    real, inverted, edited = (x.numpy() for x in images(2, 2, (20, 31), torch.float64))
    d2 = np.add.outer(np.fft.fftfreq(20, 1 / 20) ** 2, np.fft.fftfreq(31, 1 / 31) ** 2)
    low = lambda x: np.fft.ifft2(np.fft.fft2(x) * np.exp(-d2 / (2 * 3.0**2))).real  # noqa: E731
    expected = edited - low(edited) + 0.8 * low(edited) + low(real) - 0.3 * low(inverted)
    three = [torch.from_numpy(x) for x in (real, inverted, edited)]
    np.testing.assert_allclose(op(*three, 0.8, 0.3, 3.0), expected, atol=1e-12)


@pytest.mark.parametrize("op", [fuse_frequencies, fuse_frequencies_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_empty(device, shape, dtype, op):
    x = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
    op(x.detach(), x.detach(), x).sum().backward()
    assert x.grad.shape == shape


def test_infinite_sigma_takes_all_frequencies():
    real, inverted, edited = images(2, 2, (5, 6))
    torch.testing.assert_close(fuse_frequencies(real, inverted, edited, sigma=math.inf), edited + real - inverted)


@pytest.mark.parametrize("sources", [1, 2])
def test_gradcheck(device, sources):
    three = [x.requires_grad_() for x in images(2, sources, (3, 4), torch.float64, device)]
    assert torch.autograd.gradcheck(lambda *t: fuse_frequencies(*t, 0.8, 0.3, 1.5), three)
    assert torch.autograd.gradgradcheck(lambda *t: fuse_frequencies(*t, 0.8, 0.3, 1.5) ** 2, three)


def test_opcheck(device):
    op = torch.ops.sage_fast.fuse_frequencies.default
    three = images(2, 1, (5, 6), device=device)
    torch.library.opcheck(op, (*three, 1.0, 0.3, 2.0))
    torch.library.opcheck(op, (*(x.requires_grad_() for x in three), 0.8, 0.3, 2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_runs(dtype):
    three = [x.to(dtype) for x in images(2, 2, (8, 8))]
    expected = fuse_frequencies_reference(*(x.double() for x in three))
    fused = fuse_frequencies(*three)
    assert fused.dtype == dtype
    torch.testing.assert_close(fused.double(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_show_in_their_channel(device, value):
    three = images(3, 3, (32, 32), device=device)
    for image in three:
        image[1, 2, 7, 9] = value
        finite = fuse_frequencies(*three).isfinite()
        assert not finite[1, 2, 7, 9]
        finite[1, 2] = True
        assert finite.all()


@pytest.mark.parametrize("sources", [1, 3])
def test_threads(same_bits_for_all_thread_counts, sources):
    three = images(3, sources, (59, 97))
    same_bits_for_all_thread_counts(lambda: fuse_frequencies(*three))


def test_bad_input():
    x = torch.zeros(2, 3, 8, 8)
    for op in (fuse_frequencies, fuse_frequencies_reference):
        with pytest.raises(InputError, match=r"inverted must have shape \[2, 3, 8, 8\].*got \[2, 1, 8, 8\]"):
            op(x, x[:, :1], x)
        with pytest.raises(InputError, match="sigma must be positive, in cycles per image, got 0"):
            op(x, x, x, sigma=0)
        with pytest.raises(InputError, match="real must be on cpu, as edited is, got meta"):
            op(x.to("meta"), x, x)
