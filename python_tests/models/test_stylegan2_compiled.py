"""The networks under torch.compile, torch.export and autocast: no graph break, the same values and gradients."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil

import pytest
import torch
import torch._dynamo.testing

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


@pytest.fixture(params=[8, 16], ids="{} channels".format)  # 16: convolutions in the transform's domain
def channels(request) -> dict[str, int]:
    return dict(channel_base=16 * request.param, channel_max=request.param)


@pytest.fixture
def generator(channels) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Generator(16, style_dim=8, n_mapping=2, **channels)
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


def test_the_graph_holds_the_native_ops(generator, channels):
    if not _native.has_kernel("upfirdn2d", "cpu"):
        pytest.skip("no kernels here")
    found: set[str] = set()

    def look(graph: torch.fx.GraphModule, _):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.compile(generator.synthesis, fullgraph=True, backend=look)(latents(generator))
    assert any("sage_fast.upfirdn2d" in name for name in found)
    assert any("sage_fast.conv3x3" in name for name in found) == (channels["channel_max"] == 16)


def test_compiled_discriminator(channels):
    network = Discriminator(16, **channels)
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), network(images), atol=1e-5, rtol=1e-5)


def test_exported_synthesis(generator):
    w_plus = latents(generator)
    program = torch.export.export(generator.eval(), (w_plus,))
    torch.testing.assert_close(program.module()(w_plus), generator(w_plus), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_exported_for_every_batch(generator, kernels, recorded, strict):
    batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    plain = contextlib.nullcontext if kernels else _native.without_kernels
    with torch.set_grad_enabled(recorded):
        with plain():
            program = torch.export.export(
                generator.eval(), (latents(generator, 4),), dynamic_shapes=batch, strict=strict
            )
        for n in (1, 3, 70):
            w_plus = latents(generator, n)
            torch.testing.assert_close(program.module()(w_plus), generator(w_plus), atol=2e-5, rtol=1e-5)


def test_compiled_for_every_batch(generator):
    """Below 16 samples, where PyTorch's own convolution is another: one graph serves what eager mode does by two roads."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(generator.synthesis, fullgraph=True, backend=counter)
    w_plus = latents(generator, 4)
    torch._dynamo.mark_dynamic(w_plus, 0)
    for w in (w_plus, latents(generator, 3), latents(generator, 9)):
        torch.testing.assert_close(compiled(w), generator.synthesis(w), atol=2e-5, rtol=1e-5)
    assert counter.frame_count == 1


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


def test_r1_under_autocast(channels):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Discriminator(16, **channels)
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
