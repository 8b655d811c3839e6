"""bias_act on the layers of 32 px and 256 px StyleGAN2 networks, in float32 and bfloat16, channels first and last.

The floor is memory: one read and one write of each value. Plain PyTorch takes a pass for each step; its best form works
in place behind the first.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sage_fast.ops import bias_act

LAYERS = {
    "32 px, 8 px layer, N 1": (1, 128, 8, 8),
    "32 px, 32 px layer, N 1": (1, 32, 32, 32),
    "32 px, 32 px layer, N 64": (64, 32, 32, 32),
    "256 px, 16 px layer, N 1": (1, 512, 16, 16),
    "256 px, 64 px layer, N 1": (1, 512, 64, 64),
    "256 px, 256 px layer, N 1": (1, 128, 256, 256),
    "mapping, N 64": (64, 512),
}
GAIN = math.sqrt(2)


def shaped(b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return b.view(1, -1, *[1] * (x.ndim - 2))


FORMS = [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("first", "last")]
SMOOTH = {
    "tanh": torch.tanh_,
    "elu": F.elu_,
    "selu": F.selu_,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid_,
    "swish": lambda x: F.silu(x, inplace=True).mul_(GAIN),
}


def values(compare, dtype: str, layout: str, *shape: int) -> torch.Tensor:
    """Random values in that form; bfloat16 rounds, in plain PyTorch at each step, so its parity is coarser."""
    compare.tolerance = 2e-5 if dtype == "float32" else 2e-2
    form = torch.contiguous_format if layout == "first" else torch.channels_last
    return torch.randn(shape, device=compare.device).to(getattr(torch, dtype)).to(memory_format=form)


@pytest.mark.parametrize("dtype, layout", FORMS)
@pytest.mark.parametrize("case", LAYERS)
def test_lrelu(compare, case, dtype, layout):
    if layout == "last" and len(LAYERS[case]) < 4:
        pytest.skip("no image")
    x = values(compare, dtype, layout, *LAYERS[case])
    b = torch.randn(x.shape[1], device=x.device).to(x.dtype)
    rivals = {
        "in place": lambda: F.leaky_relu_(x + shaped(b, x), 0.2).mul_(GAIN),
        "three steps": lambda: F.leaky_relu(x + shaped(b, x), 0.2) * GAIN,
    }
    compare(f"{case}, {dtype}, {layout}", lambda: bias_act(x, b, act="lrelu"), rivals, 2 * x.nbytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("act", SMOOTH)
def test_smooth(compare, act, dtype):
    x = values(compare, dtype, "first", 8, 32, 32, 32)
    b = torch.randn(32, device=x.device).to(x.dtype)
    compare(
        f"{act}, 32 px, 32 px layer, N 8, {dtype}",
        lambda: bias_act(x, b, act=act),
        {"in place": lambda: SMOOTH[act](x + shaped(b, x))},
        2 * x.nbytes,
    )


@pytest.mark.parametrize("dtype, layout", FORMS)
@pytest.mark.parametrize("act", ["linear", "sigmoid", "swish"])
@pytest.mark.parametrize("case", LAYERS)
def test_with_gain_and_clamp(compare, case, act, dtype, layout):
    if layout == "last" and len(LAYERS[case]) < 4:
        pytest.skip("no image")
    x = values(compare, dtype, layout, *LAYERS[case])
    b = torch.randn(x.shape[1], device=x.device).to(x.dtype)
    steps = {"linear": lambda x: x, "sigmoid": torch.sigmoid_, "swish": lambda x: F.silu(x, inplace=True)}
    rivals = {"in place": lambda: steps[act](x + shaped(b, x)).mul_(GAIN).clamp_(-0.9, 0.9)}
    ours = lambda: bias_act(x, b, act=act, gain=GAIN, clamp=0.9)  # noqa: E731
    compare(f"{act}, gain, clamp, {case}, {dtype}, {layout}", ours, rivals, 2 * x.nbytes)


@pytest.mark.parametrize("case", ["32 px, 32 px layer, N 64", "256 px, 64 px layer, N 1"])
def test_gradient(compare, case):
    """Forward and backward, as training has it."""
    shape, device = LAYERS[case], compare.device
    x, b = (torch.randn(size, device=device, requires_grad=True) for size in (shape, shape[1]))
    grad = torch.randn(shape, device=device)
    both = lambda y: torch.cat([g.flatten() for g in torch.autograd.grad(y, (x, b), grad)])  # noqa: E731
    rivals = {"in place": lambda: both(F.leaky_relu_(x + shaped(b, x), 0.2) * GAIN)}
    compare.tolerance = 1e-4  # sums over all pixels
    compare(f"with gradient, {case}", lambda: both(bias_act(x, b, act="lrelu")), rivals)
