"""Synthesis of whole images: the fused road against plain PyTorch and, with ``--peer-path``, against published code.

The plain rival is not the printed form (a weight for each image, a grouped convolution) but the best plain one: weights
shared by the batch, activations scaled by the style, outputs demodulated, channels last. In bfloat16 it runs under
autocast. Peers run as they are published, in float32 on a CPU, with the weights of our generator.

    pytest benchmarks/bench_synthesis.py --benchmark-enable --bench-threads 2 --peer-path ~/stylegan2-ada-pytorch

On a machine with a GPU ``test_synthesis_on_a_gpu`` times whole calls there, by CUDA events, with and without a CUDA graph:

    pytest benchmarks/bench_synthesis.py -k "gpu or memory" --benchmark-enable --bench-device cuda

and ``test_convolutions_on_a_gpu`` times, layer by layer, cuDNN with an epilogue beside ``styled_conv`` in each width.

Set MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ to 4 GB, as ``make bench`` does: without them glibc maps and
unmaps large activations at every op, which flatters us (our workspace is kept) by up to 1.9 times.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from clocks import medians
from memory import peak_mib, printed_by_a_process
from peers import load_peers

from sage_fast.models.graphs import GraphedSynthesis
from sage_fast.models.inference import choose_road, fused_network
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import cuda_convolution, synthesis_cuda, synthesis_epilogue
from sage_fast.ops.synthesis import SynthesisNetwork, has_products, synthesis_reference

#: name -> resolution, channel_base, channel_max
CONFIGS = {
    "32s": (32, 2048, 128),
    "64s": (64, 4096, 128),
    "64": (64, 16384, 512),
    "256p": (256, 16384, 512),
    "256F": (256, 32768, 512),
    "1024F": (1024, 32768, 512),
}
_MOST = 400e9  # FLOP a call: larger batches say nothing new on a CPU and take minutes (--bench-large)


def generator(name: str) -> Generator:
    resolution, base, most = CONFIGS[name]
    torch.manual_seed(0)
    G = Generator(resolution, 512, 1, channel_base=base, channel_max=most)
    for layer in (G.conv1, *G.convs):
        torch.nn.init.normal_(layer.noise.weight, std=0.1)
    return G.eval().requires_grad_(False)


def flop(G: Generator) -> float:
    """Of the convolutions of one image, direct algorithm, 2 per multiplication."""
    total = 0.0
    for i, layer in enumerate([G.conv1, *G.convs]):
        c_out, c_in, k, _ = layer.conv.weight[0].shape
        size = (4 << ((i + 1) // 2)) // layer.conv.up
        total += 2 * k * k * c_in * c_out * size**2
    return total + sum(2 * G.n_channels * c * (4 << i) ** 2 for i, c in enumerate(G.channels))


def channels_last(network: SynthesisNetwork) -> SynthesisNetwork:
    def change(x: torch.Tensor) -> torch.Tensor:
        return x.to(memory_format=torch.channels_last)

    layers = [dataclasses.replace(layer, weight=change(layer.weight)) for layer in network.layers]
    return dataclasses.replace(network, input=change(network.input), layers=layers)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 4, 8, 64])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "1024F"])
def test_synthesis(compare, request, name, n, precision):
    if compare.device.type != "cpu":
        pytest.skip("on a CPU; test_synthesis_on_a_gpu is the other")
    bf16 = precision == "bfloat16"
    if bf16 and not has_products(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this processor has no bfloat16 products")
    G = generator(name)
    work = n * flop(G)
    if work > _MOST and not request.config.getoption("--bench-large"):
        pytest.skip(f"{work / 1e9:.0f} GFLOP a call: for a GPU, or --bench-large")
    w_plus = torch.randn(n, G.n_latent, 512, generator=torch.Generator().manual_seed(n))
    noise = [getattr(G.noises, f"noise_{i}") for i in range(G.n_latent - 1)]
    network = channels_last(fused_network(G))
    assert choose_road(G, w_plus)[0] == "fused"

    def timed(draw):
        @torch.no_grad()
        def call():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return draw()

        return call

    rivals = {"plain PyTorch": timed(lambda: synthesis_reference(network, w_plus, noise))}
    for peer, draw in load_peers(request.config.getoption("--peer-path"), G).items():
        rivals[peer] = torch.no_grad()(lambda draw=draw: draw(w_plus))
    compare.tolerance = 0.05 if bf16 else 1e-5
    compare.rounds = 5 if work > 20e9 else 11
    dtype = torch.bfloat16 if bf16 else torch.float32
    compare(f"{name}, N {n}, {precision}", timed(lambda: G.synthesis(w_plus)), rivals, flops=work, dtype=dtype)


# the most telling first, in case the time runs out; "tf32" and "float32" are float32 with and without TF32 products
GPU_CASES = [
    *itertools.product(["bfloat16"], ["256F", "1024F"], [64, 1, 8]),
    *itertools.product(["float16"], ["256F", "1024F"], [64, 1, 8]),
    *itertools.product(["tf32", "float32"], ["256F"], [1, 8, 64]),
    *itertools.product(["tf32", "float32"], ["1024F"], [1, 8]),
    *itertools.product(["bfloat16"], ["64", "256p"], [1, 64]),
]
_gpu_generator = functools.lru_cache(maxsize=1)(lambda name, device: generator(name).to(device))


@pytest.mark.parametrize(("precision", "name", "n"), GPU_CASES)
@torch.no_grad()
def test_synthesis_on_a_gpu(compare, request, precision, name, n):
    if compare.device.type != "cuda":
        pytest.skip("needs --bench-device cuda")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    G, dtype = _gpu_generator(name, compare.device), getattr(torch, precision.replace("tf", "float"))
    w_plus = torch.randn(n, G.n_latent, 512, generator=torch.Generator().manual_seed(n)).to(compare.device)
    noise = [getattr(G.noises, f"noise_{i}") for i in range(G.n_latent - 1)]
    network = fused_network(G)
    last = channels_last(network)
    graph = GraphedSynthesis(G, n, dtype)
    plain_epilogues = mock.patch.multiple(
        synthesis_cuda,
        styled_epilogue=synthesis_epilogue.styled_epilogue_reference,
        blur_epilogue=synthesis_epilogue.blur_epilogue_reference,
    )
    calls = {
        "ours": lambda: G.synthesis(w_plus),
        "ours, graph": lambda: graph(w_plus),
        "plain PyTorch, channels last": lambda: synthesis_reference(last, w_plus, noise),
        "our road, plain epilogues": plain_epilogues(lambda: synthesis_cuda.draw(network, w_plus, noise, dtype)),
    }
    low = torch.autocast("cuda", dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32)
    calls = {who: low(call) for who, call in calls.items()}
    for peer, draw in load_peers(request.config.getoption("--peer-path"), G).items():
        calls[peer] = functools.partial(draw, w_plus)  # chooses float16 itself
    with low:
        assert choose_road(G, w_plus)[0] == "fused"
    expected = calls["ours"]().float()
    for who, call in calls.items():
        error = (call().float() - expected).abs().max() / expected.abs().max()
        assert error < 0.1, f"{who} differs by {error:.2e}"
    if compare.benchmark.disabled:
        return
    seconds = medians(compare.clock, calls, 7)
    images = {who: round(n / t, 1) for who, t in seconds.items()}
    compare.add(f"{name}, N {n}, {precision}", seconds, flops=n * flop(G), dtype=dtype, images_per_s=images)


# what each leaves to the convolutions differs most: layers of one tile, of few, of many
LAYER_CASES = [("bfloat16", "256F", 1), ("bfloat16", "256F", 8), ("bfloat16", "1024F", 8), ("float32", "256F", 8)]


@pytest.mark.parametrize(("precision", "name", "n"), LAYER_CASES)
@torch.no_grad()
def test_convolutions_on_a_gpu(compare, monkeypatch, precision, name, n):
    """Milliseconds of each styled layer in each way of `ops.cuda_convolution`, by its own measurement."""
    if compare.device.type != "cuda" or compare.benchmark.disabled:
        pytest.skip("needs --bench-device cuda and --benchmark-enable")
    monkeypatch.setenv("SAGE_FAST_CUDA_CONV", "auto")
    monkeypatch.setattr(cuda_convolution, "_choices", {})
    G, dtype = _gpu_generator(name, compare.device), getattr(torch, precision)
    w_plus = torch.randn(n, G.n_latent, 512, generator=torch.Generator().manual_seed(n)).to(compare.device)
    noise = [getattr(G.noises, f"noise_{i}") for i in range(G.n_latent - 1)]
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        synthesis_cuda.draw(fused_network(G), w_plus, noise, dtype)
    for layer, choice in cuda_convolution.choices().items():
        taken = choice.ms[choice.way]
        case = f"{name}, N {n}, {precision}, {layer.size} px, {layer.c_in} > {layer.c_out}{', up' * layer.up}: {choice.way}"
        ratios = {way: round(ms / taken, 3) for way, ms in choice.ms.items()}
        compare.rows.append(dict(case=case, ms=round(taken, 5), ratios=ratios, way=choice.way))


@pytest.mark.parametrize("n", [8])
def test_memory(request, compare, n):
    """Peak memory of a synthesis at 256 px above what was held before; on a CPU each in a process of its own."""
    device, threads = compare.device, torch.get_num_threads()
    peers = request.config.getoption("--peer-path")
    if device.type == "cuda":
        used = {"ours": _peak("ours", n, device)} | {Path(peer).name: _peak(peer, n, device) for peer in peers}
    else:
        used = {Path(who).name: printed_by_a_process(__file__, who, n, threads) for who in ["ours", *peers]}
    compare.rows.append(dict(case=f"256p, N {n}, above the network", mib=used))
    for who, mib in used.items():
        assert who == "ours" or used["ours"] <= mib / 2


def _peak(who: str, n: int, device: torch.device) -> float:
    G = generator("256p").to(device)
    draw = G.synthesis if who == "ours" else next(iter(load_peers([who], G).values()))
    w_plus = torch.randn(n, G.n_latent, 512, device=device)
    with torch.inference_mode():
        draw(w_plus[:1, :])  # packs weights, loads code
        return peak_mib(lambda: draw(w_plus), device)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(_peak(sys.argv[1], int(sys.argv[2]), torch.device("cpu")))
