"""What a run takes at most, said before it begins, and kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, Prepared, generate, memory, writing
from sage_fast.generation.drawing import draw_images, draw_latents
from sage_fast.generation.memory import LIMIT, images_at_once, room_for
from sage_fast.generation.plan_files import read_plan
from sage_fast.models.stylegan2 import Generator
from sage_fast.pipeline import FewShotPipeline

MB = 1 << 20

PROGRAM = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
from bench_generate import SIZES, make_pipeline, make_shots
from sage_fast.generation import GenerateConfig, generate
from sage_fast.generation.memory import room_for
from sage_fast.generation.run import plan_of
from sage_fast.models.inference import fused_network

size, base, categories, n, stop = (int(word) for word in sys.argv[2:])
torch.set_num_threads(4)
SIZES[size] = (base, *SIZES[size][1:])
pipeline = make_pipeline(size)
shots = make_shots(Path(sys.argv[1]) / "shots", size, categories)
config = GenerateConfig(n=n)

class Enough(Exception):
    pass

def progress(done, total):
    if done >= stop:
        raise Enough

try:
    generate(pipeline, shots, Path(sys.argv[1]) / "out", config, progress)
except Enough:
    pass
network = fused_network(pipeline.generator)
held = [t for part in (pipeline.generator, pipeline.encoder) for t in (*part.parameters(), *part.buffers())]
held += [*network.packed(torch.float32), *(layer.weight for layer in network.layers), pipeline.codes.w_plus]
held += [pipeline.irrelevant.directions, *(editor.codes_ for editor in pipeline._editors.values())]
words = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
print(json.dumps({
    "peak": int(words["VmHWM"].split()[0]) * 1024,
    "model": sum(t.numel() * t.element_size() for t in held),
    "room": asdict(room_for(pipeline, plan_of(pipeline, shots, config), 4)),
}))
"""


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


def measured(folder, *words):
    """Peak memory of a run of its own process, the model's share of it, and what was said before."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to read the peak of the memory from")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "benchmarks")])
    command = [sys.executable, "-c", PROGRAM, str(folder), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_large_images_of_many_categories_stay_within_what_is_said(tmp_path):
    found = measured(tmp_path, 256, 8192, 16, 2, 10**9)
    assert found["room"]["drawers"] == 4
    assert found["peak"] - found["model"] <= found["room"]["bytes"] <= LIMIT


def test_ten_million_images_begin_in_less_than_a_gibibyte(tmp_path):
    found = measured(tmp_path, 32, 2048, 100, 100_000, 2048)
    assert found["peak"] < 1024 * MB


def plan_like(pipeline, shots, **settings):
    return read_plan(None, shots, GenerateConfig(**{"n": 5, "batch": 4, "shard": 8, **settings}), 3, 8)


def of_size(pipeline, resolution, **settings):
    """The pipeline with a generator of another size."""
    other = copy.copy(pipeline)
    other.generator = Generator(resolution, 16, n_mapping=1, **settings).eval()
    return other


@pytest.mark.parametrize(
    "resolution, base, batch", [(256, 16384, 4), (256, 16384, 64), (512, 16384, 1), (1024, 32768, 1)]
)
@pytest.mark.parametrize("threads", [1, 2, 4, 64])
def test_no_plan_takes_more_than_the_limit(pipeline, tiny_shots, resolution, base, batch, threads):
    large = of_size(pipeline, resolution, channel_base=base)
    plan = plan_like(large, tiny_shots, batch=batch, shard=4096)
    room = room_for(large, plan, threads)
    assert room.bytes <= LIMIT
    assert 1 <= room.drawers <= threads and room.drawers * room.threads <= threads and room.ahead >= 1


def test_more_threads_draw_more_micro_batches_while_they_fit(pipeline, tiny_shots):
    large = of_size(pipeline, 256)
    plan = plan_like(large, tiny_shots, batch=4)
    assert [room_for(large, plan, threads).drawers for threads in (1, 2, 4, 8)] == [1, 2, 4, 4]
    assert room_for(pipeline, plan, 40).drawers == 40


def test_a_large_micro_batch_is_drawn_in_parts_of_a_bounded_size(pipeline):
    assert images_at_once(pipeline) > 1000
    assert 2 <= images_at_once(of_size(pipeline, 256)) <= 8


def test_a_batch_or_shard_that_does_not_fit_is_refused_with_one_that_does(pipeline, tiny_shots, tmp_path):
    with pytest.raises(
        InputError, match=r"^batch must be at most (\d+) for images of 8 px.*, got 99999999\.$"
    ) as error:
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(batch=99_999_999))
    most = int(str(error.value).split()[5])
    room_for(pipeline, plan_like(pipeline, tiny_shots, batch=most), 1)
    with pytest.raises(InputError, match=r"^A shard must have at most (\d+) images .*, got 1000000; give") as error:
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(shard=1_000_000))
    most = int(str(error.value).split()[6])
    assert room_for(pipeline, plan_like(pipeline, tiny_shots, shard=most), 1).commits == 0
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "n, words",
    [
        (10**9, r"^A plan has at most 1,000,000 shards, got 3,906,250 of 512 images; give larger shards"),
        (10**20, r"^A plan has at most 1,000,000,000,000 images, got 200,000,000,000,000,000,000; ask for fewer\.$"),
    ],
)
def test_a_plan_of_any_number_of_images_is_refused_or_begun(pipeline, tiny_shots, tmp_path, n, words):
    with pytest.raises(InputError, match=words):
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=n))
    assert room_for(pipeline, plan_like(pipeline, tiny_shots, n=10**9, shard=4096), 1).bytes < LIMIT


def many_small_categories(pipeline, shots, n_shots, fusion, n=4):
    """Categories of many shots and few images each: those of several are on their way at the same time."""
    plan = plan_like(pipeline, shots, n=n, fusion=fusion)
    shown = replace(plan.parts[0], shots=plan.parts[0].shots[:1] * n_shots, hashes=plan.parts[0].hashes[:1] * n_shots)
    return replace(plan, parts=tuple(replace(shown, category=f"c{i}") for i in range(100)))


def test_categories_that_are_fused_at_the_same_time_are_counted(pipeline, tiny_shots):
    large = of_size(pipeline, 256)
    for fusion, n, drawers in (("none", 4, 4), ("pixel", 400, 4), ("pixel", 4, 2)):
        room = room_for(large, many_small_categories(large, tiny_shots, 40, fusion, n), 4)
        assert room.drawers == drawers and room.bytes <= LIMIT


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_categories_are_fused_at_the_same_time_than_are_counted(
    pipeline, tiny_shots, tmp_path, monkeypatch, threads
):
    alive, most = weakref.WeakSet(), [0]
    prepare, draw = Prepared._prepare, writing.draw_images

    def prepared(self, part):
        alive.add(made := prepare(self, part))
        most[0] = max(most[0], len(alive))
        return made

    def slowly(*arguments):
        time.sleep(0.2)
        return draw(*arguments)

    lines = [{"category": f"c{i}", "shots": "rose", "n": 4, "fusion": "pixel"} for i in range(24)]
    (tmp_path / "plan.json").write_text(json.dumps({"categories": lines}))
    monkeypatch.setattr(Prepared, "_prepare", prepared)
    monkeypatch.setattr(writing, "draw_images", slowly)
    monkeypatch.setattr("sage_fast.generation.drawing.KEPT", 1)
    config = GenerateConfig(batch=4, shard=16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generate(pipeline, tiny_shots, tmp_path / "out", config, plan=tmp_path / "plan.json")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    plan = read_plan(tmp_path / "plan.json", tiny_shots, config, 3, 8)
    counted = memory._fused_together(pipeline, plan, threads) // memory._category_bytes(pipeline, 2)
    assert threads < most[0] <= counted < len(plan.parts)


def test_shots_are_kept_and_their_reconstructions_drawn_for_fusion_alone(pipeline, tiny_shots, monkeypatch):
    fused, plain = (Prepared(pipeline, plan_like(pipeline, tiny_shots, fusion=fusion)) for fusion in ("both", "none"))
    assert fused[0].novel.inverted.shape == (3, 3, 8, 8)
    monkeypatch.setattr(FewShotPipeline, "render", None)
    assert len(plain[0].novel.shots) == len(plain[0].novel.inverted) == 0 and plain[0].size < fused[0].size
    assert draw_images(pipeline, draw_latents(plain, range(4))).shape == (4, 3, 8, 8)


def test_many_shots_of_a_category_are_counted(pipeline, tiny_shots):
    large = of_size(pipeline, 256)
    plan = plan_like(large, tiny_shots)
    part = plan.parts[0]
    many = replace(part, shots=part.shots * 200, hashes=part.hashes * 200)
    assert room_for(large, replace(plan, parts=(many,)), 1).bytes > room_for(large, plan, 1).bytes + 500 * MB
