"""Whether damage of any kind is found, named and mended."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec

import pytest
from tiny_model import RESOLUTION

from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, generate
from sage_fast.generation.verifying import verify
from sage_fast.pipeline import FewShotPipeline

WHOLE = "10 images of 2 categories: all there, whole and as recorded."


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="module", params=["folder", "webdataset", "safetensors"])
def whole(request, pipeline, tiny_shots, tmp_path_factory):
    """An output of ten images in shards of four, to be copied, and its config."""
    config = GenerateConfig(n=5, shard=4, batch=4, format=request.param, parquet=find_spec("pyarrow") is not None)
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


def drop_first_line(out):
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (out / "manifest.jsonl").write_bytes(b"".join(lines[1:]))


def repeat_last_line(out):
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (out / "manifest.jsonl").write_bytes(b"".join([*lines, lines[-1]]))


def set_in_line(out, **values):
    """Another value in the second line of the manifest."""
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = json.dumps(json.loads(lines[1]) | values).encode() + b"\n"
    (out / "manifest.jsonl").write_bytes(b"".join(lines))


def set_in_config(out, **values):
    settings = json.loads((out / "config.json").read_text()) | values
    (out / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def forget_sums(out):
    """The output as it was before digests were recorded."""
    (out / "SHA256SUMS").unlink()
    settings = json.loads((out / "config.json").read_text())
    del settings["checksums"]
    (out / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


DAMAGES = {
    "a file is gone": lambda out, config: first_file(out, config).unlink(),
    "a file is empty": lambda out, config: first_file(out, config).write_bytes(b""),
    "a file is cut": lambda out, config: first_file(out, config).write_bytes(
        first_file(out, config).read_bytes()[:-1100]
    ),
    "a file is longer": lambda out, config: first_file(out, config).write_bytes(
        first_file(out, config).read_bytes() + b"\0"
    ),
    "a byte is another": lambda out, config: spoil_byte(
        first_file(out, config), 150 if config.format == "folder" else 700
    ),
    "a line is gone": lambda out, config: drop_line(out),
    "the first line is gone": lambda out, config: drop_first_line(out),
    "a line is there twice": lambda out, config: repeat_last_line(out),
    "lines are exchanged": lambda out, config: swap_lines(out),
    "a line is no JSON": lambda out, config: spoil_byte(out / "manifest.jsonl", 0),
    "the seed is another": lambda out, config: set_in_line(out, seed=7),
    "the version is another": lambda out, config: set_in_line(out, version="0"),
    "the config has another preset": lambda out, config: set_in_config(out, preset="paper"),
    "the config is no JSON": lambda out, config: spoil_byte(out / "config.json", 0),
} | {
    f"{name} is {what}": lambda out, config, name=name, act=act: act(out / name)
    for name in ("config.json", "README.md", "contact_sheet.png", "SHA256SUMS")
    for what, act in (
        ("gone", lambda path: path.unlink()),
        ("empty", lambda path: path.write_bytes(b"")),
        ("longer", lambda path: path.write_bytes(path.read_bytes() + b"\n")),
    )
}  # fmt: skip


def resume(pipeline, shots, out, config):
    generate(pipeline, shots, out, replace(config, resume=True))


@pytest.fixture
def out(whole, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(whole[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_mended(whole, out, pipeline, tiny_shots, damage):
    original, config = whole
    assert str(verify(out)) == WHOLE
    DAMAGES[damage](out, config)
    mended(original, config, out, pipeline, tiny_shots)


def mended(original, config, out, pipeline, shots):
    """The damage is found, and what 'verify --repair' and 'generate --resume' make is the output as it was."""
    found = verify(out, repair=True)
    assert found.problems and (found.damaged or found.files) and "\n" not in str(found)
    assert "not written" in str(verify(out)) if found.damaged else verify(out).problems
    resume(pipeline, shots, out, config)
    assert contents(out) == contents(original) and str(verify(out)) == WHOLE


KINDS = [
    "an image",
    "manifest.jsonl",
    "manifest.parquet",
    "config.json",
    "README.md",
    "contact_sheet.png",
    "SHA256SUMS",
]


@pytest.mark.parametrize("kind", KINDS)
def test_any_bit_that_is_another_is_found(whole, out, pipeline, tiny_shots, kind):
    original, config = whole
    path, rng = first_file(out, config) if kind == "an image" else out / kind, random.Random(0)
    if kind == "manifest.parquet":
        pytest.importorskip("pyarrow")
    data = path.read_bytes()
    for _ in range(24):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        found = verify(out)
        assert found.problems and (found.damaged or found.files), (at, bit)
    mended(original, config, out, pipeline, tiny_shots)


@pytest.mark.parametrize("name", ["config.json", "README.md", "contact_sheet.png", "SHA256SUMS", "manifest.parquet"])
def test_a_resumed_run_puts_back_what_is_gone(whole, out, pipeline, tiny_shots, name):
    original, config = whole
    if name == "manifest.parquet":
        pytest.importorskip("pyarrow")
    (out / name).unlink()
    found = verify(out)
    assert f"'{name}' is gone" in str(found) and found.files == [name] and not found.damaged
    resume(pipeline, tiny_shots, out, config)
    assert contents(out) == contents(original)


def test_a_resumed_run_keeps_no_line_of_another_image(whole, out, pipeline, tiny_shots):
    """Without 'verify --repair' too, where the number of lines tells that some are gone."""
    original, config = whole
    drop_first_line(out)
    resume(pipeline, tiny_shots, out, config)
    assert contents(out) == contents(original)


def test_a_lost_config_is_not_replaced_by_that_of_another_run(whole, out, pipeline, tiny_shots):
    _, config = whole
    set_in_config(out, preset="paper")
    before = contents(out)
    with pytest.raises(
        InputError, match="config.json in .* is not the file that was recorded, and this command"
    ) as error:
        resume(pipeline, tiny_shots, out, replace(config, seed=1))
    assert contents(out) == before and "\n" not in str(error.value)
    assert "with the settings, model and version of the first run" in verify(out).remedy()


def test_the_checksums_are_those_of_the_system(whole):
    """A line as ``sha256sum`` has it; where that is installed, by itself too."""
    out, n = whole[0], 4 + whole[1].parquet
    lines = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines() if not line.startswith("#")]
    assert [digest for digest, _ in lines] == [sha256((out / name).read_bytes()).hexdigest() for _, name in lines]
    assert len(lines) == n
    if shutil.which("sha256sum") is not None:
        words = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        said = subprocess.run(words, cwd=out, capture_output=True, text=True)
        assert said.returncode == 0 and said.stdout.count(": OK") == n, said.stderr


# --- outputs without checksums, as earlier versions made them, and such that are not complete ---


def test_an_output_without_checksums_is_verified_and_gets_them(whole, out, pipeline, tiny_shots):
    original, config = whole
    forget_sums(out)
    found = verify(out)
    assert found.problems == []
    assert f"{WHOLE} Digests of config.json, README.md, contact_sheet.png and manifest.jsonl were not recorded" in str(
        found
    )
    (out / "README.md").unlink()
    assert "'README.md' is gone" in str(verify(out))
    resume(pipeline, tiny_shots, out, config)
    assert (out / "SHA256SUMS").exists() and str(verify(out)) == WHOLE
    changed = {"config.json", "SHA256SUMS"}
    assert {k: v for k, v in contents(out).items() if k not in changed} == {
        k: v for k, v in contents(original).items() if k not in changed
    }


OTHER = {
    "category": "rose", "index": 3, "file": "x.png", "bytes": 1, "sha256": "0" * 64, "source": "lily/2.png", "shots": [],
    "seed": 7, "method": "age", "alpha": 1.25, "fusion": "both", "preset": "paper", "similar": ["a"], "model": "m",
    "version": "9", "n_similar": 3, "other": None,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_what_a_line_says_is_compared_with_the_plan(whole, out, key):
    forget_sums(out)
    (out / "manifest.parquet").unlink(missing_ok=True)
    set_in_line(out, **{key: OTHER[key]})
    (problem,) = verify(out).problems
    assert key in ("bytes", "sha256", "similar", "version") or f"Line 1 of the manifest has {key} " in problem


def test_spaces_of_a_line_are_compared_too(whole, out):
    forget_sums(out)
    text = (out / "manifest.jsonl").read_text()
    (out / "manifest.jsonl").write_text(text.replace('"seed": 0', '"seed":  0', 1))
    assert "Line 0 of the manifest is not written as generate writes it" in str(verify(out))


def test_parquet_that_was_not_recorded_is_compared_with_the_manifest(out, whole):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    forget_sums(out)
    assert verify(out).problems == []
    table = pq.read_table(out / "manifest.parquet")
    seeds = pa.array([7, *table["seed"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("seed"), "seed", seeds), out / "manifest.parquet")
    assert verify(out).files == ["manifest.parquet"]
    pq.write_table(table.slice(0, 9), out / "manifest.parquet")
    assert verify(out).files == ["manifest.parquet"]
    (out / "manifest.parquet").write_bytes(b"x")
    assert verify(out).files == ["manifest.parquet"]


def test_lines_of_an_output_that_is_not_complete_are_compared(whole, out):
    _, config = whole
    if config.format == "safetensors":
        return  # pixels are in one file, so nothing of a complete one is kept
    first_file(out, config).unlink()
    assert verify(out, repair=True).damaged == [0] and verify(out).damaged == []
    part = out / ".sage_fast" / "parts" / "00000001.jsonl"
    part.write_bytes(part.read_bytes().replace(b'"seed": 0', b'"seed": 7', 1))
    assert "Line 4 of the manifest has seed 7, and by the plan it is 0." in verify(out).problems


# --- arrays ---


def set_labels(out):
    """All labels 2."""
    data = bytearray((out / "images.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 80] = (2).to_bytes(8, "little") * 10
    (out / "images.safetensors").write_bytes(data)


ARRAY_DAMAGES = {
    "labels are others": set_labels,
    "an index is another": lambda out: spoil_byte(out / "images.safetensors", -10 * (8 + 3 * RESOLUTION**2)),
    "the header is no JSON": lambda out: spoil_byte(out / "images.safetensors", 8),
    "the header has another length": lambda out: spoil_byte(out / "images.safetensors", 0),
    "the header names another category": lambda out: (out / "images.safetensors").write_bytes(
        (out / "images.safetensors").read_bytes().replace(b"lily", b"lilo")
    ),
}


@pytest.mark.parametrize("damage", ARRAY_DAMAGES)
def test_damage_beside_the_pixels_of_arrays(pipeline, tiny_shots, tmp_path, damage):
    config = GenerateConfig(n=5, shard=4, batch=4, format="safetensors")
    generate(pipeline, tiny_shots, tmp_path / "whole", config)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    ARRAY_DAMAGES[damage](tmp_path / "out")
    assert "'images.safetensors' is not the file that was recorded." in verify(tmp_path / "out").problems
    mended(tmp_path / "whole", config, tmp_path / "out", pipeline, tiny_shots)


def test_files_that_do_not_belong_are_named(whole, tmp_path):
    original, config = whole
    out = tmp_path / "out"
    shutil.copytree(original, out)
    strays = ["notes.txt", "shard-000009.tar"]
    if config.format == "folder":
        strays += ["lily/lily_00005.png", "lily/lily_000001.png", "lily/x.png"]
    for name in strays:
        (out / name).write_bytes(b"x")
    for name in (
        ".DS_Store",
        "Thumbs.db",
        *(["lily/.DS_Store", "lily/desktop.ini"] if config.format == "folder" else []),
    ):
        (out / name).write_bytes(b"of a desktop, which nobody minds")
    found = verify(out)
    assert sorted(found.problems) == sorted(f"{name!r} does not belong to the plan." for name in strays)
    assert found.remedy() == "Move away what does not belong."
    spoil_byte(first_file(out, config), -20 if config.format == "folder" else -900)
    assert verify(out).remedy().startswith("Move away what does not belong. 'verify --repair', then")


def test_a_folder_in_the_place_of_a_file_counts_as_gone(whole, out, pipeline, tiny_shots):
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    assert verify(out).problems == ["'README.md' is gone."]
    (out / "README.md").rmdir()
    resume(pipeline, tiny_shots, out, whole[1])
    assert not verify(out).problems


def test_a_tar_that_was_cut_off_is_named_as_such(pipeline, tiny_shots, tmp_path):
    generate(pipeline, tiny_shots, tmp_path, GenerateConfig(n=5, format="webdataset", shard=5))
    with open(tmp_path / "shard-000001.tar", "r+b") as file:
        file.truncate(2000)
    assert "Shard 1 is cut off or damaged: " in str(verify(tmp_path))


def test_what_is_no_output_of_generate(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run of generate"):
        verify(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"space": "w"}')
    with pytest.raises(InputError, match="no run of generate"):
        verify(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="damaged"):
        verify(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        verify(tmp_path / "empty")
