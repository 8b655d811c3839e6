"""Stages at work at the same time, with short queues between them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from sage_fast.generation import GenerateConfig, Meter, generate, writing
from sage_fast.generation.writing import ahead
from sage_fast.pipeline import FewShotPipeline

CONFIG = GenerateConfig(n=20, batch=4, shard=40, workers=1)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


def slow(monkeypatch, drawing, encoding):
    """Every micro-batch takes so many seconds more to draw, and to encode; returns the two counts, kept up to date."""
    counts = {"drawn": 0, "most ahead": 0, "stored": 0}
    draw, store = writing.draw_images, writing._Task.store

    def slow_draw(*args):
        time.sleep(drawing)
        counts["drawn"] += 1
        counts["most ahead"] = max(counts["most ahead"], counts["drawn"] - counts["stored"])
        return draw(*args)

    def slow_store(*args):
        time.sleep(encoding)
        counts["stored"] += 1
        return store(*args)

    monkeypatch.setattr(writing, "draw_images", slow_draw)
    monkeypatch.setattr(writing._Task, "store", slow_store)
    return counts


def test_drawing_and_encoding_overlap(pipeline, tiny_shots, tmp_path, monkeypatch):
    spans = {"draw_images": [], "store": []}

    def timed(owner, name):
        call = getattr(owner, name)

        def slower(*args):
            start = time.monotonic()
            time.sleep(0.05)
            result = call(*args)
            spans[name].append((start, time.monotonic()))
            return result

        monkeypatch.setattr(owner, name, slower)

    timed(writing, "draw_images")
    timed(writing._Task, "store")
    generate(pipeline, tiny_shots, tmp_path / "out", CONFIG)
    at_once = [s for s in spans["store"] if any(s[0] < d[1] and d[0] < s[1] for d in spans["draw_images"])]
    assert len(spans["store"]) == 10 and len(at_once) > 5


def test_a_slow_encoder_holds_up_the_drawing(pipeline, tiny_shots, tmp_path, monkeypatch):
    counts = slow(monkeypatch, 0, 0.01)
    meter = Meter()
    generate(pipeline, tiny_shots, tmp_path / "out", replace(CONFIG, n=80), meter=meter)
    assert counts["drawn"] == counts["stored"] == 40
    assert counts["most ahead"] <= 6
    assert meter.slowest == "encoding"


def test_a_slow_generator_is_named(pipeline, tiny_shots, tmp_path, monkeypatch):
    slow(monkeypatch, 0.03, 0)
    meter = Meter()
    generate(pipeline, tiny_shots, tmp_path / "out", CONFIG, meter=meter)
    assert meter.slowest == "drawing"


def test_ahead_keeps_the_order_and_the_distance():
    taken, shares = [], []

    def items():
        for number in range(30):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        for number, done in enumerate(ahead(pool, lambda item: item * item, items(), 4, shares.append)):
            assert done == number * number and len(taken) <= number + 5
    assert taken == list(range(30)) and all(0 <= share <= 1 for share in shares)


def test_threads_of_torch_are_put_back(pipeline, tiny_shots, tmp_path):
    torch.set_num_threads(2)
    try:
        generate(pipeline, tiny_shots, tmp_path / "out", replace(CONFIG, n=3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
