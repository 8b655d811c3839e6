"""The networks under torch.compile, torch.export and autocast: no graph break, the same values and gradients."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch

from sage_fast import _native
from sage_fast.models.stylegan2 import Discriminator, Generator

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            shutil.which(os.environ.get("CXX", "c++")) is None or "SAGE_FAST_INDUCTOR_TESTS" not in os.environ,
            reason="compiles for about a minute; set SAGE_FAST_INDUCTOR_TESTS=1 where there is a C++ compiler",
        ),
    ),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def generator() -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Generator(16, style_dim=8, n_mapping=2, channel_base=64, channel_max=8)
        for module in network.modules():  # noise that counts
            if type(module).__name__ == "_NoiseStrength":
                torch.nn.init.constant_(module.weight, 0.1)
    return network


def latents(network: Generator, n: int = 2) -> torch.Tensor:
    return torch.randn(n, network.n_latent, network.style_dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_synthesis_is_one_graph_and_equal(generator, backend):
    w_plus = latents(generator)
    compiled = torch.compile(generator.synthesis, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(w_plus), generator.synthesis(w_plus), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients_are_equal(generator, backend):
    w_plus = latents(generator).requires_grad_()
    compiled = torch.compile(generator.synthesis, fullgraph=True, backend=backend)
    inputs = [w_plus, *generator.convs.parameters()]
    ours, theirs = (torch.autograd.grad(run(w_plus).square().mean(), inputs) for run in (compiled, generator.synthesis))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_graph_holds_the_native_ops(generator):
    if not _native.has_kernel("upfirdn2d", "cpu"):
        pytest.skip("no kernels here")
    found: set[str] = set()

    def look(graph: torch.fx.GraphModule, _):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.compile(generator.synthesis, fullgraph=True, backend=look)(latents(generator))
    assert any("sage_fast.upfirdn2d" in name for name in found)


def test_compiled_discriminator(generator):
    network = Discriminator(16, channel_base=64, channel_max=8)
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), network(images), atol=1e-5, rtol=1e-5)


def test_exported_synthesis(generator):
    w_plus = latents(generator)
    program = torch.export.export(generator.eval(), (w_plus,))
    torch.testing.assert_close(program.module()(w_plus), generator(w_plus), atol=1e-5, rtol=1e-5)


def test_autocast_loses_no_more_than_plain_pytorch(generator, monkeypatch):
    """The same network on the reference ops in the same precision, both against float64."""
    w_plus = latents(generator, 4)

    def images_and_gradients(network, w_plus, low):
        w_plus = w_plus.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            images = network.synthesis(w_plus)
        (grad,) = torch.autograd.grad(images.double().square().mean(), w_plus)
        return images.detach().double(), grad.double()

    exact = images_and_gradients(copy.deepcopy(generator).double(), w_plus.double(), False)
    ours = images_and_gradients(generator, w_plus, True)
    monkeypatch.setattr(_native, "has_kernel", lambda op, device_type: False)
    plain = images_and_gradients(generator, w_plus, True)
    for mine, theirs, right in zip(ours, plain, exact):
        error, allowed = ((y - right).norm() for y in (mine, theirs))
        assert 0 < error <= 2 * allowed


def test_r1_under_autocast(generator):
    network = Discriminator(16, channel_base=64, channel_max=8)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def penalty(low: bool) -> torch.Tensor:
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            logits = network(x)
        (grad,) = torch.autograd.grad(logits.float().sum(), x, create_graph=True)
        return grad.square().sum([1, 2, 3]).mean()

    exact, low = penalty(False), penalty(True)
    low.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert network.convs[1].conv1[0].weight.grad.abs().max() > 0
    torch.testing.assert_close(low, exact, rtol=0.1, atol=1e-6)
