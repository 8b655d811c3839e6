"""Which convolution a styled layer of the CUDA synthesis takes: decided here, and kept.

``SAGE_FAST_CUDA_CONV`` says how: ``cudnn`` (cuDNN's, then an epilogue), ``own``
(:func:`~sage_fast.ops.styled_conv.styled_conv`) or, where it is not set, ``auto``: each layer shape is measured in all ways at
its first use, and the process stays with the fastest, so that a call repeats to the bit. Two processes may differ in it;
where they must not, as in generation, inside :func:`repeatable` ``auto`` takes cuDNN's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from statistics import median
from typing import Any, NamedTuple

import torch

from sage_fast import _native
from sage_fast.errors import InputError

__all__ = [
    "CUDNN", "MODES", "OWN", "Choice", "Layer", "choices", "choose", "has_products", "mode", "repeatable", "taken",
]  # fmt: skip

MODES = ("auto", "cudnn", "own")
CUDNN = "cudnn"
OWN = {"own": 0, "own 32": 32, "own 64": 64, "own 128": 128}  # columns of styled_conv
_ROUNDS, _REPEATS = 3, 3
_AHEAD = (
    1_000_000  # cycles that the GPU sleeps, in which the calls of a round are launched: their launches are not measured
)


class Layer(NamedTuple):
    """What a choice depends on; ``size`` of the output, in pixels."""

    device: torch.device
    dtype: torch.dtype
    n: int
    size: int
    c_in: int
    c_out: int
    up: bool


class Choice(NamedTuple):
    """The way that a layer takes, and the milliseconds of all."""

    way: str
    ms: dict[str, float]


_choices: dict[Layer, Choice] = {}
_repeatable: ContextVar[bool] = ContextVar("repeatable", default=False)


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, no layer of this thread takes a way that was chosen by the clock: the next process has the same bits."""
    token = _repeatable.set(True)
    try:
        yield
    finally:
        _repeatable.reset(token)


def mode() -> str:
    """``SAGE_FAST_CUDA_CONV``.

    Raises:
        InputError: it is another word.
    """
    wanted = os.environ.get("SAGE_FAST_CUDA_CONV", "auto")
    if wanted not in MODES:
        raise InputError(f"SAGE_FAST_CUDA_CONV must be one of {', '.join(MODES)}, got '{wanted}'.")
    return wanted


def choices() -> dict[Layer, Choice]:
    """What was measured in this process."""
    return dict(_choices)


def taken(layer: Layer) -> str | None:
    """The way that ``layer`` takes, :data:`CUDNN` or a key of :data:`OWN`; None: its first use is to decide.

    cuDNN's where there is nothing to choose: off the GPU, for float32 without TF32, under ``torch.use_deterministic_algorithms``,
    inside :func:`repeatable`.

    Raises:
        InputError: ``own`` is wanted for float32, and TF32 products are not allowed.
    """
    wanted = mode()
    if wanted == "own":
        if not has_products(layer.dtype):
            raise InputError(
                "SAGE_FAST_CUDA_CONV=own multiplies float32 in TF32, which torch.backends.cudnn does not allow now; "
                "set torch.backends.cudnn.allow_tf32 = True or SAGE_FAST_CUDA_CONV=cudnn."
            )
        return "own"
    on_gpu = layer.device.type == "cuda" and _native.has_kernel("styled_conv", "cuda")
    fixed = wanted == "cudnn" or _repeatable.get() or torch.are_deterministic_algorithms_enabled()
    if fixed or not (on_gpu and has_products(layer.dtype)):
        return CUDNN
    return _choices[layer].way if layer in _choices else None


def choose(layer: Layer, ways: Mapping[str, Callable[[], Any]]) -> str:
    """The way that ``layer`` takes, after a measurement if need be; ``ways``: a call of the whole layer for each.

    Nothing is measured while a CUDA graph is captured: a layer that was never measured takes cuDNN's then, and stays open.
    """
    way = taken(layer)
    if way is not None:
        return way
    if torch.cuda.is_current_stream_capturing():
        return CUDNN
    ms = _measured(layer.device, ways)
    return _choices.setdefault(layer, Choice(min(ms, key=lambda way: (ms[way], way)), ms)).way


def has_products(dtype: torch.dtype) -> bool:
    """Whether tensor cores may multiply it: float32 where cuDNN's convolutions may round it to TF32."""
    return dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _measured(device: torch.device, ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians of milliseconds a call, the ways by turns."""
    for run in ways.values():
        run()  # weights are prepared, memory is found
    times: dict[str, list[float]] = {way: [] for way in ways}
    stream = torch.cuda.current_stream(device)
    for _ in range(_ROUNDS):
        for way, run in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                torch.cuda._sleep(_AHEAD)
            start.record(stream)
            for _ in range(_REPEATS):
                run()
            end.record(stream)
            end.synchronize()
            times[way].append(start.elapsed_time(end) / _REPEATS)
    return {way: median(values) for way, values in times.items()}
