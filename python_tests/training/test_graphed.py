"""The networks of a training: plain calls on any device; replayed as CUDA graphs, the same training, on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.augment import AugmentConfig
from sage_fast.training.gan import GANConfig, train_gan
from sage_fast.training.graphed import Networks
from sage_fast.training.shares import logits_of_both

TINY = GANConfig(
    resolution=16,
    style_dim=16,
    n_mapping=2,
    channel_base=256,
    channel_max=32,
    batch=8,
    total_kimg=0.096,
    r1_every=4,
    pl_weight=2.0,
    pl_every=4,
    log_every=1,
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def pair(device: str = "cpu"):
    torch.manual_seed(0)
    G = Generator(16, 16, 2, channel_base=256, channel_max=32)
    return G.to(device), Discriminator(16, channel_base=256, channel_max=32).to(device)


def test_without_graphs_the_networks_are_called():
    G, D = pair()
    networks = Networks(G, D)
    w_plus = torch.randn(8, G.n_latent, 16, requires_grad=True)
    noise = [torch.randn(8, *maps.shape[1:]) for maps in G.noises.buffers()]
    fakes = networks.fakes(w_plus, noise)
    assert torch.equal(fakes, G(w_plus, noise=noise)) and fakes.requires_grad
    assert torch.equal(networks.logits(fakes), D(fakes))
    for ours, plain in zip(networks.logits_of_both(fakes, -fakes), logits_of_both(D, fakes, -fakes)):
        assert torch.equal(ours, plain)
    with torch.no_grad():
        assert not networks.fakes(w_plus, noise).requires_grad


def test_bad_settings(tmp_path):
    with pytest.raises(InputError, match="graphs keeps one micro-batch's gradients, expected accumulate 1, got 2"):
        dataclasses.replace(TINY, graphs=True, accumulate=2)
    images = torch.zeros(16, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(InputError, match="graphs needs a GPU, got device 'cpu'"):
        train_gan(dataclasses.replace(TINY, graphs=True), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_function_is_captured_on_the_networks_device_into_memory_of_its_own(monkeypatch):
    """A replay of one function comes between another's forward and backward, which reads what its forward left."""
    G, D = pair()
    networks, seen, current = Networks(G, D, graphs=True), [], [torch.device("cuda:0")]
    networks.device = torch.device("cuda:1")

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    def capture(network, samples, allow_unused_input, pool=None):
        seen.append((pool, current[-1], torch.cuda.graph.default_capture_stream))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: f"a stream of {current[-1]}")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", "a stream of cuda:0")
    noise = [torch.randn(8, *maps.shape[1:]) for maps in G.noises.buffers()]
    fakes = networks.fakes(torch.randn(8, G.n_latent, 16), noise)
    networks.logits(fakes), networks.logits_of_both(fakes, -fakes)
    assert seen == [(None, networks.device, "a stream of cuda:1")] * 3
    assert torch.cuda.graph.default_capture_stream == "a stream of cuda:0"


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_gradients_are_those_of_calls(precision):
    """Twice, with other numbers: what a replay overwrites belongs to nobody any more."""
    G, D = pair("cuda")
    graphed, called = Networks(G, D, precision, graphs=True), Networks(G, D, precision)
    for seed in range(3):
        torch.manual_seed(seed)
        w_plus = torch.randn(8, G.n_latent, 16, device="cuda")
        noise = [torch.randn(8, *maps.shape[1:], device="cuda") for maps in G.noises.buffers()]
        real = torch.rand(8, 3, 16, 16, device="cuda") * 2 - 1
        found = []
        for networks in (called, graphed):
            latents = w_plus.clone().requires_grad_()
            D.requires_grad_(False)
            fakes = networks.fakes(latents, noise)
            loss = torch.nn.functional.softplus(-networks.logits(fakes).float()).mean()
            of_G = torch.autograd.grad(loss, [latents, *G.convs.parameters(), G.input.input])
            D.requires_grad_(True)
            with torch.no_grad():
                new = networks.fakes(w_plus + 1, noise)
            of_reals, of_fakes = networks.logits_of_both(real, new)
            loss = torch.nn.functional.softplus(of_fakes.float() - of_reals.float()).mean()
            of_D = torch.autograd.grad(loss, list(D.parameters()))
            found.append([g.clone() for g in (*of_G, *of_D)])
        tolerance = 1e-4 if precision == "float32" else 0.05
        for one, other in zip(*found, strict=True):
            assert float((one - other).norm()) <= tolerance * float(other.norm()) + 1e-7


@needs_gpu
@pytest.mark.parametrize("augment", ["none", "ada"])
def test_a_training_replayed_is_the_training(tmp_path, augment):
    images = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(TINY, augment=AugmentConfig(augment, p=0.5 if augment == "ada" else None))
    for name, graphs in (("called", False), ("replayed", True)):
        train_gan(dataclasses.replace(config, graphs=graphs), images, tmp_path / name, device="cuda")
    called, replayed = (
        [json.loads(line) for line in (tmp_path / name / "logs/gan.jsonl").read_text().splitlines()]
        for name in ("called", "replayed")
    )
    assert len(called) == len(replayed) == 12
    for one, other in zip(called, replayed):
        for loss in ("g_loss", "d_loss", "r1"):
            assert other[loss] == pytest.approx(one[loss], rel=0.02, abs=1e-3), (one["step"], loss)
