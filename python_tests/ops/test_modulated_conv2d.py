"""modulated_conv2d: activations scaled against weights scaled, both against SciPy, derivatives, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.ops import modulated_conv2d, modulated_conv2d_reference

FIR = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64
WAYS = {"same": dict(), "up": dict(up=2, resample_filter=FIR), "down": dict(down=2, resample_filter=FIR)}


def settings(way: str, device: str) -> dict[str, object]:
    """What belongs to a way, with its filter where the images are."""
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in WAYS[way].items()}


def arguments(n=2, c_in=3, c_out=4, k=3, size=(9, 7), dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """x [N, C_in, H, W], weight [C_out, C_in, k, k], style [N, C_in]."""
    rng = torch.Generator().manual_seed(n + c_in + k)
    shapes = (n, c_in, *size), (c_out, c_in, k, k), (n, c_in)
    return [torch.randn(shape, generator=rng, dtype=dtype).to(device) for shape in shapes]


def scipy_modulated(x, weight, style, demodulate, way) -> np.ndarray:
    """Eq. 1 and 3 in NumPy; pixels moved apart and picked by slices, every convolution by SciPy."""
    weight = weight * style[None, :, None, None]
    if demodulate:
        weight = weight / np.sqrt((weight**2).sum((1, 2, 3), keepdims=True) + 1e-8)
    f, (h, w), k = FIR.double().numpy(), x.shape[1:], weight.shape[2]

    def convolve(images, kernels):  # cross-correlation, as networks have it
        return np.stack([sum(scipy.signal.correlate2d(i, c, "full") for i, c in zip(images, row)) for row in kernels])

    if way == "up":
        wide = np.zeros((len(x), 2 * h, 2 * w))
        wide[:, ::2, ::2] = x
        # transposed convolution: the flipped kernel
        y = np.stack([scipy.signal.convolve2d(plane, 4 * f) for plane in convolve(wide, weight[:, :, ::-1, ::-1])])
        first = (y.shape[1] - 2 * h - 1) // 2
        return y[:, first : first + 2 * h, first : first + 2 * w]
    if way == "down":
        blurred = np.stack([scipy.signal.convolve2d(plane, f) for plane in x])
        y = convolve(blurred, weight)
        first = k + 2 - (k + 2) // 2  # the whole kernel has k + 3 rows; half of the rows beyond 2 lie before the image
        return y[:, first : first + h : 2, first : first + w : 2][:, : h // 2, : w // 2]
    return convolve(x, weight)[:, k // 2 : k // 2 + h, k // 2 : k // 2 + w]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("way", WAYS)
def test_equals_reference(device, way, k, demodulate, dtype):
    for size in ((59, 97), (4, 4), (2, 3)):
        x, weight, style = arguments(k=k, size=size, dtype=dtype, device=device)
        options = settings(way, device) | dict(demodulate=demodulate)
        expected = modulated_conv2d_reference(x, weight, style, **options)
        result = modulated_conv2d(x, weight, style, **options)
        torch.testing.assert_close(result, expected, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("n", [1, 2])
def test_mixing_channels_keeps_the_layout(device, layout, n):
    """The layer to the image: 1 x 1 without demodulation, images and gradients lie in memory as x does."""
    x, weight, style = arguments(n, 8, 3, k=1, dtype=torch.float64, device=device)
    inputs = [x.contiguous(memory_format=layout).requires_grad_(), weight.requires_grad_(), style.requires_grad_()]
    y = modulated_conv2d(*inputs, demodulate=False)
    expected = modulated_conv2d_reference(*inputs, demodulate=False)
    torch.testing.assert_close(y, expected)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view_as(y)
    gradients = torch.autograd.grad(y, inputs, grad.contiguous(memory_format=layout))
    for ours, want in zip(gradients, torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(ours, want)
    assert y.is_contiguous(memory_format=layout) and gradients[0].is_contiguous(memory_format=layout)
    assert torch.autograd.gradgradcheck(lambda *tensors: modulated_conv2d(*tensors, demodulate=False), inputs)
    assert modulated_conv2d(inputs[0][:0], weight, style[:0], demodulate=False).shape == (0, 3, 9, 7)


def test_mixing_channels_under_vmap(device):
    x, weight, style = arguments(6, 8, 3, k=1, dtype=torch.float64, device=device)
    each = torch.func.vmap(lambda x, style: modulated_conv2d(x, weight, style, demodulate=False))
    result = each(x.unflatten(0, (3, 2)), style.unflatten(0, (3, 2))).flatten(0, 1)
    torch.testing.assert_close(result, modulated_conv2d(x, weight, style, demodulate=False))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_of_each_samples_own(device, way, k, demodulate):
    x, weight, style = arguments(n=3, k=k, size=(8, 6), dtype=torch.float64, device=device)
    weights = weight * torch.tensor([1.0, -2.0, 0.5], device=device, dtype=torch.float64).view(3, 1, 1, 1, 1)
    weights = weights + torch.linspace(-1, 1, weights.numel(), device=device, dtype=torch.float64).view_as(weights)
    options = settings(way, device) | dict(demodulate=demodulate)
    expected = torch.cat([modulated_conv2d(x[i : i + 1], weights[i], style[i : i + 1], **options) for i in range(3)])
    torch.testing.assert_close(modulated_conv2d(x, weights, style, **options), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        modulated_conv2d_reference(x, weights, style, **options), expected, atol=1e-10, rtol=1e-10
    )
    with pytest.raises(InputError, match="one for each of the 2 samples"):
        modulated_conv2d(x[:2], weights, style[:2], **options)


def test_memory_layouts(device, laid_out):
    tensors = [laid_out(t) for t in arguments(n=3, device=device)]
    for way in WAYS:
        options = settings(way, device)
        expected = modulated_conv2d_reference(*tensors, **options)
        torch.testing.assert_close(modulated_conv2d(*tensors, **options), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", [modulated_conv2d, modulated_conv2d_reference])
@pytest.mark.parametrize("way, size", [("same", (8, 6)), ("up", (16, 12)), ("down", (4, 3))])
def test_sizes_with_and_without_images(op, way, size):
    for n in (0, 1, 2):
        x, weight, style = arguments(n=n, size=(8, 6))
        for shared in (True, False):
            x = x.detach().requires_grad_()
            own = weight.detach().clone() if shared else weight.expand(n, -1, -1, -1, -1).clone()
            y = op(x, own.requires_grad_(), style, **WAYS[way])
            assert y.shape == (n, 4, *size)
            y.sum().backward()
            assert x.grad.shape == x.shape and own.grad.shape == own.shape


@pytest.mark.parametrize("op", [modulated_conv2d, modulated_conv2d_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "k, way, size", [(1, "same", 8), (3, "same", 8), (3, "up", 16), (1, "down", 4), (3, "down", 4)]
)
def test_empty(device, k, way, size, dtype, op):
    """No images; the least images there are have a pixel, or two a side to go down."""
    x, weight, style = arguments(n=0, k=k, size=(8, 8), dtype=dtype, device=device)
    options = settings(way, device)
    y = op(x, weight, style, **options)
    assert y.shape == (0, 4, size, size) and y.dtype == dtype
    least = 2 if way == "down" else 1
    x, weight, style = arguments(k=k, size=(least, least), dtype=dtype, device=device)
    assert op(x, weight, style, **options).shape[2:] == (least * size // 8,) * 2


@pytest.mark.parametrize("op", [modulated_conv2d, modulated_conv2d_reference])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_equals_scipy(op, way, demodulate):
    x, weight, style = arguments(dtype=torch.float64, size=(8, 6))
    result = op(x, weight, style, demodulate=demodulate, **WAYS[way])
    for y, image, s in zip(result, x.numpy(), style.numpy()):
        np.testing.assert_allclose(y, scipy_modulated(image, weight.numpy(), s, demodulate, way), atol=1e-12)


def test_a_style_of_ones_is_a_convolution():
    x, weight, style = arguments()
    y = modulated_conv2d(x, weight, torch.ones_like(style), demodulate=False)
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1))


def test_demodulation_takes_out_the_size_of_the_style():
    x, weight, style = arguments(dtype=torch.float64)
    torch.testing.assert_close(
        modulated_conv2d(x, weight, style * 100, eps=0.0), modulated_conv2d(x, weight, style, eps=0.0)
    )


@pytest.mark.parametrize("way", WAYS)
def test_each_image_has_its_own_style(way):
    x, weight, style = arguments(n=3, dtype=torch.float64)
    together = modulated_conv2d(x, weight, style, **WAYS[way])
    alone = torch.cat([modulated_conv2d(x[i : i + 1], weight, style[i : i + 1], **WAYS[way]) for i in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_those_of_the_reference(device, way):
    tensors = [t.requires_grad_() for t in arguments(dtype=torch.float64, device=device)]
    ours, theirs = (op(*tensors, **settings(way, device)) for op in (modulated_conv2d, modulated_conv2d_reference))
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(device, way, demodulate):
    tensors = arguments(n=1, c_in=2, c_out=1, size=(4, 2), dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in tensors]
    options = settings(way, device) | dict(demodulate=demodulate)
    assert torch.autograd.gradcheck(lambda *t: modulated_conv2d(*t, **options), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: modulated_conv2d(*t, **options), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_low_precision(no_worse_than_plain, way, dtype):
    """The plain form is the printed one: in low precision throughout, a weight for each image."""
    x, weight, style = (t.to(dtype) for t in arguments(n=4, c_in=16))
    exact = modulated_conv2d_reference(x.double(), weight.double(), style.double(), **WAYS[way])
    plain = modulated_conv2d_reference(x, weight, style, **WAYS[way])
    no_worse_than_plain(modulated_conv2d(x, weight, style, **WAYS[way]), plain, exact)


def test_large_styles_do_not_overflow_half_precision():
    """Demodulation divides the style's size out again; until then it must not leave float16, whose end is 65504."""
    x, weight, style = arguments(n=2, c_in=16)
    exact = modulated_conv2d(x, weight, style * 3e4)
    y = modulated_conv2d(x.half(), weight, style * 3e4)
    torch.testing.assert_close(y.float(), exact, atol=2e-2, rtol=2e-2)
    y = modulated_conv2d(x.half(), weight.half(), (style * 1e4).half())
    torch.testing.assert_close(y.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("way", WAYS)
def test_nan_and_infinity_stay_in_their_image(device, way):
    for value in (float("nan"), float("inf")):
        x, weight, style = arguments(device=device)
        x[0, 1, 4, 3] = value
        y, expected = (
            op(x, weight, style, **settings(way, device)) for op in (modulated_conv2d, modulated_conv2d_reference)
        )
        assert not y[0].isfinite().all()
        assert torch.equal(y.isfinite(), expected.isfinite()) and y[1].isfinite().all()


@pytest.mark.parametrize("op", [modulated_conv2d, modulated_conv2d_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 8, 8)), r"x must be floating point \[N, C_in, H, W\], got torch.float32 \[3, 8, 8\]"),
        (dict(weight=torch.zeros(4, 3, 2, 2)), r"k odd, got \[4, 3, 2, 2\]"),
        (dict(weight=torch.zeros(4, 3, 3, 1)), r"k odd, got \[4, 3, 3, 1\]"),
        (dict(weight=torch.zeros(4, 5, 3, 3)), "x must have the 5 channels of weight, got 3"),
        (dict(weight=torch.zeros(4, 3, 3, 3, device="meta")), "weight must be floating point on cpu, .* on meta"),
        (dict(style=torch.zeros(1, 3, dtype=torch.int64)), "style must be floating point on cpu, .* got torch.int64"),
        (dict(style=torch.zeros(2, 5)), r"style must have shape \[1, 3\], one factor per input channel, got \[2, 5\]"),
        (dict(x=torch.zeros(1, 3, 0, 0)), r"x must have at least 1 rows and columns with down=1, got \[1, 3, 0, 0\]"),
        (dict(x=torch.zeros(1, 3, 0, 0), up=2, resample_filter=FIR), "x must have at least 1 rows and columns"),
        (dict(x=torch.zeros(1, 3, 1, 8), down=2, resample_filter=FIR), "x must have at least 2 rows .* with down=2"),
        (dict(weight=torch.zeros(0, 3, 3, 3)), "weight must have at least one channel on either side, got"),
        (
            dict(x=torch.zeros(1, 0, 8, 8), weight=torch.zeros(4, 0, 3, 3), style=torch.zeros(1, 0)),
            "weight must have at least",
        ),
        (dict(up=2, resample_filter=torch.ones(0, 4)), r"resample_filter must have shape .* got \[0, 4\]"),
        (dict(up=2, resample_filter=FIR.clone().requires_grad_()), "pass resample_filter.detach"),
        (dict(up=True), "up and down must be .* got True and 1"),
        (dict(up=3), "up and down must be 1 and 1, 2 and 1, or 1 and 2, got 3 and 1"),
        (dict(up=2, down=2, resample_filter=FIR), "got 2 and 2"),
        (dict(up=2), "resample_filter is needed with up=2 or down=2"),
        (dict(resample_filter=FIR), "resample_filter is ignored without up=2 or down=2; leave it out"),
        (dict(down=2, resample_filter=FIR[0]), r"resample_filter must have shape \[kh, kw\], got \[4\]"),
    ],
)
def test_bad_input(op, change, message):
    given = dict(x=torch.zeros(1, 3, 8, 8), weight=torch.zeros(4, 3, 3, 3), style=torch.zeros(1, 3)) | change
    with pytest.raises(InputError, match=message):
        op(**given)
