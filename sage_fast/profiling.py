"""Where a synthesis spends its time, layer by layer: the table behind ``sage-fast profile``."""

from __future__ import annotations

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

from sage_fast.errors import InputError
from sage_fast.models.inference import choose_road, fused_network, wanted_dtype
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import cuda_convolution, synthesis_cuda
from sage_fast.ops.synthesis import synthesis_times

__all__ = ["LayerTime", "ProfileConfig", "profile_synthesis", "profile_table"]


@dataclass(frozen=True)
class ProfileConfig:
    """Settings of :func:`profile_synthesis`.

    ``resolution``, ``channel_base``, ``channel_max``: of a network with random weights; None: 256, 16384, 512. A model has
    its own.
    ``gradients``: the differentiable road, forward only.
    """

    n: int = 4  # images a call
    precision: Literal["float32", "bfloat16"] = "float32"
    gradients: bool = False
    rounds: int = 7
    resolution: int | None = None
    channel_base: int | None = None
    channel_max: int | None = None
    threads: int | None = None  # None: torch's own choice

    def __post_init__(self) -> None:
        for name in ("n", "rounds", "resolution", "channel_base", "channel_max"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")


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

    On the fused road the native op keeps the time of its layers; otherwise each layer is timed from its input to its
    output. ``trace``: also write a Chrome trace of one call by ``torch.profiler``.

    Returns:
        The layers in the order of their names, and ``road``, ``reason``, ``products`` (the dtype of the
        multiplications), ``seconds`` of a whole call, ``device``, ``threads``; on a GPU's fused road ``convolutions``, which
        way each styled layer takes (:mod:`sage_fast.ops.cuda_convolution`).
    """
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
            call = _fused_call(generator, w_plus) if road == "fused" else _layered_call(generator, w_plus)
            call()
            rounds = [call() for _ in range(config.rounds)]
            whole = median(_seconds(lambda: generator.synthesis(w_plus), device) for _ in range(config.rounds))
            products = str(wanted_dtype(device) if road == "fused" else getattr(torch, config.precision)).split(".")[1]
            about = dict(road=road, reason=reason, products=products, seconds=whole, device=str(device))
            about["threads"] = torch.get_num_threads()
            if road == "fused" and device.type == "cuda":
                about["convolutions"] = _convolutions(generator, config.n)
            if trace is not None:
                _write_trace(generator, w_plus, Path(trace))
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
    for i, c in enumerate(generator.channels):
        size, channels = 4 << i, generator.n_channels
        name = "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}"
        found.append(LayerTime(name, size, c, channels, 0.0, 2.0 * n * c * channels * size**2))
    return found


def _convolutions(generator: Generator, n: int) -> list[str]:
    dtype = wanted_dtype(generator.latent_avg.device)
    keys = synthesis_cuda.convolutions(fused_network(generator).prepared(dtype), n, dtype)
    return [cuda_convolution.taken(key) or "not chosen" for key in keys]


def _fused_call(generator: Generator, w_plus: Tensor) -> Callable[[], list[float]]:
    noise = [getattr(generator.noises, f"noise_{i}") for i in range(generator.n_latent - 1)]
    network, dtype = fused_network(generator), wanted_dtype(w_plus.device)
    return lambda: synthesis_times(network, w_plus, noise, dtype).tolist()


def _layered_call(generator: Generator, w_plus: Tensor) -> Callable[[], list[float]]:
    def call() -> list[float]:
        with _stopwatches(generator) as times:
            generator.synthesis(w_plus)
        return times

    return call


@contextmanager
def _stopwatches(generator: Generator) -> Iterator[list[float]]:
    """Hooks that note how long each layer takes; the device is waited for at both ends."""
    modules: list[Any] = [*chain([generator.conv1], generator.convs, [generator.to_rgb1], generator.to_rgbs)]
    times, begun, hooks = [0.0] * len(modules), [0.0] * len(modules), []

    def start(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            _wait(generator.latent_avg.device)
            begun[i] = time.perf_counter()

        return hook

    def stop(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            _wait(generator.latent_avg.device)
            times[i] = time.perf_counter() - begun[i]

        return hook

    for i, module in enumerate(modules):
        hooks += [module.register_forward_pre_hook(start(i)), module.register_forward_hook(stop(i))]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def _write_trace(generator: Generator, w_plus: Tensor, path: Path) -> None:
    from torch.profiler import profile

    with profile() as profiler:
        generator.synthesis(w_plus)
    profiler.export_chrome_trace(str(path))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
