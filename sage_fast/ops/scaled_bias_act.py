"""What follows the convolution of a styled layer, in one pass over its result, and its derivatives in another: for training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops.bias_act import bias_act_reference, straight_derivative
from sage_fast.ops.inputs import number, require_floats, require_real, require_same_device

__all__ = ["scaled_bias_act", "scaled_bias_act_reference"]

_SLOPE = 0.2


def scaled_bias_act(
    x: Tensor,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    b: Tensor | None,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    """``clamp(gain * leaky_relu(x * scale + strength * noise + b))``, slope 0.2; differentiable any number of times.

    Demodulation, noise, bias and activation of Karras et al. 2020 [StyleGAN2], Fig. 2 (d). Everything between is float32, for float64
    images float64. No derivative by ``noise`` is taken where the kernel runs, so noise that wants one goes the plain way.

    Args:
        x: [N, C, H, W], floating; channels last, or copied so.
        scale: [N, C] or None.
        noise: [1 or N, 1, H, W] or None.
        strength: one number as a tensor; goes with ``noise``.
        b: [C] or None.
        gain: factor behind the activation, above 0.
        clamp: values go to [-clamp, clamp]; None leaves them.
    Returns:
        The shape and dtype of ``x``; channels last by the kernel.
    Raises:
        InputError: shapes, dtypes or devices that do not belong together, noise or strength without the other, a gain that is
            not above 0, or a negative clamp.
    """
    limit = _check(x, scale, noise, strength, b, gain, clamp)
    needs_noise = noise is not None and noise.requires_grad and torch.is_grad_enabled()
    if needs_noise or not _native.has_kernel("scaled_bias_act", "cpu" if x.is_cpu else x.device.type):
        return scaled_bias_act_reference(x, scale, noise, strength, b, gain, clamp)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = [None if t is None else t.to(wide) for t in (scale, noise, strength, b)]
    return _native.call(torch.ops.sage_fast.scaled_bias_act.default, (x, *factors), _SLOPE, float(gain), limit)


def scaled_bias_act_reference(
    x: Tensor,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    b: Tensor | None,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    """The same in plain PyTorch."""
    _check(x, scale, noise, strength, b, gain, clamp)
    if scale is not None:
        x = x * scale[:, :, None, None].to(x.dtype)
    if noise is not None:
        assert strength is not None
        x = x + (strength * noise).to(x.dtype)  # float32 noise would widen bfloat16 maps
    return bias_act_reference(x, b, act="lrelu", alpha=_SLOPE, gain=gain, clamp=clamp)


def _check(x, scale, noise, strength, b, gain, clamp) -> float:
    """The clamp, -1 for none."""
    require_floats("x", x, 4, "[N, C, H, W]")  # sizes as text would be numbers in a graph for every batch
    if scale is not None:
        require_floats("scale", scale, 2, "[N, C]")
        _require_sizes("scale", scale, x, x.shape[:2])
    if noise is None and strength is not None:
        raise InputError("noise must be given where strength is; leave both out or neither.")
    if noise is not None:
        require_floats("noise", noise, 4, "[1 or N, 1, H, W]")
        if noise.shape[0] != 1:
            _require_sizes("noise", noise, x, (x.shape[0], 1, *x.shape[2:]))
        else:
            _require_sizes("noise", noise, x, (1, 1, *x.shape[2:]))
        require_real("strength", strength)
        if strength.numel() != 1:
            raise InputError(f"strength must be one number, got {list(strength.shape)}.")
    if b is not None:
        require_floats("b", b, 1, "[C]")
        _require_sizes("b", b, x, x.shape[1:2])
    for name, t in (("scale", scale), ("noise", noise), ("strength", strength), ("b", b)):
        if t is not None:
            require_same_device(name, t, x, "x")
    if not number("gain", gain) > 0:
        raise InputError(f"gain must be above 0, got {gain}.")
    if clamp is None:
        return -1.0
    if not (limit := number("clamp", clamp)) >= 0:
        raise InputError(f"clamp must be None or at least 0, got {clamp}.")
    return limit


def _require_sizes(name: str, t: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    if tuple(t.shape) != tuple(sizes):
        raise InputError(f"{name} must have shape {list(sizes)} for x of {list(x.shape)}, got {list(t.shape)}.")


def _setup_context(ctx, inputs, output):
    x, scale, noise, strength, _, *ctx.settings = inputs
    ctx.save_for_backward(None if scale is None else x, scale, noise, strength, output)


def _backward(ctx, grad):
    x, scale, noise, strength, y = ctx.saved_tensors
    _, needs_scale, _, needs_strength, needs_b, *rest = ctx.needs_input_grad
    if torch.is_grad_enabled():  # a second derivative is wanted: every step by itself, each differentiable
        grads = _composed_backward(grad, x, scale, noise, strength, y, ctx.settings)
    else:
        grads = torch.ops.sage_fast.scaled_bias_act_backward(grad, x, y, scale, noise, *ctx.settings)
    grad_x, grad_scale, grad_b, grad_strength = grads
    if needs_strength and grad_strength is not None:
        grad_strength = grad_strength.view(strength.shape)
    return (
        grad_x,
        grad_scale if needs_scale else None,
        None,
        grad_strength if needs_strength else None,
        grad_b if needs_b else None,
        *[None] * len(rest),
    )


def _composed_backward(grad, x, scale, noise, strength, y, settings):
    """(of x, of scale, of b, of strength), as the kernel's."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    straight = straight_derivative(grad, y.detach(), *settings).to(wide)  # y changes it nowhere
    grad_x = (straight if scale is None else straight * scale[:, :, None, None]).to(y.dtype)
    grad_scale = None if scale is None else (straight * x.to(wide)).sum((2, 3))
    grad_strength = None if noise is None else (straight.sum(1, keepdim=True) * noise).sum()
    return grad_x, grad_scale, straight.sum((0, 2, 3)), grad_strength


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fake_backward(grad, x, y, scale, noise, *_):
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    n, c = y.shape[:2]
    sums = [y.new_empty(size, dtype=wide) for size in ((0 if scale is None else n, c), (c,), (1,))]
    return torch.empty_like(y, memory_format=torch.channels_last), *sums


@_native.when_loaded
def _register() -> None:
    torch.library.register_fake("sage_fast::scaled_bias_act", _fake)
    torch.library.register_fake("sage_fast::scaled_bias_act_backward", _fake_backward)
    _native.register_autograd("scaled_bias_act", _backward, _setup_context)
