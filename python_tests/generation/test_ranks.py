"""Several ranks on one output: each its shards, whoever comes last completes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, Meter, generate
from sage_fast.generation.locks import joined
from sage_fast.generation.stores import open_store
from sage_fast.pipeline import FewShotPipeline

CONFIG = GenerateConfig(n=10, batch=3, shard=4, fusion="pixel")


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


@pytest.fixture
def rank(monkeypatch, pipeline, tiny_shots):
    """``rank(r, n, out)``: the run of one rank of n."""

    def run(number, world_size, out, config=CONFIG, **arguments):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return generate(pipeline, tiny_shots, out, config, **arguments)

    return run


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_ranks_one_after_another_make_the_files_of_one(rank, pipeline, tiny_shots, tmp_path, order):
    generate(pipeline, tiny_shots, tmp_path / "one", CONFIG)
    summaries = [rank(number, 3, tmp_path / "three") for number in order]
    assert sorted(s.n_new for s in summaries) == [4, 8, 8] and summaries[-1].missing == 0
    assert [s.missing > 0 for s in summaries] == [True, True, False]
    assert "shards of other ranks are not there yet" in str(summaries[0])
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert not (tmp_path / "three" / ".sage_fast").exists()


def test_a_run_of_three_is_finished_by_two(rank, pipeline, tiny_shots, tmp_path):
    generate(pipeline, tiny_shots, tmp_path / "one", CONFIG)
    rank(1, 3, tmp_path / "out")
    again = [rank(number, 2, tmp_path / "out", replace(CONFIG, resume=True)) for number in (1, 0)]
    assert [(s.n_new, s.n_kept) for s in again] == [(4, 4), (8, 4)]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_rank_without_shards_and_one_that_is_late(rank, tmp_path):
    config = GenerateConfig(n=3, shard=100)
    assert [rank(number, 2, tmp_path / "a", config).n_new for number in (1, 0)] == [0, 6]
    assert [rank(number, 2, tmp_path / "b", config).n_new for number in (0, 1)] == [6, 0]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(InputError, match="is not empty; add --resume"):
        rank(0, 2, tmp_path / "a", config)


def test_a_second_run_is_refused(rank, pipeline, tiny_shots, tmp_path, monkeypatch):
    store = open_store(tmp_path / "out")
    store.prepare(resume=False)
    file, folder, _ = store.locks
    with joined("out", file, folder, 0, 2):
        for number, world_size in ((0, 2), (0, 3), (0, 1)):
            with pytest.raises(InputError, match="is being written by another run"):
                rank(number, world_size, tmp_path / "out")
        assert rank(1, 2, tmp_path / "out").n_new == 8


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}],
)
def test_environments_that_cannot_be(pipeline, tiny_shots, tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="RANK and WORLD_SIZE must be"):
        generate(pipeline, tiny_shots, tmp_path / "out", CONFIG)


def test_overwriting_is_for_one(rank, tmp_path):
    with pytest.raises(InputError, match="--overwrite does not go with several ranks"):
        rank(0, 2, tmp_path / "out", replace(CONFIG, overwrite=True))


def test_the_meter_and_the_metrics_say_how_it_went(rank, tmp_path):
    meter = Meter()
    rank(0, 2, tmp_path / "out", replace(CONFIG, metrics=str(tmp_path / "m.jsonl")), meter=meter)
    lines = [json.loads(line) for line in Path(tmp_path / "m.jsonl.0").read_text().splitlines()]
    assert (meter.done, meter.total, len(lines)) == (12, 12, 3)
    assert lines[-1]["images"] == 12 and lines[-1]["images_per_s"] > 0
    assert set(lines[-1]["busy"]) == {"sampling", "drawing", "encoding", "committing"}
    assert lines[-1]["slowest"] in lines[-1]["busy"]
