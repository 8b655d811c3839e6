"""The kernels of bias_act on the host: packed and single, every activation and dtype, forward and both derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_fast.ops import bias_act, bias_act_reference
from sage_fast.ops.bias_act import ACTIVATIONS

OPTIONS = [dict(), dict(gain=3.0, clamp=1.0), dict(gain=0.5)]
# shape, dim: rows of whole packs and of none, one bias a pack and one a value, a bias axis in front and behind
CASES = [((2, 5, 9, 8), 1), ((3, 16), 1), ((7, 5), 1), ((97,), 0), ((3, 7, 5), 0), ((3, 4, 8), -1)]
SMOOTH_IN_FLOAT64 = [act for act in ACTIVATIONS if act not in ("linear", "relu", "lrelu")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def results(op, x: Tensor, b: Tensor | None, *settings, **options) -> list[Tensor]:
    """The output, the gradients, and what a product of the gradient gives behind it."""
    needed = [t.detach().requires_grad_() for t in (x, b) if t is not None]
    y = op(needed[0], needed[1] if b is not None else None, *settings, **options)
    grad = normal(*y.shape, seed=1).to(y).requires_grad_()
    first = torch.autograd.grad(y, needed, grad, create_graph=True)
    second = torch.autograd.grad(
        (first[0] * normal(*y.shape, seed=2).to(y)).sum(), [needed[0], grad], allow_unused=True
    )
    return [torch.zeros_like(x) if t is None else t.detach() for t in (y, *first, *second)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape, dim", CASES)
def test_equals_the_reference_in_every_order(routed, shape, dim, act, options):
    x, b = normal(*shape) * 2, normal(shape[dim])
    for bias in (b, None):
        ours = routed.in_every_order(results, bias_act, x, bias, dim, act, **options)
        for one, other in zip(ours, results(bias_act_reference, x, bias, dim, act, **options), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_a_wide_bias(routed, dtype, act):
    """float64 has kernels of the activations with a kink alone."""
    if dtype == torch.float64 and act in SMOOTH_IN_FLOAT64:
        pytest.skip("a composition in float64")
    for shape in ((3, 16, 4, 2), (2, 5, 7)):
        for b in (normal(shape[1]).to(dtype), normal(shape[1])):
            if dtype == torch.float64 and b.dtype != dtype:
                continue
            x = normal(*shape).to(dtype)
            ours = results(bias_act, x, b, act=act, gain=1.5)
            exact = results(bias_act_reference, x.double(), b.double(), act=act, gain=1.5)
            for one, other in zip(ours, exact):
                unit = 8 * torch.finfo(dtype).eps
                # a sum of up to 40 gradients behind each value of b
                torch.testing.assert_close(one.double(), other, atol=unit * (4 if one.ndim == 1 else 1), rtol=unit)


def test_layouts_alignment_and_nothing(routed):
    b = normal(8)
    wide = normal(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    shifted = normal(1 + 2 * 8 * 4)[1:].view(2, 8, 4)
    for x in (wide, wide[..., ::2], wide[:1].expand(3, -1, -1, -1), shifted, wide[:0]):
        for one, other in zip(*(results(op, x, b, act="lrelu") for op in (bias_act, bias_act_reference))):
            torch.testing.assert_close(one, other)
    assert bias_act(wide, b).is_contiguous(memory_format=torch.channels_last)


def test_more_than_the_grid_holds(routed):
    """Three blocks at most on the host: ten rounds of each, the last one short."""
    x, b = normal(2, 4, 61, 61), normal(4)
    y = routed.in_every_order(bias_act, x, b, act="lrelu")
    torch.testing.assert_close(y, bias_act_reference(x, b, act="lrelu"))
