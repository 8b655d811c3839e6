"""The cache of decoded images: the same pixels as from memory, and never those of anything else."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sage_fast.data import pixel_cache
from sage_fast.data.folders import ImageSet, read_images, scan_image_folder
from sage_fast.data.pixel_cache import cached_images, read_or_map
from sage_fast.data.sources import open_source
from sage_fast.errors import InputError, SageFastWarning

PIXELS, HEADER, LOCK = (f"sage_fast_cache.{kind}" for kind in ("pixels", "json", "lock"))
N = 60


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(N):
        path = tmp_path / "data" / f"c{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "data"


def cached(data: Path, cache: Path, resolution: int = 16, **options) -> ImageSet:
    return cached_images(open_source(data), resolution, 3, cache, **options)


def check_same(found: ImageSet, expected: ImageSet) -> None:
    assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
    assert (found.files, found.categories, found.skipped) == (expected.files, expected.categories, expected.skipped)
    assert found.root == expected.root


@pytest.fixture
def no_decoding(monkeypatch):
    """Call to make any further decoding fail."""

    def forbid() -> None:
        def refuse(*arguments):
            raise AssertionError("decoded again")

        monkeypatch.setattr(pixel_cache, "decode_all", refuse)

    return forbid


def test_it_holds_what_memory_would(data, tmp_path, no_decoding):
    expected = read_images(scan_image_folder(data), 16)
    calls = []
    check_same(cached(data, tmp_path / "a" / "cache", progress=lambda *done: calls.append(done)), expected)
    assert calls[-1] == (N, N)
    assert sorted(os.listdir(tmp_path / "a" / "cache")) == [HEADER, LOCK, PIXELS]
    assert (tmp_path / "a" / "cache" / PIXELS).read_bytes() == expected.images.numpy().tobytes()
    no_decoding()
    check_same(cached(data, tmp_path / "a" / "cache"), expected)


def test_parts_of_it_are_ordinary_image_sets(data, tmp_path):
    found, expected = cached(data, tmp_path / "cache"), read_images(scan_image_folder(data), 16)
    check_same(found.select(["c1", "c2"]), expected.select(["c1", "c2"]))
    check_same(found.subset([5, 2]), expected.subset([5, 2]))


def test_an_archive_can_be_cached(data, tmp_path, no_decoding):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in data.rglob("*.png"):
            archive.write(path, path.relative_to(data))
    first = cached(tmp_path / "a.zip", tmp_path / "cache")
    assert torch.equal(first.images, read_images(scan_image_folder(data), 16).images)
    no_decoding()
    cached(tmp_path / "a.zip", tmp_path / "cache")
    os.utime(tmp_path / "a.zip", (1, 1))
    with pytest.warns(SageFastWarning, match="a file of the source has changed"), pytest.raises(AssertionError):
        cached(tmp_path / "a.zip", tmp_path / "cache")


class Rows(list):
    _fingerprint = "one"


def test_a_data_set_object_is_told_by_its_fingerprint(tmp_path):
    rows = Rows({"image": Image.new("L", (8, 8), i), "label": i % 2} for i in range(4))
    for fingerprint, message in (("one", None), ("one", None), ("two", "the data set has changed")):
        rows._fingerprint = fingerprint
        with warnings.catch_warnings() if message is None else pytest.warns(SageFastWarning, match=message):
            assert cached_images(open_source(rows), 8, 1, tmp_path / "cache").images[:, 0, 0, 0].tolist() == [
                0,
                2,
                1,
                3,
            ]


# --- what makes it anew -----------------------------------------------------------------------------------------------


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_pixels(data: Path) -> None:
    path = data / "c1" / "001.png"
    times = path.stat()
    Image.new("RGB", (16, 16)).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def rewrite_header(cache: Path, text: str) -> None:
    (cache / HEADER).write_text(text)


HARM = {
    "first byte": (lambda data, cache: flip_byte(cache / PIXELS, 0), "its pixels are damaged"),
    "last byte": (lambda data, cache: flip_byte(cache / PIXELS, -1), "its pixels are damaged"),
    "truncated": (lambda data, cache: os.truncate(cache / PIXELS, 1000), "another length than they should"),
    "too long": (lambda data, cache: (cache / PIXELS).open("ab").write(b"x"), "another length than they should"),
    "no pixels": (lambda data, cache: (cache / PIXELS).unlink(), r"cannot be read \(No such file"),
    "header bit": (lambda data, cache: flip_byte(cache / HEADER, 300), "its description is damaged"),
    "header cut": (lambda data, cache: os.truncate(cache / HEADER, 500), "its description is damaged"),
    "header empty": (lambda data, cache: rewrite_header(cache, ""), "its description is damaged"),
    "header foreign": (lambda data, cache: rewrite_header(cache, "[1]"), "its description is damaged"),
    "header deep": (lambda data, cache: rewrite_header(cache, "[" * 100_000), "its description is damaged"),
    "changed": (lambda data, cache: change_pixels(data), "a file of the source has changed"),
    "touched": (lambda data, cache: os.utime(data / "c0" / "000.png"), "a file of the source has changed"),
    "removed": (lambda data, cache: (data / "c0" / "000.png").unlink(), "the source has other images"),
    "renamed": (
        lambda data, cache: (data / "c0" / "000.png").rename(data / "c0" / "zzz.png"),
        "the source has other images",
    ),
    "moved": (lambda data, cache: (data / "c0").rename(data / "d0"), "the source has other images"),
    "added": (
        lambda data, cache: shutil.copy2(data / "c0" / "000.png", data / "c0" / "new.png"),
        "the source has other images",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_does_not_agree_is_noticed_and_made_anew_with_one_warning(harm, data, tmp_path, no_decoding):
    cache = tmp_path / "cache"
    cached(data, cache)
    spoil, message = HARM[harm]
    spoil(data, cache)
    with pytest.warns(SageFastWarning, match=f"is made anew: .*{message}") as caught:
        check_same(cached(data, cache), read_images(scan_image_folder(data), 16))
    assert len(caught) == 1
    no_decoding()
    check_same(cached(data, cache), read_images(scan_image_folder(data), 16))


def test_another_resolution_number_of_channels_or_rule(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cached(data, cache)
    with pytest.warns(SageFastWarning, match="another resolution"):
        assert cached(data, cache, 8).images.shape == (N, 3, 8, 8)
    with pytest.warns(SageFastWarning, match="another number of channels"):
        assert cached_images(open_source(data), 8, 1, cache).images.shape == (N, 1, 8, 8)
    monkeypatch.setattr(pixel_cache, "RULE", pixel_cache.RULE + 1)
    with pytest.warns(SageFastWarning, match="the rule that images are decoded by has changed"):
        cached_images(open_source(data), 8, 1, cache)


def test_every_single_flipped_bit_of_the_pixels_is_noticed(data, tmp_path):
    """CRC-32 finds any one bit; blocks smaller than the file are all looked at."""
    cache = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_cache, "_BLOCK", 1000)
        cached(data, cache)
        content = (cache / PIXELS).read_bytes()
        found = pixel_cache._checksums(cache / PIXELS)
        assert len(found) == -(-len(content) // 1000)
        for place in np.random.default_rng(0).integers(0, len(content), 50):
            flip_byte(cache / PIXELS, int(place))
            assert pixel_cache._checksums(cache / PIXELS) != found
            (cache / PIXELS).write_bytes(content)


def test_enlarged_images_are_not_taken_for_real_ones(data, tmp_path):
    cache = tmp_path / "cache"
    assert cached(data, cache, 32, upscale=True).images.shape[-1] == 32
    with pytest.warns(SageFastWarning, match="may hold enlarged"), pytest.raises(InputError, match="60 of 60 images"):
        cached(data, cache, 32, upscale=False)
    assert os.listdir(cache) == [LOCK]


def test_images_that_are_not_enlarged_serve_both(data, tmp_path, no_decoding):
    cached(data, tmp_path / "cache", upscale=False)
    no_decoding()
    cached(data, tmp_path / "cache", upscale=True)


# --- bad images -------------------------------------------------------------------------------------------------------


def spoil_images(data: Path, n: int) -> None:
    """Every sixth image, the first among them, so that gaps lie everywhere."""
    for path in sorted(data.rglob("*.png"))[:: N // n][:n]:
        path.write_bytes(path.read_bytes()[:50])


def test_bad_images_are_listed_once_and_leave_no_gaps(data, tmp_path):
    spoil_images(data, 3)
    with pytest.warns(SageFastWarning, match="3 of 60 images .* left out") as caught:
        found = cached(data, tmp_path / "cache")
    assert len(caught) == 1
    with pytest.warns(SageFastWarning):
        expected = read_images(scan_image_folder(data), 16)
    check_same(found, expected)
    assert len(found) == N - 3 and len(found.skipped) == 3
    check_same(cached(data, tmp_path / "cache"), expected)  # a second warning would be an error
    assert json.loads((tmp_path / "cache" / HEADER).read_text())["header"]["bad"].keys() == {"0", "20", "40"}


def test_too_many_bad_images_leave_nothing(data, tmp_path):
    spoil_images(data, 6)
    with pytest.raises(InputError, match="6 of 60 images .* more than the 5% allowed"):
        cached(data, tmp_path / "run" / "cache")
    assert os.listdir(tmp_path) == ["data"]


# --- room -------------------------------------------------------------------------------------------------------------


def test_budget_and_disk(data, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="take 0.00 GiB, more than the 0.00 GiB allowed; raise the budget"):
        cached(data, tmp_path / "cache", budget=N * 3 * 256 - 1)
    assert os.listdir(tmp_path) == ["data"]
    cached(data, tmp_path / "cache", budget=N * 3 * 256)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**28)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="the disk has 0.25 GiB free; give another folder"):
        cached(data, tmp_path / "other")
    cached(data, tmp_path / "cache")  # is there already


def test_a_full_disk_is_one_sentence_and_leaves_nothing(data, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(
                InputError, match=r"cannot be written \(No space left on device\); choose another folder"
            ):
                cached(data, tmp_path / "cache")
        assert os.listdir(tmp_path) == ["data"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda descriptor, content, place: len(content) - 1)
        with pytest.raises(InputError, match="No space left on device"):
            cached(data, tmp_path / "cache")


def test_a_cache_in_a_file(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\); choose another folder"):
        cached(data, tmp_path / "file" / "cache")


def test_few_images_stay_in_memory_unless_a_cache_is_asked_for(data, tmp_path, monkeypatch):
    listing, usual, asked = open_source(data), tmp_path / "run" / "cache", tmp_path / "asked"
    expected = read_images(listing, 16)
    check_same(read_or_map(listing, 16, 3, usual), expected)
    check_same(read_or_map(listing, 16, 3), expected)
    assert not usual.exists()
    check_same(read_or_map(listing, 16, 3, usual, asked), expected)
    assert asked.exists() and not usual.exists()
    monkeypatch.setattr(pixel_cache, "IN_MEMORY", N * 3 * 256 - 1)
    monkeypatch.setattr(pixel_cache, "no_room_for", lambda *arguments: "the disk is full")
    with pytest.warns(SageFastWarning, match="read into memory, not mapped from a cache in '.*': the disk is full"):
        check_same(read_or_map(listing, 16, 3, usual), expected)
    with pytest.raises(InputError, match="cannot be made: the disk is full"):
        read_or_map(listing, 16, 3, usual, tmp_path / "other")
    monkeypatch.undo()
    monkeypatch.setattr(pixel_cache, "IN_MEMORY", N * 3 * 256 - 1)
    check_same(read_or_map(listing, 16, 3, usual), expected)
    assert (usual / PIXELS).exists()


def test_opening_costs_no_memory(tmp_path):
    """75 MiB of pixels: the process grows by less than half of that."""
    rows = Rows({"image": Image.new("RGB", (256, 256), (i % 256, 0, 0)), "label": 0} for i in range(400))
    listing = open_source(rows)
    cached_images(listing, 256, 3, tmp_path / "cache")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    images = cached_images(listing, 256, 3, tmp_path / "cache").images
    assert images.nbytes > 2**26 and resident() - before < 2**25, "two blocks of a checksum are read at a time"
    assert images[399, 0, 0, 0] == 399 % 256


# --- several processes ------------------------------------------------------------------------------------------------

BUILD = """
import sys, time
from pathlib import Path
from sage_fast.data import folders, pixel_cache
from sage_fast.data.sources import open_source
data, cache, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
decode = folders.decode
def slow(content, *rest):
    with open(log, "a") as file:
        file.write(f"{content}\\n")
    time.sleep(pause)
    return decode(content, *rest)
folders.decode = slow
images = pixel_cache.cached_images(open_source(data), 16, 3, cache).images
print(int(images.long().sum()))
"""


def start(data: Path, cache: Path, log: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(data), str(cache), str(log), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, n_lines: int) -> None:
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) >= n_lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not grow")


def test_of_several_processes_one_builds_and_all_read(data, tmp_path):
    processes = [start(data, tmp_path / "cache", tmp_path / "log", 0.1) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    expected = int(read_images(scan_image_folder(data), 16).images.long().sum())
    assert [int(out) for out, _ in results] == [expected] * 2
    assert len((tmp_path / "log").read_text().splitlines()) == N, "each image is decoded once in all"
    assert sum("waiting for another process" in err for _, err in results) == 1


def test_a_killed_builder_leaves_no_lock_and_no_false_cache(data, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    process = start(data, cache, log, 0.3)
    wait_for(log, 10)
    with (cache / LOCK).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (cache / PIXELS).exists() and not (cache / HEADER).exists()
    assert any(name.endswith(".tmp") for name in os.listdir(cache))
    check_same(cached(data, cache), read_images(scan_image_folder(data), 16))
    assert sorted(os.listdir(cache)) == [HEADER, LOCK, PIXELS]


def test_a_builder_killed_between_its_two_files(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(pixel_cache, "atomic_write", lambda path: os._exit(9))
        if (child := os.fork()) == 0:
            cached(data, cache)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (cache / PIXELS).exists() and not (cache / HEADER).exists()
    check_same(cached(data, cache), read_images(scan_image_folder(data), 16))


def test_images_in_use_survive_that_the_cache_is_made_anew(data, tmp_path):
    first = cached(data, tmp_path / "cache")
    before = first.images.clone()
    change_pixels(data)
    with pytest.warns(SageFastWarning):
        second = cached(data, tmp_path / "cache")
    assert torch.equal(first.images, before) and not torch.equal(second.images, before)


def test_a_waiting_process_takes_the_lock_that_is_there_now(data, tmp_path):
    """A builder that failed takes its lock file away; who waited for it must not build beside the next."""
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / LOCK).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = start(data, tmp_path / "cache", tmp_path / "log", 0)
        assert "waiting" in process.stderr.readline()
        (tmp_path / "cache" / LOCK).unlink()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(os.listdir(tmp_path / "cache")) == [HEADER, LOCK, PIXELS]


def test_a_file_system_without_locks_has_a_cache_too(data, tmp_path, monkeypatch, no_decoding):
    def flock(*_):
        raise OSError(errno.ENOLCK, "of this file system")

    monkeypatch.setattr(fcntl, "flock", flock)
    decode_all, unfinished = pixel_cache.decode_all, tmp_path / "cache" / pixel_cache._UNFINISHED

    def decode_beside_another(*arguments):
        bad = decode_all(*arguments)
        unfinished.unlink()
        unfinished.write_bytes(b"of another process")
        return bad

    with monkeypatch.context() as patched, pytest.raises(InputError, match="cannot be written .*busy"):
        patched.setattr(pixel_cache, "decode_all", decode_beside_another)
        cached(data, tmp_path / "cache")
    expected = read_images(scan_image_folder(data), 16)
    check_same(cached(data, tmp_path / "cache"), expected)
    no_decoding()
    check_same(cached(data, tmp_path / "cache"), expected)
