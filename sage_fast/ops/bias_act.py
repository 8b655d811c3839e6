"""Bias, activation, gain and clamp in one step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError

__all__ = ["ACTIVATIONS", "bias_act", "bias_act_reference"]

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
_NEGATIVE_SLOPE = {
    "linear": 1.0,
    "relu": 0.0,
    "lrelu": None,
}  # None: alpha. These have kernels; smooth ones are PyTorch's


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
        b: bias [x.shape[dim]] or None; taken in the dtype of x.
        act: one of ``ACTIVATIONS``.
        alpha: slope of ``lrelu`` (default 0.2) or scale of ``elu`` (default 1) on the negative side.
        gain: factor; None takes the activation's own (sqrt(2) for relu, lrelu and swish, as [StyleGAN2] does, else 1).
        clamp: values go to [-clamp, clamp]; None leaves them.
    Returns:
        The shape and dtype of x.
    Raises:
        InputError: an unknown activation, a bias of another length, a negative clamp, or alpha for an activation without.
    """
    alpha, gain = _tidy(x, b, dim, act, alpha, gain, clamp)
    if x.dtype == torch.bfloat16 and _native.has_kernel("bias_act", x.device.type):
        alpha_given = alpha if act in ("lrelu", "elu") else None
        return bias_act(x.float(), b, dim, act, alpha_given, gain, clamp).to(x.dtype)
    # the kernels' derivative reads the sign of x + b off the output, which needs gain > 0 and alpha >= 0
    if act in _NEGATIVE_SLOPE and gain > 0 and alpha >= 0 and x.dtype in (torch.float32, torch.float64):
        if _native.has_kernel("bias_act", x.device.type):
            b, slope = b if b is None else b.to(x.dtype), _NEGATIVE_SLOPE[act]
            limit = -1.0 if clamp is None else float(clamp)
            return torch.ops.sage_fast.bias_act(
                x, b, dim % max(1, x.ndim), alpha if slope is None else slope, gain, limit
            )
    return bias_act_reference(x, b, dim, act, alpha if act in ("lrelu", "elu") else None, gain, clamp)


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
    alpha, gain = _tidy(x, b, dim, act, alpha, gain, clamp)
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    x = ACTIVATIONS[act][0](x, alpha)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def _tidy(x, b, dim, act, alpha, gain, clamp) -> tuple[float, float]:
    if act not in ACTIVATIONS:
        raise InputError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}.")
    if not x.is_floating_point():
        raise InputError(f"x must be floating point, got {x.dtype}.")
    if alpha is not None and act not in ("lrelu", "elu"):
        raise InputError(f"alpha has no meaning for act='{act}'; leave it out.")
    if clamp is not None and clamp < 0:
        raise InputError(f"clamp must be None or at least 0, got {clamp}.")
    if b is not None:
        if b.device != x.device:
            raise InputError(f"b must be on {x.device}, as x is, got {b.device}.")
        if not -x.ndim <= dim < x.ndim:
            raise InputError(f"dim must be an axis of x, which has {x.ndim}, got {dim}.")
        if b.shape != (x.shape[dim],):
            raise InputError(
                f"b must have shape [{x.shape[dim]}], the length of x along dim {dim}, got {list(b.shape)}."
            )
    _, default_alpha, default_gain = ACTIVATIONS[act]
    return float(default_alpha if alpha is None else alpha), float(default_gain if gain is None else gain)


def _setup_context(ctx, inputs, output):
    _, b, ctx.dim, *ctx.settings = inputs
    ctx.has_bias, ctx.sum_over = b is not None, [i for i in range(output.ndim) if i != ctx.dim]
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    (y,) = ctx.saved_tensors
    grad_x = torch.ops.sage_fast.bias_act_backward(grad, y, *ctx.settings)
    if not (ctx.has_bias and ctx.needs_input_grad[1]):
        return grad_x, *[None] * 5
    return grad_x, grad_x.sum(ctx.sum_over) if ctx.sum_over else grad_x, *[None] * 4


def _setup_context_backward(ctx, inputs, output):
    _, y, *ctx.settings = inputs
    ctx.save_for_backward(y)


def _backward_backward(ctx, grad):
    """Linear in the incoming gradient, piecewise constant in y: the second derivative is the same map."""
    (y,) = ctx.saved_tensors
    return torch.ops.sage_fast.bias_act_backward(grad, y, *ctx.settings), None, None, None, None


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake(
        "sage_fast::bias_act", lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format)
    )
    torch.library.register_fake(
        "sage_fast::bias_act_backward", lambda grad, *_: torch.empty_like(grad, memory_format=torch.contiguous_format)
    )
    torch.library.register_autograd("sage_fast::bias_act", _backward, setup_context=_setup_context)
    torch.library.register_autograd(
        "sage_fast::bias_act_backward", _backward_backward, setup_context=_setup_context_backward
    )
