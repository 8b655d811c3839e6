"""Every way to open a data set gives what its folder gives, and refuses what is broken in one sentence."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sage_fast.data import archives, folders, images
from sage_fast.data.archives import list_members
from sage_fast.data.folders import ImageFolder, ImageSet, read_images
from sage_fast.data.images import load_image
from sage_fast.data.shards import expand_pattern
from sage_fast.data.sources import open_source
from sage_fast.data.splits import take_shots
from sage_fast.errors import InputError, SageFastWarning

KINDS = [
    "folder",
    "zip",
    "tar",
    "tar.gz",
    "tar.xz",
    "one shard",
    "shards",
    "gz shards",
    "pattern",
    "glob",
    "pil",
    "bytes",
]


def png(seed: int, side: int = 9) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


SAMPLES = [(f"c{c}", f"{i:03d}", png(10 * c + i)) for c in range(3) for i in range(5)]


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path) -> Path:
    for category, name, content in SAMPLES:
        (path / category).mkdir(parents=True, exist_ok=True)
        (path / category / f"{name}.png").write_bytes(content)
    return path


def image_folder(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{category}/{name}.png": content for category, name, content in SAMPLES}


def shard(samples) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number, (category, name, content) in enumerate(samples):
        key = f"{category}_{name}"
        files |= {f"{key}.png": content, f"{key}.txt": category.encode()}
        if number % 2:
            files[f"{key}.cls"] = category[1:].encode()
        else:
            files[f"{key}.json"] = json.dumps({"label": int(category[1:]), "source": "x"}).encode()
    return files


class Names:
    names = ["c0", "c1", "c2"]


class Dataset:
    """What Hugging Face's data sets look like from outside."""

    features = {"image": None, "label": Names()}
    _fingerprint = "0123abcd"

    def __init__(self, rows, as_pil: bool) -> None:
        self.rows, self.as_pil, self.decoded = rows, as_pil, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == "label":
            return [int(row[0][1:]) for row in self.rows]
        self.decoded += 1
        content = self.rows[index][2]
        image = Image.open(io.BytesIO(content)) if self.as_pil else content
        return {"image": image, "label": int(self.rows[index][0][1:])}


def make(kind: str, path: Path):
    if kind == "folder":
        return write_folder(path / "set")
    if kind == "zip":
        return write_zip(path / "set.zip", image_folder())
    if kind == "one shard":
        return write_tar(path / "set.tar", shard(SAMPLES))
    if kind.startswith("tar"):
        mode = kind.replace("tar.", "w:") if "." in kind else "w"
        return write_tar(path / f"set.{kind}", image_folder("./outer/"), mode)
    if kind in ("pil", "bytes"):
        return Dataset(SAMPLES, kind == "pil")
    (path / "set").mkdir()
    suffix, mode = ("tar.gz", "w:gz") if kind.startswith("gz") else ("tar", "w")
    for i in range(3):
        write_tar(path / "set" / f"shard-{i:04d}.{suffix}", shard(SAMPLES[5 * i : 5 * i + 5]), mode)
    pattern = {"pattern": "shard-{0000..0002}.tar", "glob": "shard-*.tar"}.get(kind)
    return path / "set" / pattern if pattern else path / "set"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> ImageSet:
    return read_images(open_source(write_folder(tmp_path_factory.mktemp("set"))), 8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_what_the_folder_gives(kind, tmp_path, expected):
    source = make(kind, tmp_path)
    listing = open_source(source, min_categories=3)
    assert isinstance(listing, ImageFolder)
    images = read_images(listing, 8)
    assert torch.equal(images.images, expected.images)
    assert torch.equal(images.labels, expected.labels)
    assert images.categories == expected.categories
    assert len(set(images.files)) == 15 and images.skipped == []
    if kind in ("folder", "zip", "tar", "tar.gz", "tar.xz"):
        assert images.files == expected.files
    assert all(file.startswith(f"c{label}/") for file, label in zip(images.files, images.labels.tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_source_are_read_at_their_places(kind, tmp_path, expected):
    listing = open_source(make(kind, tmp_path)).select(["c1", "c2"]).subset([7, 0, 3])
    images = read_images(listing, 8)
    assert torch.equal(images.images, expected.images[[12, 5, 8]])
    assert images.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_listing_decodes_nothing(kind, tmp_path, monkeypatch):
    source = make(kind, tmp_path)

    def refuse(*arguments, **options):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    assert len(open_source(source)) == 15
    assert getattr(source, "decoded", 0) == 0


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "pil"])
def test_progress_counts_every_image(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_CHUNK", 4)
    calls = []
    read_images(open_source(make(kind, tmp_path)), 8, progress=lambda *done: calls.append(done))
    assert calls == [(4, 15), (8, 15), (12, 15), (15, 15)]


@pytest.mark.parametrize("kind", KINDS)
def test_few_threads_or_small_chunks_change_nothing(kind, tmp_path, monkeypatch, expected):
    monkeypatch.setattr(folders, "_n_threads", lambda: 1)
    monkeypatch.setattr(folders, "_CHUNK_BYTES", 1)
    assert torch.equal(read_images(open_source(make(kind, tmp_path)), 8).images, expected.images)


def test_shots_are_the_same_from_a_folder_and_an_archive(tmp_path):
    of_folder, of_zip = (take_shots(open_source(make(kind, tmp_path)), 2, 7)[0] for kind in ("folder", "zip"))
    assert of_folder.files == of_zip.files


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_order_does_not_depend_on_how_the_archive_is_written(tmp_path, shuffled, expected):
    files = list(image_folder().items())
    if shuffled:
        files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    for write, name in ((write_zip, "a.zip"), (write_tar, "a.tar")):
        images = read_images(open_source(write(tmp_path / name, dict(files))), 8)
        assert images.files == expected.files and torch.equal(images.images, expected.images)


def test_categories_are_sorted_by_name_and_then_images(tmp_path):
    content = png(0)
    names = ["b/2.png", "a b/1.png", "a/2.png", "a/10.png", "C/x.png"]
    listing = open_source(write_zip(tmp_path / "a.zip", dict.fromkeys(names, content)))
    assert listing.categories == ["C", "a", "a b", "b"]
    assert listing.files == ["C/x.png", "a/10.png", "a/2.png", "a b/1.png", "b/2.png"]


def test_hidden_and_foreign_members_are_passed_over(tmp_path, recwarn):
    extra = {"__MACOSX/c0/._1.png": b"x", "c0/.hidden.png": b"x", "c0/notes.txt": b"x" * 100_000, "sheet.png": png(1)}
    extra |= {"c0/deep/1.png": png(1), "c0/000.json": b'{"author": "me"}'}
    for write, name in ((write_zip, "a.zip"), (write_tar, "a.tar")):
        assert open_source(write(tmp_path / name, image_folder() | extra)).files == list(image_folder())
    assert not recwarn.list


def test_a_folder_that_generate_wrote_can_be_zipped_with_its_sheet(tmp_path):
    files = image_folder("out/") | {"out/contact_sheet.png": png(1), "out/manifest.jsonl": b"{}"}
    assert open_source(write_zip(tmp_path / "a.zip", files)).files == list(image_folder())


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_folder_in_an_archive_can_be_given(write, tmp_path, expected):
    other = {f"set/train2/{i % 2}/{i}.png": png(90 + i) for i in range(4)}
    path = write(tmp_path / "a.archive", other | image_folder("set/train/"))
    with pytest.raises(InputError, match=r"give '.*a.archive/set/train2', which has some"):
        open_source(path)
    listing = open_source(path / "set" / "train")
    assert listing.files == expected.files and listing.root == path / "set" / "train"
    assert torch.equal(read_images(listing, 8).images, expected.images)
    assert open_source(path / "set" / "train" / "c0", flat_ok=True).categories == ["c0"]
    for gone in ("set/trai", "set/train/c0/000.png", "gone"):
        with pytest.raises(InputError, match=rf"has no folder .{gone}.; give .*set/train., which has images"):
            open_source(path / gone)


def test_a_flat_archive_is_one_category_where_that_is_allowed(tmp_path):
    path = write_zip(tmp_path / "tulip.zip", {"b.png": png(0), "a.png": png(1)})
    listing = open_source(path, flat_ok=True)
    assert (listing.categories, listing.files) == (["tulip"], ["a.png", "b.png"])
    assert torch.equal(read_images(listing, 4).images[0], read_images(listing, 4).subset([0]).images[0])
    with pytest.raises(InputError, match="no images of the form <category>/<image>"):
        open_source(path)


def test_the_rule_is_that_of_one_file(tmp_path):
    (tmp_path / "a.png").write_bytes(SAMPLES[0][2])
    images = read_images(open_source(Dataset(SAMPLES, True)), 5, 1)
    assert torch.equal(images.images[0], load_image(tmp_path / "a.png", 5, 1))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_of_shards_may_be_names_numbers_or_named_beside_them(tmp_path):
    a, b = png(0), png(1)
    named = write_tar(tmp_path / "n.tar", {"1.jpg": a, "1.cls": b"rose\n", "2.webp": b, "2.json": b'{"cls": "tulip"}'})
    assert open_source(named).files == ["rose/n/1.jpg", "tulip/n/2.webp"]
    (tmp_path / "d").mkdir()
    numbered = write_tar(tmp_path / "d" / "x.tar", {"1.png": a, "1.cls": b"1", "2.png": b, "2.cls": b"0"})
    assert open_source(numbered).categories == ["0", "1"]
    (tmp_path / "d" / "classnames.txt").write_text("tulip\nrose\n")
    for source in (numbered, tmp_path / "d"):
        listing = open_source(source)
        assert listing.files == ["rose/x/1.png", "tulip/x/2.png"]
    (tmp_path / "d" / "classnames.txt").write_text("tulip\n")
    with pytest.raises(InputError, match="names 1 classes and lacks class '1'"):
        open_source(numbered)


def test_categories_of_generate_name_the_numbers_of_shards(tmp_path):
    def about(*categories):
        texts = {f"{i}.json": json.dumps({"category": name}).encode() for i, name in enumerate(categories)}
        return texts | {f"{i}.png": png(i) for i in range(3)} | {f"{i}.cls": b"%d" % (i % 2) for i in range(3)}

    named = write_tar(tmp_path / "a.tar", about("tulip", "rose", "tulip"))
    assert open_source(named).files == ["rose/a/1.png", "tulip/a/0.png", "tulip/a/2.png"]
    for name, categories in (("b", ("tulip", "rose", "iris")), ("c", ("tulip", "", "tulip"))):
        assert open_source(write_tar(tmp_path / f"{name}.tar", about(*categories))).categories == ["0", "1"]


def arrays(path: Path, n_channels: int = 3, names: object = ("rose", "iris"), **changes) -> Path:
    tensors = {
        "images": torch.arange(3 * n_channels * 16, dtype=torch.uint8).view(3, n_channels, 4, 4),
        "labels": torch.tensor([0, 1, 0]),
        "indices": torch.tensor([0, 0, 1]),
    } | changes
    save_file(tensors, path, {"categories": json.dumps(names)})
    return path


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_arrays_of_generate_are_a_source(tmp_path, n_channels):
    path = arrays(tmp_path / "images.safetensors", n_channels)
    Image.new("RGB", (8, 8)).save(tmp_path / "contact_sheet.png")
    for source in (path, tmp_path):
        listing = open_source(source)
        assert (listing.categories, listing.labels, listing.archives) == (["iris", "rose"], [0, 1, 1], (path,))
        found = read_images(listing, 4, n_channels)
        expected = load_file(path)["images"][[1, 0, 2]]
        assert torch.equal(found.images, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": torch.tensor([0, 1])},
        {"labels": torch.tensor([0, 1, 2])},
        {"images": torch.zeros(3, 3, 4, 4)},
        {"images": torch.zeros(3, 5, 4, 4, dtype=torch.uint8)},
        {"names": 3},
    ],
)
def test_arrays_that_are_none_are_refused(tmp_path, changes):
    with pytest.raises(InputError, match="holds no images with labels as generate writes them"):
        open_source(arrays(tmp_path / "images.safetensors", **changes))


def test_cut_arrays_are_refused(tmp_path):
    path = arrays(tmp_path / "images.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="or is damaged; make it again"):
        open_source(path)


def test_texts_that_differ_within_a_class_are_captions(tmp_path):
    files = {"1.png": png(0), "1.cls": b"0", "1.txt": b"a rose", "2.png": png(1), "2.cls": b"0", "2.txt": b"red"}
    with pytest.warns(SageFastWarning, match="taken for captions"):
        assert open_source(write_tar(tmp_path / "a.tar", files)).categories == ["0"]


def test_names_become_names_of_folders(tmp_path):
    rows = [("c0", "", png(0)), ("c1", "", png(1))]
    dataset = Dataset(rows, False)
    dataset.features = {"label": type("F", (), {"names": ["n/a ", "..\\x"]})()}
    assert open_source(dataset).categories == ["_._x", "n_a"]


@pytest.mark.parametrize("names", [["a/b", "a\\b"], ["rose", "rose"], ["rose", " rose "]])
def test_names_that_fall_together_are_refused(names, tmp_path):
    dataset = Dataset([("c0", "", png(0)), ("c1", "", png(1))], False)
    dataset.features = {"label": type("F", (), {"names": names})()}
    with pytest.raises(InputError, match="has classes 0 .* and 1 .*, which both have the name"):
        open_source(dataset)
    texts = {f"{i}.txt": name.encode() for i, name in enumerate(names)}
    files = {"0.png": png(0), "0.cls": b"0", "1.png": png(1), "1.cls": b"1"} | texts
    with pytest.raises(InputError, match="which both have the name"):
        open_source(write_tar(tmp_path / "a.tar", files))


@pytest.mark.parametrize("name", ["", "   ", "x" * 121])
def test_names_that_are_none_are_refused(name):
    dataset = Dataset([("c0", "", png(0))], False)
    dataset.features = {"label": type("F", (), {"names": [name]})()}
    with pytest.raises(InputError, match="a name of 1 to 120 characters"):
        open_source(dataset)


def test_a_data_set_without_columns_or_names():
    rows = [{"image": Image.new("RGB", (4, 4)), "label": np.int64(1)}, {"image": Image.new("L", (4, 4), 9), "label": 0}]
    images = read_images(open_source(rows), 4)
    assert images.categories == ["0", "1"] and images.files == ["0/00000001", "1/00000000"]
    assert images.images[:, 0, 0, 0].tolist() == [9, 0]


def test_a_data_set_that_gives_undecoded_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png(4))
    rows = [
        {"image": {"bytes": png(3), "path": None}, "label": 0},
        {"image": {"bytes": None, "path": str(tmp_path / "a.png")}, "label": 0},
    ]
    images = read_images(open_source(rows), 8)
    (tmp_path / "b.png").write_bytes(png(3))
    assert torch.equal(images.images, torch.stack([load_image(tmp_path / f"{n}.png", 8) for n in "ba"]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is empty"),
        ([{"image": None}], "has no label, an integer or a name, at 0"),
        ([{"image": None, "label": 0}, {"image": None, "label": 1.5}], "at 1, but 1.5; name its columns"),
        ([{"image": None, "label": True}], "has no label"),
        ([{"image": None, "label": 0.5}], "at 0, but 0.5; name its columns .* without a format or transform"),
        (
            {"train": [{"image": None, "label": 1}], "test": []},
            "a mapping of data sets, 'train', 'test'; give one of them",
        ),
        ([(1, 2)], "has no label"),
        (iter([]), "a streamed data set"),
        (7, "got int"),
    ],
)
def test_bad_data_sets(data, message):
    with pytest.raises(InputError, match=message):
        open_source(data)


def test_a_label_without_a_name():
    dataset = Dataset([("c3", "", png(0))], False)
    with pytest.raises(InputError, match="has 3 names of labels and a label 3"):
        open_source(dataset)


def test_images_that_a_data_set_does_not_give_are_bad_images():
    class Faulty(Dataset):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("gone")
            return {"image": 5, "label": 0} if index == 4 else super().__getitem__(index)

    rows = SAMPLES * 4
    with pytest.warns(SageFastWarning, match="2 of 60 images"):
        images = read_images(open_source(Faulty(rows, True)), 8)
    assert [line.split(": ")[1] for line in images.skipped] == [
        "the data set does not give it (OSError)",
        "expected an image of Pillow's or bytes, got int",
    ]


# --- what is broken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../c0/1.png", "/c0/1.png", "c0/../../1.png", "C:/c0/1.png", "c0\\..\\..\\1.png"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_point_outside_are_refused(name, write, tmp_path):
    path = write(tmp_path / "a.archive", image_folder() | {name: png(0)})
    with pytest.raises(InputError, match="which lies outside it"):
        open_source(path)
    assert os.listdir(tmp_path) == ["a.archive"], "nothing is unpacked"


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_doubles_after_normalisation_are_refused(write, tmp_path):
    path = write(tmp_path / "a.archive", {"c0/1.png": png(0), ".//c0/1.png": png(1)})
    with pytest.raises(InputError, match="holds 'c0/1.png' more than once; keep one"):
        open_source(path)


def test_links_in_a_tar_are_passed_over_with_a_warning(tmp_path):
    path = write_tar(tmp_path / "a.tar", image_folder())
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (
            ("c0/x.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("c0/y.png", tarfile.LNKTYPE, "c0/000.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    with pytest.warns(SageFastWarning, match="2 links in"):
        assert open_source(path).files == list(image_folder())


def test_an_encrypted_zip(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"c0/1.png": png(0)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is encrypted"):
        open_source(path)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz", "one shard"])
def test_truncated_archives_are_one_sentence(kind, tmp_path):
    path = make(kind, tmp_path)
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 3, len(content) // 2 + 7):
        path.write_bytes(content[:size])
        with pytest.raises(
            InputError, match=r"Archive '.*' is damaged or no .zip or .tar \(.*\); make or fetch it again"
        ):
            open_source(path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar"])
def test_damaged_bytes_never_give_other_than_an_input_error(kind, tmp_path):
    path = make(kind, tmp_path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with suppress(InputError, SageFastWarning):  # the warning is an error in tests
            read_images(open_source(path), 8, max_bad_share=0.0)


def test_a_damaged_member_of_a_zip_is_one_bad_image(tmp_path):
    path = write_zip(tmp_path / "a.zip", {f"c{i % 2}/{i:03d}.png": png(i) for i in range(60)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(png(17)) + 60] ^= 255
    path.write_bytes(content)
    with pytest.warns(SageFastWarning, match="1 of 60 images"):
        images = read_images(open_source(path), 8)
    assert images.skipped == ["c1/017.png: damaged in the archive (Bad CRC-32 for file 'c1/017.png')"]


@pytest.mark.parametrize("kind", ["zip", "tar", "one shard", "shards", "bytes"])
@pytest.mark.parametrize("n_bad", [1, 10])
def test_bad_images_at_one_and_at_ten_percent(kind, n_bad, tmp_path, monkeypatch):
    spoilt = [b"", b"no image", png(3)[:50]]
    samples = [(f"c{i % 2}", f"{i:03d}", spoilt[i % 3] if i < n_bad else png(i)) for i in range(100)]
    monkeypatch.setitem(globals(), "SAMPLES", samples)
    if kind == "shards":
        for k in range(2):
            write_tar(tmp_path / f"s{k}.tar", shard(samples[k::2]))
    source = tmp_path if kind == "shards" else make(kind, tmp_path)
    if n_bad == 10:
        with pytest.raises(InputError, match="10 of 100 images .* more than the 5% allowed"):
            read_images(open_source(source), 4)
    else:
        with pytest.warns(SageFastWarning, match="1 of 100 images .* are left out") as caught:
            images = read_images(open_source(source), 4)
        assert len(caught) == 1 and len(images) == 99
        assert len(images.skipped) == 1 and images.skipped[0].endswith("the file is empty")


def test_an_empty_shard(tmp_path):
    write_tar(tmp_path / "a.tar", shard(SAMPLES))
    write_tar(tmp_path / "b.tar", {"1.cls": b"0"})
    with pytest.raises(InputError, match=r"Shard '.*b.tar' holds no images; remove it"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "extra", [{}, {"9.json": b"{}"}, {"9.json": b"nonsense"}, {"9.json": b'{"label": null}'}, {"9.cls": b" \n"}]
)
def test_an_image_without_a_label(extra, tmp_path):
    path = write_tar(tmp_path / "a.tar", shard(SAMPLES) | {"9.png": png(0)} | extra)
    with pytest.raises(InputError, match=r"Sample '9' in '.*' has no label; expected 9.cls with a class"):
        open_source(path)


def test_shards_without_any_label(tmp_path):
    for k in range(2):
        write_tar(tmp_path / f"{k}.tar", image_folder())
    with pytest.raises(InputError, match="has no label"):
        open_source(tmp_path)


def test_two_images_of_one_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": png(0), "1.jpg": png(1), "1.cls": b"0"})
    with pytest.raises(InputError, match="two images of the sample '1'"):
        open_source(path)


def test_a_header_that_claims_much_is_refused_before_it_is_read(tmp_path):
    """A PAX header of 1 GiB of zeros: 1 MiB as .tar.gz, and tarfile would read it whole."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(2**20))
    with pytest.raises(InputError, match="a header of 1,073,741,824 bytes"):
        open_source(path)


def test_an_image_that_unpacks_to_more_than_allowed_is_a_bad_image(tmp_path, monkeypatch):
    for module in (archives, images):
        monkeypatch.setattr(module, "MAX_BYTES", 50_000)
    path = write_zip(tmp_path / "a.zip", image_folder() | {"c0/bomb.png": bytes(10**7)})
    with pytest.warns(SageFastWarning):
        skipped = read_images(open_source(path), 8, max_bad_share=0.1).skipped
    assert skipped == ["c0/bomb.png: more than 50,000 bytes"]


def test_no_such_data(tmp_path):
    with pytest.raises(InputError, match="does not exist; give a folder of images, a .zip or .tar, or shards"):
        open_source(tmp_path / "gone")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="is damaged or no .zip or .tar"):
        open_source(tmp_path / "a.txt")


def test_fewer_categories_than_needed(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"c0/1.png": png(0)})
    with pytest.raises(InputError, match=r"has 1 category \(c0\), expected at least 2"):
        open_source(path, min_categories=2)


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_patterns(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand_pattern(str(tmp_path / pattern))]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{b,a-{09,10}}.tar") == ["b.tar", "a-09.tar", "a-10.tar"]
    assert names("a-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{a-0[89],b}.tar") == ["a-08.tar", "a-09.tar", "b.tar"]
    for pattern in ("a-{08..11}.tar", "c-*.tar", "a-{0..3}.tar", "a-{00..99999999999}.tar"):
        with pytest.raises(InputError, match="there is no file '.*'; give shards that are there"):
            expand_pattern(str(tmp_path / pattern))
    with pytest.raises(InputError, match="count upwards"):
        expand_pattern(str(tmp_path / "a-{10..08}.tar"))


def test_a_name_with_braces_that_is_there_is_that_file(tmp_path):
    path = write_zip(tmp_path / "{a,b}.zip", image_folder())
    assert len(open_source(path)) == 15


def test_members_have_keys_and_suffixes(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.y/1.seg.PNG": b"x", "x.y/1.PNG": b"x", "x.y/1.cls": b" 3 "})
    found = [(m.name, m.key, m.suffix, m.text) for m in list_members(path, (".cls",))]
    assert found[1:] == [("x.y/1.PNG", "x.y/1", ".png", ""), ("x.y/1.cls", "x.y/1", ".cls", "3")]
    assert found[0][2] == ".seg.png"
