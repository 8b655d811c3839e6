"""scaled_bias_act on the styled layers of 32, 64 and 256 px networks, channels last: forward, and with gradients.

The floor of the forward is a read and a write of each value; that of both ways adds a read of the incoming gradient, of
images and of results, and a write. Rivals: plain PyTorch a step at a time, and demodulation and noise in plain PyTorch before
``bias_act``.
"""

from __future__ import annotations

import pytest
import torch

from sage_fast.ops import bias_act, scaled_bias_act, scaled_bias_act_reference

#: batch, channels, side
LAYERS = {
    "32s, 4 px": (16, 128, 4),
    "32s, 16 px": (16, 128, 16),
    "32s, 32 px": (16, 64, 32),
    "64s, 64 px": (16, 64, 64),
    "256p, 64 px": (4, 256, 64),
    "256p, 256 px": (4, 64, 256),
}
DTYPES = ["float32", "bfloat16"]


def in_steps(x, scale, noise, strength, b):
    x = x * scale[:, :, None, None].to(x.dtype)
    return bias_act(x + (strength * noise).to(x.dtype), b, act="lrelu")


RIVALS = {"plain PyTorch": scaled_bias_act_reference, "bias_act behind steps": in_steps}


def arguments(compare, case: str, dtype: str) -> list[torch.Tensor]:
    """bfloat16 rounds, in plain PyTorch at each step, so its parity is coarser."""
    n, c, side = LAYERS[case]
    compare.tolerance = 1e-4 if dtype == "float32" else 3e-2
    x = torch.randn(n, c, side, side, device=compare.device).to(
        getattr(torch, dtype), memory_format=torch.channels_last
    )
    scale, noise = torch.rand(n, c, device=x.device) + 0.5, torch.randn(n, 1, side, side, device=x.device)
    return [x, scale, noise, torch.full([1], 0.1, device=x.device), torch.randn(c, device=x.device)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYERS)
def test_forward(compare, case, dtype):
    given = arguments(compare, case, dtype)
    rivals = {name: lambda op=op: op(*given) for name, op in RIVALS.items()}
    compare(f"{case}, {dtype}", lambda: scaled_bias_act(*given), rivals, 2 * given[0].nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYERS)
def test_gradient(compare, case, dtype):
    given = arguments(compare, case, dtype)
    learned = [given[i].requires_grad_() for i in (0, 1, 3, 4)]
    grad = torch.randn_like(given[0])

    def both_ways(op):
        def run():
            y = op(*given)
            gradients = torch.autograd.grad(y, learned, grad)
            return gradients[0] if dtype == "float32" else y.detach()  # in 16 bits signs turn on a rounding at the kink

        return run

    rivals = {name: both_ways(op) for name, op in RIVALS.items()}
    compare(f"{case}, {dtype}, both ways", both_ways(scaled_bias_act), rivals, 6 * given[0].nbytes)
