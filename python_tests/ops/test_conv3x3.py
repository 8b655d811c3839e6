"""3 x 3 convolutions in the transform's domain: against PyTorch, SciPy, and their own derivatives."""

from __future__ import annotations

import pytest
import scipy.signal
import torch
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.ops import conv3x3, conv3x3_reference

SHAPES = [(2, 16, 32, 8), (1, 48, 16, 12), (3, 32, 80, 20), (9, 16, 16, 16), (1, 64, 16, 64)]  # N, C_in, C_out, side


def problem(n, c_in, c_out, side, device="cpu"):
    rng = torch.Generator().manual_seed(n + c_in + c_out + side)
    x, weight = torch.randn(n, c_in, side, side, generator=rng), torch.randn(c_out, c_in, 3, 3, generator=rng)
    grad = torch.randn(n, c_out, side, side, generator=rng)
    return tuple(t.to(device) for t in (x, weight / (3 * c_in**0.5), grad))


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


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_float64(cpu_kernel, shape):
    x, weight, grad = problem(*shape)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y, expected = conv3x3(*ours), conv3x3_reference(*exact)
    pairs = [(y, expected)]
    pairs += zip(torch.autograd.grad(y, ours, grad), torch.autograd.grad(expected, exact, grad.double()))
    for got, want in pairs:
        assert got.shape == want.shape
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 5e-6


def test_the_kernel_is_taken_where_it_pays(cpu_kernel, native_calls):
    x, weight, _ = problem(*SHAPES[0])
    with native_calls:
        conv3x3(x, weight)
    assert "sage_fast::conv3x3" in native_calls.names
    for other in (x[..., :4, :4], x[..., :7], x[:, :8], x.double()):
        native_calls.names.clear()
        with native_calls:
            y = conv3x3(other, weight[:, : other.shape[1]].to(other.dtype))
        assert "sage_fast::conv3x3" not in native_calls.names
        assert y.shape == (len(x), 32, *other.shape[2:])
    native_calls.names.clear()
    with native_calls, torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight).dtype == torch.bfloat16


def test_equals_scipy(cpu_kernel):
    x, weight, _ = problem(1, 16, 16, 8)
    y = conv3x3(x, weight)[0, 5].numpy()
    planes = zip(x[0].double().numpy(), weight[5].double().numpy())
    expected = sum(scipy.signal.correlate(image, taps, mode="same") for image, taps in planes)
    assert abs(y - expected).max() < 1e-5


def test_layouts_and_empty_batches(cpu_kernel, laid_out):
    x, weight, _ = problem(3, 16, 32, 8)
    x = laid_out(x)
    torch.testing.assert_close(conv3x3(x, weight), F.conv2d(x, weight, padding=1), atol=5e-6, rtol=5e-6)
    empty = conv3x3(x[:0], weight.clone().requires_grad_())
    assert empty.shape == (0, 32, 8, 8)
    empty.sum().backward()


def test_a_sample_does_not_depend_on_the_batch(cpu_kernel):
    x, weight, _ = problem(9, 16, 16, 16)
    whole = conv3x3(x, weight)
    assert torch.equal(conv3x3(x[4:5], weight)[0], whole[4])


def test_same_bits_for_all_thread_counts(same_bits_for_all_thread_counts):
    x, weight, grad = problem(9, 16, 48, 16)

    def compute():
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        grads = torch.autograd.grad(conv3x3(*inputs), inputs, grad)
        return torch.cat([g.flatten() for g in grads])

    same_bits_for_all_thread_counts(compute)


def test_second_derivatives(cpu_kernel):
    """The gradient's gradient, as R1 needs it, against float64."""
    x, weight, grad = problem(2, 16, 32, 8)

    def penalty(x, weight, conv):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = conv(x, weight).square() * grad.to(x.dtype)
        gx, gw = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(gx.square().sum() + gw.square().sum(), (x, weight))

    ours = penalty(x.clone(), weight.clone(), conv3x3)
    exact = penalty(x.double(), weight.double(), conv3x3_reference)
    for got, want in zip(ours, exact):
        assert (got.double() - want).abs().max() / want.abs().max() < 1e-5


def test_opcheck(cpu_kernel):
    x, weight, grad = problem(2, 16, 32, 8)
    x, grad = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, grad))
    taps = weight.permute(2, 3, 1, 0).contiguous().requires_grad_()
    torch.library.opcheck(torch.ops.sage_fast.conv3x3, (x, taps))
    torch.library.opcheck(torch.ops.sage_fast.conv3x3_taps, (x, grad))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_near(cpu_kernel, value):
    x, weight, _ = problem(2, 16, 16, 16)
    clean = conv3x3(x, weight)
    x[0, 3, 2, 2] = value
    y = conv3x3(x, weight)
    assert not y[0, :, 1:4, 1:4].isfinite().any()
    assert torch.equal(y[1], clean[1]) and torch.equal(y[0, :, 8:, 8:], clean[0, :, 8:, 8:])


def test_bad_input(cpu_kernel):
    x, weight, grad = problem(2, 16, 32, 8)
    with pytest.raises(InputError, match=r"x must be floating point \[N, C_in, H, W\]"):
        conv3x3(x[0], weight)
    with pytest.raises(InputError, match=r"weight must have shape \[C_out, 16, 3, 3\]"):
        conv3x3(x, weight[:, :8])
    op, last = torch.ops.sage_fast.conv3x3, x.contiguous(memory_format=torch.channels_last)
    taps = weight.permute(2, 3, 1, 0).contiguous()
    with pytest.raises(ValueError, match="channels last"):
        op(x, taps)
    with pytest.raises(ValueError, match=r"taps must be float32 \[3, 3, C_in, C_out\]"):
        op(last, taps[:, :2])
    with pytest.raises(ValueError, match="multiples of 16"):
        op(last, taps[..., :9])
    with pytest.raises(ValueError, match="grad must match x"):
        torch.ops.sage_fast.conv3x3_taps(last, grad[:1].contiguous(memory_format=torch.channels_last))
