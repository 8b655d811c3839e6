"""Synthesis of whole images: the fused road against plain PyTorch and, with ``--peer-path``, against published code.

The plain rival is not the printed form (a weight for each image, a grouped convolution) but the best plain one: weights
shared by the batch, activations scaled by the style, outputs demodulated, channels last. In bfloat16 it runs under
autocast. Peers run as they are published, in float32 on a CPU, with the weights of our generator.

    pytest benchmarks/bench_synthesis.py --benchmark-enable --bench-threads 2 --peer-path ~/stylegan2-ada-pytorch

On a machine with a GPU ``test_synthesis_on_a_gpu`` times whole calls there, by CUDA events, with and without a CUDA graph:

    pytest benchmarks/bench_synthesis.py -k gpu --benchmark-enable -s

Set MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ to 4 GB, as ``make bench`` does: without them glibc maps and
unmaps large activations at every op, which flatters us (our workspace is kept) by up to 1.9 times.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import pytest
import torch
from peers import load_peers

from sage_fast import _native
from sage_fast.models.graphs import GraphedSynthesis
from sage_fast.models.inference import choose_road, fused_network
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import synthesis_cuda, synthesis_epilogue
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
_MOST = 400e9  # FLOP a call: larger batches say nothing new on a CPU and take minutes


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
    bf16 = precision == "bfloat16"
    if bf16 and not has_products(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this processor has no bfloat16 products")
    G = generator(name)
    work = n * flop(G)
    if work > _MOST:
        pytest.skip(f"{work / 1e9:.0f} GFLOP a call: for a GPU")
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


# the most telling first, in case the time runs out
GPU_CASES = list(itertools.product(["bfloat16", "float16"], ["256F", "1024F"], [1, 8, 64, 4]))
_gpu_generator = functools.lru_cache(maxsize=1)(lambda name: generator(name).to("cuda"))


@pytest.mark.parametrize(("precision", "name", "n"), GPU_CASES)
@torch.no_grad()
def test_synthesis_on_a_gpu(request, capsys, precision, name, n):
    """Medians of whole calls; a line of JSON each, at once, so that what was measured stays when the run is cut off."""
    if "cuda" not in _native.load().devices:
        pytest.skip(f"no kernels on 'cuda': {_native.load().reasons['cuda']}")
    G, dtype = _gpu_generator(name), getattr(torch, precision)
    w_plus = torch.randn(n, G.n_latent, 512, generator=torch.Generator().manual_seed(n)).cuda()
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
    calls = {who: torch.autocast("cuda", dtype)(call) for who, call in calls.items()}
    for peer, draw in load_peers(request.config.getoption("--peer-path"), G).items():
        calls[peer] = functools.partial(draw, w_plus)  # chooses float16 itself
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        with torch.autocast("cuda", dtype):
            assert choose_road(G, w_plus)[0] == "fused"
        expected = calls["ours"]().float()
        for who, call in calls.items():
            error = (call().float() - expected).abs().max() / expected.abs().max()
            assert error < 0.1, f"{who} differs by {error:.2e}"
        if not request.config.getoption("--benchmark-enable"):
            return
        ms = _gpu_medians(calls)
    images = {who: round(n / (t / 1e3), 1) for who, t in ms.items()}
    tflops = round(n * flop(G) / min(ms["ours"], ms["ours, graph"]) / 1e9, 1)
    row = dict(case=f"{name}, N {n}, {precision}", device=torch.cuda.get_device_name(), ms=ms, images_per_s=images)
    with capsys.disabled():
        print("\n" + json.dumps(row | dict(tflop_per_s=tflops)))


def _gpu_medians(calls: dict[str, Callable[[], torch.Tensor]], rounds: int = 7) -> dict[str, float]:
    """Milliseconds a call by CUDA events, the calls interleaved."""

    def measure(call: Callable[[], torch.Tensor], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    repeats = {who: max(1, min(30, int(20 / measure(call, 2)))) for who, call in calls.items()}
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(rounds):
        for who, call in calls.items():
            times[who].append(measure(call, repeats[who]))
    return {who: round(median(values), 4) for who, values in times.items()}


@pytest.mark.parametrize("n", [8])
def test_memory(request, n, capsys):
    """Peak memory of a synthesis at 256 px above what the process held before, each in a process of its own."""
    used = {who: _peak_in_a_process(who, n) for who in ["ours", *request.config.getoption("--peer-path")]}
    with capsys.disabled():
        print(f"\npeak of 256p, N {n}, MiB above the network: {used}")
    for who, mib in used.items():
        assert who == "ours" or used["ours"] <= mib / 2


def _peak_in_a_process(who: str, n: int) -> float:
    command = [sys.executable, __file__, who, str(n), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _measure(who: str, n: int, threads: int) -> None:
    torch.set_num_threads(threads)
    G = generator("256p")
    draw = G.synthesis if who == "ours" else next(iter(load_peers([who], G).values()))
    w_plus = torch.randn(n, G.n_latent, 512)
    with torch.inference_mode():
        draw(w_plus[:1, :])  # packs weights, loads code
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _status("VmRSS")
        draw(w_plus)
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
