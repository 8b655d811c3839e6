"""What bad input gets, end to end: one sentence that names it, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sage_fast import cli
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import read_manifest
from sage_fast.training import stages

TINY_TRAIN = [
    "--gan.style-dim=8", "--gan.n-mapping=2", "--gan.channel-base=64", "--gan.channel-max=8", "--gan.total-kimg=0.016",
    "--gan.batch=4", "--encoder.total-steps=4", "--encoder.batch=4", "--encoder.channel-base=64",
    "--encoder.channel-max=16", "--encoder.head-width=4", "--dictionary.total-steps=4", "--dictionary.n-directions=6",
]  # fmt: skip


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; returns the sentence, which must name every word of ``named``."""

    def run(argv: list[object], *named: str) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in argv]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("sage-fast: warning")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("sage-fast: ") and lines[0].endswith(".") and "Traceback" not in lines[0]
        for word in named:
            assert word in lines[0], f"{word!r} is not in: {lines[0]}"
        return lines[0]

    return run


def noise(side: int = 8, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)


def seen_folder(folder: Path, n_categories: int = 2, n: int = 10) -> Path:
    for category in range(n_categories):
        (folder / f"category_{category}").mkdir(parents=True)
        for number in range(n):
            pixels = noise(8, 100 * category + number)
            Image.fromarray(pixels).save(folder / f"category_{category}" / f"{number}.png")
    return folder


def train(data: Path, out: Path, *options: str) -> list[object]:
    return ["train", f"--data={data}", f"--out={out}", "--resolution=8", *TINY_TRAIN, *options]


def generate(bundle: Path, shots: Path, out: Path, *options: str) -> list[object]:
    return ["generate", f"--model={bundle}", f"--shots={shots}", f"--out={out}", "-n", "3", *options]


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_without_images(tmp_path, refused, tiny_bundle):
    (tmp_path / "empty" / "category").mkdir(parents=True)
    (tmp_path / "empty" / "category" / "notes.txt").write_text("no image")
    for argv in (
        train(tmp_path / "empty", tmp_path / "out"),
        generate(tiny_bundle, tmp_path / "empty", tmp_path / "out"),
    ):
        refused(argv, "has no images", "empty")
        assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path, refused, tiny_bundle):
    for argv in (
        train(tmp_path / "gone", tmp_path / "out"),
        generate(tiny_bundle, tmp_path / "gone", tmp_path / "out"),
    ):
        refused(argv, "gone", "does not exist")
        assert not (tmp_path / "out").exists()


def test_one_category_cannot_be_trained_on(tmp_path, refused):
    seen = seen_folder(tmp_path / "seen", 1)
    for folder in (seen, seen / "category_0"):
        refused(
            train(folder, tmp_path / "out"), "1 category (category_0), expected at least 2, since the dictionaries are"
        )
    assert not (tmp_path / "out").exists()


# --- single images ---------------------------------------------------------------------------------------------------


def write_zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def write_text(path: Path) -> None:
    path.write_text("this is no image")


def write_truncated(path: Path) -> None:
    Image.fromarray(noise(64)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def write_blank(path: Path, width: int, height: int) -> None:
    """A valid black-and-white PNG of any size in little space."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    row = b"\0" * ((width + 7) // 8 + 1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


BAD_IMAGES = {
    "zero bytes": (write_zero_bytes, "empty"),
    "text": (write_text, "not an image"),
    "truncated": (write_truncated, "truncated"),
    "20,000 pixels square": (lambda path: write_blank(path, 20_000, 20_000), "more than 89,478,485 pixels"),
    "20,000 pixels wide": (lambda path: write_blank(path, 20_000, 10), "20000 x 10 pixels"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_few_bad_images_are_listed_and_skipped(tmp_path, capsys, monkeypatch, kind):
    write, reason = BAD_IMAGES[kind]
    data = seen_folder(tmp_path / "seen", n=10)  # 1 of 21 is below 5 %
    write(data / "category_0" / "bad.png")
    given = []
    monkeypatch.setattr(stages, "gan_stage", lambda config, images, *rest: given.append(len(images)))
    assert cli.main(["train-gan", f"--data={data}", f"--out={tmp_path / 'out'}", "--resolution=8"]) == 0
    said = capsys.readouterr().err
    assert said.count("bad.png") == 1 and reason in said and said.count("\n") == 1
    assert given == [20]


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_many_bad_images_are_refused(tmp_path, refused, kind):
    write, reason = BAD_IMAGES[kind]
    data = seen_folder(tmp_path / "seen", n=9)  # 1 of 19 is above 5 %
    write(data / "category_0" / "bad.png")
    refused(train(data, tmp_path / "out"), "bad.png", reason, "5%")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_shot_is_refused(tmp_path, refused, tiny_bundle, kind):
    write, reason = BAD_IMAGES[kind]
    data = seen_folder(tmp_path / "shots", n=2)
    write(data / "category_0" / "bad.png")
    refused(generate(tiny_bundle, data, tmp_path / "out"), "bad.png", reason)
    assert not (tmp_path / "out").exists()


def rotated(path: Path) -> Image.Image:
    image = Image.fromarray(noise())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def with_alpha(path: Path) -> Image.Image:
    image = Image.fromarray(noise(channels=4))
    image.save(path)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def in_mode(mode: str):
    def write(path: Path) -> Image.Image:
        image = Image.fromarray(noise()).convert(mode)
        image.save(path)
        return Image.open(path).convert("RGB")

    return write


def grey_16_bit(path: Path) -> Image.Image:
    grey = noise(channels=1)[:, :, 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    return Image.fromarray(grey).convert("RGB")


UNUSUAL = {
    "grey.png": in_mode("L"),
    "black_and_white.png": in_mode("1"),
    "palette.png": in_mode("P"),
    "cmyk.jpg": in_mode("CMYK"),
    "rgba.png": with_alpha,
    "16_bit.png": grey_16_bit,
    "rotated.jpg": rotated,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_count_as_what_pillow_makes_of_them(tmp_path, tiny_bundle, name):
    (tmp_path / "given").mkdir()
    (tmp_path / "converted").mkdir()
    UNUSUAL[name](tmp_path / "given" / name).save(tmp_path / "converted" / "image.png")
    for folder in ("given", "converted"):
        options = [f"--out={tmp_path / 'out' / folder}", "--method=inversion", "--n=1", f"--model={tiny_bundle}"]
        assert cli.main(["generate", f"--shots={tmp_path / folder}", *options]) == 0
    images = [np.array(Image.open(next((tmp_path / "out").glob(f"{f}/*/*.png")))) for f in ("given", "converted")]
    np.testing.assert_array_equal(*images)
    assert images[0].std() > 0


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", ["24", "0", "-8", "2", "2048"])
@pytest.mark.parametrize("command", ["train", "train-gan"])
def test_a_resolution_that_is_no_power_of_two(tmp_path, refused, command, resolution):
    data = seen_folder(tmp_path / "seen", n=2)
    argv = [command, f"--data={data}", f"--out={tmp_path / 'out'}", f"--resolution={resolution}"]
    refused(argv, "power of two", resolution)
    assert not (tmp_path / "out").exists()


def test_fewer_images_than_shots(tmp_path, refused, tiny_bundle, tiny_shots):
    refused(
        generate(tiny_bundle, tiny_shots, tmp_path / "out", "--n-shots=3"), "rose", "fewer images (2) than shots (3)"
    )
    assert not (tmp_path / "out").exists()


def test_more_components_than_seen_categories(tmp_path, refused, tiny_bundle, tiny_shots):
    refused(generate(tiny_bundle, tiny_shots, tmp_path / "out", "--n-components=7"), "n_components", "6", "7")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--alpha=nan", "alpha"),
        ("--n=0", "n must be"),
        ("--method=sagu", "sagu"),
        ("--fusion=cold", "cold"),
        ("--batch=0", "batch"),
        ("--device=abacus", "abacus"),
    ],
)
def test_settings_out_of_range(tmp_path, refused, tiny_bundle, tiny_shots, option, named):
    refused(generate(tiny_bundle, tiny_shots, tmp_path / "out", option), named)
    assert not (tmp_path / "out").exists()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy of the tiny bundle that may be spoilt."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


BUNDLE_FILES = ["generator.safetensors", "encoder.safetensors", "dictionary.safetensors", "codes.safetensors"]


@pytest.mark.parametrize("name", ["bundle.json", *BUNDLE_FILES])
@pytest.mark.parametrize("spoil", ["missing", "truncated", "foreign"])
def test_a_model_with_a_spoilt_file(tmp_path, refused, bundle, tiny_shots, name, spoil):
    path = bundle / name
    if spoil == "missing":
        path.unlink()
    elif spoil == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(b'{"made": "elsewhere"}')
    refused(generate(bundle, tiny_shots, tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_or_no_folder(tmp_path, refused, tiny_shots):
    refused(generate(tmp_path / "gone", tiny_shots, tmp_path / "out"), "gone", "does not exist")
    (tmp_path / "file.pt").write_bytes(b"weights")
    refused(generate(tmp_path / "file.pt", tiny_shots, tmp_path / "out"), "file.pt", "folder")
    refused(generate(tiny_shots, tiny_shots, tmp_path / "out"), "bundle.json")
    assert not (tmp_path / "out").exists()


def test_styles_for_another_resolution(tmp_path, refused, bundle, tiny_shots):
    """Codes of a 16 px generator beside an 8 px one, put there with a matching checksum."""
    table = LatentTable.load(bundle / "codes.safetensors")
    n_latent = table.w_plus.shape[1]
    LatentTable(table.w_plus.repeat(1, 2, 1)[:, : n_latent + 2], table.labels, table.categories).save(
        bundle / "codes.safetensors"
    )
    index = json.loads((bundle / "bundle.json").read_text())
    index["files"]["codes.safetensors"] = hashlib.sha256((bundle / "codes.safetensors").read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(index))
    refused(generate(bundle, tiny_shots, tmp_path / "out"), "codes", str(n_latent), str(n_latent + 2))
    assert not (tmp_path / "out").exists()


# --- output folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def occupied(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    yield tmp_path / "out"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diary.txt"]


def test_generate_refuses_a_folder_that_is_not_empty(occupied, refused, tiny_bundle, tiny_shots):
    refused(generate(tiny_bundle, tiny_shots, occupied), "not empty", "--resume", "--overwrite")
    refused(generate(tiny_bundle, tiny_shots, occupied, "--resume"), "nothing to resume")
    refused(generate(tiny_bundle, tiny_shots, occupied, "--overwrite"), "not made by sage_fast")


def test_train_refuses_a_folder_that_is_not_empty(tmp_path, occupied, refused):
    data = seen_folder(tmp_path / "seen", n=4)
    refused(train(data, occupied), "not empty", "--resume", "--overwrite")
    refused(train(data, occupied, "--overwrite"), "not made by sage_fast")


def test_flora_refuses_a_folder_that_is_not_empty(occupied, refused):
    argv = ["data", "flora", f"--out={occupied}", "--n-per-category=1", "--resolution=4"]
    refused(argv, "not empty; add --overwrite to replace")
    refused([*argv, "--overwrite"], "not made by sage_fast")


def test_an_output_of_another_run_is_not_resumed(tmp_path, refused, tiny_bundle, tiny_shots):
    argv = generate(tiny_bundle, tiny_shots, tmp_path / "out")
    assert cli.main([str(word) for word in argv]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    refused([*argv, "--resume", "--seed=1"], "seed")
    refused([*argv, "--resume", "--overwrite"], "--resume", "--overwrite")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == before


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """``disk(n)``: n more bytes can be written to files, then the disk is full; ``disk(None)``: it is free again."""
    write, room = os.write, [None]

    def limited(descriptor: int, data) -> int:
        if room[0] is None or descriptor <= 2:
            return write(descriptor, data)
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, bytes(data)[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", limited)

    def set_room(n: int | None) -> None:
        room[0] = n

    return set_room


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Every picture below a folder, decoded to the last pixel."""
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in folder.rglob("*.png")}


@pytest.mark.parametrize("room", [0, 1500, 2500, 3500])
def test_generate_on_a_full_disk_leaves_whole_images_and_resumes(
    tmp_path, refused, disk, tiny_bundle, tiny_shots, room
):
    assert cli.main([str(word) for word in generate(tiny_bundle, tiny_shots, tmp_path / "whole")]) == 0
    argv = generate(tiny_bundle, tiny_shots, tmp_path / "out")
    disk(room)
    refused(argv, "No space left")
    disk(None)
    whole, found = pictures(tmp_path / "whole"), pictures(tmp_path / "out")
    assert len(found) < len(whole)
    for name, image in found.items():
        np.testing.assert_array_equal(image, whole[name])
    assert not [path for path in (tmp_path / "out").rglob("*.tmp")]
    if (tmp_path / "out" / "manifest.jsonl").exists():
        assert {entry["file"] for entry in read_manifest(tmp_path / "out" / "manifest.jsonl")} <= set(whole)
    assert cli.main([str(word) for word in [*argv, "--resume"]]) == 0
    again = pictures(tmp_path / "out")
    assert again.keys() == whole.keys()
    for name, image in again.items():
        np.testing.assert_array_equal(image, whole[name])
    files = [entry["file"] for entry in read_manifest(tmp_path / "out" / "manifest.jsonl")]
    assert len(files) == len(set(files)) == 6


@pytest.mark.parametrize("room", [0, 60_000, 150_000])
def test_train_on_a_full_disk_leaves_no_torn_checkpoint(tmp_path, refused, disk, room):
    data = seen_folder(tmp_path / "seen", n=4)
    disk(room)
    refused(train(data, tmp_path / "out"), "No space left")
    disk(None)
    for path in (tmp_path / "out").rglob("*.pt"):
        assert torch.load(path, weights_only=True)["step"] > 0
    assert not (tmp_path / "out" / "bundle.json").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert cli.main([str(word) for word in [*train(data, tmp_path / "out"), "--resume"]]) == 0
    assert (tmp_path / "out" / "bundle.json").exists()


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluate_refuses_folders_that_do_not_belong_together(tmp_path, refused, tiny_bundle, tiny_shots):
    real = tmp_path / "real" / "lily"
    real.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(noise(8, number)).save(real / f"{number}.png")
    argv = ["evaluate", f"--model={tiny_bundle}", f"--generated={tiny_shots}"]
    refused([*argv, f"--real={real.parent}"], "rose")
    refused([*argv, f"--real={tmp_path / 'gone'}"], "gone", "does not exist")
    assert not (tiny_shots / "report.md").exists()
    (tiny_shots.parent / "manifest.jsonl").touch()
    refused([*argv, f"--real={real.parent}"], "lies in an output of generate", "--out")
