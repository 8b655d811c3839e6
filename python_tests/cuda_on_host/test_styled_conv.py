"""The kernels of styled_conv on the host, copies and products of tensor cores included, and a whole synthesis on them."""

from __future__ import annotations

import pytest
import torch
from styled_conv_cases import DTYPES, SHAPES, arguments, bad_inputs, compare

from sage_fast.models.inference import fused_network
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import synthesis_cuda
from sage_fast.ops.styled_conv import styled_conv
from sage_fast.ops.synthesis import synthesis_reference


@pytest.mark.parametrize("up", [False, True], ids=["plain", "up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(routed, shape, dtype, up):
    t = arguments(shape, up, dtype)
    compare(styled_conv(**t), t)


@pytest.mark.parametrize("up", [False, True], ids=["plain", "up"])
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_every_width_in_every_order_of_threads(routed, columns, up):
    """Two blocks of 128 channels; input channels in one part and, of the second, shared by two blocks."""
    for c_in in (8, 40):
        t = arguments((3, 4, 4, c_in, 136, 3), up, torch.bfloat16, "clamped")
        compare(routed.in_every_order(styled_conv, **t, columns=columns), t)


@pytest.mark.parametrize("up", [False, True], ids=["plain", "up"])
def test_what_may_be_absent(routed, up):
    no_image = dict(image_weight=None, image_bias=None, skip=None)
    for noise in ("none", "shared"):
        for changed in (dict(next_style=None), dict(skip=None), no_image):
            t = arguments((3, 4, 4, 16, 16, 3), up, torch.float16, "clamped", noise, **changed)
            compare(styled_conv(**t), t)


def test_samples_of_a_tile_do_not_meet(routed):
    t = arguments((4, 4, 4, 16, 16, 3), False, torch.bfloat16)
    clean = styled_conv(**t)
    t["x"][1::2] = float("nan")
    y, image = styled_conv(**t)
    assert torch.equal(y[::2], clean[0][::2]) and torch.equal(image[::2], clean[1][::2])
    assert y[1::2].isnan().all() and image[1::2].isnan().all()


def test_bad_input(routed):
    t = arguments(SHAPES[0], False, torch.bfloat16)
    for changed, message in bad_inputs(t):
        with pytest.raises(ValueError, match=message):
            styled_conv(**t | changed)


def test_no_samples(routed):
    t = arguments((0, 4, 4, 8, 16, 3), True, torch.bfloat16)
    y, image = styled_conv(**t)
    assert y.shape == (0, 8, 8, 16) and image.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_synthesis(routed, monkeypatch, dtype):
    """Repeats to the bit; relative error in units of the dtype's roundings as for the other road."""
    monkeypatch.setenv("SAGE_FAST_CUDA_CONV", "own")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Generator(16, 11, 1, channels=[40, 24, 9])
        for layer in (G.conv1, *G.convs):
            torch.nn.init.normal_(layer.noise.weight, std=0.3)
    network = fused_network(G.eval().requires_grad_(False))
    noise = [getattr(G.noises, f"noise_{i}") for i in range(G.n_latent - 1)]
    w_plus = torch.randn(3, G.n_latent, 11, generator=torch.Generator().manual_seed(1))
    images = synthesis_cuda.draw(network, w_plus, noise, dtype)
    assert torch.equal(images, synthesis_cuda.draw(network, w_plus, noise, dtype))
    expected = synthesis_reference(network, w_plus, noise)
    eps = 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps  # of TF32
    assert 0 < (images - expected).abs().max() / expected.abs().max() < 12 * eps
