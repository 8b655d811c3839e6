"""The kernels of scaled_bias_act on the host: packed and single, every dtype, what a call may lack, and both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_fast.ops.scaled_bias_act import scaled_bias_act, scaled_bias_act_reference

LACKING = {"nothing": (), "scale": (0,), "noise": (1, 2), "all but the bias": (0, 1, 2)}
# N, C, H, W: whole packs and none, a pixel and many, more images than the host's grid is deep, more channels than threads
SHAPES = [(1, 1, 1, 1), (2, 8, 5, 9), (5, 5, 3, 4), (3, 24, 1, 7), (1, 1028, 2, 2), (1, 300, 3, 1)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def arguments(shape: tuple[int, ...], dtype: torch.dtype, lacking: tuple[int, ...] = (), maps: int = 0) -> list:
    """x, scale, noise, strength, b; numbers beside the images in the dtype of sums."""
    n, c, h, w = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    others = [normal(n, c), normal(maps or n, 1, h, w), normal(1) + 1, normal(c)]
    kept = [None if i in lacking else t.to(wide) for i, t in enumerate(others)]
    return [normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last), *kept]


def results(op, x: Tensor, *others: Tensor | None) -> list[Tensor]:
    """The output and the gradients of all but the noise."""
    given = [None if t is None else t.detach().requires_grad_(t.ndim < 4) for t in (x, *others)]
    given[0].requires_grad_()
    y = op(*given, clamp=1.5)
    needed = [t for t in given if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, needed, normal(*x.shape, seed=1).to(y) + 1)]


@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_in_every_order(routed, shape, lacking):
    for maps in (0, 1):
        given = arguments(shape, torch.float32, LACKING[lacking], maps)
        ours = routed.in_every_order(results, scaled_bias_act, *given)
        for one, other in zip(ours, results(scaled_bias_act_reference, *given), strict=True):
            torch.testing.assert_close(one, other, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(routed, dtype):
    for shape in SHAPES[1:4]:
        given = arguments(shape, dtype)
        exact = [None if t is None else t.double() for t in given]
        y, grad_x, *grads = routed.in_every_order(results, scaled_bias_act, *given)
        expected = results(scaled_bias_act_reference, *exact)
        unit = 8 * torch.finfo(dtype).eps
        assert y.dtype == grad_x.dtype == dtype
        for one, other in zip((y, grad_x, *grads), expected, strict=True):
            near = (other.abs() < 1.5 - unit).all() if one is y else True  # a kink decides otherwise beside it
            if near:
                torch.testing.assert_close(one.double(), other, atol=50 * unit, rtol=50 * unit)


def test_layouts_alignment_and_nothing(routed):
    x, *others = arguments((2, 8, 5, 6), torch.float32)
    shifted = x.new_full((x.numel() + 1,), torch.nan)[1:].view(2, 5, 6, 8).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous(memory_format=torch.channels_last)
    for images in (x.contiguous(), shifted, x[:, :, ::2, :], x[:1].expand(2, -1, -1, -1)):
        noise = others[1][:, :, : images.shape[2]]
        ours, plain = (
            results(op, images, others[0], noise, *others[2:]) for op in (scaled_bias_act, scaled_bias_act_reference)
        )
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, atol=3e-5, rtol=3e-5)
        assert ours[0].is_contiguous(memory_format=torch.channels_last)
    empty = results(scaled_bias_act, x[:0], others[0][:0], others[1][:0], *others[2:])
    assert empty[0].shape == (0, 8, 5, 6) and all((grad == 0).all() for grad in empty[1:])


@pytest.mark.parametrize("op", ["both", "without noise"])
def test_every_sum_is_written(routed, op):
    """Into memory that nothing was put into before."""
    x, scale, noise, strength, b = arguments((2, 12, 3, 5), torch.float32)
    y = torch.ops.sage_fast_on_host.scaled_bias_act(x, scale, noise, strength, b, 0.2, 1.0, -1.0)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert before, "torch fills fresh memory with NaN"
        given = noise if op == "both" else None
        _, *sums = torch.ops.sage_fast_on_host.scaled_bias_act_backward(x, x, y, scale, given, 0.2, 1.0, -1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(s.isfinite().all() for s in sums)
    assert (sums[2] == 0) == (op != "both")
