"""Derivatives forward and the transforms of ``torch.func``: kernels know neither, so the reference runs; a tangent is never
lost.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import forward_ad

from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.ops import bias_act, conv3x3, modulated_conv2d, upfirdn2d
from sage_fast.ops.scaled_bias_act import scaled_bias_act

FIR = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64
RNG = torch.Generator().manual_seed(1)
WEIGHT, BIAS, STYLE = (torch.randn(*shape, generator=RNG) for shape in ((16, 16, 3, 3), (16,), (4, 16)))
NOISE, STRENGTH = torch.randn(1, 1, 8, 8, generator=RNG), torch.ones(1)
OPS = {
    "conv3x3": lambda x: conv3x3(x, WEIGHT, scale=0.1),
    "upfirdn2d": lambda x: upfirdn2d(x, FIR, up=2, padding=2),
    "bias_act": lambda x: bias_act(x, BIAS, act="lrelu"),
    "scaled_bias_act": lambda x: scaled_bias_act(x, STYLE, NOISE, STRENGTH, BIAS),
    "modulated_conv2d": lambda x: modulated_conv2d(x, WEIGHT, STYLE, up=2, resample_filter=FIR),
}


def along(f, x, tangent):
    """The derivative of f along the tangent, by two derivatives the other way."""
    return torch.autograd.functional.jvp(f, x, tangent)[1]


@pytest.mark.parametrize("op", OPS)
def test_ops(op):
    x, tangent = (torch.randn(4, 16, 8, 8, generator=RNG) for _ in range(2))
    expected = along(OPS[op], x, tangent)
    torch.testing.assert_close(torch.func.jvp(OPS[op], (x,), (tangent,))[1], expected, atol=1e-4, rtol=1e-4)
    with forward_ad.dual_level():
        y = OPS[op](forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected, atol=1e-4, rtol=1e-4)
    assert OPS[op](x).grad_fn is None


def test_networks():
    """How images and logits change along a direction of the latents, as analyses of directions ask."""
    torch.manual_seed(2)
    G = Generator(16, 8, 2, channel_base=64, channel_max=16).eval().requires_grad_(False)
    D = Discriminator(16, channel_base=64, channel_max=16).eval().requires_grad_(False)
    w, tangent = torch.randn(4, G.n_latent, 8), torch.randn(4, G.n_latent, 8)
    for f in (lambda w: G.synthesis(w, noise="const"), lambda w: D(G.synthesis(w, noise="const"))):
        got = torch.func.jvp(f, (w,), (tangent,))[1]
        expected = along(f, w, tangent)
        assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("op", OPS)
def test_gradients_by_torch_func(op):
    x = torch.randn(4, 16, 8, 8, generator=RNG)

    def total(x):
        return OPS[op](x).square().sum()

    whole = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(whole), whole)
    torch.testing.assert_close(torch.func.grad(total)(x), expected, atol=1e-2, rtol=1e-4)
    y, back = torch.func.vjp(OPS[op], x)
    torch.testing.assert_close(back(2 * y)[0], expected, atol=1e-2, rtol=1e-4)


def test_networks_by_torch_func():
    """A gradient of each image by itself, and a Jacobian, as influence functions and analyses of latents ask."""
    torch.manual_seed(3)
    G = Generator(16, 8, 2, channel_base=64, channel_max=16).eval().requires_grad_(False)
    D = Discriminator(16, channel_base=64, channel_max=16).eval().requires_grad_(False)
    w = torch.randn(3, G.n_latent, 8)

    def means(w):
        return G.synthesis(w, noise="const").mean((2, 3))

    expected = torch.autograd.functional.jacobian(means, w)
    torch.testing.assert_close(torch.func.jacrev(means)(w), expected, atol=1e-5, rtol=1e-3)
    drawn = torch.func.vmap(lambda one: G.synthesis(one[None], noise="const")[0])(w)
    images = G.synthesis(w, noise="const")
    torch.testing.assert_close(drawn, images, atol=1e-4, rtol=1e-4)
    each = torch.func.vmap(torch.func.grad(lambda image: D(image[None]).sum()))(images)
    for image, gradient in zip(images, each):
        alone = image[None].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(D(alone).sum(), alone)
        assert (gradient - wanted[0]).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_an_ensemble_of_networks_in_one_call(network):
    torch.manual_seed(4)
    x = torch.randn(2, 6, 512) if network is Generator else torch.randn(4, 3, 16, 16)
    models = [network(16, channel_base=64, channel_max=16) for _ in range(3)]
    state, empty = torch.func.stack_module_state(models), copy.deepcopy(models[0]).to("meta")
    together = torch.vmap(lambda *state: torch.func.functional_call(empty, state, (x,)))(*state)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]), atol=1e-4, rtol=1e-4)
