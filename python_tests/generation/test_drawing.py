"""A shard to pixels, whatever else is drawn and in whatever batches."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_model import tiny_encoder

from sage_fast.data.images import load_image
from sage_fast.data.writers import save_png, to_uint8
from sage_fast.errors import InputError
from sage_fast.generation import (
    GenerateConfig,
    Prepared,
    about_images,
    committed,
    draw_shard,
    format_of,
    generate,
    open_output,
    write_shard,
)
from sage_fast.generation.agreeing import with_settings
from sage_fast.generation.drawing import draw_latents
from sage_fast.generation.plan_files import read_plan
from sage_fast.generation.verifying import verify
from sage_fast.pipeline import FewShotPipeline, one_thread


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


def plan_of(shots, **settings):
    return read_plan(None, shots, GenerateConfig(**{"n": 11, "batch": 4, "shard": 9, **settings}), 3, 8)


def shots_of(folder, category, size=8):
    return torch.stack([load_image(path, size) for path in sorted((folder / category).iterdir())])


@pytest.mark.parametrize("method", ["sage", "age", "sage-q", "inversion"])
@pytest.mark.parametrize("batch", [1, 4, 7, 22])
def test_latents_are_those_of_the_pipeline_to_the_last_bit(pipeline, tiny_shots, method, batch):
    prepared = Prepared(pipeline, plan_of(tiny_shots, method=method, batch=batch, shard=22, seed=5))
    drawn = torch.cat([draw_latents(prepared, positions).w_plus for positions in prepared.plan.batches(0)])
    expected = [
        pipeline(shots_of(tiny_shots, c), 11, method=method, seed=5, category=c).w_plus for c in ("lily", "rose")
    ]
    assert torch.equal(drawn, torch.cat(expected))


@pytest.mark.parametrize("method", ["sage", "age", "inversion"])
def test_latents_are_the_same_on_any_number_of_threads(tmp_path, method):
    """With the model that comes with the package: the networks of the tests are too small for threads to share."""
    threads = torch.get_num_threads()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = torch.from_numpy(rng.integers(0, 256, (3, 32, 32), np.uint8))
        (tmp_path / "rose").mkdir(exist_ok=True)
        save_png(tmp_path / "rose" / f"{number}.png", pixels)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pipeline = FewShotPipeline.from_bundle(None)
            prepared = Prepared(
                pipeline, read_plan(None, tmp_path, GenerateConfig(n=12, method=method, batch=12), 3, 32)
            )
            found += [draw_latents(prepared, range(12)).w_plus]
            found += [pipeline(shots_of(tmp_path, "rose", 32), 12, method=method, category="rose").w_plus]
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(w_plus, found[0]) for w_plus in found)


def test_categories_of_unlike_settings_share_a_micro_batch(pipeline, tiny_shots):
    plan = plan_of(tiny_shots, batch=22, shard=22)
    parts = (replace(plan.parts[0], alpha=0.5, fusion="pixel"), replace(plan.parts[1], method="age", fusion="both"))
    images = draw_shard(pipeline, replace(plan, parts=parts), 0)
    for part, own in zip(parts, (images[:11], images[11:])):
        result = pipeline(
            shots_of(tiny_shots, part.category), 11, part.alpha, part.method, part.fusion, category=part.category
        )
        np.testing.assert_array_equal(own, to_uint8(result.fused[part.fusion]).numpy())


def test_each_shots_own_weights_draw_its_images(pipeline, tiny_shots):
    """HyperStyle changes the generator for each shot."""
    encoder = tiny_encoder("hyperstyle", pipeline.generator)
    parts = (pipeline.generator, encoder, pipeline.relevant, pipeline.irrelevant, pipeline.codes)
    own = FewShotPipeline(*parts, hash="hyperstyle")
    images = draw_shard(own, plan_of(tiny_shots, batch=22, shard=22, fusion="frequency"), 0)
    result = own(shots_of(tiny_shots, "rose"), 11, fusion="frequency", category="rose")
    np.testing.assert_array_equal(images[11:], to_uint8(result.fused["frequency"]).numpy())
    assert (
        images[11:] != draw_shard(pipeline, plan_of(tiny_shots, batch=22, shard=22, fusion="frequency"), 0)[11:]
    ).any()


def test_images_depend_on_the_batch_by_a_level_at_most(pipeline, tiny_shots):
    one, other = (draw_shard(pipeline, plan_of(tiny_shots, batch=b, shard=22), 0) for b in (1, 22))
    apart = np.abs(one.astype(int) - other)
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.001


def test_shards_are_the_pieces_of_one(pipeline, tiny_shots):
    plan = plan_of(tiny_shots)
    whole = draw_shard(pipeline, replace(plan, shard=22), 0)
    pieces = [draw_shard(pipeline, plan, shard) for shard in (2, 0, 1)]
    np.testing.assert_array_equal(np.concatenate([pieces[1], pieces[2], pieces[0]]), whole)
    assert pieces[0].dtype == np.uint8 and pieces[0].shape == (4, 3, 8, 8)


def test_prepared_categories_are_dropped_above_a_size_and_come_back(pipeline, tiny_shots, monkeypatch):
    prepared = Prepared(pipeline, plan_of(tiny_shots))
    first = prepared[0]
    assert prepared[0] is first
    monkeypatch.setattr("sage_fast.generation.drawing.KEPT", 1)
    assert prepared[1] is not None and prepared[0] is not first
    torch.testing.assert_close(prepared[0].novel.w_plus, first.novel.w_plus, rtol=0, atol=0)


@pytest.mark.parametrize("fusion", ["none", "both"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_large_micro_batch_is_drawn_in_parts(pipeline, tiny_shots, monkeypatch, fusion, size):
    plan = replace(plan_of(tiny_shots, n=6, fusion=fusion), batch=12, shard=12)
    whole = draw_shard(pipeline, plan, 0)
    monkeypatch.setattr("sage_fast.generation.drawing.images_at_once", lambda _: size)
    np.testing.assert_array_equal(draw_shard(pipeline, plan, 0), whole)
    latents = draw_latents(Prepared(pipeline, plan), plan.positions(0))
    parts = list(latents.cut(size))
    assert [n for part in parts for n in part.positions] == list(range(12))
    assert [line for part in parts for line in part.about()] == list(latents.about())


def test_a_shot_that_changed_since_the_plan_was_made(pipeline, tiny_shots):
    plan = plan_of(tiny_shots)
    other = replace(plan, parts=(replace(plan.parts[0], hashes=("0" * 64, *plan.parts[0].hashes[1:])),))
    with pytest.raises(InputError, match="is not the file that the plan was made with"):
        draw_shard(pipeline, other, 0)


@pytest.mark.parametrize("format", ["folder", "webdataset", "safetensors"])
def test_shards_written_one_by_one_are_those_of_a_run(pipeline, tiny_shots, tmp_path, format):
    """As other programs run a plan: one process opens the output, others write shards to it."""
    config = GenerateConfig(n=11, batch=4, shard=9, format=format)
    generate(pipeline, tiny_shots, tmp_path / "run", config)
    plan = plan_of(tiny_shots)
    with open_output(pipeline, plan, tmp_path / "own", config) as opened:
        for shard in (2, 0, 1):
            target = format_of(tmp_path / "own")
            assert target.plan.parts == with_settings(pipeline, plan).parts and shard not in committed(
                target.target, target.plan
            )
            prepared = Prepared(pipeline, target.plan)
            about = about_images(prepared, target.plan.positions(shard))
            write_shard(target, shard, draw_shard(pipeline, target.plan, shard, prepared), about)
        assert committed(opened.target, plan) == {0, 1, 2}
    for path in (tmp_path / "run").rglob("*"):
        other = tmp_path / "own" / path.relative_to(tmp_path / "run")
        assert path.is_dir() or path.read_bytes() == other.read_bytes()
    assert verify(tmp_path / "own").problems == []


def test_an_output_of_another_encoder_is_not_written_to(pipeline, tiny_shots, tmp_path):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=2, encoder="pillow"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings | {"encoder": "pillow 0.1"}))
    (tmp_path / "out" / "SHA256SUMS").unlink()  # or the config would count as damaged
    with pytest.raises(InputError, match="is written with pillow 0.1, and here is pillow"):
        format_of(tmp_path / "out")
    with pytest.raises(InputError, match="encoder was 'pillow 0.1', is 'pillow"):
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=2, encoder="pillow", resume=True))


def test_torch_has_its_threads_back_however_those_that_compute_latents_overlap():
    """Whoever came second found one, and set it back to that."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        assert torch.get_num_threads() == 1
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
