"""upfirdn2d: kernel against reference, reference against SciPy, derivatives, and what bad input gets."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.signal
import torch
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops import upfirdn2d, upfirdn2d_reference

BINOMIAL = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64
RANDOM = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) - 0.3  # of full rank: not separable
SETTINGS = {
    "identity": dict(),
    "blur": dict(padding=(2, 1, 2, 1)),
    "up 2": dict(up=2, padding=(2, 1, 2, 1), gain=4.0),
    "up 2, uneven": dict(up=2, padding=(5, 0, 1, 2), flip_filter=True),
    "down 2": dict(down=2, padding=1),
    "down 2, uneven": dict(down=2, padding=(0, 3, 2, 5), flip_filter=True),
    "up 2, down 2": dict(up=2, down=2, padding=3),
    "up 3": dict(up=3, padding=(1, 2, 3, 0), gain=-0.5),
    "down 3": dict(down=3, padding=(4, 1, 0, 2)),
    "up 3, down 2": dict(up=3, down=2, padding=(0, 1, 2, 3)),
    "crop": dict(padding=(-2, -1, -3, 1), flip_filter=True),
    "up 2, crop": dict(up=2, padding=(-3, 1, 2, -4)),
    "down 2, crop": dict(down=2, padding=(-1, 2, -3, 0)),
    "beyond the edges": dict(up=2, padding=(9, 8, 7, 11)),
}
TOLERANCE = {torch.float32: dict(atol=2e-6, rtol=2e-6), torch.float64: dict(atol=1e-14, rtol=1e-14)}


def images(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", [BINOMIAL, RANDOM], ids=["separable", "full rank"])
@pytest.mark.parametrize("name", SETTINGS)
def test_kernel_equals_reference(device, dtype, f, name):
    x = images(2, 3, 59, 97, dtype=dtype, device=device)
    expected = upfirdn2d_reference(x, f.to(device), **SETTINGS[name])
    torch.testing.assert_close(upfirdn2d(x, f.to(device), **SETTINGS[name]), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("padding", [(0, 0, 5, -2), (0, 0, -3, 9), (-7, 11, 0, 1), (4, -6, 6, -1)])
def test_a_crop_of_more_than_the_image(device, padding):
    x, f = images(2, 1, 1, 6, device=device), torch.rand(2, 3, device=device)
    y = upfirdn2d_reference(x, f, padding=padding)
    torch.testing.assert_close(upfirdn2d(x, f, padding=padding), y, atol=1e-6, rtol=1e-6)
    left, right, top, bottom = (max(p, 0) for p in padding)
    framed = torch.zeros(2, 1, 1 + top + bottom, 6 + left + right, device=device)
    framed[:, :, top : top + 1, left : left + 6] = x
    rows = slice(max(-padding[2], 0), framed.shape[2] + min(padding[3], 0))
    columns = slice(max(-padding[0], 0), framed.shape[3] + min(padding[1], 0))
    torch.testing.assert_close(upfirdn2d_reference(framed[:, :, rows, columns], f), y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 5), (4, 4), (17, 16)])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_kernel_equals_reference_on_tiny_images(device, shape, up, down):
    x = images(2, 1, *shape, device=device)
    for f in (BINOMIAL, RANDOM, torch.tensor([[2.0]]), torch.zeros(2, 3), torch.rand(32, 1), torch.rand(7)):
        options = dict(up=up, down=down, padding=(31, 3, 16, 31))
        torch.testing.assert_close(
            upfirdn2d(x, f.to(device), **options), upfirdn2d_reference(x, f.to(device), **options), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [2, 3, 19, 40])
@pytest.mark.parametrize("name", SETTINGS)
def test_channels_last(device, dtype, c, name):
    """Read as it lies and given back so, in both directions."""
    x = images(2, c, 21, 18, dtype=dtype, device=device)
    for f in (BINOMIAL, RANDOM):
        last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        y, expected = (
            upfirdn2d(last, f.to(device), **SETTINGS[name]),
            upfirdn2d_reference(x, f.to(device), **SETTINGS[name]),
        )
        torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
        assert y.is_contiguous(memory_format=torch.channels_last)
        (grad,) = torch.autograd.grad(y.sum(), last)
        plain = x.detach().requires_grad_()
        (expected,) = torch.autograd.grad(upfirdn2d_reference(plain, f.to(device), **SETTINGS[name]).sum(), plain)
        torch.testing.assert_close(grad, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", [16, 35])
@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("padding", [1, (2, 1, 3, 0), (-3, 5, 4, -2), 0])
def test_strips_of_channels(device, same_bits_for_all_thread_counts, padding, down, c, dtype):
    """More rows than a band, columns that do not fill the last strip, edges with pixels beyond the image, a NaN inside."""
    x = images(2, c, 71, 133, device=device).to(dtype).to(memory_format=torch.channels_last)
    x[1, 5, 40, 20] = float("nan")
    compute = lambda: upfirdn2d(x, BINOMIAL.to(device), down=down, padding=padding, gain=2.0)  # noqa: E731
    y, exact = (
        compute(),
        upfirdn2d_reference(x.double(), BINOMIAL.double().to(device), down=down, padding=padding, gain=2.0),
    )
    rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y.double(), exact, atol=2e-6, rtol=rounding, equal_nan=True)
    assert y.isnan().sum() > 0 and y.is_contiguous(memory_format=torch.channels_last)
    same_bits_for_all_thread_counts(lambda: compute().nan_to_num())


@pytest.mark.parametrize("planes", [1, 5, 16, 37])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (9, 9), (17, 17), (16, 33), (70, 70)])
@pytest.mark.parametrize("name", ["blur", "up 2", "down 2", "down 2, uneven", "up 3, down 2"])
def test_any_number_of_planes(device, planes, size, name):
    """Small planes are worked on side by side, some of them alone at the end."""
    x = images(1, planes, *size, device=device)
    options = SETTINGS[name] | (dict(padding=5) if size == (1, 1) else {})
    torch.testing.assert_close(
        upfirdn2d(x, BINOMIAL.to(device), **options),
        upfirdn2d_reference(x, BINOMIAL.to(device), **options),
        **TOLERANCE[torch.float32],
    )


def test_wide_rows_are_cut(device):
    for shape, options in (((1, 600, 3, 90), dict(up=2, padding=2)), ((1, 1, 3, 40000), dict(down=2, padding=3))):
        x = images(*shape, device=device).to(memory_format=torch.channels_last)
        y, expected = (
            upfirdn2d(x, BINOMIAL.to(device), **options),
            upfirdn2d_reference(x, BINOMIAL.to(device), **options),
        )
        torch.testing.assert_close(y, expected, **TOLERANCE[torch.float32])


@pytest.mark.skipif("SAGE_FAST_LARGE_TESTS" not in os.environ, reason="needs 13 GiB; set SAGE_FAST_LARGE_TESTS=1")
@pytest.mark.parametrize("last", [False, True])
def test_more_than_2_to_the_31_values(device, last):
    x = torch.zeros(1, 33000, 256, 256, dtype=torch.bfloat16, device=device)
    x[0, -1, -1, -1] = 16
    if last:
        x = torch.zeros(1, 256, 256, 33000, dtype=torch.bfloat16, device=device).permute(0, 3, 1, 2)
        x[0, -1, -1, -1] = 16
    y = upfirdn2d(x, BINOMIAL.to(device), padding=(2, 1, 2, 1))
    assert y[0, -1, -2:, -2:].tolist() == (16 * BINOMIAL[:2, :2]).tolist() and y[0, -2, -1, -1] == 0


def test_memory_layouts(device, laid_out):
    x = laid_out(images(3, 4, 9, 11, device=device))
    for f in (BINOMIAL, BINOMIAL.t(), laid_out(RANDOM[None])[0]):
        torch.testing.assert_close(
            upfirdn2d(x, f.to(device), up=2, padding=2), upfirdn2d_reference(x, f.to(device), up=2, padding=2)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_empty(device, shape, dtype):
    x = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
    y = upfirdn2d(x, BINOMIAL.to(device), up=2, padding=(2, 1, 2, 1))
    assert y.shape == (*shape[:2], 16, 16)
    y.sum().backward()
    assert x.grad.shape == shape


def test_filter_of_float32_in_float64(device):
    """An outer product rounded to float32 is nearly of rank one: in float64 it must not be treated as such."""
    rng, x = torch.Generator().manual_seed(1), images(1, 1, 9, 9, dtype=torch.float64, device=device)
    for side in torch.rand(20, 3, generator=rng):
        f = torch.outer(side, side)
        torch.testing.assert_close(
            upfirdn2d(x, f.to(device)), upfirdn2d_reference(x, f.to(device)), **TOLERANCE[torch.float64]
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_filter_of_another_dtype(device, dtype):
    f, x = torch.tensor([1, 3, 3, 1], dtype=dtype), images(1, 2, 9, 9, device=device)
    assert upfirdn2d(x, f.to(device)).dtype == torch.float32
    torch.testing.assert_close(upfirdn2d(x, f.to(device)), upfirdn2d_reference(x, f.float().to(device)))


@pytest.mark.parametrize("name", SETTINGS)
def test_reference_equals_scipy(name):
    """Zeros between pixels and padding in NumPy, the convolution by SciPy."""
    options = dict(up=1, down=1, padding=0, flip_filter=False, gain=1.0) | SETTINGS[name]
    x, f = images(1, 1, 13, 16, dtype=torch.float64)[0, 0].numpy(), RANDOM.double().numpy()
    left, right, top, bottom = np.broadcast_to(options["padding"], 4)
    wide = np.zeros((13 * options["up"], 16 * options["up"]))
    wide[:: options["up"], :: options["up"]] = x
    canvas = np.pad(wide, ((max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))))
    canvas = canvas[max(-top, 0) : canvas.shape[0] - max(-bottom, 0), max(-left, 0) : canvas.shape[1] - max(-right, 0)]
    filtered = scipy.signal.convolve2d(canvas, f[::-1, ::-1] if options["flip_filter"] else f, mode="valid")
    expected = filtered[:: options["down"], :: options["down"]] * options["gain"]
    result = upfirdn2d_reference(torch.from_numpy(x)[None, None], RANDOM, **SETTINGS[name])
    np.testing.assert_allclose(result[0, 0], expected, atol=1e-14)


@pytest.mark.parametrize("op", [upfirdn2d, upfirdn2d_reference])
def test_equals_scipy_upfirdn_along_both_axes(op):
    side, x = np.array([0.5, -1.0, 2.0, 0.25, 3.0]), images(2, 3, 10, 7, dtype=torch.float64)
    expected = x.numpy()
    for axis in (2, 3):
        expected = scipy.signal.upfirdn(side, expected, up=3, down=2, axis=axis)
    result = op(x, torch.from_numpy(side), up=3, down=2, padding=(4, 2, 4, 2))
    np.testing.assert_allclose(result, expected, atol=1e-13)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_equals_that_of_the_reference(device, name):
    for f in (BINOMIAL, RANDOM):
        x = images(2, 2, 12, 15, device=device).requires_grad_()
        y, expected = (
            upfirdn2d(x, f.to(device), **SETTINGS[name]),
            upfirdn2d_reference(x, f.to(device), **SETTINGS[name]),
        )
        grad = torch.randn_like(expected)
        (ours,), (theirs,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
        torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "name", ["blur", "up 2, uneven", "down 2, uneven", "up 3, down 2", "up 2, crop", "down 2, crop"]
)
def test_gradcheck(device, name):
    x = images(1, 1, 7, 6, dtype=torch.float64, device=device).requires_grad_()
    for f in (BINOMIAL.double(), RANDOM.double()):
        assert torch.autograd.gradcheck(lambda x, f=f: upfirdn2d(x, f.to(device), **SETTINGS[name]), x)
        assert torch.autograd.gradgradcheck(lambda x, f=f: upfirdn2d(x, f.to(device), **SETTINGS[name]) ** 2, x)


def test_opcheck(device):
    x, f = images(2, 2, 5, 6, device=device), BINOMIAL.to(device)
    for layout in (x.requires_grad_(), x.detach().movedim(1, -1).contiguous().movedim(-1, 1)):
        torch.library.opcheck(torch.ops.sage_fast.upfirdn2d.default, (layout, f, 2, 1, 2, 1, 2, 1, False, 4.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("c, size", [(3, (20, 21)), (35, (9, 17)), (2, (65, 70))])
def test_low_precision(device, no_worse_than_plain, dtype, layout, c, size):
    half = images(2, c, *size, device=device).to(dtype).to(memory_format=layout)
    exact, f = half.double(), BINOMIAL.to(device)
    weight = f.to(dtype).expand(c, 1, 4, 4)
    for down in (1, 2):
        options = dict(down=down, padding=2)
        plain = F.conv2d(half, weight, padding=2, stride=down, groups=c)
        no_worse_than_plain(upfirdn2d(half, f, **options), plain, upfirdn2d_reference(exact, f, **options))
    options = dict(up=2, padding=(2, 1, 2, 1), gain=4.0)
    plain = F.conv_transpose2d(half, 4 * weight, stride=2, padding=1, groups=c)
    y = upfirdn2d(half, f, **options)
    no_worse_than_plain(y, plain, upfirdn2d_reference(exact, f, **options))
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_torch(request, device, dtype):
    """Through the identity filter every value comes back; doubled, it is rounded as torch rounds.

    CUDA is built to flush what is too small for the usual digits of float32, in and out; and so round processors to bfloat16
    that have an instruction for it.
    """
    on_cpu = request.node.callspec.params["device"] == "cpu"
    exact = on_cpu and not (dtype == torch.bfloat16 and _native.has_bf16_products())
    flushed = 0.0 if exact else torch.finfo(torch.float32).tiny
    bits = torch.arange(-(2**15), 2**15, device=device).to(torch.int16)
    x = bits.view(dtype).reshape(1, 1, 256, 256)
    one = torch.ones(1, 1, device=device)
    torch.testing.assert_close(upfirdn2d(x, one), x, atol=flushed, rtol=0, equal_nan=True)
    for factor in (1.01, 300.0, 0.003):
        most = flushed * max(factor, 1.0)
        expected = (x.float() * torch.tensor(factor, dtype=torch.float32, device=device)).to(dtype)
        torch.testing.assert_close(upfirdn2d(x, one, gain=factor), expected, atol=most, rtol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["blur", "up 2", "down 2", "up 3, down 2"])
def test_nan_and_infinity_spread_as_in_the_reference(device, name, value, layout):
    for f in (BINOMIAL, RANDOM):
        x = images(1, 2, 9, 9, device=device).to(memory_format=layout)
        x[0, 0, 4, 5] = value
        y, expected = (
            upfirdn2d(x, f.to(device), **SETTINGS[name]),
            upfirdn2d_reference(x, f.to(device), **SETTINGS[name]),
        )
        assert torch.isfinite(y[0, 1]).all()
        special = ~expected.isfinite()
        assert special.any()
        torch.testing.assert_close(y, expected, equal_nan=True)


def test_threads(same_bits_for_all_thread_counts):
    for x in (images(5, 3, 59, 97), images(7, 64, 17, 17)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=layout)
            same_bits_for_all_thread_counts(lambda x=x: upfirdn2d(x, BINOMIAL, up=2, padding=(2, 1, 2, 1)))


def test_upsampling_keeps_a_constant_image(device):
    y = upfirdn2d(torch.ones(1, 1, 8, 8, device=device), BINOMIAL.to(device), up=2, padding=(2, 1, 2, 1), gain=4.0)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones(1, 1, 12, 12, device=device))


def test_sizes_follow_the_documented_formula():
    y = upfirdn2d(torch.zeros(1, 1, 10, 12), torch.ones(3, 5), up=3, down=2, padding=(1, 2, 3, 4))
    assert y.shape[2:] == ((10 * 3 + 7 - 3) // 2 + 1, (12 * 3 + 3 - 5) // 2 + 1)


@pytest.mark.parametrize("op", [upfirdn2d, upfirdn2d_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 8, 8)), r"x must be floating point images \[N, C, H, W\], got torch.float32 \[3, 8, 8\]"),
        (dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "got torch.uint8"),
        (dict(f=torch.zeros(33)), r"f must have shape \[k\] or \[kh, kw\] with sides from 1 to 32, got \[33\]"),
        (dict(f=torch.zeros(1, 4, 4)), r"got \[1, 4, 4\]"),
        (dict(f=torch.zeros(0)), r"got \[0\]"),
        (dict(f=torch.ones(4, requires_grad=True)), "f must not require a gradient.*pass f.detach"),
        (dict(up=0), "up must be a positive integer below 2\\^31, got 0"),
        (dict(down=1.5), "down must be a positive integer below 2\\^31, got 1.5"),
        (dict(up=True), "up must be a positive integer below 2\\^31, got True"),
        (dict(up=2**62, padding=20), "up must be a positive integer below 2\\^31, got 4611686018427387904"),
        (dict(padding=2**40), "padding must be .*, each at most 65536, got 1099511627776"),
        (dict(f=torch.ones(4, dtype=torch.complex64)), "f must be real, .* got torch.complex64"),
        (dict(padding=2**16 + 1, down=2**16), "padding must be .*, each at most 65536, got 65537"),
        (dict(padding=2**28, down=2**28), "padding must be .*, each at most 65536, got 268435456"),
        (dict(flip_filter="no"), "flip_filter must be True or False, got 'no'"),
        (dict(padding=(1, 1)), r"padding must be one integer or \(left, right, top, bottom\), each at most 65536, got \(1, 1\)"),
        (dict(padding=1.5), "padding must be .*, got 1.5"),
        (dict(padding=(1, 1, 0.5, 1)), r"padding must be .*, got \(1, 1, 0.5, 1\)"),
        (dict(padding=-3), r"padding \[-3, -3, -3, -3\] leaves images of 2 x 2 px, expected at least the filter's 4 x 4"),
        (dict(x=torch.zeros(1, 3, 0, 8)), r"x is \[1, 3, 0, 8\]"),
    ],
)  # fmt: skip
def test_bad_input(op, change, message):
    arguments = dict(x=torch.zeros(1, 3, 8, 8), f=BINOMIAL) | change
    with pytest.raises(InputError, match=message):
        op(**arguments)


def test_the_most_padding_there_may_be(device):
    """One output meets the image's corner, the others zeros alone; more padding the kernel refuses by itself, too."""
    x, f = torch.ones(1, 1, 8, 8, device=device), torch.ones(2, 2, device=device)
    y = upfirdn2d(x, f, padding=2**16, down=2**16)
    assert y.tolist() == [[[[0, 0, 0], [0, 4, 0], [0, 0, 0]]]]
    with pytest.raises(ValueError, match="padding must be at most 2\\^16"):
        torch.ops.sage_fast.upfirdn2d(x, f, 1, 2**28, *[2**28] * 4, False, 1.0)
