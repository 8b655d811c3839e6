"""16 bits on every road: within 2e-2 of the largest value of what float32 gives for the same inputs, whatever the architecture.

A few architectures always; ``SAGE_FAST_SWEEP=N`` draws N more at random (a minute for a hundred).
"""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch

from sage_fast import _native
from sage_fast.models.stylegan2 import Discriminator, Generator, truncate
from sage_fast.models.stylegan2_layers import Linear, sparing
from sage_fast.models.weights import load_generator

BF16 = torch.bfloat16
ALWAYS = {
    "4 px": dict(resolution=4, channels=[12], connections="skip", n_channels=1),
    "16 px, labels": dict(resolution=16, channels=[16] * 3, connections="skip", c_dim=3, clamp=256.0),
    "32 px, orig": dict(resolution=32, channels=[32] * 4, connections="orig", clamp=1.0),
    "64 px, orig": dict(resolution=64, channels=[8] * 5, connections="orig", n_channels=4),
    "32 px, resnet": dict(resolution=32, channels=[8] * 4, connections="resnet", clamp=1.0),
    "32 px, wide": dict(resolution=32, channels=[256, 256, 256, 128], connections="skip"),
    "256 px": dict(resolution=256, channels=[32, 32, 32, 32, 16, 16, 8], connections="skip"),
    "512 px": dict(resolution=512, channels=[16, 16, 16, 16, 8, 8, 4, 4], connections="skip", clamp=256.0),
    "1024 px": dict(resolution=1024, channels=[16, 16, 16, 8, 8, 8, 4, 4, 2], connections="skip"),
}


def weighted(network, seed):
    """Random weights in which everything counts, in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            if name.endswith(("bias", "noise.weight")):
                value.add_(torch.randn(value.shape, generator=rng) * 0.3)
            elif not name.endswith("kernel"):
                value.copy_(torch.randn(value.shape, generator=rng))
                mapping = name.startswith(("style.", "embed.1")) and "embed.w" not in name
                value.mul_(100 if mapping else 0.2 if name == "latent_avg" else 1)
    return network.eval()


def discriminator_of(G, seed):
    kinds = dict(connections=("resnet", "skip", "orig")[seed % 3], mbstd_group=(2, 4, None)[seed % 3], n_mapping=2)
    shape = dict(n_channels=G.n_channels, channels=G.channels, c_dim=G.c_dim, clamp=G.clamp)
    return weighted(Discriminator(G.resolution, **shape, **kinds), seed)


@torch.no_grad()
def arrays(G, D, inputs, latents=None):
    """Every array of the acceptance: ``latents`` are those the images are drawn from, the network's own when absent."""
    z, c, d_in = inputs
    w = G.mapping(z, c)
    found = {"w": w, "psi": truncate(w, G.latent_avg, 0.7)}
    psi, w_plus = (G.broadcast(found["psi"]), G.broadcast(w.flip(0))) if latents is None else latents
    found |= {"const": G(psi), "none": G(psi, noise="none"), "w_plus": G(w_plus, noise="none"), "logits": D(d_in, c)}
    return found, (psi, w_plus)


def errors(shape, seed, n=4):
    """The share of its largest value by which each array is off: 16-bit weights and inputs, then autocast."""
    G = weighted(Generator(**{"style_dim": 32, "n_mapping": 4, **shape}), seed)
    D = discriminator_of(G, seed + 1)
    rng = torch.Generator().manual_seed(seed + 2)
    c = torch.eye(max(n, G.c_dim))[:n, : G.c_dim] if G.c_dim else None
    inputs = (
        torch.randn(n, G.style_dim, generator=rng),
        c,
        torch.randn(n, G.n_channels, *[G.resolution] * 2, generator=rng),
    )
    inputs = tuple(x if x is None else x.to(BF16).float() for x in inputs)
    _, (psi, w_plus) = arrays(G, D, inputs)
    w_plus = w_plus + 0.3 * torch.randn(w_plus.shape, generator=rng)
    latents = psi.to(BF16).float(), w_plus.to(BF16).float()
    expected, _ = arrays(G, D, inputs, latents)
    low = [x if x is None else x.to(BF16) for x in inputs]
    low_latents = [x.to(BF16) for x in latents]
    found = {"bf16": arrays(copy.deepcopy(G).to(BF16), copy.deepcopy(D).to(BF16), low, low_latents)[0]}
    with torch.autocast("cpu", BF16):
        found["autocast"] = arrays(G, D, inputs, latents)[0]
    return {
        f"{road} {name}": float((value.double() - expected[name]).abs().max() / expected[name].abs().max())
        for road, values in found.items()
        for name, value in values.items()
    }


CASES = [
    pytest.param(shape, native, id=f"{name}-{'native' if native else 'reference'}")
    for name, shape in ALWAYS.items()
    for native in (True, False)
    if native or shape["resolution"] < 1024  # where the reference is slow
]


@pytest.mark.parametrize(("shape", "native"), CASES)
def test_every_array_keeps_two_digits(monkeypatch, shape, native):
    if not native:
        monkeypatch.setattr(_native, "has_kernel", lambda op, device: False)
    found = errors(shape, 1, n=4 if shape["resolution"] < 512 else 1)
    assert max(found.values()) < 1.2e-2, max(found.items(), key=lambda item: item[1])


def any_shape(rng):
    resolution = rng.choice([4, 8, 16, 32, 64, 128, 256, 512, 1024])
    most = rng.choice([8, 16, 32, 64, 128] if resolution <= 64 else [8, 16, 32] if resolution <= 256 else [2, 4, 8])
    return dict(
        resolution=resolution,
        channel_base=most * rng.choice([16, 64, 256]),
        channel_max=most,
        style_dim=rng.choice([16, 32, 64, 512]),
        n_mapping=rng.randint(1, 8),
        n_channels=rng.randint(1, 4),
        c_dim=rng.choice([0, 3]),
        connections=rng.choice(["skip", "resnet", "orig"]),
        clamp=rng.choice([None, 256.0, 1.0]),
    )


@pytest.mark.skipif("SAGE_FAST_SWEEP" not in os.environ, reason="SAGE_FAST_SWEEP=N draws N architectures")
def test_a_sweep_of_architectures(monkeypatch):
    rng, worst = random.Random(int(os.environ.get("SAGE_FAST_SEED", "0"))), {}
    has_kernel = _native.has_kernel
    for _ in range(int(os.environ["SAGE_FAST_SWEEP"])):
        shape, seed = any_shape(rng), rng.randrange(1 << 30)
        for road in ("native", "reference"):
            monkeypatch.setattr(_native, "has_kernel", has_kernel if road == "native" else lambda op, device: False)
            for name, value in errors(shape, seed, n=4 if shape["resolution"] < 512 else 2).items():
                worst[f"{road} {name}"] = max(worst.get(f"{road} {name}", (0.0,)), (value, seed, str(shape)))
    print(*(f"{name}: {value:.4f}  {shape}" for name, (value, _, shape) in worst.items()), sep="\n")
    assert max(worst.values())[0] < 2e-2, max(worst.values())


def test_only_large_kernels_go_to_16_bits(tmp_path):
    G = Generator(16, 64, n_mapping=2, channels=[512, 128, 64])
    network = copy.deepcopy(G).to(BF16)
    low = {name for name, p in (*network.named_parameters(), *network.named_buffers()) if p.dtype == BF16}
    assert low == {"conv1.conv.weight", "convs.0.conv.weight"}
    assert {p.dtype for p in network.double().parameters()} == {torch.float64}
    same = copy.deepcopy(G).to(torch.float16).to_empty(device="cpu")
    assert same.conv1.conv.weight.dtype == torch.float16 and same.to_rgb1.bias.dtype == torch.float32
    kept = torch.randn(8, 1, 1, 1)
    assert sparing(lambda t: t.to(BF16))(kept).equal(kept)
    assert load_generator(dtype=BF16).latent_avg.dtype == torch.float32


def test_gradients_flow_through_16_bit_weights():
    G = weighted(Generator(8, 16, n_mapping=1, channels=[256, 128]), 3).to(BF16)
    w = torch.randn(2, G.n_latent, 16, dtype=BF16, requires_grad=True)
    G(w).square().sum().backward()
    assert (
        w.grad.isfinite().all()
        and G.convs[0].conv.weight.grad.dtype == BF16
        and G.to_rgb1.bias.grad.dtype == torch.float32
    )


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_linear_keeps_its_digits_for_small_inputs_and_large_gradients(dtype, autocast):
    """The mapping network's scale of 1/2263: in float16 neither x nor the gradient alone can bear it."""
    torch.manual_seed(0)
    layer = Linear(512, 64, lr_mul=0.01)
    x, grad = 1e-3 * torch.randn(16, 512), 100 * torch.randn(16, 64)
    x, exact_x = (x if autocast else x.to(dtype)).requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = layer(x)
    exact = copy.deepcopy(layer).double()(exact_x)
    (gx,), (exact_gx,) = torch.autograd.grad(y, x, grad.to(y.dtype)), torch.autograd.grad(exact, exact_x, grad.double())
    for got, want in ((y, exact), (gx, exact_gx)):
        assert (got.double() - want).norm() < 2 * torch.finfo(dtype).eps * want.norm()
