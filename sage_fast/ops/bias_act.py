"""Bias, activation, gain and clamp in one step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops._arrays import takes_arrays
from sage_fast.ops.inputs import FLOATS, number, require_real, require_same_device, seen

__all__ = ["ACTIVATIONS", "bias_act", "bias_act_reference", "straight_derivative"]

#: name -> (function of x and alpha, alpha by default, gain by default)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float, float]] = {
    "linear": (lambda x, _: x, 0.0, 1.0),
    "relu": (lambda x, _: F.relu(x), 0.0, math.sqrt(2)),
    "lrelu": (F.leaky_relu, 0.2, math.sqrt(2)),
    "tanh": (lambda x, _: torch.tanh(x), 0.0, 1.0),
    "sigmoid": (lambda x, _: torch.sigmoid(x), 0.0, 1.0),
    "elu": (lambda x, alpha: F.elu(x, alpha), 1.0, 1.0),
    "selu": (lambda x, _: F.selu(x), 0.0, 1.0),
    "softplus": (lambda x, _: F.softplus(x), 0.0, 1.0),
    "swish": (lambda x, _: F.silu(x), 0.0, math.sqrt(2)),
}
_SWISH = 6
#: name -> (number of the kernel, its slope below zero; None: alpha). Without gain and clamp linear is PyTorch's: one op,
#: x + b. In float64 the smooth ones are, too: nobody trains in it.
_KERNELS: dict[str, tuple[int, float | None]] = {
    "linear": (0, 1.0),
    "relu": (0, 0.0),
    "lrelu": (0, None),
    "tanh": (1, 1.0),
    "elu": (2, None),
    "selu": (3, 1.0),
    "softplus": (4, 1.0),
    "sigmoid": (5, 1.0),
    "swish": (_SWISH, 1.0),
}
#: number -> derivative by y / gain of the slope, which is made of y / gain; composed, since only second derivatives of
#: smooth activations take it
_CURVATURE: dict[int, Callable[[Tensor], Tensor]] = {
    1: lambda r: -2 * r,
    2: lambda r: (r <= 0).to(r.dtype),
    3: lambda r: (r <= 0).to(r.dtype),
    4: lambda r: torch.exp(-r),
    5: lambda r: 1 - 2 * r,
}
_HALVES = (torch.bfloat16, torch.float16)


@takes_arrays("x", "b")
def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """``clamp(gain * act(x + b))``, the end of every StyleGAN2 layer; differentiable any number of times.

    Args:
        x: any shape, floating.
        b: bias [x.shape[dim]] or None, real; taken in the dtype of x, or as float32 where x has 16 bits.
        dim: axis of x that the bias goes along.
        act: one of ``ACTIVATIONS``.
        alpha: slope of ``lrelu`` (default 0.2) or scale of ``elu`` (default 1) on the negative side.
        gain: factor; None takes the activation's own (sqrt(2) for relu, lrelu and swish, as [StyleGAN2] does, else 1).
        clamp: values go to [-clamp, clamp]; None leaves them.
    Returns:
        The shape, dtype and memory format of x.
    Raises:
        InputError: an unknown activation, a bias of another length, kind or device, a negative clamp, alpha for an activation
            without, or a setting that is no number.
    """
    alpha, gain, clamp = _tidy(x, b, dim, act, alpha, gain, clamp)
    dtype = x.dtype
    kernel, slope = _kernel(act, alpha, gain, clamp, dtype == torch.float64)
    if kernel is not None:
        if _native.has_kernel("bias_act", "cpu" if x.is_cpu else x.device.type):
            if b is not None and b.dtype != dtype and not (b.dtype == torch.float32 and dtype in _HALVES):
                b = b.to(dtype)
            if dim < 0:
                dim %= max(1, x.ndim)
            limit = -1.0 if clamp is None else clamp
            return _native.call(torch.ops.sage_fast.bias_act.default, (x, b), dim, slope, gain, limit, kernel)
    return _composed(x, b, dim, act, alpha, gain, clamp)


def _kernel(act: str, alpha: float, gain: float, clamp: float | None, float64: bool) -> tuple[int | None, float]:
    """The number of the kernel, None where plain PyTorch does it, and its slope."""
    kernel, slope = _KERNELS.get(act, (None, None))
    # the kernels' derivative reads the sign of x + b off the output, which needs gain > 0 and alpha >= 0
    if kernel is None or not gain > 0 or not alpha >= 0 or (float64 and kernel != 0):
        return None, 0.0
    if act == "linear" and gain == 1 and clamp is None:
        return None, 0.0
    return kernel, alpha if slope is None else slope


def _on_host(host, x, b, dim, act, alpha, gain, clamp):
    if x.dtype.name not in ("float32", "float64", "float16") or (clamp is not None and not clamp >= 0):
        return None
    if not isinstance(dim, int) or (b is None and dim != 1) or (b is not None and b.dtype.kind not in "fiub"):
        return None
    alpha, gain = _settings(act, alpha, gain)
    kernel, slope = _kernel(act, alpha, gain, clamp, x.dtype.name == "float64")
    if kernel is None:
        return None
    if b is not None and b.dtype != x.dtype and not (b.dtype.name == "float32" and x.dtype.name == "float16"):
        b = b.astype(x.dtype)
    return host.bias_act(x, b, dim, slope, gain, -1.0 if clamp is None else clamp, kernel)


def bias_act_reference(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """The same in plain PyTorch."""
    alpha, gain, clamp = _tidy(x, b, dim, act, alpha, gain, clamp)
    return _composed(x, b, dim, act, alpha, gain, clamp)


def _composed(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    x = ACTIVATIONS[act][0](_biased(x, b, dim), alpha)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def _biased(x: Tensor, b: Tensor | None, dim: int) -> Tensor:
    if b is None:
        return x
    shape = [1] * x.ndim
    shape[dim] = -1
    return x + (b if b.dtype == x.dtype else b.to(x.dtype)).view(shape)


def _tidy(x, b, dim, act, alpha, gain, clamp) -> tuple[float, float, float | None]:
    alpha, gain = _settings(act, alpha, gain)
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise InputError(f"x must be floating point, got {seen(x)}; convert it to 16 bits or more.")
    if clamp is not None:
        clamp = number("clamp", clamp)
        if not clamp >= 0:
            raise InputError(f"clamp must be None or at least 0, got {clamp}.")
    if b is not None or dim != 1:  # without a bias the default says nothing, and x may have any number of axes
        shape = x.shape
        if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
            raise InputError(f"dim must be an axis of x, which has {len(shape)}, got {dim!r:.60}.")
    if b is not None:
        require_real("b", b)
        require_same_device("b", b, x, "x")
        if b.shape != (shape[dim],):
            raise InputError(f"b must have shape [{shape[dim]}], the length of x along dim {dim}, got {list(b.shape)}.")
    return alpha, gain, clamp


def _settings(act: str, alpha: float | None, gain: float | None) -> tuple[float, float]:
    """alpha and gain, the activation's own where None."""
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise InputError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r:.60}.")
    if alpha is not None and act not in ("lrelu", "elu"):
        raise InputError(f"alpha has no meaning for act='{act}'; leave it out.")
    _, default_alpha, default_gain = ACTIVATIONS[act]
    return (
        default_alpha if alpha is None else number("alpha", alpha),
        default_gain if gain is None else number("gain", gain),
    )


def _setup_context(ctx, inputs, output):
    x, b, ctx.dim, *ctx.settings = inputs
    ctx.bias_dtype, ctx.sum_over = None if b is None else b.dtype, [i for i in range(output.ndim) if i != ctx.dim]
    ctx.save_for_backward(*((x, b) if ctx.settings[-1] == _SWISH else (output,)))


def _backward(ctx, grad):
    y, *b = ctx.saved_tensors
    if ctx.settings[-1] == _SWISH:  # takes most values twice: the derivative is read off x + b
        y = _biased(y, b[0], ctx.dim)
    wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    if wants_bias and _summed_beside(y, ctx.dim, *ctx.settings):
        slope, gain, clamp, _ = ctx.settings
        op = torch.ops.sage_fast.scaled_bias_act_backward.default
        grad_x, _, grad_b, _ = op(grad, None, y, None, None, slope, gain, clamp)
        return grad_x, grad_b.to(ctx.bias_dtype), *[None] * 5
    grad_x = _native.call(torch.ops.sage_fast.bias_act_backward.default, (grad, y), *ctx.settings)
    if not wants_bias:
        return grad_x, *[None] * 6
    # float32 sums in either case; on the CPU asking for a float32 result would copy grad_x to float32 first
    exact = torch.float32 if grad_x.dtype in _HALVES and grad_x.device.type != "cpu" else grad_x.dtype
    grad_b = grad_x.sum(ctx.sum_over, dtype=exact) if ctx.sum_over else grad_x
    return grad_x, grad_b.to(ctx.bias_dtype), *[None] * 5


def _summed_beside(y: Tensor, dim: int, slope: float, gain: float, clamp: float, kernel: int) -> bool:
    """Whether one pass gives both gradients of these activations; it has no derivative of its own."""
    images = y.ndim == 4 and dim == 1 and y.is_contiguous(memory_format=torch.channels_last)
    return images and kernel == 0 and slope > 0 and not torch.is_grad_enabled()


def straight_derivative(grad: Tensor, y: Tensor, slope: float, gain: float, clamp: float) -> Tensor:
    """``grad`` through a leaky ReLU with gain and clamp (-1: none) whose output is ``y``; linear in ``grad``."""
    return _native.call(torch.ops.sage_fast.bias_act_backward.default, (grad, y), slope, gain, clamp, 0)


def _setup_context_backward(ctx, inputs, output):
    grad, y, *ctx.settings = inputs
    ctx.save_for_backward(grad, y)


def _backward_backward(ctx, grad):
    """Linear in the incoming gradient: there it is the same map. In y it is constant where the activation is straight.

    y is x + b for swish.
    """
    incoming, y = ctx.saved_tensors
    _, gain, clamp, kernel = ctx.settings
    grad_incoming = _native.call(torch.ops.sage_fast.bias_act_backward.default, (grad, y), *ctx.settings)
    if kernel == 0 or not ctx.needs_input_grad[1]:
        return grad_incoming, *[None] * 5
    if kernel == _SWISH:
        s = torch.sigmoid(y)
        curvature, value = gain * s * (1 - s) * (2 + y * (1 - 2 * s)), gain * y * s
    else:
        curvature, value = _CURVATURE[kernel](y / gain), y
    grad_y = grad * incoming * curvature
    return grad_incoming, grad_y if clamp < 0 else torch.where(value.abs() < clamp, grad_y, 0), *[None] * 4


def _fake(x: Tensor, *_: object) -> Tensor:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::bias_act", _fake)
    torch.library.register_fake("sage_fast::bias_act_backward", lambda grad, y, *settings: _fake(y))
    _native.register_autograd("bias_act", _backward, _setup_context)
    _native.register_autograd("bias_act_backward", _backward_backward, _setup_context_backward)
