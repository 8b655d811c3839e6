"""Split files and the choice of shots."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sage_fast.data.folders import ImageFolder, ImageSet
from sage_fast.data.images import UnreadableImage
from sage_fast.data.sources import open_source
from sage_fast.data.splits import Split, draw_split, hold_out, load_split, split_seen_unseen, take_shots, write_split
from sage_fast.errors import InputError, SageFastWarning

SHARED = Path(__file__).parents[3] / "shared" / "data" / "splits"


def folder(counts: dict[str, int]) -> ImageFolder:
    names = sorted(counts)
    files = [f"{name}/{i:03d}.png" for name in names for i in range(counts[name])]
    labels = [names.index(name) for name in names for _ in range(counts[name])]
    return ImageFolder(Path("root"), names, files, labels)


def image_set(counts: dict[str, int]) -> ImageSet:
    listed = folder(counts)
    images = torch.arange(len(listed), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(images, torch.tensor(listed.labels), listed.categories, listed.files, [])


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_load_split(tmp_path):
    split = load_split(write(tmp_path / "s.json", {"seen": ["a", "b"], "unseen": ["c"], "counts": {}, "mode": 1}))
    assert (split.name, split.seen, split.unseen) == ("s", ("a", "b"), ("c",))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not on this machine")
def test_every_shared_split_loads():
    sizes = {path.stem: load_split(path) for path in sorted(SHARED.glob("*.json"))}
    assert (len(sizes["flowers102_128"].seen), len(sizes["flowers102_128"].unseen)) == (85, 13)
    assert all(split.name == name for name, split in sizes.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seen": ["a"]}, "two lists"),
        ({"seen": [], "unseen": ["a"]}, "two lists"),
        ({"seen": "ab", "unseen": ["a"]}, "two lists"),
        ({"seen": [1], "unseen": ["a"]}, "two lists"),
        (["a"], "two lists"),
        ({"seen": ["a", "b"], "unseen": ["b"]}, "names 'b' more than once"),
        ({"seen": ["a", "a"], "unseen": ["b"]}, "names 'a' more than once"),
    ],
)
def test_bad_split(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load_split(write(tmp_path / "s.json", content))


def test_split_file_that_is_none(tmp_path):
    with pytest.raises(InputError, match="cannot be opened"):
        load_split(tmp_path / "gone.json")
    (tmp_path / "s.json").write_bytes(b"\xff\xfe not json")
    with pytest.raises(InputError, match="is not JSON"):
        load_split(tmp_path / "s.json")


@pytest.mark.parametrize("make", [folder, image_set])
def test_split_seen_unseen(tmp_path, make):
    split = load_split(write(tmp_path / "s.json", {"seen": ["d", "a"], "unseen": ["b"]}))
    seen, unseen = split_seen_unseen(make({"a": 2, "b": 3, "c": 4, "d": 5}), split)
    assert (seen.categories, len(seen)) == (["a", "d"], 7)
    assert (unseen.categories, len(unseen)) == (["b"], 3)
    with pytest.raises(InputError, match="lacks b"):
        split_seen_unseen(make({"a": 2, "d": 3}), split)


@pytest.mark.parametrize("make", [folder, image_set])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_shots_and_real_are_a_partition(make, k):
    images = make({"a": 5, "b": 9, "c": 20})
    shots, real = take_shots(images, k, seed=3)
    assert [int(label) for label in shots.labels] == [0] * k + [1] * k + [2] * k
    assert sorted(shots.files + real.files) == sorted(images.files)
    assert shots.categories == real.categories == images.categories


def test_shots_carry_their_pixels():
    images = image_set({"a": 5, "b": 9})
    shots, real = take_shots(images, 2)
    for part in (shots, real):
        for name, pixel in zip(part.files, part.images.flatten().tolist()):
            assert images.files[pixel] == name


def test_shots_are_fixed_by_the_seed():
    images = folder({"a": 50, "b": 50})
    assert take_shots(images, 3, 7)[0].files == take_shots(images, 3, 7)[0].files
    assert len({tuple(take_shots(images, 3, seed)[0].files) for seed in range(10)}) == 10


def test_shots_are_the_same_on_every_machine():
    assert take_shots(folder({"a": 50, "b": 50}), 2, 0)[0].files == ["a/048.png", "a/029.png", "b/041.png", "b/039.png"]


def test_one_shot_is_contained_in_three():
    images = folder({"a": 30})
    assert take_shots(images, 3)[0].files[:1] == take_shots(images, 1)[0].files


def test_shots_do_not_depend_on_other_categories_or_the_order():
    alone = take_shots(folder({"b": 20}), 3)[0].files
    images = folder({"a": 5, "b": 20})
    assert take_shots(images, 3)[0].files[3:] == alone
    turned = images.subset(list(reversed(range(len(images)))))
    assert take_shots(turned, 3)[0].files[3:] == alone


def test_fewer_images_than_shots():
    images = folder({"a": 5, "b": 2})
    with pytest.raises(InputError, match=r"'b' has fewer images \(2\) than shots \(3\); add images or ask for fewer"):
        take_shots(images, 3)
    with pytest.raises(InputError, match="at least 1, got 0"):
        take_shots(images, 0)


def test_held_out_images_are_a_share_and_the_rest_is_trained_on():
    images = image_set({"a": 300, "b": 100})
    training, held_out = hold_out(images, 0.05)
    assert (len(training), len(held_out)) == (380, 20)
    assert sorted(training.files + held_out.files) == images.files
    assert training.files == sorted(training.files) and held_out.files == sorted(held_out.files)
    assert held_out.images.flatten().tolist() == [images.files.index(f) % 256 for f in held_out.files]
    assert len(hold_out(images, 0.5, most=30)[1]) == 30


def test_held_out_images_depend_on_names_and_seed_alone():
    images = folder({"a": 50, "b": 50})
    held_out = hold_out(images, 0.1)[1]
    turned = images.subset(list(reversed(range(len(images)))))
    assert sorted(hold_out(turned, 0.1)[1].files) == held_out.files
    assert len({tuple(hold_out(images, 0.1, seed=seed)[1].files) for seed in range(10)}) == 10
    assert hold_out(folder({"a": 30}), 0.1)[1].files == ["a/001.png", "a/015.png", "a/029.png"]


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01, 0.999])
def test_a_share_leaves_images_in_both_parts(share):
    with pytest.raises(InputError, match=rf"leave images in both parts, got {share} of 20 images"):
        hold_out(folder({"a": 20}), share)


def written(root: Path, counts: dict[str, int]) -> Path:
    for file in folder(counts).files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    return root


def listed(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}


@pytest.mark.parametrize("packed", [False, True])
def test_a_split_is_written_byte_for_byte(tmp_path, packed):
    counts = {"rose": 4, "été 1": 5, "lily": 3, "桜": 6}
    data = written(tmp_path / "data", counts)
    before = listed(data)
    if packed:
        data = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "data"))
    found = write_split(open_source(data), Split("x", ("lily", "rose"), ("été 1", "桜")), tmp_path / "out", 2, seed=1)
    assert found == {"seen": 7, "shots": 4, "real": 7}
    out = {name: listed(tmp_path / "out" / name) for name in found}
    assert out["seen"] | out["shots"] | out["real"] == before
    assert {name.split("/")[0] for name in out["seen"]} == {"lily", "rose"}
    shots, real = take_shots(folder({"été 1": 5, "桜": 6}), 2, seed=1)
    assert sorted(out["shots"]) == sorted(shots.files) and sorted(out["real"]) == sorted(real.files)
    assert load_split(tmp_path / "out" / "split.json").unseen == ("été 1", "桜")


def test_copies_of_what_is_learned_or_generated_from_are_not_compared_with(tmp_path):
    data = written(tmp_path / "data", {"a": 3, "b": 3, "c": 5})
    shot = take_shots(folder({"c": 5}), 1)[0].files[0]
    others = sorted(path for path in (data / "c").iterdir() if path.name != Path(shot).name)
    others[0].write_bytes((data / shot).read_bytes())
    others[1].write_bytes((data / "a" / "001.png").read_bytes())
    split = Split("x", ("a", "b"), ("c",))
    with pytest.warns(SageFastWarning, match="real/: 2 images of unseen categories, with the bytes of one in seen/"):
        found = write_split(open_source(data), split, tmp_path / "out", 1)
    assert found == {"seen": 6, "shots": 1, "real": 2}
    assert sorted(listed(tmp_path / "out" / "real")) == [f"c/{path.name}" for path in others[2:]]
    for path in others[2:]:
        path.write_bytes((data / shot).read_bytes())
    with pytest.raises(InputError, match="No image of 'c' is left beside its 1 shot"):
        write_split(open_source(data), split, tmp_path / "none", 1)
    assert not list((tmp_path / "none").iterdir())


def test_a_split_that_cannot_be_written_leaves_nothing(tmp_path):
    data, split = open_source(written(tmp_path / "data", {"a": 3, "b": 3, "c": 3})), Split("x", ("a", "b"), ("c",))
    for words, n_shots, to in (("take fewer shots", 3, "out"), ("fewer images", 4, "out"), ("overlap", 1, "data/out")):
        with pytest.raises(InputError, match=words):
            write_split(data, split, tmp_path / to, n_shots)
        assert not (tmp_path / to).exists()
    lost = replace(data, reader=lambda files: ((i, UnreadableImage(files[i], "cut off")) for i in range(len(files))))
    with pytest.raises(InputError, match="cannot be split at '.*': cut off; give other images"):
        write_split(lost, split, tmp_path / "out", 1)
    assert not list((tmp_path / "out").iterdir())
    write_split(data, split, tmp_path / "out", 1)
    with pytest.raises(InputError, match="not empty; give another folder"):
        write_split(data, split, tmp_path / "out", 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.timeout(60)
def test_a_pipe_among_the_images_is_named_not_waited_at(tmp_path):
    data = written(tmp_path / "data", {"a": 3, "b": 3, "c": 3})
    os.mkfifo(data / "b" / "z.png")
    with pytest.raises(InputError, match=r"cannot be split at 'b/z.png': not a regular file; give other images"):
        write_split(open_source(data), Split("x", ("a", "b"), ("c",)), tmp_path / "out", 1)


def test_unseen_categories_are_drawn_by_seed_and_name():
    names = [f"c{i}" for i in range(30)]
    drawn = draw_split(names, seed=3)
    assert len(drawn.unseen) == 3 and sorted(drawn.seen + drawn.unseen) == sorted(names)
    assert draw_split(names[::-1], seed=3) == drawn != draw_split(names, seed=4)
    assert set(drawn.unseen) <= set(draw_split(names, 10, seed=3).unseen)
    for n in (0, 29):
        with pytest.raises(InputError, match="at least two of 30 categories seen"):
            draw_split(names, n)


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    data = open_source(written(tmp_path / "data", {"a": 3, "b": 3, "c": 3}))

    def full(path, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"File '.*out/seen/a/.*' cannot be written \(No space left on device\)"):
        write_split(data, Split("s", ("a", "b"), ("c",)), tmp_path / "out", 1)
