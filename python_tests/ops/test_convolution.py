"""Convolutions whose second derivatives are convolutions: the values and derivatives of PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.ops import convolution
from sage_fast.ops.convolution import conv2d, conv_transpose2d, second_derivatives
from sage_fast.training.losses import path_length_penalty, r1_penalty

# shape of the images, of the filter, settings: sides that stride 2 divides and does not, filters of uneven sides, one pixel
CASES = {
    "1 x 1": ((2, 3, 5, 4), (4, 3, 1, 1), {}),
    "3 x 3": ((2, 3, 5, 4), (4, 3, 3, 3), {"padding": 1}),
    "3 x 3, stride 2": ((2, 3, 7, 8), (4, 3, 3, 3), {"stride": 2}),
    "2 x 5, stride 2, padding": ((1, 2, 6, 7), (3, 2, 2, 5), {"stride": 2, "padding": 1}),
    "one pixel left": ((2, 3, 3, 3), (1, 3, 3, 3), {}),
    "transposed": ((2, 3, 4, 3), (3, 2, 3, 3), {"stride": 2}),
    "transposed, stride 1": ((1, 3, 2, 2), (3, 2, 3, 3), {"stride": 1}),
}


@pytest.fixture(autouse=True)
def on_every_device(monkeypatch):
    monkeypatch.setattr(convolution, "_DEVICES", ("cpu", "cuda"))


def pair(case: str):
    plain, ours = (F.conv_transpose2d, conv_transpose2d) if "transposed" in case else (F.conv2d, conv2d)
    return plain, second_derivatives()(ours)


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def derivatives(function, x, weight):
    """Of a function that is not linear in the results: the value, first and second derivatives."""
    y = function(x, weight)
    first = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum(g.cos().sum() for g in first), (x, weight), create_graph=True)
    third = torch.autograd.grad(sum(g.sin().sum() for g in second), (x, weight))
    return [y, *first, *second, *third]


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_three_orders_are_pytorchs(device, case):
    images, filter, settings = CASES[case]
    plain, ours = pair(case)
    x, weight = draw(*images, device=device), draw(*filter, device=device)
    found = derivatives(lambda *both: ours(*both, **settings), x, weight)
    expected = derivatives(lambda *both: plain(*both, **settings), x, weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradgradcheck(case):
    images, filter, settings = CASES[case]
    _, ours = pair(case)
    x, weight = draw(*images, device="cpu"), draw(*filter, device="cpu")
    assert torch.autograd.gradcheck(lambda *both: ours(*both, **settings), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *both: ours(*both, **settings), (x, weight))


@pytest.mark.parametrize("needs", ["images", "filter", "neither"])
def test_only_what_is_wanted_is_derived(device, needs):
    x, weight = draw(2, 3, 5, 5, device=device), draw(4, 3, 3, 3, device=device)
    x, weight = x.detach().requires_grad_(needs == "images"), weight.detach().requires_grad_(needs == "filter")
    _, ours = pair("3 x 3")
    y = ours(x, weight, padding=1)
    assert y.requires_grad == (needs != "neither")
    if y.requires_grad:
        y.square().sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (needs == "images", needs == "filter")


def test_empty_batches_and_layouts(device):
    weight = draw(4, 3, 3, 3, device=device)
    _, ours = pair("3 x 3")
    assert ours(draw(0, 3, 5, 5, device=device), weight, padding=1).shape == (0, 4, 5, 5)
    x = draw(2, 3, 5, 5, device=device)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for one, other in zip(derivatives(ours, x, weight), derivatives(ours, last, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_on_a_cpu_they_are_pytorchs(monkeypatch):
    monkeypatch.undo()
    with second_derivatives():
        y = conv2d(draw(1, 2, 4, 4, device="cpu"), draw(2, 2, 3, 3, device="cpu"))
    assert "Convolution" in type(y.grad_fn).__name__


def test_outside_the_block_they_are_pytorchs():
    x, weight = draw(1, 2, 4, 4, device="cpu"), draw(2, 2, 3, 3, device="cpu")
    assert "Convolution" in type(conv2d(x, weight).grad_fn).__name__
    with second_derivatives():
        assert "Convolution" not in type(conv2d(x, weight).grad_fn).__name__
        with pytest.raises(ZeroDivisionError), second_derivatives():
            _ = 1 / 0
        assert "Convolution" not in type(conv2d(x, weight).grad_fn).__name__
    assert "Convolution" in type(conv2d(x, weight).grad_fn).__name__


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_regularisers_of_a_training(device, dtype):
    """R1 and the path length through whole networks, with and without; channels that the CPU's own kernels do not take."""
    torch.manual_seed(0)
    sizes = dict(channel_base=64, channel_max=6)
    G, D = Generator(16, 8, 1, **sizes).double().to(device), Discriminator(16, **sizes).double().to(device)
    real, w_plus = draw(4, 3, 16, 16, device=device), draw(4, G.n_latent, 8, device=device)
    y, low = torch.randn_like(real), dtype != torch.float64
    if low:
        G, D, real, w_plus, y = G.float(), D.float(), real.float(), w_plus.float(), y.float()

    def gradients():
        with torch.autocast(device, torch.bfloat16, enabled=low):
            shown, latents = real.detach().requires_grad_(), w_plus.detach().requires_grad_()
            loss = r1_penalty(D(shown), shown)
            loss = loss + path_length_penalty(G(latents, noise="const"), latents, loss.detach(), y)[0]
        return torch.autograd.grad(loss, [*D.parameters(), *G.parameters()], allow_unused=True, materialize_grads=True)

    plain = torch.cat([g.flatten() for g in gradients()])
    with second_derivatives():
        ours = torch.cat([g.flatten() for g in gradients()])
    assert float((ours - plain).norm() / plain.norm()) < (0.05 if low else 1e-10)
