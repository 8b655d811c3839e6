"""fuse_pixels (Eq. 21, 22): kernel against reference, reference against SciPy, derivatives, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from sage_fast.errors import InputError
from sage_fast.ops import fuse_pixels, fuse_pixels_reference
from sage_fast.ops.fuse_pixels import BLENDS


def images(n: int, sources: int, size: tuple[int, int], dtype=torch.float32, device="cpu", c=3) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(n + sources)
    shapes = [(k, c, *size) for k in (sources, sources, n)]
    return [(torch.rand(shape, generator=rng, dtype=dtype) * 2 - 1).to(device) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("n, sources, c", [(3, 3, 3), (3, 1, 3), (1, 1, 1), (2, 2, 4)])
@pytest.mark.parametrize("size", [(59, 97), (130, 33), (1, 7), (7, 1), (1, 1), (2, 2), (64, 64)])
def test_kernel_equals_reference(device, size, n, sources, c, blend, dtype):
    three = images(n, sources, size, dtype, device, c)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for low in (None, three[0] / 2):
        expected = fuse_pixels_reference(*three, 0.4, blend, low)
        torch.testing.assert_close(fuse_pixels(*three, 0.4, blend, low), expected, atol=tolerance, rtol=tolerance)
    assert (expected != three[2]).any()


def test_one_real_image_and_many_inversions(device):
    real, _, edited = images(3, 1, (12, 9), device=device)
    for three in ((real, edited.flip(0), edited), (edited.flip(0), real, edited)):
        torch.testing.assert_close(fuse_pixels(*three), fuse_pixels_reference(*three), atol=1e-6, rtol=1e-6)


def test_memory_layouts(device, laid_out):
    three = [laid_out(x) for x in images(3, 3, (12, 9), device=device)]
    torch.testing.assert_close(fuse_pixels(*three), fuse_pixels_reference(*three), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("op", [fuse_pixels, fuse_pixels_reference])
def test_equals_scipy(op):
    """SciPy's Gaussian, cut to 3 x 3 pixels; its ``mirror`` too leaves the outermost pixel single."""
    three = images(1, 1, (20, 31), torch.float64)
    a, b, e = (x[0].numpy() / 2 + 0.5 for x in three)
    sharp = np.linalg.norm(a - b, axis=0) - 0.5 * np.linalg.norm(e - b, axis=0)
    mask = gaussian_filter(sharp, 1.3, mode="mirror", radius=1).clip(0, 1)
    np.testing.assert_allclose(op(*three)[0] / 2 + 0.5, e + mask * (a - b), atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device)
    assert torch.ops.sage_fast.fuse_pixels(x, x, x, None, 0.5, 0, 1.3).shape == shape


@pytest.mark.parametrize("op", [fuse_pixels, fuse_pixels_reference])
@pytest.mark.parametrize("dtypes", ["float32", "float64", "float16", "bfloat16", "float16 float32", "float64 bfloat16"])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_empty_in_every_dtype(device, shape, dtypes, op):
    first, last = (torch.empty(shape, dtype=getattr(torch, d), device=device) for d in (dtypes.split() * 2)[:2])
    last.requires_grad_()
    y = op(first, first, last, low=first)
    y.sum().backward()
    assert y.shape == last.grad.shape == shape and y.dtype == torch.promote_types(first.dtype, last.dtype)


def test_empty_arrays_of_float16():
    x = np.empty((2, 3, 0, 8), np.float16)
    assert fuse_pixels(x, x, x).shape == x.shape and fuse_pixels(x, x, x).dtype == x.dtype


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("sources, has_low", [(1, True), (2, False)])
def test_gradcheck(device, sources, has_low, blend):
    three = images(2, sources, (3, 4), torch.float64, device)
    low = [three[0] / 4] if has_low else []  # nothing at a clamp, where there is no derivative
    inputs = [x.detach().mul(0.5).requires_grad_() for x in (*three, *low)]
    op = lambda real, inverted, edited, low=None: fuse_pixels(real, inverted, edited, 0.1, blend, low)  # noqa: E731
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def test_gradient_equals_that_of_the_reference(device):
    three = [x.requires_grad_() for x in images(2, 1, (17, 20), device=device)]
    grad = torch.randn_like(three[2])
    ours, theirs = (torch.autograd.grad(op(*three), three, grad) for op in (fuse_pixels, fuse_pixels_reference))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_opcheck(device):
    op = torch.ops.sage_fast.fuse_pixels.default
    three = images(2, 1, (5, 6), device=device)
    torch.library.opcheck(op, (*three, None, 0.5, 0, 1.3))
    torch.library.opcheck(op, (*(x.requires_grad_() for x in three), three[0].detach(), 0.5, 1, 1.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_runs(dtype):
    three = [x.to(dtype) for x in images(2, 2, (8, 8))]
    fused = fuse_pixels(*three)
    assert fused.dtype == dtype
    torch.testing.assert_close(fused.double(), fuse_pixels_reference(*(x.double() for x in three)), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("blend", BLENDS)
def test_nan_shows_and_stays_within_a_pixel(device, blend):
    for which in range(3):
        three = images(3, 3, (32, 32), device=device)
        three[which][1, 2, 7, 9] = float("nan")
        finite = fuse_pixels(*three, blend=blend).isfinite()
        assert not finite[1, :, 6:9, 8:11].any()
        finite[1, :, 6:9, 8:11] = True
        assert finite.all()


def test_infinity_runs(device):
    three = images(3, 3, (32, 32), device=device)
    three[2][1, 2, 7, 9] = float("inf")
    finite = fuse_pixels(*three).isfinite()
    assert not finite[1, 2, 7, 9] and finite[[0, 2]].all()


@pytest.mark.parametrize("sources", [1, 3])
def test_threads(same_bits_for_all_thread_counts, sources):
    three = images(3, sources, (159, 97))
    same_bits_for_all_thread_counts(lambda: fuse_pixels(*three))


def test_bad_input():
    x = torch.zeros(2, 3, 8, 8)
    for op in (fuse_pixels, fuse_pixels_reference):
        with pytest.raises(InputError, match=r"real must have shape \[2, 3, 8, 8\].*got \[2, 1, 8, 8\]"):
            op(x[:, :1], x, x)
        with pytest.raises(InputError, match="blend must be one of residual, convex, printed, got 'mix'"):
            op(x, x, x, blend="mix")
        with pytest.raises(InputError, match=r"low must have shape \[2, 3, 8, 8\].*got \[2, 3, 8, 4\]"):
            op(x, x, x, low=x[..., :4])
        with pytest.raises(InputError, match="inverted must be on cpu, as edited is, got meta"):
            op(x, x.to("meta"), x)
