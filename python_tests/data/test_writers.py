"""Writers: files are whole or absent, whatever happens; only our own output is ever deleted."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sage_fast.data.writers import (
    MARKER,
    ManifestWriter,
    atomic_write,
    check_file,
    check_output,
    contact_sheet,
    prepare_output,
    read_manifest,
    save_png,
    to_uint8,
    write_json,
    write_remedy,
)
from sage_fast.errors import InputError

ROOT = Path(__file__).parents[2]


def disk_full_after(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """os.write takes ``n_bytes`` more, then says that the disk is full, as a real one does: first in part."""
    real, left = os.write, [n_bytes]

    def write(descriptor, data):
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(descriptor, bytes(data)[: left[0]])
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)


def test_atomic_write(tmp_path):
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"one")
        assert not (tmp_path / "a.bin").exists()
        file.write(b"two" * 100_000)
    assert (tmp_path / "a.bin").read_bytes() == b"one" + b"two" * 100_000
    with atomic_write(tmp_path / "a.bin", durable=False) as file:
        file.write(b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_permissions_follow_the_umask(tmp_path):
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FileNotFoundError])
def test_an_error_in_the_block_leaves_nothing_and_passes_through(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("left", [0, 10, 150_000])
@pytest.mark.parametrize("old", [True, False])
def test_full_disk(tmp_path, monkeypatch, left, old):
    if old:
        (tmp_path / "a").write_bytes(b"old")
    disk_full_after(monkeypatch, left)
    message = r"'.*a' cannot be written \(No space left on device\); free some space"
    with pytest.raises(InputError, match=message), atomic_write(tmp_path / "a") as file:
        file.write(b"x" * 100_000)
        file.write(b"x" * 100_000)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["a"] if old else [])
    if old:
        assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_the_very_end(tmp_path, monkeypatch, call):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(InputError, match="No space left"), atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_full_disk_below_a_serialiser_that_hides_the_cause(tmp_path, monkeypatch):
    disk_full_after(monkeypatch, 1000)
    with pytest.raises(InputError, match="No space left"), atomic_write(tmp_path / "a.pt") as file:
        torch.save({"w": torch.zeros(100_000)}, file)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_full_disk_swallowed_by_the_block(tmp_path, monkeypatch):
    disk_full_after(monkeypatch, 0)
    with pytest.raises(InputError, match="No space left"), atomic_write(tmp_path / "a") as file:
        try:
            file.write(b"x" * 1_000_000)
        except OSError:
            pass
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "gone" / "a", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot be written"), atomic_write(place) as file:
            file.write(b"x")
    assert os.listdir(tmp_path) == ["folder"]


def test_the_remedy_is_that_of_the_place(tmp_path):
    """Only who chose the folder is told to make it; a run that can be resumed is told so."""
    with pytest.raises(InputError, match=r"\(No such file or directory\); make its folder first\.$"):
        with atomic_write(tmp_path / "gone" / "a"):
            pass
    gone = r"; its folder is gone, perhaps with a mount: bring it back, and the same command with --resume goes on\.$"
    with pytest.raises(InputError, match=gone), atomic_write(tmp_path / "gone" / "a", resumable=True):
        pass
    full = [write_remedy(OSError(number, ""), resumable=True) for number in (errno.ENOSPC, errno.EDQUOT)]
    assert full == ["free some space, and the same command with --resume goes on"] * 2


def test_torch_checkpoint_round_trip(tmp_path):
    with atomic_write(tmp_path / "a.pt") as file:
        torch.save({"step": 3, "w": torch.arange(5)}, file)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state["w"].tolist() == list(range(5))


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
def test_a_real_write_limit(tmp_path):
    """The kernel itself refuses the bytes (RLIMIT_FSIZE): no picture, table, checkpoint or half line is left."""
    code = f"""
        import resource, signal, sys
        import numpy as np
        import torch
        from sage_fast.data.latent_table import LatentTable
        from sage_fast.data.writers import ManifestWriter, atomic_write, save_png
        from sage_fast.errors import InputError
        folder = {str(tmp_path)!r}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        def checkpoint():
            with atomic_write(folder + "/c.pt") as file:
                torch.save(torch.zeros(50_000), file)
        def manifest():
            with ManifestWriter(folder + "/manifest.jsonl") as writer:
                for i in range(1000):
                    writer.append({{"image": i, "padding": "x" * 93}})
        noise = np.random.default_rng(0).integers(0, 256, (3, 200, 200), np.uint8)
        table = LatentTable(torch.randn(100, 10, 10), torch.zeros(100, dtype=torch.int64), ["a"])
        for job in (lambda: save_png(folder + "/a.png", noise), lambda: table.save(folder + "/t"), checkpoint, manifest):
            try:
                job()
            except InputError as error:
                assert "File too large" in str(error), error
            else:
                sys.exit("a write went through")
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["manifest.jsonl"]
    content = (tmp_path / "manifest.jsonl").read_bytes()
    assert content.endswith(b"}\n")
    assert [json.loads(line)["image"] for line in content.splitlines()] == list(range(len(content.splitlines())))
    assert len(content) > 19_000


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2], "a": "ü"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "ü", "b": [1, 2]}
    with pytest.raises(InputError, match="b.json' cannot be written: JSON has finite numbers alone"):
        write_json(tmp_path / "b.json", {"lr": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_to_uint8_rule():
    halves = (torch.arange(0, 511, dtype=torch.float64) / 2) / 127.5 - 1  # exact level or halfway between two
    expected = torch.from_numpy(np.round((halves.numpy() + 1) * 127.5)).clamp(0, 255).to(torch.uint8)
    assert torch.equal(to_uint8(halves), expected)
    values = torch.tensor([-torch.inf, -9.0, -1.0, 0.0, 1.0, 9.0, torch.inf])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255, 255]  # 127.5 goes to the even 128
    assert to_uint8(torch.tensor([-0.5, 0.25], dtype=torch.float16)).tolist() == [64, 159]


def test_to_uint8_leaves_its_argument_alone():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    before = images.detach().clone()
    assert to_uint8(images).dtype == torch.uint8
    assert torch.equal(images.detach(), before)


def test_to_uint8_refuses():
    with pytest.raises(InputError, match="not numbers"):
        to_uint8(torch.tensor([0.0, torch.nan]))
    with pytest.raises(TypeError, match="floating-point"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_round_trip(tmp_path, channels, mode):
    image = torch.randint(0, 256, (channels, 9, 7), dtype=torch.uint8)
    save_png(tmp_path / "a.png", image, text={"category": "a rose", "seed": "3", "name": "花"})
    save_png(tmp_path / "b.png", image.numpy(), durable=False)
    for name in "ab":
        stored = Image.open(tmp_path / f"{name}.png")
        assert stored.mode == mode
        np.testing.assert_array_equal(np.asarray(stored).reshape(9, 7, channels), image.permute(1, 2, 0).numpy())
    text = Image.open(tmp_path / "a.png").text
    assert (text["category"], text["seed"], text["name"]) == ("a rose", "3", "花")


def test_png_refuses(tmp_path):
    with pytest.raises(TypeError, match="uint8"):
        save_png(tmp_path / "a.png", torch.zeros(3, 4, 4))
    for shape in ((4, 4), (5, 4, 4), (3, 0, 4)):
        with pytest.raises(InputError, match="C = 1 to 4"):
            save_png(tmp_path / "a.png", torch.zeros(shape, dtype=torch.uint8))
    assert os.listdir(tmp_path) == []


def test_png_on_a_full_disk(tmp_path, monkeypatch):
    disk_full_after(monkeypatch, 50)
    with pytest.raises(InputError, match="No space left"):
        save_png(tmp_path / "a.png", torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_contact_sheet_places_every_image():
    images = torch.randint(0, 255, (7, 3, 8, 6), dtype=torch.uint8)
    sheet = np.asarray(contact_sheet(images, columns=3))
    assert sheet.shape == (3 * 10 + 2, 3 * 8 + 2, 3)
    for i in range(7):
        top, left = 2 + 10 * (i // 3), 2 + 8 * (i % 3)
        np.testing.assert_array_equal(sheet[top : top + 8, left : left + 6], images[i].permute(1, 2, 0).numpy())
    assert (sheet[22:30, 10:] == 255).all()


def test_contact_sheet_of_fewer_images_than_columns_and_scaled():
    sheet = contact_sheet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), columns=9, scale=3)
    assert sheet.size == (2 * 14 + 2, 14 + 2)
    assert np.asarray(sheet)[2:14, 2:14].max() == 0


def test_contact_sheet_sections_bear_names():
    images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    plain = contact_sheet(images, 2)
    named = contact_sheet(images, 2, labels=["a rose", "a rose", "a rose", "花\n\udcff" + "long name" * 30, "x"])
    assert named.height == 3 * 16 + 4 * 34 + 2
    assert plain.height == 3 * 34 + 2
    band = np.asarray(named)[2:18]
    assert band.min() < 128  # text
    assert (band == 255).mean() > 0.5


@pytest.mark.parametrize(
    ("name", "shown"),
    [("rosé Łódź", "rose [0141]odz"), ("日本", "[65E5][672C]"), ("ﬁg", "fig"), ("a · b", "a [00B7] b")],
)
def test_contact_sheet_names_bear_no_empty_boxes(name, shown):
    image = torch.zeros(1, 3, 4, 300, dtype=torch.uint8)
    sheets = [np.asarray(contact_sheet(image, 1, [label])) for label in (name, shown)]
    assert np.array_equal(*sheets)


def test_contact_sheet_composites_over_white():
    sheet = contact_sheet(torch.zeros(1, 4, 4, 4, dtype=torch.uint8), 1)
    assert np.asarray(sheet).min() == 255


def test_contact_sheet_refuses():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for arguments in ((images[:0], 2), (images, 0), (images, 2, None, 0)):
        with pytest.raises(InputError, match="needs images, columns and a scale"):
            contact_sheet(*arguments)
    with pytest.raises(InputError, match="each of the 2 images, got 1"):
        contact_sheet(images, 2, ["a"])


def test_manifest_round_trip(tmp_path):
    with ManifestWriter(tmp_path / "m.jsonl") as writer:
        for i in range(3):
            writer.append({"file": f"花/{i}.png", "seed": i})
    assert [entry["seed"] for entry in read_manifest(tmp_path / "m.jsonl")] == [0, 1, 2]
    assert read_manifest(tmp_path / "m.jsonl")[0]["file"] == "花/0.png"
    writer.close()


def test_manifest_that_exists_needs_resume(tmp_path):
    ManifestWriter(tmp_path / "m.jsonl").close()
    with pytest.raises(InputError, match="exists already; resume it"):
        ManifestWriter(tmp_path / "m.jsonl")


@pytest.mark.parametrize("tail", [b"", b'{"i": 2', b'{"i": 2}', b"\0\0\0", b"\0\0\0\n", b'{"i": \n'])
def test_manifest_resumes_behind_the_last_whole_line(tmp_path, tail):
    (tmp_path / "m.jsonl").write_bytes(b'{"i": 0}\n{"i": 1}\n' + tail)
    assert len(read_manifest(tmp_path / "m.jsonl")) == 2
    with ManifestWriter(tmp_path / "m.jsonl", resume=True) as writer:
        assert writer.entries == [{"i": 0}, {"i": 1}]
        writer.append({"i": 2})
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"i": 0}\n{"i": 1}\n{"i": 2}\n'


def test_manifest_resume_without_a_file(tmp_path):
    with ManifestWriter(tmp_path / "m.jsonl", resume=True) as writer:
        assert writer.entries == []
        writer.append({"i": 0})
    assert read_manifest(tmp_path / "m.jsonl") == [{"i": 0}]


def test_manifest_damaged_in_the_middle(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"i": 0}\nrubbish\n{"i": 1}\n')
    with pytest.raises(InputError, match="line 2, is no JSON object"):
        read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(InputError, match="line 2"):
        ManifestWriter(tmp_path / "m.jsonl", resume=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path / "gone.jsonl")


def test_manifest_on_a_full_disk_takes_the_half_line_back(tmp_path, monkeypatch):
    writer = ManifestWriter(tmp_path / "m.jsonl")
    writer.append({"i": 0})
    disk_full_after(monkeypatch, 4)
    with pytest.raises(InputError, match="No space left"):
        writer.append({"i": 1})
    monkeypatch.undo()
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"i": 0}\n'
    writer.append({"i": 2})
    writer.close()
    assert [entry["i"] for entry in read_manifest(tmp_path / "m.jsonl")] == [0, 2]


def test_manifest_writes_a_line_at_once(tmp_path):
    writer = ManifestWriter(tmp_path / "m.jsonl")
    writer.append({"i": 0})
    assert read_manifest(tmp_path / "m.jsonl") == [{"i": 0}]  # before close
    writer.close()


def test_prepare_output_new_and_empty(tmp_path):
    for place in (tmp_path / "a" / "b", tmp_path / "a" / "b"):
        assert prepare_output(place) == place
        assert os.listdir(place) == [MARKER]
    (tmp_path / "c").mkdir()
    prepare_output(str(tmp_path / "c"), overwrite=True)
    prepare_output(tmp_path / "d", resume=True)


def test_prepare_output_refuses_what_is_not_empty(tmp_path):
    prepare_output(tmp_path / "out")
    (tmp_path / "out" / "manifest.jsonl").write_text("")
    with pytest.raises(InputError, match="is not empty; add --resume .* --overwrite"):
        prepare_output(tmp_path / "out")
    with pytest.raises(InputError, match="exclude each other"):
        prepare_output(tmp_path / "out", resume=True, overwrite=True)
    assert prepare_output(tmp_path / "out", resume=True) == tmp_path / "out"
    assert (tmp_path / "out" / "manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("offers", "advice"),
    [
        ((), "give another folder."),
        (("overwrite",), "add --overwrite to replace its contents, or give another folder."),
        (("resume",), "add --resume to go on in it, or give another folder."),
    ],
)
def test_prepare_output_advises_what_there_is(tmp_path, offers, advice):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"is not empty; {advice}"):
        prepare_output(tmp_path, offers=offers)


def test_check_file(tmp_path):
    check_file(tmp_path / "new.json", "trace")
    assert not list(tmp_path.iterdir())
    for place in (tmp_path, tmp_path / "nodir" / "new.json"):
        with pytest.raises(InputError, match="trace must be a file in a folder that is there .* make the folder"):
            check_file(place, "trace")


def test_prepare_output_overwrites_its_own(tmp_path):
    out = prepare_output(tmp_path / "out")
    (out / "rose").mkdir()
    for name in (
        "rose/rose_00000.png",
        "manifest.jsonl",
        "config.json",
        "m.safetensors",
        ".0123.sage_fast.tmp",
        ".DS_Store",
    ):
        (out / name).write_bytes(b"x")
    assert os.listdir(prepare_output(out, overwrite=True)) == [MARKER]


def test_prepare_output_leaves_the_cache_of_images_where_it_is(tmp_path):
    (tmp_path / "out" / "cache").mkdir(parents=True)
    (tmp_path / "out" / "cache" / "x.pixels").write_bytes(b"x")
    out = prepare_output(tmp_path / "out")
    (out / "a.png").write_bytes(b"x")
    prepare_output(out, overwrite=True)
    assert sorted(os.listdir(out)) == [MARKER, "cache"] and os.listdir(out / "cache") == ["x.pixels"]


def test_check_output_refuses_the_same_and_changes_nothing(tmp_path):
    assert check_output(tmp_path / "new") == [] and not (tmp_path / "new").exists()
    out = prepare_output(tmp_path / "out")
    (out / "a.png").write_bytes(b"x")
    assert check_output(out, overwrite=True) == ["a.png"] and (out / "a.png").exists()
    with pytest.raises(InputError, match="is not empty"):
        check_output(out)
    (out / "a.odt").write_bytes(b"x")
    with pytest.raises(InputError, match="did not write"):
        check_output(out, overwrite=True)


@pytest.mark.parametrize("foreign", ["photo.jpg", "rose/photo.jpg", "thesis.tex", "rose/.git/HEAD"])
def test_prepare_output_never_deletes_other_peoples_files(tmp_path, foreign):
    out = prepare_output(tmp_path / "out")
    (out / foreign).parent.mkdir(parents=True, exist_ok=True)
    for name in ("rose.png", foreign):
        (out / name).write_bytes(b"x")
    before = sorted(str(path) for path in out.rglob("*"))
    with pytest.raises(InputError, match="which sage_fast did not write"):
        prepare_output(out, overwrite=True)
    assert sorted(str(path) for path in out.rglob("*")) == before


def test_prepare_output_never_empties_a_folder_it_did_not_make(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(InputError, match="was not made by sage_fast"):
        prepare_output(tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "manifest.jsonl"]
    os.unlink(tmp_path / "manifest.jsonl")
    with pytest.raises(InputError, match="nothing to resume"):
        prepare_output(tmp_path, resume=True)
    (tmp_path / "bundle.json").write_text("{}")
    prepare_output(tmp_path, resume=True)
    with pytest.raises(InputError):  # resuming does not make an unmarked folder ours to delete
        prepare_output(tmp_path, overwrite=True)


def test_prepare_output_does_not_follow_links(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "a.png").write_bytes(b"x")
    out = prepare_output(tmp_path / "out")
    (out / "link.png").symlink_to(precious / "a.png")
    prepare_output(out, overwrite=True)
    assert (precious / "a.png").exists()
    (out / "linked").symlink_to(precious)
    with pytest.raises(InputError, match="did not write"):
        prepare_output(out, overwrite=True)
    assert (precious / "a.png").exists()


def test_prepare_output_that_cannot_be_emptied(tmp_path, monkeypatch):
    out = prepare_output(tmp_path / "out")
    (out / "a.png").write_bytes(b"x")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError, match=r"cannot be emptied \(Permission denied\)"):
        prepare_output(out, overwrite=True)


def test_prepare_output_where_none_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; give a folder"):
        prepare_output(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be made .*; give another folder"):
        prepare_output(tmp_path / "file" / "below")
