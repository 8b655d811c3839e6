"""Derivatives forward and the transforms of ``torch.func``: kernels know neither, so the reference runs; a tangent is never
lost.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import forward_ad

from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.ops import (
    bias_act,
    conv3x3,
    conv3x3_transposed,
    edit_latents,
    edit_latents_reference,
    least_squares_codes,
    modulated_conv2d,
    project_onto_basis,
    upfirdn2d,
)
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


BATCHED = {
    "conv3x3": (conv3x3, (4, 16, 8, 8), (16, 16, 3, 3)),
    "conv3x3, stride 2": (lambda x, weight: conv3x3(x, weight, 2), (4, 16, 17, 17), (16, 16, 3, 3)),
    "conv3x3_transposed": (conv3x3_transposed, (4, 16, 8, 8), (16, 16, 3, 3)),
    "bias_act": (lambda x, b: bias_act(x, b, act="swish"), (4, 16, 8, 8), (16,)),
    "project_onto_basis": (project_onto_basis, (5, 4, 16), (4, 16, 3)),
    "least_squares_codes": (least_squares_codes, (5, 4, 16), (4, 3, 16)),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("op, x, weight", BATCHED.values(), ids=BATCHED)
def test_a_batch_of_gradients_in_one_pass_back(op, x, weight, order):
    """What ``torch.autograd.functional.jacobian(vectorize=True)`` asks for."""
    inputs = [torch.randn(*shape, generator=RNG).requires_grad_() for shape in (x, weight)]
    y = op(*inputs)
    if order == 2:
        y = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)[0]
    grads = torch.randn(3, *y.shape, generator=RNG)
    got = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    for batch, alone in zip(got, zip(*each)):
        torch.testing.assert_close(batch, torch.stack(alone), atol=1e-3, rtol=1e-5)


def test_a_jacobian_of_a_network_in_one_pass_back():
    torch.manual_seed(5)
    G = Generator(16, 8, 2, channel_base=256, channel_max=16)
    w = torch.randn(4, G.n_latent, 8)

    def means(w):
        return G.synthesis(w, noise="const").mean((2, 3))

    together, each = (torch.autograd.functional.jacobian(means, w, vectorize=vectorize) for vectorize in (True, False))
    torch.testing.assert_close(together, each, atol=1e-5, rtol=1e-4)


def test_classes_of_a_batch_of_edits():
    """Numbers of a batch cannot be looked at; a class that is not there is NaN, as on a GPU."""
    e, codes, directions = (torch.randn(*shape, generator=RNG) for shape in ((2, 4, 8), (6, 5, 4, 3), (4, 8, 3)))
    index = torch.randint(0, 2, (6, 5), generator=RNG)
    got = torch.func.vmap(lambda n, i: edit_latents(e, n, directions, 2.0, None, i))(codes, index)
    each = [edit_latents_reference(e, n, directions, 2.0, None, i) for n, i in zip(codes, index)]
    torch.testing.assert_close(got, torch.stack(each))
    index[3, 1] = 2
    got = torch.func.vmap(lambda n, i: edit_latents(e, n, directions, 2.0, None, i))(codes, index)
    assert got[3, 1].isnan().all() and got.isnan().sum() == 4 * 8
