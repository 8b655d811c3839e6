"""Generation to disk: what lies in the folder afterwards, whatever interrupted it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import RESOLUTION

from sage_fast import __version__
from sage_fast.commands.watching import watched
from sage_fast.data.images import load_image
from sage_fast.data.writers import MARKER, read_manifest, save_png, to_uint8
from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, Meter, generate, run
from sage_fast.generation.verifying import verify
from sage_fast.pipeline import FewShotPipeline


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


@pytest.fixture
def shots(tiny_shots, tmp_path):
    """A copy to change: ``lily`` with three images, ``rose`` with two."""
    return Path(shutil.copytree(tiny_shots, tmp_path / "novel"))


def pictures(folder):
    """Every generated image by its path in the folder."""
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in folder.glob("*/*.png")}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder):
    """The bytes of every file that is not hidden."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def most_apart(a, b):
    assert a.keys() == b.keys()
    return max(int(np.abs(a[name].astype(int) - b[name].astype(int)).max()) for name in a)


EDITOR = {
    "n_components": 6,
    "n_similar": 6,
    "n_directions": 5,
}  # of the default preset, as far as the tiny model has them


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ". " not in text


# --- what is written ---


def test_the_folder_holds_images_manifest_config_and_sheet(tiny_bundle, tiny_shots, tmp_path):
    summary = generate(tiny_bundle, tiny_shots, tmp_path / "out", GenerateConfig(n=5, fusion="pixel", seed=2))
    assert (summary.categories, summary.n_new, summary.n_kept) == (["lily", "rose"], 10, 0)
    names = [f"{c}/{c}_{j:05d}.png" for c in ("lily", "rose") for j in range(5)]
    found = pictures(tmp_path / "out")
    assert sorted(found) == names
    assert all(image.shape == (RESOLUTION, RESOLUTION, 3) for image in found.values())
    lines = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [line["file"] for line in lines] == names
    hash = FewShotPipeline.from_bundle(tiny_bundle).hash
    data = (tmp_path / "out" / names[4]).read_bytes()
    shots = [{"file": f"lily/{i}.png", "sha256": sha256(tiny_shots / "lily" / f"{i}.png")} for i in range(3)]
    assert len(lines[4].pop("similar")) == 6
    assert lines[4] == {
        "category": "lily", "index": 4, "file": names[4], "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(), "source": "lily/1.png", "shots": shots, "seed": 2,
        "method": "sage", "alpha": 1.0, "fusion": "pixel", "preset": "default", "model": hash, "version": __version__,
        **EDITOR,
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_images"], config["model"], config["resolution"]) == (10, hash, RESOLUTION)
    assert [(part["category"], part["n"], part["alpha"], len(part["shots"])) for part in config["plan"]] == [
        ("lily", 5, 1.0, 3),
        ("rose", 5, 1.0, 2),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "10 images of 2 categories, 8 x 8 pixels,\n3 channels. **All of them are synthetic**" in card
    assert "sage-fast regenerate OUT/manifest.jsonl 12 --model RUN  #" in card
    assert Image.open(tmp_path / "out" / names[4]).text["Software"] == "sage_fast"
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize("fusion", ["none", "pixel", "frequency", "both"])
def test_images_are_those_of_the_pipeline(pipeline, tiny_shots, tmp_path, fusion):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=3, fusion=fusion, seed=4, alpha=1.5))
    shots = torch.stack([_read(tiny_shots / "rose" / name) for name in ("0.png", "1.png")])
    result = pipeline(shots, n=3, alpha=1.5, seed=4, category="rose", fusion=fusion)
    expected = to_uint8(result.images if fusion == "none" else result.fused[fusion])
    for j in range(3):
        image = _read(tmp_path / "out" / "rose" / f"rose_{j:05d}.png")
        assert (image.int() - expected[j].int()).abs().max() <= 1


def _read(path):
    return load_image(path, RESOLUTION)


@pytest.mark.parametrize("method", ["sage", "age", "inversion"])
def test_the_batch_does_not_show(pipeline, tiny_shots, tmp_path, method):
    for batch in (1, 5, 64):
        config = GenerateConfig(n=12, method=method, fusion="frequency", batch=batch)
        generate(pipeline, tiny_shots, tmp_path / str(batch), config)
    first = pictures(tmp_path / "1")
    assert most_apart(first, pictures(tmp_path / "5")) <= 1
    assert most_apart(first, pictures(tmp_path / "64")) <= 1


def test_other_categories_do_not_change_a_categorys_images(pipeline, shots, tmp_path):
    generate(pipeline, shots, tmp_path / "both", GenerateConfig(n=4))
    shutil.rmtree(shots / "lily")
    generate(pipeline, shots, tmp_path / "one", GenerateConfig(n=4))
    one, both = pictures(tmp_path / "one"), pictures(tmp_path / "both")
    assert len(one) == 4 and most_apart(one, {name: both[name] for name in one}) == 0


def test_a_flat_folder_is_one_category_by_its_name(pipeline, shots, tmp_path):
    generate(pipeline, shots / "rose", tmp_path / "flat", GenerateConfig(n=4))
    shutil.rmtree(shots / "lily")
    generate(pipeline, shots, tmp_path / "tree", GenerateConfig(n=4))
    assert most_apart(pictures(tmp_path / "flat"), pictures(tmp_path / "tree")) == 0


def test_the_sheet_shows_the_shots_before_the_generated_images(pipeline, tiny_shots, tmp_path):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=30))
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    scale = 64 // RESOLUTION
    wanted = [_read(tiny_shots / "lily" / "0.png"), _read(tmp_path / "out" / "lily" / "lily_00000.png")]
    wanted += [_read(tiny_shots / "rose" / "1.png"), _read(tmp_path / "out" / "rose" / "rose_00023.png")]
    cells = [np.kron(image.permute(1, 2, 0).numpy(), np.ones((scale, scale, 1), np.uint8)) for image in wanted]
    rows = [_row_of(sheet, cell) for cell in cells]
    assert rows == sorted(rows) and -1 not in rows and len(set(rows)) == 4
    left_out = _read(tmp_path / "out" / "rose" / "rose_00029.png").permute(1, 2, 0).numpy()
    assert _row_of(sheet, np.kron(left_out, np.ones((scale, scale, 1), np.uint8))) == -1


def _row_of(sheet, cell):
    """Top row of ``cell`` in the sheet, -1 when it is not there."""
    height, width = cell.shape[:2]
    corners = np.argwhere((sheet[: -height + 1, : -width + 1] == cell[0, 0]).all(2))
    return next((int(y) for y, x in corners if (sheet[y : y + height, x : x + width] == cell).all()), -1)


def test_n_shots_takes_that_many_images_of_each_category(pipeline, tiny_shots, tmp_path):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=1, n_shots=2, seed=1))
    parts = json.loads((tmp_path / "out" / "config.json").read_text())["plan"]
    assert {part["category"]: len(part["shots"]) for part in parts} == {"lily": 2, "rose": 2}
    assert set(parts[0]["shots"]) < {"lily/0.png", "lily/1.png", "lily/2.png"}


def test_progress_counts_to_the_end(pipeline, tiny_shots, tmp_path):
    seen = []
    generate(
        pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=5, batch=2, workers=1), lambda *done: seen.append(done)
    )
    assert seen == [(2, 10), (4, 10), (6, 10), (8, 10), (10, 10)]


# --- interruption ---


def full_after(monkeypatch, budget):
    """From now on the disk takes ``budget`` more bytes."""
    real_write, left = os.write, [budget]

    def write(descriptor, data):
        size = len(data)
        if size > left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= size
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("budget", [0, 200, 1000, 2500, 4000, 6000])
def test_a_full_disk_leaves_no_truncated_file_and_the_run_goes_on(pipeline, tiny_shots, tmp_path, monkeypatch, budget):
    config = GenerateConfig(n=8, batch=3)
    generate(pipeline, tiny_shots, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        full_after(patch, budget)
        with pytest.raises(InputError, match="No space left") as error:
            generate(pipeline, tiny_shots, tmp_path / "out", config)
    assert one_sentence(error)
    out, whole = tmp_path / "out", pictures(tmp_path / "whole")
    partial = pictures(out)  # decodes every image
    assert len(partial) < 16 and not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    assert most_apart(partial, {name: whole[name] for name in partial}) == 0 if partial else True
    if (out / "manifest.jsonl").exists():
        assert (out / "manifest.jsonl").read_bytes()[-1:] in (b"", b"\n")
        assert {line["file"] for line in read_manifest(out / "manifest.jsonl")} <= partial.keys()
    resume = bool([p for p in out.iterdir() if not p.name.startswith(".")])
    generate(pipeline, tiny_shots, out, GenerateConfig(n=8, batch=3, resume=resume))
    assert most_apart(pictures(out), whole) <= 1
    files = [line["file"] for line in read_manifest(out / "manifest.jsonl")]
    assert sorted(files) == sorted(whole) and (out / "contact_sheet.png").exists()


def test_resume_draws_what_is_missing_and_touches_nothing_else(pipeline, tiny_shots, tmp_path):
    out = tmp_path / "out"
    generate(pipeline, tiny_shots, out, GenerateConfig(n=6, shard=2))
    before, times = pictures(out), {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    lost = [out / "lily" / "lily_00002.png", out / "rose" / "rose_00000.png"]
    lost[0].unlink()
    lost[1].write_bytes(b"")
    summary = generate(pipeline, tiny_shots, out, GenerateConfig(n=6, shard=2, resume=True))
    assert (summary.n_new, summary.n_kept) == (4, 8)  # a shard is drawn as a whole
    assert most_apart(pictures(out), before) == 0
    again = [*lost, out / "lily" / "lily_00003.png", out / "rose" / "rose_00001.png"]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path not in again)
    assert summary.n_new and (out / "manifest.jsonl").exists() and not (out / ".sage_fast").exists()


def test_a_run_can_ask_for_more_images_and_categories(pipeline, tiny_shots, tmp_path):
    out, config = tmp_path / "out", GenerateConfig(n=6, shard=4)
    generate(pipeline, tiny_shots, out, replace(config, categories=("lily",)))
    (out / "lily" / "lily_00005.png").unlink()
    summary = generate(pipeline, tiny_shots, out, replace(config, n=9, resume=True))
    assert (summary.n_new, summary.n_kept) == (14, 4)  # the first shard is the same in both plans
    generate(pipeline, tiny_shots, tmp_path / "whole", replace(config, n=9))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("format", ["folder", "webdataset", "safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_new_category_that_sorts_first_moves_the_labels_of_the_others(
    pipeline, tiny_shots, tmp_path, monkeypatch, format, whole
):
    config, plans = GenerateConfig(n=6, shard=4, format=format), {"old": ["lily", "rose"]}
    plans["new"] = [*plans["old"], "aster"]
    for name, words in plans.items():
        lines = [{"category": word, "shots": "rose"} for word in words]
        (tmp_path / f"{name}.json").write_text(json.dumps({"categories": lines}))
    with monkeypatch.context() as patch:
        if not whole:
            patch.setenv("RANK", "0")
            patch.setenv("WORLD_SIZE", "2")
        generate(pipeline, tiny_shots, tmp_path / "out", config, plan=tmp_path / "old.json")
    resumed = replace(config, resume=True)
    summary = generate(pipeline, tiny_shots, tmp_path / "out", resumed, plan=tmp_path / "new.json")
    generate(pipeline, tiny_shots, tmp_path / "whole", config, plan=tmp_path / "new.json")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and verify(tmp_path / "out").problems == []
    if format == "folder":  # whose files hold no labels
        assert summary.n_kept == (12 if whole else 8)


def test_images_without_a_manifest_line_are_drawn_again(pipeline, tiny_shots, tmp_path):
    out = tmp_path / "out"
    generate(pipeline, tiny_shots, out, GenerateConfig(n=3, shard=2))
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (out / "manifest.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while writing the line
    assert generate(pipeline, tiny_shots, out, GenerateConfig(n=3, shard=2, resume=True)).n_new == 2
    assert (out / "manifest.jsonl").read_bytes().splitlines(keepends=True) == lines


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"alpha": 2.0},
        {"method": "age"},
        {"fusion": "both"},
        {"n_similar": 2},
        {"n": 2},
        {"batch": 3},
        {"shard": 5},
        {"image": "jpg"},
    ],
)
def test_resuming_with_other_settings_is_refused(pipeline, tiny_shots, tmp_path, change):
    out = tmp_path / "out"
    generate(pipeline, tiny_shots, out, GenerateConfig(n=3))
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    with pytest.raises(InputError, match=next(iter(change))) as error:
        generate(pipeline, tiny_shots, out, GenerateConfig(**{"n": 3, "resume": True, **change}))
    assert one_sentence(error)
    assert {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()} == before


def test_resuming_with_other_shots_or_another_model_is_refused(pipeline, shots, tmp_path):
    out = tmp_path / "out"
    generate(pipeline, shots, out, GenerateConfig(n=2))
    other = FewShotPipeline(
        pipeline.generator, pipeline.encoder, pipeline.relevant, pipeline.irrelevant, pipeline.codes, hash="other"
    )
    with pytest.raises(InputError, match="model"):
        generate(other, shots, out, GenerateConfig(n=2, resume=True))
    save_png(shots / "rose" / "0.png", torch.full((3, 8, 8), 7, dtype=torch.uint8))
    with pytest.raises(InputError, match="shot 'rose/0.png' is another image"):
        generate(pipeline, shots, out, GenerateConfig(n=2, resume=True))


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        ("sage", ()),
        ("sage-q", ("n_similar", "n_directions")),
        ("sage-i", ("n_components",)),
        ("inversion", tuple(EDITOR)),
    ],
)
def test_the_editor_s_settings_are_recorded_as_they_were_used(pipeline, tiny_shots, tmp_path, method, idle):
    out = tmp_path / "out"
    generate(pipeline, tiny_shots, out, GenerateConfig(n=1, method=method))
    used = {name: value for name, value in EDITOR.items() if name not in idle}
    for part in json.loads((out / "config.json").read_text())["plan"]:
        assert {name: part[name] for name in EDITOR} == dict.fromkeys(idle) | used
    for line in read_manifest(out / "manifest.jsonl"):
        assert {name: line[name] for name in EDITOR if name in line} == used


@pytest.mark.parametrize(("name", "most"), [("n_components", 6), ("n_similar", 6), ("n_directions", 5)])
def test_more_than_the_model_has_is_refused(pipeline, tiny_shots, tmp_path, name, most):
    refused(tmp_path, f"{name} must be 1 to {most}", pipeline, tiny_shots, **{name: 500})


def test_overwrite_replaces_a_run(pipeline, tiny_shots, tmp_path):
    out = tmp_path / "out"
    generate(pipeline, tiny_shots, out, GenerateConfig(n=6, seed=1))
    generate(pipeline, tiny_shots, out, GenerateConfig(n=3, seed=2, overwrite=True))
    generate(pipeline, tiny_shots, tmp_path / "fresh", GenerateConfig(n=3, seed=2))
    assert most_apart(pictures(out), pictures(tmp_path / "fresh")) == 0
    assert len(read_manifest(out / "manifest.jsonl")) == 6


# --- bad input: one sentence, nothing written ---


def refused(tmp_path, words, *arguments, **settings):
    """``generate`` raises one sentence with ``words`` in it, and the output folder is not made."""
    with pytest.raises(InputError, match=words) as error:
        generate(*arguments, tmp_path / "out", GenerateConfig(**{"n": 2, **settings}))
    assert one_sentence(error)
    assert not (tmp_path / "out").exists()


def test_fewer_images_than_shots(pipeline, tiny_shots, tmp_path):
    refused(tmp_path, r"'rose' has fewer images \(2\) than shots \(3\)", pipeline, tiny_shots, n_shots=3)


def test_a_folder_without_images_or_no_folder(pipeline, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "no images", pipeline, tmp_path / "empty")
    refused(tmp_path, "does not exist", pipeline, tmp_path / "nowhere")


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_an_unreadable_shot_is_named(pipeline, shots, tmp_path, data):
    (shots / "rose" / "1.png").write_bytes(data)
    refused(tmp_path, "rose/1.png", pipeline, shots)


def test_shots_of_any_kind_and_size_are_read(pipeline, shots, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 20, 4), dtype=np.uint8)
    for number, mode in enumerate(("L", "RGB", "RGBA", "CMYK", "P", "1")):
        Image.fromarray(pixels).convert("RGB").convert(mode).save(shots / "rose" / f"m{number}.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipeline, shots, tmp_path / "out", GenerateConfig(n=9))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["plan"][1]["shots"]) == 8


def test_a_missing_or_damaged_model(tiny_bundle, tiny_shots, tmp_path):
    refused(tmp_path, "does not exist", tmp_path / "nowhere", tiny_shots)
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "model"))
    (broken / "encoder.safetensors").write_bytes(b"")
    refused(tmp_path, "encoder.safetensors", broken, tiny_shots)


def test_n_components_above_what_the_model_allows(pipeline, tiny_shots, tmp_path):
    refused(tmp_path, "n_components must be 1 to 6", pipeline, tiny_shots, n_components=7)


def test_an_output_folder_that_is_not_empty(pipeline, tiny_shots, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for settings, words in (
        ({}, "--resume"),
        ({"resume": True}, "nothing to resume"),
        ({"overwrite": True}, "is deleted"),
    ):
        with pytest.raises(InputError, match=words) as error:
            generate(pipeline, tiny_shots, out, GenerateConfig(n=2, **settings))
        assert one_sentence(error)
        assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_resuming_a_folder_of_another_program_part_is_refused(pipeline, tiny_shots, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text('{"made": "elsewhere"}\n')
    with pytest.raises(InputError, match="no run of generate"):
        generate(pipeline, tiny_shots, out, GenerateConfig(n=2, resume=True))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.jsonl"]


def test_output_and_shots_or_model_must_lie_apart(tiny_bundle, pipeline, shots, tmp_path):
    for out in (shots, shots / "out", shots.parent, shots / "rose"):
        for flag in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(InputError, match="overlap"):
                generate(pipeline, shots, out, GenerateConfig(n=2, **flag))
    model = Path(shutil.copytree(tiny_bundle, tmp_path / "run" / "model"))
    (tmp_path / "run" / MARKER).write_text("{}")
    for out in (model, tmp_path / "run"):
        with pytest.raises(InputError, match="holds the model"):
            generate(model, shots, out, GenerateConfig(n=2, overwrite=True))
    assert len(list(model.iterdir())) == len(list(tiny_bundle.iterdir()))
    assert len(list(shots.rglob("*.png"))) == 5


def test_a_url_of_a_folder_here_is_that_folder(tiny_bundle, shots, tmp_path):
    pytest.importorskip("fsspec")
    model = Path(shutil.copytree(tiny_bundle, tmp_path / "model"))
    (model / MARKER).write_text("{}")
    for out, words in ((shots / "out", "overlap"), (model, "holds the model")):
        with pytest.raises(InputError, match=words):
            generate(model, shots, f"file://{out}", GenerateConfig(n=2, overwrite=True))
    assert {path.name for path in model.iterdir()} == {MARKER, *(path.name for path in tiny_bundle.iterdir())}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n must be"),
        ({"batch": 0}, "batch must be"),
        ({"n_shots": 0}, "n_shots must be"),
        ({"n_components": 0}, "n_components must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"method": "magic"}, "method must be one of"),
        ({"fusion": "magic"}, "fusion must be one of"),
        ({"preset": "magic"}, "preset must be one of"),
        ({"method": "inversion", "alpha": 2.0}, "method 'inversion' makes no use of alpha"),
        ({"method": "age", "n_components": 3, "n_similar": 3}, "makes no use of n_components and n_similar"),
        ({"method": "sage-i", "n_components": 3}, "makes no use of n_components"),
        ({"method": "sage-q", "n_similar": 3}, "makes no use of n_similar"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"n": -1}, "n must be at least 1, got -1"),
        ({"shard": 0}, "shard must be"),
        ({"workers": 0}, "workers must be"),
        ({"format": "zip"}, "format must be one of folder, webdataset, safetensors, got 'zip'"),
        ({"image": "gif"}, "image must be one of png, jpg, webp, got 'gif'"),
        ({"encoder": "magick"}, "encoder must be one of auto, pillow"),
        ({"encoder": "simplejpeg"}, "'simplejpeg' writes jpg alone"),
        ({"quality": 10}, "quality of png must be 0 to 9, got 10"),
        ({"image": "jpg", "quality": 0}, "quality of jpg must be 1 to 100, got 0"),
        ({"format": "safetensors", "image": "jpg"}, "stores plain arrays"),
        ({"shard_mb": 3.0}, "goes with format 'webdataset'"),
        ({"format": "webdataset", "shard_mb": 3.0, "shard": 4}, "without shard"),
        ({"format": "webdataset", "shard_mb": 0.0}, "shard_mb must be above 0"),
    ],
)
def test_settings_that_cannot_be_used(settings, words):
    with pytest.raises(InputError, match=words) as error:
        GenerateConfig(**settings)
    assert one_sentence(error)


def test_a_preset_that_contradicts_the_pipelines(pipeline, tiny_shots, tmp_path):
    refused(tmp_path, "preset", pipeline, tiny_shots, preset="paper")


# --- larger than memory, disks that fail ---


def test_ten_million_images_start_at_once(pipeline, tiny_shots, tmp_path):
    class Enough(Exception):
        pass

    def stop(done, total):
        assert total == 10**7
        raise Enough

    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Enough):
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=5 * 10**6), stop)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    with pytest.raises(Enough):
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=5 * 10**6, resume=True), stop)


FULL = r"No space left on device\); free some space, and the same command with --resume goes on\."
FORMATS = {"webdataset": {"image": "jpg"}, "safetensors": {}, "folder": {}}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("written", [0, 5, 13])
def test_a_target_that_vanishes_stops_the_run_which_goes_on_when_it_is_back(
    pipeline, tiny_shots, tmp_path, format, written
):
    config = GenerateConfig(n=10, batch=3, shard=5, workers=1, format=format, **FORMATS[format])
    generate(pipeline, tiny_shots, tmp_path / "whole", config)
    out, away = tmp_path / "out", tmp_path / "away"

    def vanish(done, total):
        if done > written and out.exists():
            out.rename(away)

    with pytest.raises(InputError, match=r"No such file.*bring it back, and the same command with --resume") as error:
        generate(pipeline, tiny_shots, out, config, vanish)
    assert one_sentence(error) and not out.exists() and "make its folder" not in str(error.value)
    away.rename(out)
    summary = generate(pipeline, tiny_shots, out, replace(config, resume=True))
    assert summary.n_new + summary.n_kept == 20 and contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("budget", [0, 300, 3000, 9000, 16000])
def test_a_full_disk_in_every_format(pipeline, tiny_shots, tmp_path, monkeypatch, format, budget):
    config = GenerateConfig(n=10, batch=3, shard=5, format=format, **FORMATS[format])
    generate(pipeline, tiny_shots, tmp_path / "whole", config)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_after(patch, budget)
        with pytest.raises(InputError, match=FULL if budget else "No space left") as error:
            generate(pipeline, tiny_shots, out, config)
    assert one_sentence(error)
    assert list(out.rglob("*.tmp")) == [] and [p for p in out.glob(".sage_fast/tmp/*")] == []
    generate(pipeline, tiny_shots, out, replace(config, resume=True))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
def test_what_the_system_refuses_to_write_is_named(pipeline, tiny_shots, tmp_path, format):
    """A limit on the size of files stands for a disk that is full: it meets every way of writing."""
    config = GenerateConfig(n=60, batch=16, shard=120, format=format, **FORMATS[format])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            InputError,
            match=r"^File '.*/out/.*' cannot be written \(File too large\); choose another place, or mend this one, and",
        ) as error:
            generate(pipeline, tiny_shots, tmp_path / "out", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_sentence(error)
    assert list((tmp_path / "out").glob(".sage_fast/tmp/*")) == []
    summary = generate(pipeline, tiny_shots, tmp_path / "out", replace(config, resume=True))
    assert summary.n_new == 120 and summary.missing == 0


def test_the_folder_of_the_metrics_must_be_there(pipeline, tiny_shots, tmp_path):
    refused(tmp_path, "metrics must be a file in a folder", pipeline, tiny_shots, metrics=str(tmp_path / "no" / "x"))


def test_a_target_that_cannot_be_written(pipeline, tiny_shots, tmp_path, monkeypatch):
    real_open = os.open

    def read_only(path, flags, *rest, **named):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(InputError, match="Read-only file system") as error:
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=2))
    assert one_sentence(error)


def test_a_file_of_the_same_name_stands_in_the_way(pipeline, tiny_shots, tmp_path):
    (tmp_path / "out").write_bytes(b"")
    refused_as(InputError, "is a file; give a folder", pipeline, tiny_shots, tmp_path / "out")


def refused_as(kind, words, *arguments):
    with pytest.raises(kind, match=words) as error:
        generate(*arguments, GenerateConfig(n=2))
    assert one_sentence(error)


@pytest.mark.parametrize("name", ["x" * 240, "a\\b"])
def test_categories_that_cannot_be_folders(pipeline, shots, tmp_path, name):
    (shots / "rose").rename(shots / name)
    refused(tmp_path, "Category name", pipeline, shots)


@pytest.mark.parametrize("name", ["Rose", "rose ", "ro\u200bse"])
def test_categories_that_are_one_folder_somewhere(pipeline, shots, tmp_path, name):
    shutil.copytree(shots / "rose", shots / name)
    first, second = sorted([name, "rose"])
    refused(tmp_path, re.escape(f"{first!r} and {second!r} are one folder"), pipeline, shots)


@pytest.mark.parametrize("name", ["薔薇", "St. John's wort", "rose\udcff", 'a "b" | c', "x" * 230])
def test_categories_of_any_name(pipeline, shots, tmp_path, name):
    (shots / "rose").rename(shots / name)
    for format in ("folder", "webdataset"):
        generate(pipeline, shots, tmp_path / format, GenerateConfig(n=2, format=format))
        assert verify(tmp_path / format).problems == []
        assert read_manifest(tmp_path / format / "manifest.jsonl")[-1]["category"] in (name, "lily")
    assert (tmp_path / "folder" / name / f"{name}_00001.png").exists()


def test_an_error_in_the_middle_leaves_what_was_committed(pipeline, tiny_shots, tmp_path, monkeypatch):
    """An exception of the networks comes out as it is, and the shards before it count."""
    config = GenerateConfig(n=10, batch=5, shard=5, workers=1)
    from sage_fast.generation import writing

    draw = writing.draw_images

    def fail_late(pipeline, latents):
        if latents.positions.start >= 15:
            raise RuntimeError("out of memory")
        return draw(pipeline, latents)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "draw_images", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(pipeline, tiny_shots, tmp_path / "out", config)
    summary = generate(pipeline, tiny_shots, tmp_path / "out", replace(config, resume=True))
    assert 5 <= summary.n_kept <= 15
    generate(pipeline, tiny_shots, tmp_path / "whole", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- the end of a run, broken off; clocks ---


class BrokenOff(Exception):
    pass


def break_off(*_):
    raise BrokenOff


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "step", ["run.data_card", "run.draw_sheet", "run.write_manifest", "committing.write_sums", "run.write_parquet", "run.write_sums"]
)  # fmt: skip
def test_a_run_broken_off_at_its_end_leaves_the_same_files(pipeline, tiny_shots, tmp_path, monkeypatch, format, step):
    with_parquet = step in ("run.write_parquet", "run.write_sums")
    if with_parquet:
        pytest.importorskip("pyarrow")
    config = GenerateConfig(n=4, shard=3, format=format, parquet=with_parquet, **FORMATS[format])
    generate(pipeline, tiny_shots, tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(BrokenOff):
        patch.setattr(f"sage_fast.generation.{step}", break_off)
        generate(pipeline, tiny_shots, tmp_path / "out", config)
    generate(pipeline, tiny_shots, tmp_path / "out", replace(config, resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("format", FORMATS)
def test_clocks_that_jump_do_not_matter(pipeline, tiny_shots, tmp_path, monkeypatch, capsys, format):
    """By days and years, forwards and backwards, during a run and between it and its continuation."""
    config = GenerateConfig(
        n=12, batch=2, shard=4, workers=1, format=format, metrics=str(tmp_path / "m.jsonl"), **FORMATS[format]
    )
    generate(pipeline, tiny_shots, tmp_path / "whole", config)
    day, now, seen, out = 86_400, time.time, [], tmp_path / "out"
    jumps = itertools.cycle([0, 3 * day, -2 * day, 4_000 * day, -9_000 * day])
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (now() + next(jumps))))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal

    def run(config, last):
        meter = Meter()
        with watched("generating", meter) as bar:

            def progress(done, total):
                seen.append((done, total, meter.seconds, meter.speed, *meter.busy.values()))
                bar(done, total)
                if done >= last:
                    break_off()

            return generate(pipeline, tiny_shots, out, config, progress, meter)

    with pytest.raises(BrokenOff):
        run(config, 14)
    for path in [out, *out.rglob("*"), *out.glob(".sage_fast*")]:
        os.utime(path, (now() + 10_000 * day,) * 2)
    summary = run(replace(config, resume=True), 99)
    assert summary.n_new + summary.n_kept == 24 and summary.n_kept >= 4
    assert contents(out) == contents(tmp_path / "whole") and verify(out).problems == []
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert min(min(line) for line in seen) >= 0 and max(line[2] for line in seen) < day
    assert all(0 <= line["seconds"] < day and line["images_per_s"] >= 0 for line in lines)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "generating" in shown and re.search(r"-\d|\d days?", shown) is None


def test_an_alpha_that_no_image_survives_is_refused():
    for alpha in (1e38, -1e5, float("nan")):
        with pytest.raises(InputError, match="alpha must be a finite number of at most 10,000, got"):
            GenerateConfig(alpha=alpha)
    assert GenerateConfig(alpha=-1e4).alpha == -1e4


def test_names_that_are_no_text_do_not_go_into_parquet(pipeline, tiny_shots, tmp_path):
    pytest.importorskip("pyarrow")
    shots = os.fsencode(tmp_path) + b"/novel/\xff\xfe"
    try:
        shutil.copytree(tiny_shots / "rose", os.fsdecode(shots))
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(InputError, match="parquet holds text alone, and the name .* is none"):
        generate(pipeline, tmp_path / "novel", tmp_path / "out", GenerateConfig(n=1, parquet=True))
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_that_was_asked_for_once_is_kept(pipeline, tiny_shots, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    out, config = tmp_path / "out", GenerateConfig(n=2, shard=2, parquet=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "write_manifest", mock.Mock(side_effect=KeyboardInterrupt))
        generate(pipeline, tiny_shots, out, config)
    again = replace(config, parquet=False, resume=True)
    generate(pipeline, tiny_shots, out, again)
    assert (out / "manifest.parquet").exists() and verify(out).problems == []
    generate(pipeline, tiny_shots, out, replace(again, n=5))
    assert (out / "manifest.parquet").exists() and verify(out).problems == [] and not (out / ".sage_fast").exists()
    (out / "manifest.parquet").unlink()
    generate(pipeline, tiny_shots, out, replace(again, n=5))
    assert (out / "manifest.parquet").exists() and verify(out).problems == []
    (out / "rose" / "rose_00001.png").write_bytes(b"")
    assert verify(out, repair=True).problems != [] and not (out / "manifest.parquet").exists()
    generate(pipeline, tiny_shots, out, replace(again, n=5))
    assert (out / "manifest.parquet").exists() and verify(out).problems == []
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="has a manifest.parquet, and that needs pyarrow; .* or take another output"):
        generate(pipeline, tiny_shots, out, replace(again, n=6))
    assert verify(out).problems == []


def test_a_refused_run_asks_for_no_parquet_file(pipeline, tiny_shots, tmp_path):
    pytest.importorskip("pyarrow")
    out, config = tmp_path / "out", GenerateConfig(n=2)
    generate(pipeline, tiny_shots, out, config)
    with pytest.raises(InputError, match="seed of '.*' was 0, is 1"):
        generate(pipeline, tiny_shots, out, replace(config, seed=1, resume=True, parquet=True))
    generate(pipeline, tiny_shots, out, replace(config, n=3, resume=True))
    assert not (out / "manifest.parquet").exists()
