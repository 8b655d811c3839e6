"""Folders of images: what is a category, what is passed over, what is refused."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sage_fast.data import folders
from sage_fast.data.folders import read_images, scan_image_folder
from sage_fast.data.images import load_image
from sage_fast.errors import InputError, SageFastWarning


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)).save(path)


def make(root: Path, categories: int = 2, images: int = 3) -> Path:
    for c in range(categories):
        for i in range(images):
            save(root / f"c{c}" / f"{i}.png", seed=10 * c + i)
    return root


def test_scan_is_sorted_and_complete(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a/x.jpeg", "C/q.bmp"):
        save(tmp_path / name)
    folder = scan_image_folder(tmp_path)
    assert folder.categories == ["C", "a", "b"]
    assert folder.files == ["C/q.bmp", "a/x.jpeg", "b/10.JPG", "b/2.png"]
    assert folder.labels == [0, 1, 2, 2]
    assert len(folder) == 4


def test_read_gives_each_image_at_its_place(tmp_path):
    folder = scan_image_folder(make(tmp_path, 5, 30))
    calls = []
    images = read_images(folder, 8, progress=lambda done, total: calls.append((done, total)))
    assert images.images.shape == (150, 3, 8, 8)
    assert images.images.dtype == torch.uint8
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == folder.labels
    assert (images.categories, images.files, images.skipped) == (folder.categories, folder.files, [])
    assert images.root == str(tmp_path)
    for i in range(0, 150, 7):
        assert torch.equal(images.images[i], load_image(tmp_path / folder.files[i], 8))
    assert calls[-1] == (150, 150)
    assert calls == sorted(calls)


def test_read_does_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    folder = scan_image_folder(make(tmp_path, 4, 40))
    expected = read_images(folder, 8).images
    for threads in (1, 7):
        monkeypatch.setattr(folders, "_n_threads", lambda threads=threads: threads)
        assert torch.equal(read_images(folder, 8).images, expected)


def test_hidden_foreign_and_macos_names_are_passed_over(tmp_path, recwarn):
    make(tmp_path)
    save(tmp_path / ".cache" / "a.png")
    save(tmp_path / "__MACOSX" / "a.png")
    save(tmp_path / "contact_sheet.png")
    save(tmp_path / "c0" / ".hidden.png")
    (tmp_path / "c0" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    folder = scan_image_folder(tmp_path)
    assert folder.categories == ["c0", "c1"]
    assert len(folder) == 6
    assert not recwarn.list


def test_spaces_unicode_and_odd_names(tmp_path):
    names = ["Blüte 1", "花", "a'b\"c", "with.dot", "100%"]
    for name in names:
        save(tmp_path / name / "größe 1.png")
    images = read_images(scan_image_folder(tmp_path), 4)
    assert images.categories == sorted(names)


def test_names_that_are_no_unicode(tmp_path):
    raw = os.fsencode(tmp_path) + b"/\xff\xfe"
    try:
        os.mkdir(raw)
    except OSError:
        pytest.skip("the file system takes Unicode names only")
    make(tmp_path, 1)
    Path(os.fsdecode(raw + b"/\xff.png")).write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_images(scan_image_folder(tmp_path), 4)
    str(caught.value).encode("utf-8")


def test_links_to_files_and_folders_are_followed(tmp_path):
    make(tmp_path / "real")
    root = tmp_path / "links"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "real" / "c0")
    save(root / "own" / "a.png")
    (root / "own" / "b.png").symlink_to(tmp_path / "real" / "c1" / "0.png")
    images = read_images(scan_image_folder(root), 4)
    assert images.categories == ["linked", "own"]
    assert torch.equal(images.images[-1], load_image(tmp_path / "real" / "c1" / "0.png", 4))


def test_sub_folders_without_images_are_named_once(tmp_path):
    make(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.warns(SageFastWarning, match="without images are passed over: empty") as caught:
        assert scan_image_folder(tmp_path).categories == ["c0", "c1"]
    assert len(caught) == 1


def test_images_beside_the_categories_are_named(tmp_path):
    save(make(tmp_path / "shots") / "loose.png")
    with pytest.warns(SageFastWarning, match="in no category's folder are passed over: loose.png"):
        assert scan_image_folder(tmp_path / "shots", flat_ok=True).categories == ["c0", "c1"]


@pytest.mark.parametrize("inside", [["bundle.json"], ["checkpoints/gan.pt", "configs/gan.json"]])
def test_a_model_or_run_is_no_folder_of_images(tmp_path, inside):
    for name in ("grids/gan_reals.png", *inside):
        save(tmp_path / "RUN" / "grids" / "gan_reals.png")
        (tmp_path / "RUN" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "RUN" / name).touch()
    with pytest.raises(InputError, match="RUN' is the folder of a model or its training; give a folder of images"):
        scan_image_folder(tmp_path / "RUN")


def test_flat_folder(tmp_path, monkeypatch):
    save(tmp_path / "tulip" / "b.png")
    save(tmp_path / "tulip" / "a.png")
    folder = scan_image_folder(tmp_path / "tulip", flat_ok=True)
    assert (folder.categories, folder.files, folder.labels) == (["tulip"], ["a.png", "b.png"], [0, 0])
    assert len(read_images(folder, 4)) == 2
    monkeypatch.chdir(tmp_path / "tulip")
    assert scan_image_folder(".", flat_ok=True).categories == ["tulip"]
    with pytest.raises(InputError, match="no category folders"):
        scan_image_folder(".")
    with pytest.raises(InputError, match="expected at least 2"):
        scan_image_folder(".", min_categories=2, flat_ok=True)


def test_flat_folder_behind_a_link_bears_the_name_of_the_link(tmp_path):
    save(tmp_path / "x123" / "a.png")
    (tmp_path / "tulip").symlink_to(tmp_path / "x123")
    assert scan_image_folder(tmp_path / "tulip", flat_ok=True).categories == ["tulip"]


def test_one_category_where_two_are_needed(tmp_path):
    make(tmp_path, 1)
    assert scan_image_folder(tmp_path).categories == ["c0"]
    with pytest.raises(InputError, match=r"has 1 category \(c0\), expected at least 2; add"):
        scan_image_folder(tmp_path, min_categories=2)


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a").mkdir()
    for flat_ok in (False, True):
        with pytest.raises(
            InputError, match=r"has no images \(notes.txt is of no type that is read\), expected .*/<category>/<image>"
        ):
            scan_image_folder(tmp_path, flat_ok=flat_ok)


def test_images_one_level_too_deep_are_pointed_at(tmp_path):
    make(tmp_path / "set" / "train")
    with pytest.raises(InputError, match="give '.*train'"):
        scan_image_folder(tmp_path / "set")


def test_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="does not exist"):
        scan_image_folder(tmp_path / "gone")
    with pytest.raises(InputError, match="is a file"):
        scan_image_folder(tmp_path / "file")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be listed \(Permission denied\); check its permissions"):
        scan_image_folder(tmp_path)


def spoil(root: Path, n: int) -> None:
    kinds = [b"", b"not an image", (root / "c0" / "0.png").read_bytes()[:60]]
    for i in range(n):
        (root / "c1" / f"bad{i}.png").write_bytes(kinds[i % 3])


def test_few_bad_images_are_left_out_with_one_warning(tmp_path):
    spoil(make(tmp_path, 2, 30), 3)
    folder = scan_image_folder(tmp_path)
    with pytest.warns(SageFastWarning, match=r"3 of 63 images .* left out; repair or remove") as caught:
        images = read_images(folder, 4)
    assert len(caught) == 1
    assert len(images) == len(images.labels) == len(images.images) == 60
    assert len(images.skipped) == 3
    assert images.skipped[0] == "c1/bad0.png: the file is empty"
    assert not any("bad" in name for name in images.files)
    assert torch.equal(images.images[-1], load_image(tmp_path / images.files[-1], 4))


def test_many_bad_images_are_refused(tmp_path):
    spoil(make(tmp_path, 2, 30), 6)
    with pytest.raises(InputError) as caught:
        read_images(scan_image_folder(tmp_path), 4)
    message = str(caught.value)
    assert "6 of 66 images" in message
    assert "c1/bad0.png: the file is empty" in message
    assert "and 3 more" in message
    assert "more than the 5% allowed; repair or remove them" in message


def test_exactly_the_allowed_share_passes(tmp_path):
    spoil(make(tmp_path, 2, 19), 2)
    with pytest.warns(SageFastWarning):
        assert len(read_images(scan_image_folder(tmp_path), 4)) == 38
    with pytest.raises(InputError, match="more than the 0% allowed"):
        read_images(scan_image_folder(tmp_path), 4, max_bad_share=0.0)


def test_a_category_that_loses_all_its_images(tmp_path):
    make(tmp_path, 2, 30)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="No image can be read of lost"):
        read_images(scan_image_folder(tmp_path), 4)


def test_enlarging_is_refused_on_request(tmp_path):
    make(tmp_path, 2, 30)  # 12 x 10 pixels
    for i, side in enumerate((7, 6)):
        Image.new("RGB", (side, 9)).save(tmp_path / "c1" / f"small{i}.png")
    folder = scan_image_folder(tmp_path)
    assert len(read_images(folder, 6, upscale=False)) == len(read_images(folder, 8)) == 62
    with pytest.raises(InputError) as caught:
        read_images(folder, 8, upscale=False)
    message = str(caught.value)
    assert "2 of 62 images" in message and "smaller than the resolution 8" in message
    assert "the smallest, c1/small1.png, has 6 pixels on its shorter side" in message
    assert "choose a resolution of at most 6, leave small images out, or allow enlarging with upscale" in message
    with pytest.raises(InputError, match="62 of 62 images"):
        read_images(folder, 16, upscale=False)


def test_an_interrupt_in_progress_stops_the_reading(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_images(scan_image_folder(make(tmp_path, 2, 40)), 4, progress=stop)


def test_an_array_beyond_memory(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("can't allocate memory")

    folder = scan_image_folder(make(tmp_path))
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(InputError, match="6 images of 16384 pixels need 4.5 GiB of memory"):
        read_images(folder, 16384)


def test_select_and_subset(tmp_path):
    folder = scan_image_folder(make(tmp_path, 4, 3))
    images = read_images(folder, 4)
    for whole in (folder, images):
        part = whole.select(["c3", "c1"])
        assert part.categories == ["c1", "c3"]
        assert part.files == whole.files[3:6] + whole.files[9:]
        assert [int(label) for label in part.labels] == [0, 0, 0, 1, 1, 1]
        with pytest.raises(InputError, match="lacks z; choose among c0, c1, c2, and 1 more"):
            whole.select(["c1", "z"])
        with pytest.raises(InputError, match="lacks"):
            whole.select([])
        few = whole.subset([11, 0])
        assert few.files == [whole.files[11], whole.files[0]]
        assert [int(label) for label in few.labels] == [3, 0]
        assert few.categories == whole.categories
    assert torch.equal(images.select(["c3"]).images, images.images[9:])
    assert torch.equal(images.subset(torch.tensor([2, 1])).images, images.images[[2, 1]])
    wanted = torch.arange(len(images)) % 2 == 1
    for mask in (wanted, wanted.tolist()):
        assert images.subset(mask).files == images.files[1::2] and len(images.subset(mask).images) == int(wanted.sum())


def test_the_room_itself_imports_nothing():
    source = (Path(folders.__file__).parent / "__init__.py").read_text()
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_the_sheet_beside_a_manifest_is_no_flat_category(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "contact_sheet.png")
    assert scan_image_folder(tmp_path, flat_ok=True).files == ["contact_sheet.png"]
    (tmp_path / "manifest.jsonl").touch()
    with pytest.raises(InputError, match="has no images"):
        scan_image_folder(tmp_path, flat_ok=True)
