"""bias_act: kernel against reference, reference against NumPy and SciPy, derivatives, and what bad input gets."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import scipy.special
import torch

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator
from sage_fast.ops import bias_act, bias_act_reference
from sage_fast.ops.bias_act import ACTIVATIONS

WITH_KERNELS = ("linear", "relu", "lrelu")  # and a kink: derivatives jump there
SMOOTH = ("tanh", "elu", "selu", "softplus", "sigmoid", "swish")
OPTIONS = [dict(), dict(clamp=0.8), dict(gain=0.5), dict(gain=3.0, clamp=1.0), dict(gain=-1.0), dict(clamp=0.0)]
NUMPY = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "lrelu": lambda x: np.where(x > 0, x, 0.2 * x),
    "tanh": np.tanh,
    "sigmoid": scipy.special.expit,
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "swish": lambda x: x * scipy.special.expit(x),
}


def normal(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).to(device)


def away_from_kinks(x: torch.Tensor) -> torch.Tensor:
    """Values at least 0.05 from 0 and from 1 in size: where the slope of relu or a clamp at 1 is about to change."""
    return (x.sign() * (x.abs() + 0.05)) * torch.where((x.abs() > 0.85) & (x.abs() < 1.05), 1.3, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape, dim", [((2, 5, 59, 97), 1), ((59, 97), 1), ((97,), 0), ((3, 7, 5), -1), ((3, 7, 5), 0)]
)
def test_kernel_equals_reference(device, shape, dim, act, options, dtype):
    x, b = normal(*shape, dtype=dtype, device=device), normal(shape[dim], dtype=dtype, device=device)
    for bias in (b, None):
        expected = bias_act_reference(x, bias, dim, act, **options)
        torch.testing.assert_close(bias_act(x, bias, dim, act, **options), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 1.5, -0.3])
def test_slopes(device, alpha):
    """A negative slope makes the output's sign say nothing about the input's: value and gradient still hold."""
    x = normal(5, 4, device=device).requires_grad_()
    y, expected = (op(x, act="lrelu", alpha=alpha, gain=2.0) for op in (bias_act, bias_act_reference))
    torch.testing.assert_close(y, expected)
    (ours,), (theirs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(y, 2 * torch.where(x > 0, x, alpha * x))


def test_memory_layouts(device, laid_out):
    x, b = laid_out(normal(3, 4, 6, 5, device=device)), laid_out(normal(2, 4, device=device))[0]
    torch.testing.assert_close(bias_act(x, b, act="lrelu"), bias_act_reference(x, b, act="lrelu"))
    x.requires_grad_()
    grad = laid_out(torch.ones_like(x))
    (ours,), (theirs,) = (torch.autograd.grad(op(x, b, act="lrelu"), x, grad) for op in (bias_act, bias_act_reference))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(device, shape, dtype):
    x, b = (torch.zeros(s, device=device, dtype=dtype, requires_grad=True) for s in (shape, shape[1]))
    y = bias_act(x, b, act="lrelu")
    y.sum().backward()
    assert y.dtype == dtype and y.shape == x.grad.shape == shape and b.grad.tolist() == [0] * shape[1]


@pytest.mark.skipif("SAGE_FAST_LARGE_TESTS" not in os.environ, reason="needs 13 GiB; set SAGE_FAST_LARGE_TESTS=1")
@pytest.mark.parametrize("last", [False, True])
def test_more_than_2_to_the_31_values(device, last):
    """The last values of all, and a bias that differs from channel to channel."""
    x = torch.zeros(1, 33000, 256, 256, dtype=torch.bfloat16, device=device)
    if last:
        x = torch.zeros(1, 256, 256, 33000, dtype=torch.bfloat16, device=device).permute(0, 3, 1, 2)
    b = torch.arange(33000, device=device, dtype=torch.float32) % 7 - 3
    x[0, -1, -1, -1] = 16
    y = bias_act(x, b, act="relu", gain=2.0, clamp=30.0)
    del x
    ends = y[0, -8:, -1, -1].float()
    expected = (2 * b[-8:].relu()).clone()
    expected[-1] = min(30.0, 2 * (16 + float(b[-1])))
    assert torch.equal(ends, expected) and torch.equal(y[0, :, 0, 0].float(), 2 * b.relu())


def test_a_number(device):
    x = torch.tensor(-2.0, device=device)
    torch.testing.assert_close(bias_act(x, act="lrelu"), x * 0.2 * math.sqrt(2))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_reference_equals_numpy(act):
    x, b = normal(3, 4, 5, dtype=torch.float64), normal(4, dtype=torch.float64)
    expected = np.clip(NUMPY[act](x.numpy() + b.numpy()[None, :, None]) * 1.7, -0.9, 0.9)
    np.testing.assert_allclose(bias_act_reference(x, b, act=act, gain=1.7, clamp=0.9), expected, atol=1e-14)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_default_gain(act):
    gain = math.sqrt(2) if act in ("relu", "lrelu", "swish") else 1.0
    x = normal(50, 3)
    torch.testing.assert_close(bias_act(x, act=act), torch.from_numpy(gain * NUMPY[act](x.numpy())).float())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_equal_those_of_the_reference(device, act, options):
    x = away_from_kinks(normal(4, 5, 6, 3, device=device)).requires_grad_()
    b = torch.zeros(5, device=device, requires_grad=True)
    grad = normal(4, 5, 6, 3, device=device)
    if options.get("clamp") == 0:
        pytest.skip("a clamp at 0 has a kink everywhere")
    ours, theirs = (
        torch.autograd.grad(op(x, b, 1, act, **options), (x, b), grad) for op in (bias_act, bias_act_reference)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(clamp=1.0, gain=1.0)], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(device, act, options):
    x = away_from_kinks(normal(2, 3, 4, dtype=torch.float64, device=device)).requires_grad_()
    b = torch.full((3,), 0.01, dtype=torch.float64, device=device, requires_grad=True)
    if act not in WITH_KERNELS and options:
        options = dict(clamp=50.0)  # where no value comes near
    assert torch.autograd.gradcheck(lambda x, b: bias_act(x, b, 1, act, **options), (x, b))
    assert torch.autograd.gradgradcheck(lambda x, b: bias_act(x, b, 1, act, **options) ** 2, (x, b))


def test_opcheck(device):
    x, b = normal(2, 3, 4, device=device).requires_grad_(), normal(3, device=device).requires_grad_()
    ops = torch.ops.sage_fast
    torch.library.opcheck(ops.bias_act.default, (x, b, 1, 0.2, 1.4, 0.8))
    torch.library.opcheck(ops.bias_act.default, (x.detach().transpose(0, 2), None, 0, 0.0, 1.0, -1.0))
    y = ops.bias_act(x.detach(), None, 0, 0.2, 1.4, 0.8)
    torch.library.opcheck(ops.bias_act_backward.default, (x, y, 0.2, 1.4, 0.8))
    last = normal(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(ops.bias_act.default, (last, b, 1, 0.2, 1.4, -1.0, 1))
    torch.library.opcheck(ops.bias_act.default, (last.detach().bfloat16(), b, 1, 0.2, 1.4, -1.0, 2))
    torch.library.opcheck(ops.bias_act.default, (last, b, 1, 0.2, 1.4, 0.8, 6))
    torch.library.opcheck(
        ops.bias_act.default, (x.detach().transpose(0, 2).requires_grad_(), None, 0, 0.0, 1.0, -1.0, 6)
    )
    torch.library.opcheck(ops.bias_act_backward.default, (x, y.requires_grad_(), 0.2, 1.4, 0.8, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act != "linear"])  # whose gradient is exact
def test_low_precision(device, no_worse_than_plain, act, dtype):
    """Values and both gradients."""
    x, b = normal(4, 5, 33, device=device).to(dtype), normal(5, device=device).to(dtype)
    grad = normal(4, 5, 33, device=device).to(dtype)

    def all_of(op, convert):
        arguments = [convert(t).requires_grad_() for t in (x, b)]
        y = op(*arguments, act=act)
        return [y, *torch.autograd.grad(y, arguments, convert(grad))]

    ours, plain = all_of(bias_act, torch.clone), all_of(bias_act_reference, torch.clone)
    for case in zip(ours, plain, all_of(bias_act_reference, torch.Tensor.double)):
        no_worse_than_plain(*case)


@pytest.mark.parametrize("act", SMOOTH)
def test_smooth_activations_are_exact_to_a_few_units(request, device, act):
    """Of CUDA, which is built to flush what is too small for the usual digits, but for that."""
    x = torch.cat([torch.linspace(-110, 110, 40001), torch.logspace(-38, 2, 4001), -torch.logspace(-38, 2, 4001)])
    y, exact = bias_act(x.to(device), act=act).cpu().double(), bias_act_reference(x.double(), act=act)
    smallest = 2.0**-126 if act != "swish" else 2.0**-119  # x times a sigmoid that is subnormal
    flushes = request.node.callspec.params["device"] != "cpu"
    unit = (torch.finfo(torch.float32).eps * exact.abs()).clamp_min(smallest * (1 if flushes else 2.0**-23))
    assert ((y - exact).abs() / unit).max() < 4


@pytest.mark.parametrize("act", SMOOTH)
def test_second_derivatives_of_smooth_kernels(device, act):
    """float32, since the kernels are: against the composition in float64."""
    x = normal(3, 4, 5, device=device)

    def second(op, x):
        x = x.detach().requires_grad_()
        y = op(x, act=act, gain=1.5, clamp=1.2)
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(
        second(bias_act, x), second(bias_act_reference, x.double()).float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 3, 40, 130])
def test_channels_last(device, dtype, c):
    x = normal(2, c, 7, 5, device=device).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    for dim in range(4):
        b = normal(x.shape[dim], device=device).to(dtype)
        y, expected = (op(x, b, dim, act="lrelu") for op in (bias_act, bias_act_reference))
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swish_of_images_in_any_layout(device, dtype, laid_out):
    """Its derivative is read off x + b, whose layout is that of x."""
    x, b = laid_out(normal(3, 4, 6, 5, device=device).to(dtype)), normal(4, device=device)
    grad, options = laid_out(normal(3, 4, 6, 5, device=device).to(dtype)), dict(act="swish", clamp=0.9)
    results = []
    for op, convert in ((bias_act, torch.clone), (bias_act_reference, torch.Tensor.double)):
        arguments = [(t if op is bias_act else convert(t)).detach().requires_grad_() for t in (x, b)]
        results.append(torch.autograd.grad(op(arguments[0], arguments[1], **options), arguments, grad.to(arguments[0])))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours.double(), exact, atol=5 * tolerance, rtol=tolerance)


def test_values_that_are_kept_as_they_are(device):
    """linear without gain and clamp is x + b, and x itself without b."""
    x, b = normal(2, 3, device=device), normal(3, device=device)
    assert torch.equal(bias_act(x, b), x + b) and bias_act(x) is x


@pytest.mark.parametrize("op", [bias_act, bias_act_reference])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_x_stays(op, dtype):
    """A float32 bias must not lift half-precision activations to float32."""
    for bias_dtype in (torch.float32, torch.float64):
        b = torch.ones(3, dtype=bias_dtype, requires_grad=True)
        y = op(torch.ones(2, 3, dtype=dtype), b, act="lrelu")
        y.sum().backward()
        assert y.dtype == dtype and b.grad.dtype == bias_dtype and b.grad.abs().min() > 0


@pytest.mark.parametrize("options", [dict(), dict(clamp=2.0)], ids=str)
@pytest.mark.parametrize("act", WITH_KERNELS)
def test_nan_and_infinity(device, act, options):
    inf = math.inf
    x = torch.tensor([math.nan, inf, -inf, 1.0, -1.0], device=device).requires_grad_()
    y, expected = (op(x, act=act, **options) for op in (bias_act, bias_act_reference))
    torch.testing.assert_close(y, expected, equal_nan=True)
    for value in (1.0, inf, math.nan):
        grad = torch.full_like(x, value)
        ours, theirs = (torch.autograd.grad(z, x, grad, retain_graph=True)[0] for z in (y, expected))
        torch.testing.assert_close(ours[1:], theirs[1:], equal_nan=True)


def test_threads(same_bits_for_all_thread_counts):
    x, b = normal(3, 5, 59, 97), normal(5)
    same_bits_for_all_thread_counts(lambda: bias_act(x, b, act="lrelu", clamp=1.0))


def test_r1_through_a_discriminator_equals_that_on_the_reference(device, on_reference):
    """First and second derivatives of every op of a discriminator at once, as the R1 penalty takes them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Discriminator(16, channel_base=64, channel_max=8).double().to(device)
        images = torch.randn(4, 3, 16, 16, dtype=torch.float64).to(device).requires_grad_()

    def penalty_and_its_gradients() -> list[torch.Tensor]:
        logits = network(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        penalty = gradient.square().sum([1, 2, 3]).mean()
        used = [p for p in network.parameters() if p.ndim > 1]
        return [logits, gradient, penalty, *torch.autograd.grad(penalty, used, allow_unused=True)]

    native = penalty_and_its_gradients()
    on_reference()
    reference = penalty_and_its_gradients()
    assert native[2] > 0 and all(g is not None and g.abs().max() > 0 for g in native[3:])
    torch.testing.assert_close(native, reference, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("op", [bias_act, bias_act_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(act="gelu"), "act must be one of linear, relu, lrelu, .*, got 'gelu'"),
        (dict(x=torch.zeros(2, 3, dtype=torch.int64)), "x must be floating point, got torch.int64"),
        (dict(alpha=0.1, act="relu"), "alpha has no meaning for act='relu'; leave it out"),
        (dict(clamp=-1.0), "clamp must be None or at least 0, got -1.0"),
        (dict(clamp=float("nan")), "clamp must be None or at least 0, got nan"),
        (dict(dim=2), "dim must be an axis of x, which has 2, got 2"),
        (dict(b=torch.zeros(2)), r"b must have shape \[3\], the length of x along dim 1, got \[2\]"),
        (dict(b=torch.zeros(3, 1)), r"got \[3, 1\]"),
        (dict(b=torch.zeros(3, device="meta")), "b must be on cpu, as x is, got meta"),
    ],
)
def test_bad_input(op, change, message):
    arguments = dict(x=torch.zeros(2, 3), b=torch.zeros(3)) | change
    with pytest.raises(InputError, match=message):
        op(**arguments)
