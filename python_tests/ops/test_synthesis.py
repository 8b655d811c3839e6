"""The fused synthesis: against its reference, against the network layer by layer, and what bad input gets."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.utils.prune

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.models.inference import choose_road, counter_noise, fused_network, layer_by_layer, wanted_dtype
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import synthesis_cuda
from sage_fast.ops.synthesis import has_products, synthesis, synthesis_reference

# every size from 4 px; channels that fill no vector, more than a panel, and one
CHANNELS = {
    "4 px": [7],
    "8 px": [16, 5],
    "odd": [33, 1, 48, 17],
    "32 px": [96, 64, 48, 32],
    "64 px": [24, 24, 16, 9, 6],
}


@pytest.fixture(autouse=True)
def whole_products(monkeypatch):
    """cuDNN would otherwise round float32 to the 10 bits of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def generator(channels: list[int], n_channels: int = 3, style_dim: int = 19) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(len(channels))
        G = Generator(4 << (len(channels) - 1), style_dim, 1, n_channels, channels=channels)
        for layer in (G.conv1, *G.convs):
            torch.nn.init.normal_(layer.noise.weight, std=0.2)
            torch.nn.init.normal_(layer.activate.bias, std=0.2)
        for to_rgb in (G.to_rgb1, *G.to_rgbs):
            torch.nn.init.normal_(to_rgb.bias, std=0.2)
    return G.eval().requires_grad_(False)


def latents(G: Generator, n: int) -> torch.Tensor:
    return torch.randn(n, G.n_latent, G.style_dim, generator=torch.Generator().manual_seed(n))


def maps(G: Generator) -> list[torch.Tensor]:
    return [getattr(G.noises, f"noise_{i}") for i in range(G.n_latent - 1)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CHANNELS)
def test_equals_the_reference_in_float64(device, name, n_channels):
    """Transforms cost a digit at most: within 4e-6 of float64, where plain float32 is within 2e-6."""
    G = generator(CHANNELS[name], n_channels).to(device)
    w_plus, network = latents(G, 3).to(device), fused_network(G)
    ours, plain = synthesis(network, w_plus, maps(G)), synthesis_reference(network, w_plus, maps(G))
    exact = generator(CHANNELS[name], n_channels).to(device).double()
    exact.load_state_dict(G.state_dict())
    expected = exact.synthesis(w_plus.double())
    assert relative(plain, expected) < 3e-6
    assert relative(ours, expected) < 4e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CHANNELS)
def test_low_precision_follows_the_rule(device, name, dtype):
    """At most twice the error of plain PyTorch with products in the same dtype."""
    if not has_products(dtype, torch.device(device)):
        pytest.skip(f"this processor has no {dtype} products")
    G = generator(CHANNELS[name]).to(device)
    w_plus, network = latents(G, 8).to(device), fused_network(G)
    exact = synthesis_reference(network, w_plus, maps(G)).double()
    ours = synthesis(network, w_plus, maps(G), dtype).double()
    with torch.autocast(device, dtype):
        plain = synthesis_reference(network, w_plus, maps(G)).double()
    error, allowed = (float((x - exact).square().mean().sqrt()) for x in (ours, plain))
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("n_channels", [1, 4])
@pytest.mark.parametrize("name", CHANNELS)
def test_the_cuda_road_on_the_cpu(name, n_channels):
    """Its padding, scales and batched products, with plain PyTorch in place of the kernels."""
    G = generator(CHANNELS[name], n_channels)
    w_plus, network = latents(G, 3), dataclasses.replace(fused_network(G), clamp=2.0)
    w_plus[0] = 0  # styles are the biases then
    noise = [m.expand(3 if i % 2 else 1, -1, -1, -1) for i, m in enumerate(maps(G))]
    expected = synthesis_reference(network, w_plus, noise)
    assert relative(synthesis_cuda.draw(network, w_plus, noise, torch.float32), expected) < 3e-6
    assert synthesis_cuda.draw(network, w_plus[:0], noise, torch.float32).shape == expected[:0].shape
    with torch.profiler.profile() as profiler:
        synthesis_cuda.draw(network, w_plus, noise, torch.float32)
    layers = [event.name for event in profiler.events() if event.name.startswith("conv") and "." in event.name]
    assert layers == [f"convs.{i}" for i in range(len(network.layers) - 1)]


def test_the_cuda_road_asks_for_the_convolution_of_each_layer(monkeypatch):
    G = generator(CHANNELS["8 px"])
    w_plus, network, asked = latents(G, 3), fused_network(G), []
    monkeypatch.setattr(synthesis_cuda, "choose", lambda layer, ways: asked.append((layer, [*ways])) or "cudnn")
    synthesis_cuda.draw(network, w_plus, maps(G), torch.bfloat16)
    prepared = network.prepared(torch.bfloat16)
    assert [layer for layer, _ in asked] == synthesis_cuda.convolutions(prepared, 3, torch.bfloat16)
    for i, (layer, ways) in enumerate(asked):
        shape = prepared.weights[i].shape[:2]
        assert {layer.c_in, layer.c_out} == set(shape) and layer.size == 4 << (i + 1) // 2 and layer.up == (i % 2 == 1)
        assert ways == ["cudnn", "own", "own 32", "own 64", "own 128"]


def test_the_cuda_road_divides_large_batches(monkeypatch):
    G = generator(CHANNELS["odd"])
    w_plus, network = latents(G, 5), fused_network(G)
    noise = [torch.randn(5, *m.shape[1:]) if i % 2 else m for i, m in enumerate(maps(G))]
    whole = synthesis_cuda.draw(network, w_plus, noise, torch.float32)
    for name, most in (("_MOST_VALUES", 2 * 24 * 33**2 + 5), ("_MOST_SAMPLES", 1)):
        monkeypatch.setattr(synthesis_cuda, name, most)
        parts = synthesis_cuda.draw(network, w_plus, noise, torch.float32)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cuda_road_in_low_precision_on_the_cpu(dtype):
    """Also with weights, styles and inputs that leave the range of float16 when they are multiplied as they are."""
    G = generator(CHANNELS["32 px"])
    G.conv1.conv.weight.mul_(3000)
    G.convs[1].conv.modulation.bias.mul_(1000)
    w_plus, network = latents(G, 4), fused_network(G)
    exact = synthesis_reference(network, w_plus, maps(G))
    ours = synthesis_cuda.draw(network, w_plus, maps(G), dtype)
    assert 0 < relative(ours, exact) < 12 * torch.finfo(dtype).eps


def test_counter_noise_belongs_to_the_sample(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus, samples = latents(G, 3).to(device), torch.tensor([4, 2, 9], device=device)
    together = G.synthesis(w_plus, noise=counter_noise(G, samples, seed=1))
    alone = G.synthesis(w_plus[1:2], noise=counter_noise(G, samples[1:2], seed=1))
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)
    assert not torch.isclose(G.synthesis(w_plus, noise=counter_noise(G, samples, seed=2)), together).all()


def test_the_generator_takes_it_and_gets_the_same_images(device, monkeypatch):
    G = generator(CHANNELS["32 px"]).to(device)
    w_plus = latents(G, 2).to(device)
    assert choose_road(G, w_plus) == ("fused", "no gradients, float32")
    for noise in ("const", "none", maps(G)):
        fused = G.synthesis(w_plus, noise=noise)
        with monkeypatch.context() as patch:
            patch.setattr("sage_fast.models.stylegan2.choose_road", lambda *_: ("differentiable", "for this test"))
            layered = G.synthesis(w_plus, noise=noise)
        assert not torch.equal(fused, layered), "the fused road was not taken"
        assert relative(fused, layered) < 4e-6


def test_random_noise_is_a_map_for_each_sample(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 1).to(device).expand(2, -1, -1)
    noise = [torch.randn(2, 1, *m.shape[2:], generator=torch.Generator().manual_seed(0)).to(device) for m in maps(G)]
    images = G.synthesis(w_plus, noise=noise)
    assert not torch.equal(images[0], images[1])
    expected = synthesis_reference(fused_network(G), w_plus, noise)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_a_changed_weight_is_noticed(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 1).to(device)
    before = G.synthesis(w_plus)
    G.convs[0].conv.weight.mul_(1.5)
    G.to_rgb1.bias.add_(1)
    after = G.synthesis(w_plus)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, synthesis_reference(fused_network(G), w_plus, maps(G)), atol=1e-5, rtol=1e-5)


WRITES = {
    "through .data": lambda weight: weight.data.mul_(1.5),
    "an average of weights": lambda weight: weight.data.mul_(0.5).add_(torch.ones_like(weight), alpha=0.5),
    "a channel out": lambda weight: weight.data.flatten(0, -2)[-1].zero_(),
    "an array of the same memory": lambda weight: weight.detach().numpy().__imul__(1.5),
    "new memory twice": lambda weight: [setattr(weight, "data", weight.data * 1.5) for _ in range(2)],
    "a list": lambda weight: torch._foreach_mul_([weight.data], 1.5),
}


@pytest.mark.parametrize("name", ["convs.1.conv.weight", "convs.0.conv.modulation.weight", "to_rgb1.conv.weight"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_weights_written_behind_the_back_of_autograd(write, name):
    """No version is counted up; another process with the same memory writes as unseen."""
    if not _native.has_kernel("synthesis", "cpu"):
        pytest.skip("no kernels here")
    G = generator(CHANNELS["8 px"])
    w_plus = latents(G, 2)
    before = G.synthesis(w_plus)
    write(G.get_parameter(name))
    after = G.synthesis(w_plus)
    assert choose_road(G, w_plus)[0] == "fused" and not torch.equal(before, after)
    with layer_by_layer():
        torch.testing.assert_close(after, G.synthesis(w_plus), atol=1e-4, rtol=1e-4)


def fingerprint(*tensors):
    if not _native.has_kernel("synthesis", "cpu"):
        pytest.skip("no kernels here")
    return torch.ops.sage_fast.synthesis_fingerprint(list(tensors))


@pytest.mark.parametrize("n", [1, 3, 16, 4096, 40_000])
def test_a_fingerprint_changes_with_every_bit_and_place_of_what_is_small_or_has_one_dimension(n):
    t, other = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    words, seen = t.view(torch.int32), {fingerprint(t, other)}
    places = {0, n // 2, n - 1}
    for place in places:
        for bit in (1, 1 << 15, 1 << 30, -(2**31)):
            words[place] ^= bit
            seen.add(fingerprint(t, other))
            words[place] ^= bit
    assert fingerprint(t, other) in seen and len(seen) == 1 + 4 * len(places)
    assert fingerprint(other, t) not in seen
    assert n == 1 or not {fingerprint(t.flip(0), other), fingerprint(-t, other)} & seen


SHAPES = [
    (1, 128, 128, 3, 3),
    (1, 24, 512, 3, 3),
    (1, 33, 65, 3, 3),
    (1, 3, 512, 1, 1),
    (512, 512),
    (300, 20),
    (1, 64, 4, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_fingerprint_changes_with_every_channel(shape):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = fingerprint(t)
    matrix = t[0] if shape[0] == 1 else t
    for dim in (0, 1):
        for channel in range(matrix.shape[dim]):
            part = matrix.select(dim, channel)
            kept = part.clone()
            part.mul_(0.5)
            assert fingerprint(t) != before, (dim, channel)
            part.copy_(kept)
    assert fingerprint(t) == before


def test_a_fingerprint_is_of_the_numbers_however_they_lie():
    x = torch.randn(6, 5, 4, 3)
    assert fingerprint(x) == fingerprint(x.contiguous(memory_format=torch.channels_last))
    assert fingerprint(x) != fingerprint(x.to(torch.bfloat16))


def test_the_road_and_its_reason(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 1).to(device)
    assert choose_road(G, w_plus.clone().requires_grad_())[1] == "gradients are recorded"
    with torch.no_grad():
        assert choose_road(G, w_plus.clone().requires_grad_())[0] == "fused"
        with layer_by_layer():
            assert choose_road(G, w_plus)[1] == "weights change from call to call"
            layered = G.synthesis(w_plus)
        assert relative(layered, G.synthesis(w_plus)) < 1e-5 and not torch.equal(layered, G.synthesis(w_plus))
    G.requires_grad_(True)
    assert choose_road(G, w_plus)[0] == "differentiable"
    assert G.synthesis(w_plus).requires_grad
    assert choose_road(G.double(), w_plus.double())[0] == "differentiable"
    with torch.inference_mode():
        H = generator(CHANNELS["8 px"]).to(device)
        road, reason = choose_road(H, w_plus)
        assert road == "fused" if device == "cpu" else "inference mode" in reason
        assert relative(H.synthesis(w_plus), G.float().synthesis(w_plus)) < 1e-5


class Adapter(torch.nn.Module):
    """As adapters of low rank: the layer inside is called, and there is no weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, torch.nn.Parameter(torch.randn(19, 16) * 0.1, requires_grad=False)

    def forward(self, w):
        return self.base(w) + w @ self.down


class Ramp(torch.nn.Module):
    def forward(self, weight):
        return weight * torch.arange(weight.shape[2], device=weight.device).view(-1, 1, 1)


def change_a_method(G):
    plain = G.convs[1].forward
    G.convs[1].forward = lambda *args: 2 * plain(*args)


CHANGES = {
    "hook": lambda G: G.convs[1].register_forward_hook(lambda _, inputs, output: 2 * output),
    "hook before": lambda G: G.to_rgb1.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0], *inputs[1:])),
    "method": change_a_method,
    "layer": lambda G: setattr(G.convs[0].conv, "modulation", Adapter(G.convs[0].conv.modulation)),
    "parametrized": lambda G: torch.nn.utils.parametrize.register_parametrization(G.convs[1].conv, "weight", Ramp()),
    "pruned": lambda G: torch.nn.utils.prune.l1_unstructured(G.convs[1].conv, "weight", amount=0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_that_were_changed_are_called(device, change):
    """The fused kernels read weights; a layer that does more than them has to run."""
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 2).to(device)
    before = G.synthesis(w_plus)
    change(G)
    G.to(device).requires_grad_(False)
    assert choose_road(G, w_plus)[1] == "layers have hooks or were replaced"
    after = G.synthesis(w_plus)
    assert relative(after, before) > 1e-3
    with layer_by_layer():
        assert torch.equal(after, G.synthesis(w_plus))


def test_a_mask_is_taken_anew_at_each_call(device):
    """torch.nn.utils.prune multiplies in a hook of the convolution."""
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 2).to(device)
    torch.nn.utils.prune.identity(conv := G.convs[1].conv, "weight")
    before = G.synthesis(w_plus)
    conv.weight_mask[:, :, 1:] = 0
    after = G.synthesis(w_plus)
    torch.nn.utils.prune.remove(conv, "weight")
    G.requires_grad_(False)
    assert choose_road(G, w_plus)[0] == "fused"
    assert relative(after, before) > 1e-3 and relative(after, G.synthesis(w_plus)) < 1e-5


def test_who_listens_at_all_modules_hears_the_layers(device):
    G, heard = generator(CHANNELS["8 px"]).to(device), []
    w_plus = latents(G, 1).to(device)
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module)):
        G.synthesis(w_plus)
    assert {G.conv1, *G.convs, G.to_rgb1, *G.to_rgbs} <= set(heard)


@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16], ids=str)
def test_whatever_the_defaults_of_torch(default):
    """As with ``torch.set_default_device("cuda")``; the device that holds no numbers stands for every other."""
    G = generator(CHANNELS["8 px"])
    w_plus, mean = latents(G, 2), G.mean_latent(20)
    expected, G = G.synthesis(w_plus), copy.deepcopy(G)  # nothing is kept of a copy
    try:
        (torch.set_default_device if default == "meta" else torch.set_default_dtype)(default)
        assert torch.equal(G.synthesis(w_plus), expected) and torch.equal(G.mean_latent(20), mean)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_weights_that_lie_otherwise(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 2).to(device)
    expected = G.synthesis(w_plus)
    for weight in G.parameters():
        weight.data = weight.data.movedim(0, -1).contiguous().movedim(-1, 0)
    G.input.input.data = G.input.input.data.contiguous(memory_format=torch.channels_last)
    assert torch.equal(G.synthesis(w_plus), expected)


def test_gradients_of_noise_are_recorded(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 1).to(device)
    noise = [m.clone().requires_grad_() for m in maps(G)]
    assert choose_road(G, w_plus, noise)[1] == "gradients are recorded"
    grads = torch.autograd.grad(G.synthesis(w_plus, noise=noise).square().sum(), noise)
    assert all(g.abs().sum() > 0 for g in grads)
    G.noises.noise_1.requires_grad_(True)  # as projectors do with the stored maps
    (grad,) = torch.autograd.grad(G.synthesis(w_plus).square().sum(), [G.noises.noise_1])
    assert grad.abs().sum() > 0


def test_a_file_with_another_filter_is_taken_at_its_word(device):
    """The fused kernels know [1, 3, 3, 1] alone; weights trained with another filter draw the same images on every road."""
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus, taps = latents(G, 2).to(device), torch.tensor([1.0, 2.0, 4.0, 1.0])
    state = {name: value.clone() for name, value in G.state_dict().items()}
    kernel = torch.outer(taps, taps) / 16
    G.load_state_dict({k: kernel if k.endswith("kernel") else v for k, v in state.items()})
    assert choose_road(G, w_plus)[1] == "the fused kernels have the resampling filter [1, 3, 3, 1]"
    with torch.no_grad():
        inference = G.synthesis(w_plus)
    layered = G.requires_grad_(True).synthesis(w_plus).detach()
    assert torch.equal(inference, layered)
    G.requires_grad_(False).load_state_dict(state)
    assert choose_road(G, w_plus)[0] == "fused"


def test_without_kernels_the_reference_runs(on_reference):
    G = generator(CHANNELS["8 px"])
    w_plus = latents(G, 2)
    fused = G.synthesis(w_plus)
    on_reference()
    assert choose_road(G, w_plus)[0] == "reference"
    torch.testing.assert_close(G.synthesis(w_plus), fused, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(synthesis(fused_network(G), w_plus, maps(G)), fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_the_batch(device, dtype):
    """On the CPU the same bits alone and among others: 65 images are several bands, 1 is a part of one. cuDNN chooses by size."""
    if not has_products(dtype, torch.device(device)):
        pytest.skip("this processor has no bfloat16 products")
    G = generator(CHANNELS["32 px"]).to(device)
    w_plus, network = latents(G, 65).to(device), fused_network(G)
    together = synthesis(network, w_plus, maps(G), dtype)
    for i in (0, 7, 64):
        alone = synthesis(network, w_plus[i : i + 1], maps(G), dtype)[0]
        assert torch.equal(alone, together[i]) if device == "cpu" else relative(alone, together[i]) < 0.02


def test_autocast_chooses_the_products(device):
    where = torch.device(device)
    assert wanted_dtype(where) == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            assert wanted_dtype(where) == (dtype if has_products(dtype, where) else torch.float32)


def test_same_bits_for_all_thread_counts(same_bits_for_all_thread_counts):
    G = generator(CHANNELS["64 px"])
    w_plus = latents(G, 3)
    same_bits_for_all_thread_counts(lambda: G.synthesis(w_plus))


def test_layouts_and_empty_batches(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus = latents(G, 3).to(device)
    spread = torch.stack([w_plus, w_plus * 0], dim=-1)[..., 0]
    assert torch.equal(G.synthesis(spread), G.synthesis(w_plus))
    assert G.synthesis(w_plus[:0]).shape == (0, 3, 8, 8)


def test_clamp_and_slope(device):
    G = generator(CHANNELS["8 px"]).to(device)
    w_plus, network = latents(G, 2).to(device), dataclasses.replace(fused_network(G), clamp=0.5, slope=0.0, gain=1.0)
    ours, plain = (f(network, w_plus, maps(G)) for f in (synthesis, synthesis_reference))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_repeats_to_the_bit(device, dtype):
    G = generator(CHANNELS["32 px"]).to(device)
    w_plus = latents(G, 3).to(device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        images = [G.synthesis(w_plus) for _ in range(4)]
    assert all(torch.equal(images[0], other) for other in images[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_image(device, value):
    G = generator(CHANNELS["32 px"]).to(device)
    w_plus = latents(G, 3).to(device)
    clean = G.synthesis(w_plus)
    w_plus[1, 2, 3] = value
    images = G.synthesis(w_plus)
    assert not images[1].isfinite().all()
    assert torch.equal(images[::2], clean[::2])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """In a process of its own: the instruction set is chosen once."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from ops.test_synthesis import CHANNELS, generator, latents, maps, relative
from sage_fast.models.inference import fused_network
from sage_fast.ops.synthesis import has_products, synthesis, synthesis_reference
assert not has_products(torch.bfloat16, torch.device("cpu"))
for name in ("4 px", "odd", "32 px"):
    G = generator(CHANNELS[name])
    w = latents(G, 2)
    assert relative(synthesis(fused_network(G), w, maps(G)), synthesis_reference(fused_network(G), w, maps(G))) < 4e-6
"""
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "SAGE_FAST_ISA": isa}
    done = subprocess.run([sys.executable, "-c", script, tests], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_fake_kernel(device):
    if device == "cuda":
        pytest.skip("one op on the CPU alone")
    G = generator(CHANNELS["8 px"]).to(device)
    network, w_plus = fused_network(G), latents(G, 2).to(device)
    packed, empty = network.packed(torch.float32), w_plus.new_empty(0)
    layers = [t for i in range(3) for t in (*packed[5 * i : 5 * i + 5], empty)]
    images = [t for m in network.images for t in (m.weight, m.affine, m.affine_bias, m.bias)]
    args = (w_plus, network.input, layers, images, [0.0] * 3, 0.2, 1.0, -1.0)
    torch.library.opcheck(torch.ops.sage_fast.synthesis, args, test_utils=("test_schema", "test_faketensor"))


def test_bad_input(device):
    G = generator(CHANNELS["8 px"]).to(device)
    network, w_plus = fused_network(G), latents(G, 2).to(device)
    for bad in (w_plus[:, :3], w_plus[..., :5], w_plus.double(), w_plus[0]):
        with pytest.raises(InputError, match=r"w_plus must be float32 \[N, 4, 19\]"):
            synthesis(network, bad, maps(G))
    with pytest.raises(InputError, match="w_plus must be on .*, as the network is, got meta"):
        synthesis(network, w_plus.to("meta"), maps(G))
    with pytest.raises(InputError, match="noise must hold 3 maps"):
        synthesis(network, w_plus, maps(G)[:2])
    with pytest.raises(InputError, match=r"noise map 1 must be floating point \[1 or 2, 1, 8, 8\]"):
        synthesis(network, w_plus, [maps(G)[0]] * 3)
    with pytest.raises(InputError, match="dtype must be one that the kernels"):
        synthesis(network, w_plus, maps(G), torch.float64)
    if device == "cuda":
        return
    layers = [w_plus.new_empty(0)] * 6
    with pytest.raises(ValueError, match="layers must hold 6"):
        torch.ops.sage_fast.synthesis(w_plus, network.input, layers[:5], layers[:4], [0.0], 0.2, 1.0, -1.0)
    with pytest.raises(ValueError, match="pack them again"):
        wrong = [w_plus.new_empty(8, dtype=torch.uint8), *network.packed(torch.float32)[1:5], w_plus.new_empty(0)]
        images = list(vars(network.images[0]).values())
        torch.ops.sage_fast.synthesis(w_plus, network.input, wrong, images, [0.0], 0.2, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"float32 \[C_out, C_in, 3, 3\]"):
        torch.ops.sage_fast.synthesis_pack(w_plus, False, False)
