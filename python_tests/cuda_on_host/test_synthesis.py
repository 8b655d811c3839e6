"""The kernels of the CUDA synthesis on the host: both epilogues, counter-based noise, and the whole road through them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from epilogue_cases import RULES, call, numbers

from sage_fast.models.inference import fused_network
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import counter_normal_reference, synthesis_cuda
from sage_fast.ops.synthesis import synthesis_reference
from sage_fast.ops.synthesis_epilogue import (
    blur_epilogue,
    blur_epilogue_reference,
    styled_epilogue,
    styled_epilogue_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# n, h, w, c, pitch of the rows, image channels: groups of 1 thread to 256, of several warps, half empty; one round of
# a block's pixels and several; tiles of the blur beside each other along rows and channels
SHAPES = [
    (1, 4, 4, 8, 8, 3),
    (3, 8, 6, 24, 40, 1),
    (2, 10, 34, 16, 16, 4),
    (1, 6, 10, 264, 264, 3),
    (1, 2, 2, 1024, 1030, 2),
    (1, 10, 70, 136, 136, 3),
    (1, 4, 262, 8, 8, 3),
]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("noise", ["none", "shared", "each"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogues_equal_the_reference(routed, shape, dtype, noise, rule):
    """What differs is the order of sums, and one rounding of the result."""
    tolerance = dict(atol=3e-5, rtol=3e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    t = numbers(shape, 0, noise, dtype)
    for changed in ({}, {"next_style": None}, {"skip": None}):
        ours, plain = (call(f, t, rule, **changed) for f in (styled_epilogue, styled_epilogue_reference))
        for one, other in zip(ours, plain, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, **tolerance)
    t = numbers(shape, 1, noise, dtype)
    torch.testing.assert_close(*(call(f, t, rule) for f in (blur_epilogue, blur_epilogue_reference)), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogues_in_every_order(routed, shape, dtype):
    routed.in_every_order(call, styled_epilogue, numbers(shape, 0, "each", dtype), RULES["plain"])
    routed.in_every_order(call, blur_epilogue, numbers(shape, 1, "each", dtype), RULES["plain"])


def test_long_strips_of_the_blur(routed):
    """More rows than a strip has, the last strip short."""
    t = numbers((1, 38, 6, 8, 8, 3), 1, "each", torch.float32)
    ours = routed.in_every_order(call, blur_epilogue, t, RULES["plain"])
    torch.testing.assert_close(ours, call(blur_epilogue_reference, t, RULES["plain"]), atol=3e-5, rtol=3e-6)


def test_samples_that_are_not_a_number_stay_alone(routed):
    t = numbers((4, 16, 18, 24, 24, 3), 0, "each", torch.float32)
    clean = call(styled_epilogue, t, RULES["plain"])
    t["x"][1::2] = torch.nan
    for one, before in zip(call(styled_epilogue, t, RULES["plain"]), clean):
        assert torch.equal(one[::2], before[::2]) and one[1::2].isnan().all()


def test_no_samples(routed):
    t = {
        k: v[:0] if k in ("x", "factor", "next_style", "image_weight", "skip") else v
        for k, v in numbers(SHAPES[0], 0, "shared", torch.float32).items()
    }
    y, image = call(styled_epilogue, t, RULES["plain"])
    assert y.shape == (0, 4, 4, 8) and image.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("n, numel", [(1, 16), (3, 1001), (5, 4096), (0, 7), (2, 0), (2, 1)])
def test_counter_normal(library, n, numel):
    samples = torch.arange(n) * 2**33 - 1
    ours = library.in_every_order(torch.ops.sage_fast_on_host.counter_normal, samples, -5, 3, numel)
    torch.testing.assert_close(ours, counter_normal_reference(samples, -5, 3, numel), atol=1e-6, rtol=0)
    together = torch.ops.sage_fast_on_host.counter_normal(samples.repeat(2)[::2], -5, 3, numel)
    assert torch.equal(together, ours[torch.arange(2 * n)[::2] % max(n, 1)])


# every size from 4 px; channels that fill no vector, and one
CHANNELS = {"4 px": [7], "odd": [33, 1, 24, 17], "16 px": [48, 32, 24]}


def generator(channels: list[int], n_channels: int) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(len(channels))
        G = Generator(4 << (len(channels) - 1), 19, 1, n_channels, channels=channels)
        for layer in (G.conv1, *G.convs):
            torch.nn.init.normal_(layer.noise.weight, std=0.2)
            torch.nn.init.normal_(layer.activate.bias, std=0.2)
    return G.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [1, 3, 4])
@pytest.mark.parametrize("name", CHANNELS)
def test_the_whole_synthesis(routed, name, n_channels, dtype):
    """Every kernel of the road as it runs on a GPU, the convolutions between by PyTorch for the CPU."""
    G = generator(CHANNELS[name], n_channels)
    w_plus = torch.randn(3, G.n_latent, G.style_dim, generator=torch.Generator().manual_seed(3))
    network = dataclasses.replace(fused_network(G), clamp=2.0)
    maps = [getattr(G.noises, f"noise_{i}") for i in range(G.n_latent - 1)]
    noise = [m.expand(3 if i % 2 else 1, -1, -1, -1) for i, m in enumerate(maps)]
    exact = synthesis_reference(network, w_plus, noise)
    ours = synthesis_cuda.draw(network, w_plus, noise, dtype)
    error = float((ours.double() - exact.double()).abs().max() / exact.abs().max())
    assert error < (3e-6 if dtype == torch.float32 else 12 * torch.finfo(dtype).eps)
    assert torch.equal(synthesis_cuda.draw(network, w_plus, noise, dtype), ours)
