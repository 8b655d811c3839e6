"""The choice between the convolutions of the CUDA synthesis; no GPU is asked, the clock is replaced."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops import cuda_convolution
from sage_fast.ops.cuda_convolution import CUDNN, OWN, Layer, choices, choose, repeatable, taken

LAYER = Layer(torch.device("cuda:0"), torch.bfloat16, 4, 64, 512, 256, True)
WAYS = dict.fromkeys([CUDNN, *OWN], lambda: None)


class Event:
    """A clock that ways advance."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        self.waited = False

    def record(self, stream: None) -> None:
        self.time = Event.now

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: Event) -> float:
        assert end.waited
        return end.time - self.time


def test_a_measurement(monkeypatch):
    """Medians of rounds of each way after a call that does not count."""
    monkeypatch.undo()
    for name, fake in dict(Event=Event, current_stream=lambda device: None, _sleep=lambda cycles: None).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    calls = {CUDNN: [50.0, 2, 2, 2, 3, 3, 3, 90, 90, 90], "own": [99.0, 1, 2, 3, 1, 2, 3, 1, 2, 3]}

    def advance(way: str) -> None:
        Event.now += calls[way].pop(0)

    ways = {way: functools.partial(advance, way) for way in calls}
    assert cuda_convolution._measured(LAYER.device, ways) == {CUDNN: 3.0, "own": 2.0}
    assert not any(calls.values())


@pytest.fixture(autouse=True)
def measured(monkeypatch) -> list[dict[str, float]]:
    """A GPU with kernels, and what its clock says from one measurement to the next."""
    clock: list[dict[str, float]] = []
    monkeypatch.delenv("SAGE_FAST_CUDA_CONV", raising=False)
    monkeypatch.setattr(_native, "has_kernel", lambda op, device: device == "cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda_convolution, "_choices", {})
    monkeypatch.setattr(cuda_convolution, "_measured", lambda device, ways: clock.pop(0))
    return clock


def test_the_fastest_is_kept(measured):
    measured += [{CUDNN: 2.0, "own": 1.5, "own 64": 1.2}, {CUDNN: 1.0, "own": 1.5, "own 64": 1.2}]
    assert choose(LAYER, WAYS) == choose(LAYER, WAYS) == "own 64"
    assert taken(LAYER) == "own 64" and taken(LAYER._replace(n=5)) is None
    assert choose(LAYER._replace(n=5), WAYS) == CUDNN
    assert choose(LAYER, WAYS) == "own 64" and not measured
    assert choices()[LAYER] == ("own 64", {CUDNN: 2.0, "own": 1.5, "own 64": 1.2})


def test_nothing_is_measured_in_a_capture(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(LAYER, WAYS) == CUDNN and not choices()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    measured.append({CUDNN: 2.0, "own": 1.0})
    assert choose(LAYER, WAYS) == "own"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(LAYER, WAYS) == "own"


def test_what_must_repeat_is_not_chosen_by_the_clock(measured, monkeypatch):
    measured.append({CUDNN: 2.0, "own": 1.0})
    assert choose(LAYER, WAYS) == "own"
    with repeatable():
        assert taken(LAYER) == choose(LAYER, WAYS) == choose(LAYER._replace(n=5), WAYS) == CUDNN
        monkeypatch.setenv("SAGE_FAST_CUDA_CONV", "own")
        assert choose(LAYER, WAYS) == "own"
    monkeypatch.delenv("SAGE_FAST_CUDA_CONV")
    assert choose(LAYER, WAYS) == "own" and list(choices()) == [LAYER]


def test_it_can_be_forced(monkeypatch):
    for word in ("cudnn", "own"):
        monkeypatch.setenv("SAGE_FAST_CUDA_CONV", word)
        assert choose(LAYER, WAYS) == word
    monkeypatch.setenv("SAGE_FAST_CUDA_CONV", "fast")
    with pytest.raises(InputError, match="one of auto, cudnn, own, got 'fast'"):
        choose(LAYER, WAYS)


def test_what_leaves_no_choice(monkeypatch):
    assert choose(LAYER._replace(device=torch.device("cpu")), WAYS) == CUDNN
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose(LAYER, WAYS) == CUDNN
    monkeypatch.undo()
    monkeypatch.setattr(_native, "has_kernel", lambda op, device: False)
    assert choose(LAYER, WAYS) == CUDNN


def test_float32_needs_tf32(measured, monkeypatch):
    layer = LAYER._replace(dtype=torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert choose(layer, WAYS) == CUDNN
    monkeypatch.setenv("SAGE_FAST_CUDA_CONV", "own")
    assert choose(LAYER, WAYS) == "own"
    with pytest.raises(InputError, match="allow_tf32 = True"):
        choose(layer, WAYS)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose(layer, WAYS) == "own"
