"""Where a synthesis spends its time, layer by layer: the table behind ``sage-fast profile``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from sage_fast.data.writers import atomic_write, check_file
from sage_fast.models.inference import choose_road, fused_network, wanted_dtype
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import cuda_convolution, synthesis_cuda
from sage_fast.settings import check_at_least_one

__all__ = ["LayerTime", "ProfileConfig", "profile_synthesis", "profile_table"]


@dataclass(frozen=True)
class ProfileConfig:
    """Settings of :func:`profile_synthesis`."""

    n: int = 4  # images a call; -n for short
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products; bfloat16 by autocast
    gradients: bool = False  # the differentiable road, forward only
    rounds: int = 7  # calls, of which medians are taken
    resolution: int | None = None  # of a network with random weights; None: 256 (a model has its own)
    channel_base: int | None = None  # the same; min(channel_base / r, channel_max) feature maps at r px; None: 16384
    channel_max: int | None = None  # the same; None: 512
    threads: int | None = None  # None: torch's own choice

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "rounds", "resolution", "channel_base", "channel_max", "threads")


class LayerTime(NamedTuple):
    """One layer: its name, output size in pixels, channels in and out, median seconds a call, FLOP of the direct algorithm."""

    name: str
    size: int
    c_in: int
    c_out: int
    seconds: float
    flop: float


def profile_synthesis(
    generator: Generator, config: ProfileConfig, trace: str | Path | None = None
) -> tuple[list[LayerTime], dict[str, Any]]:
    """Time each layer of ``generator.synthesis`` on random latents.

    ``torch.profiler`` times each layer, on a GPU the kernels that it launched; any other program's profile shows the same
    ranges where the fused road was taken. On a GPU's fused road the images are part of the styled layers. ``trace``: also
    write the Chrome trace of one call.

    Returns:
        The layers in the order of their names, and ``road``, ``reason``, ``products`` (the dtype of the
        multiplications), ``seconds`` of a whole call, ``device``, ``threads``; on a GPU's fused road ``convolutions``, which
        way each styled layer takes (:mod:`sage_fast.ops.cuda_convolution`).

    Raises:
        InputError: ``trace`` cannot be there.
    """
    if trace is not None:
        check_file(trace, "trace")
    device = generator.latent_avg.device
    w_plus = torch.randn(config.n, generator.n_latent, generator.style_dim).to(device).requires_grad_(config.gradients)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with (
            torch.set_grad_enabled(config.gradients),
            torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"),
        ):
            road, reason = choose_road(generator, w_plus)
            generator.synthesis(w_plus)  # loads code, prepares weights
            rounds = _rounds(generator, w_plus, config.rounds, road)
            whole = median(_seconds(lambda: generator.synthesis(w_plus), device) for _ in range(config.rounds))
            products = str(wanted_dtype(device) if road == "fused" else getattr(torch, config.precision)).split(".")[1]
            about = dict(road=road, reason=reason, products=products, seconds=whole, device=str(device))
            about["threads"] = torch.get_num_threads()
            if road == "fused" and device.type == "cuda":
                about["convolutions"] = _convolutions(generator, config.n)
            if trace is not None:
                _write_trace(generator, w_plus, Path(trace), road)
    finally:
        torch.set_num_threads(threads)
    times = [median(values) for values in zip(*rounds)]
    return [layer._replace(seconds=t) for layer, t in zip(_layers(generator, config.n), times)], about


def profile_table(layers: list[LayerTime], about: dict[str, Any]) -> str:
    """The result of :func:`profile_synthesis` as text."""
    total = sum(layer.seconds for layer in layers)
    lines = [
        f"road: {about['road']} ({about['reason']}); products in {about['products']}; {about['device']}, "
        f"{about['threads']} threads",
        f"{'layer':<12}{'size':>6}{'channels':>12}{'ms':>10}{'share':>8}{'GFLOP/s':>10}",
    ]
    for name, size, c_in, c_out, seconds, flop in layers:
        rate = f"{flop / seconds / 1e9:.0f}" if seconds else "-"
        lines.append(
            f"{name:<12}{size:>6}{f'{c_in} > {c_out}':>12}{seconds * 1e3:>10.3f}{seconds / total:>8.1%}{rate:>10}"
        )
    for layer, way in zip(layers, about.get("convolutions", [])):
        lines.append(f"{layer.name:<12}convolution: {way}")
    lines.append(f"{'sum':<30}{total * 1e3:>10.3f}")
    lines.append(f"{'a whole call':<30}{about['seconds'] * 1e3:>10.3f}")
    return "\n".join(lines)


def _layers(generator: Generator, n: int) -> list[LayerTime]:
    styled: list[Any] = [generator.conv1, *generator.convs]
    found = []
    for i, layer in enumerate(styled):
        c_out, c_in, k, _ = layer.conv.weight[0].shape
        size = 4 << ((i + 1) // 2)
        flop = 2.0 * n * k * k * c_in * c_out * (size // layer.conv.up) ** 2
        found.append(LayerTime("conv1" if i == 0 else f"convs.{i - 1}", size, c_in, c_out, 0.0, flop))
    first = 0 if generator.connections == "skip" else len(generator.channels) - 1  # else there is one image, at the end
    for i, c in list(enumerate(generator.channels))[first:]:
        size, channels = 4 << i, generator.n_channels
        name = "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}"
        found.append(LayerTime(name, size, c, channels, 0.0, 2.0 * n * c * channels * size**2))
    return found


def _convolutions(generator: Generator, n: int) -> list[str]:
    dtype = wanted_dtype(generator.latent_avg.device)
    keys = synthesis_cuda.convolutions(fused_network(generator).prepared(dtype), n, dtype)
    return [cuda_convolution.taken(key) or "not chosen" for key in keys]


def _rounds(generator: Generator, w_plus: Tensor, rounds: int, road: str) -> list[list[float]]:
    """Seconds of the layers in the order of :func:`_layers`, for each of so many calls."""
    with _named_layers(generator, road), profile() as profiler:
        for _ in range(rounds):
            generator.synthesis(w_plus)
        _wait(w_plus.device)
    times: dict[str, list[float]] = {layer.name: [] for layer in _layers(generator, 1)}
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        # on a GPU's own timeline a range has a twin, which holds no kernels
        if event.name in times and event.device_type == torch.autograd.DeviceType.CPU:
            spent = event.device_time_total if w_plus.device.type == "cuda" else event.cpu_time_total
            times[event.name].append(spent / 1e6)
    passes = max(1, len(times["conv1"]) // rounds)  # a large batch on a GPU takes several a call
    whole = [[sum(all_[i : i + passes]) for i in range(0, len(all_), passes)] for all_ in times.values()]
    return [list(one) for one in zip(*(layer or [0.0] * rounds for layer in whole))]


@contextmanager
def _named_layers(generator: Generator, road: str) -> Iterator[None]:
    """Each layer is a range of the profiler, with the layer's name: by hooks where the fused kernels do not see to it."""
    if road == "fused":
        yield
        return
    modules: list[Any] = [*chain([generator.conv1], generator.convs, [generator.to_rgb1], generator.to_rgbs)]
    hooks = []
    for module, layer in zip(filter(None, modules), _layers(generator, 1)):
        mark = record_function(layer.name)
        hooks.append(module.register_forward_pre_hook(lambda *_, mark=mark: mark.__enter__() and None))
        hooks.append(module.register_forward_hook(lambda *_, mark=mark: mark.__exit__(None, None, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _write_trace(generator: Generator, w_plus: Tensor, path: Path, road: str) -> None:
    with _named_layers(generator, road), profile() as profiler:
        generator.synthesis(w_plus)
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as file:
        made = Path(folder, path.name)  # the profiler packs a name that ends in .gz, and says nothing when it fails
        profiler.export_chrome_trace(str(made))
        file.write(made.read_bytes())


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
