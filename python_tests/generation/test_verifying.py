"""Whether damage of any kind is found, named and mended; and single images made again."""

from __future__ import annotations

import json
import shutil

import pytest

from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, generate
from sage_fast.generation.verifying import regenerate, verify
from sage_fast.pipeline import FewShotPipeline


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="module", params=["folder", "webdataset", "safetensors"])
def whole(request, pipeline, tiny_shots, tmp_path_factory):
    """An output of ten images in shards of four, to be copied, and its config."""
    config = GenerateConfig(n=5, shard=4, batch=4, format=request.param)
    out = tmp_path_factory.mktemp("verify") / request.param
    generate(pipeline, tiny_shots, out, config)
    return out, config


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def spoil_byte(path, at=-900):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def first_file(out, config):
    return out / {"folder": "lily/lily_00001.png", "webdataset": "shard-000000.tar"}.get(
        config.format, "images.safetensors"
    )


def drop_line(out):
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (out / "manifest.jsonl").write_bytes(b"".join(lines[:-1]))


def swap_lines(out):
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (out / "manifest.jsonl").write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))


DAMAGES = {
    "a file is gone": lambda out, config: first_file(out, config).unlink(),
    "a file is empty": lambda out, config: first_file(out, config).write_bytes(b""),
    "a file is cut": lambda out, config: first_file(out, config).write_bytes(
        first_file(out, config).read_bytes()[:-1100]
    ),
    "a byte is another": lambda out, config: spoil_byte(
        first_file(out, config), 150 if config.format == "folder" else 700
    ),
    "a line is gone": lambda out, config: drop_line(out),
    "lines are exchanged": lambda out, config: swap_lines(out),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_mended(whole, pipeline, tiny_shots, tmp_path, damage):
    original, config = whole
    out = tmp_path / "out"
    shutil.copytree(original, out)
    assert str(verify(out)) == "10 images of 2 categories: all there, whole and as recorded."
    DAMAGES[damage](out, config)
    found = verify(out, repair=True)
    assert found.problems and found.damaged and "\n" not in str(found)
    assert "not written" in str(verify(out))
    generate(pipeline, tiny_shots, out, GenerateConfig(**vars(config) | {"resume": True}))
    assert contents(out) == contents(original) and verify(out).problems == []


def test_files_that_do_not_belong_are_named(whole, tmp_path):
    original, config = whole
    out = tmp_path / "out"
    shutil.copytree(original, out)
    strays = ["notes.txt", "shard-000009.tar"]
    if config.format == "folder":
        strays += ["lily/lily_00005.png", "lily/lily_000001.png", "lily/x.png"]
    for name in strays:
        (out / name).write_bytes(b"x")
    assert sorted(verify(out).problems) == sorted(f"{name!r} does not belong to the plan." for name in strays)


def test_what_is_no_output_of_generate(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run of generate"):
        verify(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"space": "w"}')
    with pytest.raises(InputError, match="no run of generate"):
        verify(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        verify(tmp_path / "empty")


def test_every_image_is_made_again_with_its_bytes(whole, pipeline, tiny_shots, tmp_path):
    out, config = whole
    for number in (0, 4, 7, 9):
        made = regenerate(out / "manifest.jsonl", number, tmp_path / f"{number}.png", pipeline)
        assert made.same and "has the recorded bytes" in str(made)
    if config.format == "folder":
        assert (tmp_path / "7.png").read_bytes() == (out / "rose" / "rose_00002.png").read_bytes()


def test_an_image_of_moved_shots(whole, pipeline, tiny_shots, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"shots_dir": "/gone"}))
    with pytest.raises(InputError, match="cannot be read any more"):
        regenerate(out / "manifest.jsonl", 0, tmp_path / "a.png", pipeline)
    assert regenerate(out / "manifest.jsonl", 0, tmp_path / "a.png", pipeline, tiny_shots).same


def test_images_that_cannot_be_made_again(whole, pipeline, tmp_path):
    out, _ = whole
    for number in (-1, 10):
        with pytest.raises(InputError, match=f"has no line {number}"):
            regenerate(out / "manifest.jsonl", number, tmp_path / "a.png", pipeline)
    for path in (out / "config.json", tmp_path / "manifest.jsonl"):
        with pytest.raises(InputError, match="is no manifest.jsonl beside a config.json"):
            regenerate(path, 0, tmp_path / "a.png", pipeline)
    parts = (pipeline.generator, pipeline.encoder, pipeline.relevant, pipeline.irrelevant, pipeline.codes)
    with pytest.raises(InputError, match="was made by model"):
        regenerate(out / "manifest.jsonl", 0, tmp_path / "a.png", FewShotPipeline(*parts, hash="other"))
    assert not (tmp_path / "a.png").exists()
