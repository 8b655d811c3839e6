"""Augmenting a batch of 16 images for a discriminator: forward, and forward with the gradient at the images.

Drawing is part of a call, as in training. Rivals: the same with depthwise convolutions of PyTorch for the filters, and with
``--peer-path`` the pipeline of a clone of stylegan2-ada-pytorch or stylegan3. They draw numbers of their own, so parity is
checked first, on amounts that their switch for percentiles can be told; after that p is 0.6 for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from peers import load_augment_pipes
from torch import Tensor
from torch.nn import functional as F

from sage_fast.training import resample
from sage_fast.training.ada import AMOUNTS
from sage_fast.training.augment import Augment, AugmentConfig, Draws

BATCH, P, PERCENTILE = 16, 0.6, 0.7
Apply = Callable[[Tensor], Tensor]


def amounts_at(percentile: float) -> Tensor:
    """What the peers take: erfinv(2 q - 1) for a normal variable, and no rotation after stretching."""
    uniform, normal = 2 * percentile - 1, torch.erfinv(torch.tensor(2 * percentile - 1)).item()
    values = {"flip": math.floor(2 * percentile), "turns": math.floor(4 * percentile)}
    values |= dict.fromkeys(("shift_x", "shift_y"), uniform / 8)
    values |= dict.fromkeys(("rotate_before", "hue"), uniform * math.pi)
    values |= dict.fromkeys(("scale", "stretch", "brightness"), 0.2 * normal)
    values |= dict.fromkeys(("move_x", "move_y"), normal / 8)
    values |= {"contrast": 0.5 * normal, "luma_flip": values["flip"], "saturation": normal}
    return torch.tensor([[values.get(name, 0.0) for name in AMOUNTS]] * BATCH, dtype=torch.float64)


def plain_upfirdn2d(x: Tensor, f: Tensor, up: int = 1, down: int = 1, padding=0, flip_filter=False, gain=1.0) -> Tensor:
    """What the resampling asks for, as two depthwise convolutions."""
    c = x.shape[1]
    taps = (f * math.sqrt(gain)).to(x).expand(c, 1, 1, -1)
    if up == 2:
        x = F.conv_transpose2d(x, taps, stride=(1, 2), padding=(0, 5), groups=c)
        return F.conv_transpose2d(x, taps.mT, stride=(2, 1), padding=(5, 0), groups=c)
    return F.conv2d(F.conv2d(x, taps, stride=(1, 2), groups=c), taps.mT, stride=(2, 1), groups=c)


@contextmanager
def plain_filters() -> Iterator[None]:
    ours = resample.upfirdn2d
    resample.upfirdn2d = plain_upfirdn2d
    try:
        yield
    finally:
        resample.upfirdn2d = ours


def in_plain_pytorch(apply: Apply) -> Apply:
    def run(images: Tensor) -> Tensor:
        with plain_filters():
            return apply(images)

    return run


@pytest.mark.parametrize("part", ["forward", "forward and gradient"])
@pytest.mark.parametrize("size", [32, 64])
def test_ada(compare, request, size, part):
    if compare.device.type != "cpu":
        pytest.skip("on a CPU")
    augment, rng = Augment(AugmentConfig("ada", p=P)), torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, size, size, requires_grad=part != "forward")
    pipes = load_augment_pipes(request.config.getoption("--peer-path"), P)
    draws = Draws.of(amounts_at(PERCENTILE))
    expected = augment.apply(images, draws)
    for name, pipe in pipes.items():
        error = (pipe(images, debug_percentile=PERCENTILE) - expected).abs().max().item()
        assert error < 1e-4 * expected.abs().max(), f"{name} differs by {error:.2e}"
    assert torch.allclose(in_plain_pytorch(lambda x: augment.apply(x, draws))(images), expected, atol=1e-4)

    grad = torch.randn_like(images)

    def call(apply: Apply) -> Callable[[], Tensor]:
        if part == "forward":
            return lambda: apply(images)
        return lambda: torch.autograd.grad(apply(images), images, grad)[0]

    ours = lambda x: augment.apply(x, augment.draw(BATCH, rng))  # noqa: E731
    compare.tolerance, compare.compiled = math.inf, False  # each draws its own; parity is above
    rivals = {"plain PyTorch": call(in_plain_pytorch(ours)), **{name: call(pipe) for name, pipe in pipes.items()}}
    compare(f"ADA bgc, {size} px, p {P}, {part}", call(ours), rivals)
