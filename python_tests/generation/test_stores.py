"""Targets: whole files or none, on a disk and behind fsspec, and one sentence for what a disk refuses."""

from __future__ import annotations

import errno
import os

import pytest

from sage_fast.errors import InputError
from sage_fast.generation.stores import LocalStore, make_state, open_store

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    made = open_store(tmp_path / "out" if request.param == "local" else f"memory://{tmp_path.name}/out")
    made.prepare(resume=False)
    make_state(made)
    return made


def test_files_are_written_read_listed_and_deleted(store):
    store.make_folder("rose")
    store.place("rose/a.png", b"123", 7)
    store.write("config.json", b"{}")
    with store.writer("big.tar") as file:
        file.write(b"x" * 100_000)
    store.sync()
    assert (store.read("rose/a.png"), store.size("big.tar"), store.size("rose"), store.size("none")) in (
        (b"123", 100_000, None, None),
        (b"123", 100_000, store.size("rose"), None),
    )
    assert {"rose", "config.json", "big.tar", ".sage_fast.json"} <= set(store.names(""))
    assert store.names("rose") == ["a.png"] and store.names("none") == []
    with store.reader("big.tar") as file:
        file.seek(99_990)
        assert file.read() == b"x" * 10
    for name in ("rose", "big.tar", "none"):
        store.remove(name)
    assert not {"rose", "big.tar"} & set(store.names(""))


def test_a_file_whose_writing_fails_does_not_appear(store):
    with pytest.raises(RuntimeError), store.writer("big.tar") as file:
        file.write(b"x")
        raise RuntimeError
    assert "big.tar" not in store.names("") and store.names(".sage_fast/tmp") == []


def test_an_output_with_files_is_not_taken_unless_it_is_ours(store):
    store.write("config.json", b"{}")
    with pytest.raises(InputError, match="is not empty; add --resume"):
        store.prepare(resume=False)
    store.prepare(resume=True)
    store.prepare_emptying()
    store.empty()
    assert [name for name in store.names("") if not name.startswith(".")] == []
    store.remove(".sage_fast.json")
    store.write("mine.txt", b"x") if store.local is False else (store.root / "mine.txt").write_bytes(b"x")
    with pytest.raises(InputError, match="nothing to resume"):
        store.prepare(resume=True)
    with pytest.raises(InputError, match="not made by sage_fast"):
        store.prepare_emptying()
    assert "mine.txt" in store.names("")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_what_the_disk_refuses_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, number):
    store = LocalStore(tmp_path)
    make_state(store)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        for write in (lambda: store.place("a.png", b"1", 3), lambda: store.write("b.json", b"2")):
            with pytest.raises(InputError, match=os.strerror(number)) as error:
                write()
            assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_store_that_is_gone_is_one_sentence(tmp_path):
    store = LocalStore(tmp_path / "mount")
    store.prepare(resume=False)
    make_state(store)
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    for act in (
        lambda: store.place("a.png", b"1", 3),
        lambda: store.write("b", b"2"),
        lambda: store.make_folder("rose"),
        store.sync,
        lambda: store.read("c"),
    ):
        with pytest.raises(InputError, match="No such file") as error:
            act()
        assert "make its folder" not in str(error.value)
    assert not (tmp_path / "mount").exists()


def test_errors_behind_fsspec_are_one_sentence(monkeypatch):
    store = open_store("memory://broken")

    def refuse(*_, **__):
        raise RuntimeError("no rights\nat all")

    monkeypatch.setattr(type(store.system), "pipe_file", refuse)
    with pytest.raises(InputError, match=r"'memory://broken/a.png' cannot be written \(no rights at all\)"):
        store.place("a.png", b"", 0)


def test_a_store_that_fails_in_the_middle_of_a_file_is_one_sentence(monkeypatch):
    store = open_store("memory://cut")

    def refuse(*_, **__):
        raise RuntimeError("Could not connect\nto the endpoint")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.write", refuse, raising=False)
    with (
        pytest.raises(
            InputError, match=r"'memory://cut/a.tar' cannot be written \(Could not connect to the endpoint\)"
        ),
        store.writer("a.tar") as file,
    ):
        for _ in range(100):
            file.write(b"x" * 10_000)
    monkeypatch.undo()
    assert store.names("") == [".sage_fast"] and store.names(".sage_fast/tmp") == []


@pytest.mark.parametrize("url", ["nonsense://x", "s4://bucket/x", "://x"])
def test_urls_of_unknown_kinds(url):
    with pytest.raises(InputError, match="cannot be opened") as error:
        open_store(url)
    assert "\n" not in str(error.value)


def test_a_file_url_is_a_folder_of_this_machine(tmp_path):
    assert open_store(f"file://{tmp_path}/out").root == tmp_path / "out"


def test_a_url_has_one_lock_whether_or_not_it_ends_in_a_slash():
    assert open_store("memory://a/out/").locks == open_store("memory://a/out").locks != open_store("memory://a").locks
