"""3 x 3 convolutions in the transform's domain: against PyTorch, SciPy, and their own derivatives."""

from __future__ import annotations

from functools import partial

import pytest
import scipy.signal
import torch
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops import conv3x3, conv3x3_reference, conv3x3_transposed, conv3x3_transposed_reference

SHAPES = [(4, 16, 32, 8), (2, 48, 16, 12), (3, 32, 80, 20), (9, 16, 16, 16), (1, 64, 16, 64), (20, 32, 48, 4)]
#                                                                             N, C_in, C_out, side of the smaller image
KINDS = ["stride 1", "stride 2", "transposed"]


def problem(n, c_in, c_out, side, kind="stride 1"):
    """Images, weight, a gradient for the result, and the two functions."""
    rng = torch.Generator().manual_seed(n + c_in + c_out + side)
    wide = 2 * side + 1
    x_side, y_side = {"stride 1": (side, side), "stride 2": (wide, side), "transposed": (side, wide)}[kind]
    x, grad = torch.randn(n, c_in, x_side, x_side, generator=rng), torch.randn(n, c_out, y_side, y_side, generator=rng)
    weight = torch.randn(c_out, c_in, 3, 3, generator=rng) / (3 * c_in**0.5)
    if kind == "transposed":
        return x, weight.transpose(0, 1), grad, conv3x3_transposed, conv3x3_transposed_reference
    stride = int(kind[-1])
    return x, weight, grad, partial(conv3x3, stride=stride), partial(conv3x3_reference, stride=stride)


@pytest.fixture
def cpu_kernel(device):
    if device != "cpu":
        pytest.skip("conv3x3 has a kernel on the CPU only: cuDNN has these transforms of its own")
    return device


@pytest.fixture
def native_calls(monkeypatch):
    """Names of the native ops that run."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Spy(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    spy = Spy()
    spy.names = []
    return spy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_float64(cpu_kernel, native_calls, shape, kind):
    x, weight, grad, conv, reference = problem(*shape, kind)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    with native_calls:
        y = conv(*ours)
    assert any("conv3x3" in name for name in native_calls.names)
    expected = reference(*exact)
    pairs = [(y, expected)]
    pairs += zip(torch.autograd.grad(y, ours, grad), torch.autograd.grad(expected, exact, grad.double()))
    for got, want in pairs:
        assert got.shape == want.shape
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 5e-6


def test_bfloat16_images_with_float32_weights(cpu_kernel, no_worse_than_plain):
    x, weight, grad, *_ = problem(4, 32, 32, 16)
    x, grad = (t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, grad))
    op = torch.ops.sage_fast
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    plain = [x.clone().requires_grad_(), weight.bfloat16().requires_grad_()]
    results = {}
    for name, (images, taps) in (("exact", exact), ("plain", plain)):
        y = F.conv2d(images, taps, padding=1)
        results[name] = (y, *torch.autograd.grad(y, (images, taps), grad.to(y.dtype)))
    weight = plain[1].detach().float()
    exact_weight = F.conv2d(x.double(), weight.double(), padding=1)
    no_worse_than_plain(op.conv3x3(x, weight, 1), results["plain"][0], exact_weight)
    exact_grad = torch.autograd.grad(F.conv2d(exact[0], weight.double(), padding=1), exact[0], grad.double())[0]
    no_worse_than_plain(op.conv3x3_transposed(grad, weight, 1), results["plain"][1], exact_grad)
    gradient = op.conv3x3_taps(x, grad, 1)
    assert gradient.dtype == torch.float32
    assert (gradient.double() - results["exact"][2]).abs().max() < 5e-6 * results["exact"][2].abs().max()


@pytest.fixture
def bf16_products(cpu_kernel):
    if not _native.has_bf16_products():
        pytest.skip("this processor does not multiply bfloat16")


def strided_problem(n, c_in, c_out, side):
    """bfloat16 images of either size, channels last, and a weight that bfloat16 holds."""
    wide, weight, narrow, *_ = problem(n, c_in, c_out, side, "stride 2")
    last = torch.channels_last
    return (*(t.bfloat16().contiguous(memory_format=last) for t in (wide, narrow)), weight.bfloat16().float())


#: small and large, several images a band and several bands an image, rows of cells that end within a thread's part
STRIDED_SHAPES = [(2, 32, 64, 4), (5, 64, 32, 12), (3, 96, 64, 20), (40, 32, 32, 4), (1, 256, 256, 4), (2, 32, 32, 100)]


@pytest.mark.parametrize("shape", STRIDED_SHAPES)
def test_strided_bfloat16(bf16_products, shape, no_worse_than_plain):
    x, y, weight = strided_problem(*shape)
    op, taps = torch.ops.sage_fast, weight.bfloat16()
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    images, gradient = torch.autograd.grad(F.conv2d(*exact, stride=2), exact, y.double())
    no_worse_than_plain(op.conv3x3(x, weight, 2), F.conv2d(x, taps, stride=2), F.conv2d(*exact, stride=2).detach())
    no_worse_than_plain(op.conv3x3_transposed(y, weight, 2), F.conv_transpose2d(y, taps, stride=2), images)
    ours = op.conv3x3_taps(x, y, 2)
    assert ours.dtype == torch.float32
    assert (ours.double() - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_strided_bfloat16_by_the_public_ops(bf16_products, native_calls, kind):
    """Under autocast: the kernel runs forward and back, the gradient of float32 weights is float32."""
    x, weight, grad, conv, reference = problem(4, 32, 64, 8, kind)
    inputs = [t.clone().requires_grad_() for t in (x, weight)]
    with native_calls:
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(*inputs)
        gradients = torch.autograd.grad(y, inputs, grad.bfloat16())
    names = {name.removeprefix("sage_fast::") for name in native_calls.names if "conv" in name}
    assert names == {"conv3x3", "conv3x3_transposed", "conv3x3_taps"}
    assert y.dtype == torch.bfloat16 and [g.dtype for g in gradients] == [torch.float32] * 2
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = reference(*exact)
    for got, want in zip((y, *gradients), (expected, *torch.autograd.grad(expected, exact, grad.double()))):
        assert (got.double() - want).abs().max() < 1e-2 * want.abs().max()


def test_second_derivatives_of_strided_bfloat16(bf16_products):
    """As R1 takes them, on numbers that bfloat16 holds; sums of squares leave rounding little to do."""
    x, _, weight = strided_problem(4, 32, 64, 8)

    def penalty(x, weight, conv):
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        (gx,) = torch.autograd.grad(conv(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), (x, weight))

    ours = penalty(x, weight, partial(conv3x3, stride=2))
    exact = penalty(x.double(), weight.double(), partial(conv3x3_reference, stride=2))
    for got, want in zip(ours, exact):
        assert (got.double() - want).abs().max() < 2e-2 * want.abs().max()


def test_strided_bfloat16_has_the_same_bits_for_all_thread_counts(bf16_products, same_bits_for_all_thread_counts):
    x, y, weight = strided_problem(9, 32, 96, 16)
    op = torch.ops.sage_fast

    def compute():
        parts = op.conv3x3(x, weight, 2), op.conv3x3_transposed(y, weight, 2), op.conv3x3_taps(x, y, 2)
        return torch.cat([part.float().flatten() for part in parts])

    same_bits_for_all_thread_counts(compute)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_strided_bfloat16_keeps_nan_and_infinity_where_they_belong(bf16_products, value):
    x, y, weight = strided_problem(2, 32, 32, 8)
    op = torch.ops.sage_fast
    x[0, 3, 4, 4], y[0, 3, 2, 2] = value, value
    bad = ~op.conv3x3(x, weight, 2).isfinite()
    assert bad[0, :, 1:3, 1:3].all() and bad.sum() == 32 * 4
    bad = ~op.conv3x3_transposed(y, weight, 2).isfinite()
    assert bad[0, :, 4:7, 4:7].all() and bad.sum() == 32 * 9
    y[0, 3, 2, 2] = 1
    bad = ~op.conv3x3_taps(x, y, 2).isfinite()  # even rows and columns of x meet the outer taps
    assert bad[:, 3, ::2, ::2].all() and bad.sum() == 32 * 4


def test_strided_bfloat16_without_the_products(cpu_kernel, native_calls, monkeypatch):
    x, _, weight = strided_problem(2, 32, 32, 8)
    monkeypatch.setattr(_native.load(), "bf16_products", False)
    with native_calls:
        y = conv3x3(x, weight, stride=2)
    assert y.dtype == torch.bfloat16 and not any("conv3x3" in name for name in native_calls.names)


def test_the_kernel_is_taken_where_it_pays(cpu_kernel, native_calls):
    x, weight, *_ = problem(*SHAPES[0])

    def kernel_runs(call):
        native_calls.names.clear()
        with native_calls:
            y = call()
        return y, any("conv3x3" in name for name in native_calls.names)

    assert kernel_runs(lambda: conv3x3(x, weight))[1]
    for other in (x[..., :4, :4], x[..., :7], x[:, :8], x.double(), x[..., :7, :7]):
        y, runs = kernel_runs(lambda other=other: conv3x3(other, weight[:, : other.shape[1]].to(other.dtype)))
        assert not runs and y.shape == (len(x), 32, *other.shape[2:])
    with torch.autocast("cpu", torch.bfloat16):
        y, runs = kernel_runs(lambda: conv3x3(x, weight))
        assert runs and y.dtype == torch.bfloat16
        y, runs = kernel_runs(lambda: conv3x3(x[..., :7, :7], weight, stride=2))
        assert not runs and y.dtype == torch.bfloat16 and y.shape[2:] == (3, 3)
    assert conv3x3(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [8, 7])  # by the kernels, and by PyTorch
@pytest.mark.parametrize("kind", KINDS)
def test_scale_is_the_weights(cpu_kernel, kind, side, dtype):
    """A power of two changes no digit: the result and all gradients are those of the scaled weight, to the bit."""
    x, weight, grad, conv, reference = problem(4, 32, 64, side, kind)
    x, grad = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, grad))
    x.requires_grad_()
    weight.requires_grad_()
    one, other = conv(x, weight, scale=0.125), conv(x, weight * 0.125)
    assert torch.equal(one, other)
    firsts = [torch.autograd.grad(y, (x, weight), grad, create_graph=True) for y in (one, other)]
    seconds = [torch.autograd.grad([g.float().square().sum() for g in first], (x, weight)) for first in firsts]
    for ours, want in zip((*firsts[0], *seconds[0]), (*firsts[1], *seconds[1])):
        assert ours.dtype == want.dtype and torch.equal(ours, want)
    exact = reference(x.double(), weight.double(), scale=0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (conv(x, weight, scale=0.3).double() - exact).abs().max() < tolerance * exact.abs().max()
    with pytest.raises(InputError, match="scale must be a number, got 'much'"):
        conv(x, weight, scale="much")


def test_equals_scipy(cpu_kernel):
    x, weight, *_ = problem(4, 16, 16, 8)
    y = conv3x3(x, weight)[0, 5].numpy()
    planes = zip(x[0].double().numpy(), weight[5].double().numpy())
    expected = sum(scipy.signal.correlate(image, taps, mode="same") for image, taps in planes)
    assert abs(y - expected).max() < 1e-5


def test_layouts_and_empty_batches(cpu_kernel, laid_out):
    x, weight, *_ = problem(4, 16, 32, 8)
    x = laid_out(x)
    torch.testing.assert_close(conv3x3(x, weight), F.conv2d(x, weight, padding=1), atol=5e-6, rtol=5e-6)
    empty = conv3x3(x[:0], weight.clone().requires_grad_())
    assert empty.shape == (0, 32, 8, 8)
    empty.sum().backward()


def test_a_sample_does_not_depend_on_the_batch(cpu_kernel):
    x, weight, *_ = problem(9, 16, 16, 16)
    whole = conv3x3(x, weight)
    assert torch.equal(conv3x3(x[4:5], weight)[0], whole[4])


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_all_thread_counts(same_bits_for_all_thread_counts, kind):
    x, weight, grad, conv, _ = problem(9, 16, 48, 16, kind)

    def compute():
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = conv(*inputs)
        return torch.cat([t.flatten() for t in (y, *torch.autograd.grad(y, inputs, grad))])

    same_bits_for_all_thread_counts(compute)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(cpu_kernel, kind):
    """The gradient's gradient, as R1 needs it, against float64."""
    x, weight, grad, conv, reference = problem(4, 16, 32, 8, kind)

    def penalty(x, weight, conv):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = conv(x, weight).square() * grad.to(x.dtype)
        gx, gw = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(gx.square().sum() + gw.square().sum(), (x, weight))

    ours = penalty(x.clone(), weight.clone(), conv)
    exact = penalty(x.double(), weight.double(), reference)
    for got, want in zip(ours, exact):
        assert (got.double() - want).abs().max() / want.abs().max() < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(cpu_kernel, stride):
    x, weight, grad, *_ = problem(2, 16, 32, 8, f"stride {stride}")
    x, grad = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, grad))
    torch.library.opcheck(torch.ops.sage_fast.conv3x3, (x, weight.requires_grad_(), stride))
    torch.library.opcheck(torch.ops.sage_fast.conv3x3_transposed, (grad, weight, stride))
    torch.library.opcheck(torch.ops.sage_fast.conv3x3_taps, (x, grad, stride))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_near(cpu_kernel, value):
    x, weight, *_ = problem(2, 16, 16, 16)
    clean = conv3x3(x, weight)
    x[0, 3, 2, 2] = value
    y = conv3x3(x, weight)
    assert not y[0, :, 1:4, 1:4].isfinite().any()
    assert torch.equal(y[1], clean[1]) and torch.equal(y[0, :, 8:, 8:], clean[0, :, 8:, 8:])


def test_bad_input(cpu_kernel):
    x, weight, grad, *_ = problem(2, 16, 32, 8)
    with pytest.raises(InputError, match=r"x must be floating point \[N, C_in, H, W\]"):
        conv3x3(x[0], weight)
    with pytest.raises(InputError, match=r"weight must have shape \[C_out, 16, 3, 3\]"):
        conv3x3(x, weight[:, :8])
    with pytest.raises(InputError, match=r"weight must have shape \[16, C_out, 3, 3\]"):
        conv3x3_transposed(x, weight)
    for stride in (3, True, 2.0):
        with pytest.raises(InputError, match=f"stride must be 1 or 2, got {stride}"):
            conv3x3(x, weight, stride=stride)
    op, last = torch.ops.sage_fast.conv3x3, x.contiguous(memory_format=torch.channels_last)
    for args, message in (
        ((x, weight, 1), "channels last"),
        ((last, weight[:, :2], 1), "with the channels of x"),
        ((last, weight.transpose(2, 3), 1), "taps side by side"),
        ((last, weight.double(), 1), "weight must be float32"),
        ((last, weight[:9], 1), "multiples of 16"),
        ((last, weight, 2), "sides of x must be odd|multiples of 4"),
        ((last, weight, 3), "stride must be 1 or 2"),
        ((last.double(), weight, 1), "images must be float32 or bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*args)
    with pytest.raises(ValueError, match="with the channels of y"):
        torch.ops.sage_fast.conv3x3_transposed(last, weight, 1)
    with pytest.raises(ValueError, match="y must match x"):
        torch.ops.sage_fast.conv3x3_taps(last, grad[:1].contiguous(memory_format=torch.channels_last), 1)


@pytest.mark.parametrize("channels", [3, 16])  # by PyTorch, and through the transform's domain
def test_too_little_for_a_result(channels):
    weight = torch.zeros(channels, channels, 3, 3)
    for op in (conv3x3, conv3x3_reference):
        for size, stride, least in (((0, 0), 1, 1), ((0, 8), 1, 1), ((0, 0), 2, 3), ((1, 1), 2, 3), ((2, 9), 2, 3)):
            with pytest.raises(InputError, match=f"x must have at least {least} rows and columns, got"):
                op(torch.zeros(2, channels, *size), weight, stride=stride)
        assert op(torch.zeros(2, channels, 3, 4), weight, stride=2).shape == (2, channels, 1, 1)
        for bad in (weight[:0], weight[:, :0]):
            with pytest.raises(InputError, match="weight must have at least one channel on either side, got"):
                op(torch.zeros(2, bad.shape[1], 8, 8), bad)
    for op in (conv3x3_transposed, conv3x3_transposed_reference):
        with pytest.raises(InputError, match="x must have at least 1 rows and columns, got"):
            op(torch.zeros(2, channels, 0, 0), weight)
        for bad in (weight[:0], weight[:, :0]):
            with pytest.raises(InputError, match="weight must have at least one channel on either side, got"):
                op(torch.zeros(2, bad.shape[0], 8, 8), bad)
