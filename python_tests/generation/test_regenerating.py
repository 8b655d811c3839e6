"""Single images made again, and what is said of those that are not the stored ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import RESOLUTION

from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, generate, regenerating
from sage_fast.generation.committing import write_parquet
from sage_fast.generation.regenerating import regenerate
from sage_fast.generation.stores import make_state, open_store
from sage_fast.pipeline import FewShotPipeline


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="module", params=["folder", "webdataset", "safetensors"])
def whole(request, pipeline, tiny_shots, tmp_path_factory):
    """An output of ten images in shards of four, to be copied, and its config."""
    config = GenerateConfig(n=5, shard=4, batch=4, format=request.param)
    out = tmp_path_factory.mktemp("regenerate") / request.param
    generate(pipeline, tiny_shots, out, config)
    return out, config


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
    for number in (-1, 10, 10**20):
        with pytest.raises(InputError, match=f"has no line {number}"):
            regenerate(out / "manifest.jsonl", number, tmp_path / "a.png", pipeline)
    for path in (out / "config.json", tmp_path / "manifest.jsonl"):
        with pytest.raises(InputError, match="is no manifest.jsonl or manifest.parquet of an output"):
            regenerate(path, 0, tmp_path / "a.png", pipeline)
    parts = (pipeline.generator, pipeline.encoder, pipeline.relevant, pipeline.irrelevant, pipeline.codes)
    with pytest.raises(InputError, match="was made by model"):
        regenerate(out / "manifest.jsonl", 0, tmp_path / "a.png", FewShotPipeline(*parts, hash="other"))
    with pytest.raises(InputError, match="written as png, so out must end in .png, got '.*a.jpg'"):
        regenerate(out / "manifest.jsonl", 0, tmp_path / "a.jpg", pipeline)
    with pytest.raises(InputError, match="lies in the output itself"):
        regenerate(out / "manifest.jsonl", 3, out / "a.png", pipeline)
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "shard": 0}))
    with pytest.raises(InputError, match="holds no plan of generate"):
        regenerate(broken / "manifest.jsonl", 0, tmp_path / "a.png", pipeline)
    assert not list(tmp_path.glob("a.*"))


def copied(whole, tmp_path, kind, name):
    """The manifest alone, elsewhere and under a name."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        make_state(open_store(whole))
        write_parquet(open_store(whole))
    return Path(shutil.copy(whole / f"manifest.{kind}", tmp_path / name))


@pytest.mark.parametrize("name", ["manifest", "kept"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_image_of_the_manifest_alone(whole, pipeline, tiny_shots, tmp_path, kind, name):
    shutil.copytree(whole[0], tmp_path / "out")
    manifest = copied(tmp_path / "out", tmp_path, kind, f"{name}.{kind}")
    assert regenerate(tmp_path / "out" / f"manifest.{kind}", 3, tmp_path / "3.png", pipeline).same
    for number in (0, 7, 9):
        made = regenerate(manifest, number, tmp_path / f"{number}.png", pipeline, tiny_shots)
        assert made.same or (made.levels is None and "config.json" in str(made))
        again = regenerate(whole[0] / "manifest.jsonl", number, tmp_path / f"again_{number}.png", pipeline)
        assert again.same
        images = [np.asarray(Image.open(file)) for file in (made.file, again.file)]
        assert abs(images[0].astype(int) - images[1]).max() <= 1
        assert made.same or (images[0] != images[1]).any()  # written by generate's usual encoder
    for number in (-1, 10, 10**20):
        with pytest.raises(InputError, match=f"has no line {number}"):
            regenerate(manifest, number, tmp_path / "a.png", pipeline, tiny_shots)
    with pytest.raises(InputError, match=f"Beside '.*{name}.{kind}' is no config.json.* with --shots"):
        regenerate(manifest, 0, tmp_path / "a.png", pipeline)
    with pytest.raises(InputError, match="cannot be read any more"):
        regenerate(manifest, 0, tmp_path / "a.png", pipeline, tmp_path)
    manifest.write_bytes(b"{}\n")
    damaged = "is no Parquet file, or damaged" if kind == "parquet" else "Line 0 of '.*' is none of generate's"
    with pytest.raises(InputError, match=damaged):
        regenerate(manifest, 0, tmp_path / "a.png", pipeline, tiny_shots)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "changed",
    [{"category": "../a"}, {"category": 3}, {"shots": [1]}, {"shots": []}, {"index": -1}, {"alpha": "x"}, {"alpha": None},
     {"method": "none"}, {"preset": 4}, {"precision": "int8"}, {"seed": "s"}, {"sha256": None}, {"n_similar": 0},
     {"fusion": None}, {"model": 1}, {"file": 1}, {"index": 1 << 70}, {"shots": [{"file": 3, "sha256": "a"}]},
     {"shots": [{"file": "\0", "sha256": "a"}]}],
)  # fmt: skip
def test_a_copied_line_that_was_altered(whole, pipeline, tiny_shots, tmp_path, changed):
    manifest = copied(whole[0], tmp_path, "jsonl", "kept.jsonl")
    line = json.loads(manifest.read_text().splitlines()[0])
    manifest.write_text(json.dumps(line | changed) + "\n")
    with pytest.raises(InputError) as error:
        regenerate(manifest, 0, tmp_path / "a.png", pipeline, tiny_shots)
    assert "\n" not in str(error.value) and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("key", ["seed", "model", "preset", "file"])
def test_a_line_that_contradicts_the_plan_is_refused(whole, pipeline, tmp_path, key):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    lines[2] = json.dumps(json.loads(lines[2]) | {key: 7}) + "\n"
    (out / "manifest.jsonl").write_text("".join([*lines, lines[-1]]))
    with pytest.raises(
        InputError, match=f"Line 2 of the manifest has {key} 7, and by the plan it is .*--repair"
    ) as error:
        regenerate(out / "manifest.jsonl", 2, tmp_path / "a.png", pipeline)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    with pytest.raises(InputError, match="has a line 10, and the plan 10 images"):
        regenerate(out / "manifest.jsonl", 10, tmp_path / "a.png", pipeline)
    (out / "manifest.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="Line 0 of the manifest is no JSON object"):
        regenerate(out / "manifest.jsonl", 0, tmp_path / "a.png", pipeline)
    assert not (tmp_path / "a.png").exists()


def test_how_far_an_image_is_from_the_stored_one_is_measured(whole, pipeline, tmp_path, monkeypatch):
    out, config = tmp_path / "out", whole[1]
    shutil.copytree(whole[0], out)
    draw = regenerating.draw_images

    def other(pipeline, latents):
        image = draw(pipeline, latents).clone()
        image[0, 0, 0, :4] ^= 128
        return image

    monkeypatch.setattr(regenerating, "draw_images", other)
    made = regenerate(out / "manifest.jsonl", 7, tmp_path / "a.png", pipeline)
    assert (made.same, made.levels, made.share, made.other) == (False, 128, 4 / (3 * RESOLUTION**2), [])
    assert "is not the stored image to the last pixel: " in str(made) and "by 128 of 255 at most." in str(made)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"device": "cuda"}))
    names = {"folder": "rose/rose_00002.png", "webdataset": "shard-000001.tar", "safetensors": "images.safetensors"}
    for spoil in (lambda path: path.write_bytes(bytes(path.stat().st_size)), lambda path: path.unlink()):
        spoil(out / names[config.format])
        made = regenerate(out / "manifest.jsonl", 7, tmp_path / "a.png", pipeline)
        assert (made.same, made.levels) == (False, None) and "is not known; other than the first time: device." in str(
            made
        )


def test_the_same_pixels_in_other_bytes(pipeline, tiny_shots, tmp_path):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=2, encoder="pillow", quality=1))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings | {"quality": 0}))
    made = regenerate(tmp_path / "out" / "manifest.jsonl", 1, tmp_path / "a.png", pipeline)
    assert (made.same, made.levels) == (False, 0) and "has the pixels of the stored image in other bytes." in str(made)
