"""Seconds of a call, and what the device reaches: copied bytes and convolution products a second.

On a CPU with one thread the time is the thread's own, which other programs on the machine do not lengthen; with more it is the
wall clock's. On a GPU it is that between two events around each call, and before each call a write of 256 MiB takes the inputs
out of the second-level cache (50 to 60 MiB on a Hopper card), while the host gets ahead with its launches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Protocol

import torch

ROUNDS, ROUND_SECONDS = 11, 0.006
_SETTLING = 0.025  # seconds until the threads of another's pool sleep and ours have a processor each
_FLUSHED = 256 << 20  # bytes
_MOST_REPEATS = {"cpu": 1_000_000, "cuda": 30}  # a flush takes longer than a small op
_COPIED = {"cpu": 1 << 25, "cuda": 1 << 28}  # floats: 128 MiB and 1 GiB, beyond the caches
_IMAGES = {"cpu": 2, "cuda": 64}  # of the convolution that shows the peak

Call = Callable[[], object]


class Clock(Protocol):
    device: torch.device

    def __call__(self, call: Call, repeats: int) -> float:
        """Seconds of one of so many calls."""

    def settle(self, call: Call) -> None:
        """What must come between another's calls and these, so that both are timed alike."""


class CpuClock:
    device = torch.device("cpu")

    def __init__(self, one_thread: bool) -> None:
        self.one_thread = one_thread
        self.now = time.thread_time if one_thread else time.perf_counter

    def settle(self, call: Call) -> None:
        """Until only the threads of ``call`` are at work."""
        end = time.perf_counter() + (0 if self.one_thread else _SETTLING)
        while time.perf_counter() < end:
            call()

    def __call__(self, call: Call, repeats: int) -> float:
        start = self.now()
        for _ in range(repeats):
            call()
        return max((self.now() - start) / repeats, 1e-9)


class CudaClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)

    def settle(self, call: Call) -> None:
        """Nothing to wait for."""

    def __call__(self, call: Call, repeats: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            self.scratch.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return max(median(start.elapsed_time(end) for start, end in pairs) / 1e3, 1e-9)


def medians(clock: Clock, calls: Mapping[str, Call], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of each, interleaved."""
    most = _MOST_REPEATS[clock.device.type]
    repeats = {name: min(most, max(1, int(ROUND_SECONDS / clock(call, 3)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:  # there and back, so that nobody always comes first
            clock.settle(calls[name])
            times[name].append(clock(calls[name], repeats[name]))
    return {name: median(values) for name, values in times.items()}


def copy_rate(clock: Clock) -> float:
    """Bytes read and written a second by a copy between tensors beyond the caches, measured now: the best of five."""
    x, y = _copied(clock.device)
    return 2 * x.nbytes / min(clock(lambda: y.copy_(x), 1) for _ in range(5))


def product_rate(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of a 3 x 3 convolution of 512 to 512 channels, measured now: the best of five."""
    n = _IMAGES[clock.device.type]
    x, w = (torch.randn(*size, device=clock.device).to(dtype) for size in ((n, 512, 32, 32), (512, 512, 3, 3)))
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    with torch.inference_mode():
        torch.nn.functional.conv2d(x, w, padding=1)
        seconds = min(clock(lambda: torch.nn.functional.conv2d(x, w, padding=1), 1) for _ in range(5))
    return 2 * 9 * 512 * 512 * n * 32 * 32 / seconds


@functools.lru_cache(maxsize=1)
def _copied(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(_COPIED[device.type], device=device)
    return x, torch.zeros_like(x)
