"""Tables of latents: what they accept, and that a file gives back what went in or one sentence."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import InputError


def table(n: int = 7, files: bool = True) -> LatentTable:
    w_plus = torch.randn(n, 4, 6, generator=torch.Generator().manual_seed(0))
    names = [f"Blüte/{i}.png" for i in range(n)] if files else None
    return LatentTable(w_plus, torch.arange(n) % 3, ["Blüte", "a b", "\udcff"], names)


@pytest.mark.parametrize("files", [True, False])
def test_round_trip(tmp_path, files):
    before = table(files=files)
    before.save(tmp_path / "codes.safetensors")
    after = LatentTable.load(tmp_path / "codes.safetensors")
    assert torch.equal(after.w_plus, before.w_plus)
    assert torch.equal(after.labels, before.labels)
    assert (after.categories, after.files) == (before.categories, before.files)
    assert os.listdir(tmp_path) == ["codes.safetensors"]


def test_half_size(tmp_path):
    before = table(500)
    before.save(tmp_path / "full")
    before.save(tmp_path / "half", dtype=torch.float16)
    after = LatentTable.load(tmp_path / "half")
    assert after.w_plus.dtype == torch.float32
    assert torch.equal(after.w_plus, before.w_plus.half().float())
    assert (tmp_path / "full").stat().st_size - (tmp_path / "half").stat().st_size == 500 * 4 * 6 * 2
    with pytest.raises(InputError, match="float16's largest"):
        LatentTable(torch.full((1, 1, 1), 1e5), torch.zeros(1, dtype=torch.int64), ["a"]).save(
            tmp_path / "x", torch.half
        )
    with pytest.raises(InputError, match="dtype must be"):
        before.save(tmp_path / "x", dtype=torch.bfloat16)
    assert not (tmp_path / "x").exists()


def test_equal_tables_give_equal_bytes(tmp_path):
    for name in "ab":
        table().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_was_loaded_outlives_the_file(tmp_path):
    table().save(tmp_path / "a")
    loaded = LatentTable.load(tmp_path / "a")
    os.truncate(tmp_path / "a", 0)
    assert torch.equal(loaded.w_plus, table().w_plus)


def test_empty_and_non_contiguous(tmp_path):
    empty = table().subset([])
    empty.save(tmp_path / "a")
    assert LatentTable.load(tmp_path / "a").w_plus.shape == (0, 4, 6)
    turned = LatentTable(torch.randn(4, 6, 7).permute(2, 0, 1), table().labels, table().categories)
    turned.save(tmp_path / "b")
    assert torch.equal(LatentTable.load(tmp_path / "b").w_plus, turned.w_plus)


def test_subset():
    mask = torch.arange(len(table())) == 5
    assert torch.equal(table().subset(mask).w_plus, table().w_plus[5:6])
    part = table().subset(torch.tensor([5, 1]))
    assert torch.equal(part.w_plus, table().w_plus[[5, 1]])
    assert part.labels.tolist() == [2, 1]
    assert part.files == ["Blüte/5.png", "Blüte/1.png"]
    assert part.categories == table().categories
    assert len(part) == 2


W, Y = torch.zeros(3, 4, 6), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W[0], Y, ["a", "b"]), InputError, r"shapes \[N, L, D\]"),
        ((W, Y[:2], ["a", "b"]), InputError, r"shapes \[N, L, D\] and \[N\], got \[3, 4, 6\] and \[2\]"),
        ((W, Y, ["a"]), InputError, "labels must be 0 to 0"),
        ((W, Y - 1, ["a", "b"]), InputError, "labels must be 0 to 1"),
        ((W, Y, ["a", "a"]), InputError, "each category once"),
        ((W, Y, ["a", "b"], ["x"]), InputError, "each of the 3 latents, got 1"),
        ((W + torch.nan, Y, ["a", "b"]), InputError, "not finite"),
        ((W.double(), Y, ["a", "b"]), TypeError, "float32 tensor, got torch.float64"),
        ((W.numpy(), Y, ["a", "b"]), TypeError, "float32 tensor"),
        ((W, Y.int(), ["a", "b"]), TypeError, "int64 tensor, got torch.int32"),
        ((W, Y, ("a", "b")), TypeError, "categories must be a list of str"),
        ((W, Y, ["a", 1]), TypeError, "categories must be a list of str"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LatentTable(*arguments)


def test_truncated_at_every_tenth(tmp_path):
    table().save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    for tenth in range(10):
        (tmp_path / "b").write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(InputError, match="truncated or damaged .*; write it again"):
            LatentTable.load(tmp_path / "b")


def test_missing_and_foreign(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        LatentTable.load(tmp_path / "gone")
    with pytest.raises(InputError, match="does not exist"):
        LatentTable.load(tmp_path)
    (tmp_path / "text").write_text("hello, this is no table" * 20)
    with pytest.raises(InputError, match="truncated or damaged"):
        LatentTable.load(tmp_path / "text")
    save_file({"w": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(InputError, match="is not a table of latents"):
        LatentTable.load(tmp_path / "other")


@pytest.mark.parametrize(
    "about",
    [
        "{}",
        "[]",
        '{"format": "other", "version": 1}',
        '{"format": "sage_fast.latent_table", "version": 2, "categories": [], "files": null}',
        '{"format": "sage_fast.latent_table", "version": 1, "categories": "ab", "files": null}',
        '{"format": "sage_fast.latent_table", "version": 1, "categories": ["a"], "files": null}',
        '{"format": "sage_fast.latent_table", "version": 1, "categories": ["a", "b"], "files": ["x"]}',
    ],
)
def test_another_table(tmp_path, about):
    save_file({"w_plus": W, "labels": Y}, tmp_path / "a", metadata={"sage_fast": about})
    with pytest.raises(InputError, match="is not a table of latents of this version"):
        LatentTable.load(tmp_path / "a")


def test_a_full_disk_keeps_the_older_table(tmp_path, monkeypatch):
    table().save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match="No space left on device"):
        table(9).save(tmp_path / "a")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]
