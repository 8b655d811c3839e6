"""Where files go: a folder of this machine, or any URL that fsspec knows.

A file is whole or absent under its name. What a disk or a network refuses is one sentence (:class:`InputError`).
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from sage_fast.data.writers import LOCK, MARKER, SETUP_LOCK, atomic_write, cannot_write, prepare_output, write_remedy
from sage_fast.errors import InputError

__all__ = ["STATE", "FsspecStore", "LocalStore", "Store", "make_state", "open_store"]

STATE = ".sage_fast"
"""Folder in the output of what is only needed until it is complete."""

_TEMPORARY = f"{STATE}/tmp"
_BUFFER = 1 << 17  # bytes that are written at a time


class LocalStore:
    """A folder of this machine; names are paths in it, with ``/``."""

    local = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._temporary = str(self.root / _TEMPORARY)

    def __str__(self) -> str:
        return str(self.root)

    @property
    def locks(self) -> tuple[Path, Path, Path]:
        """The output's lock, the folder of the ranks' own, and the lock for what one rank does at a time."""
        return self.root / LOCK, self.root / STATE, self.root / SETUP_LOCK

    def prepare(self, resume: bool) -> None:
        """Make the folder ready; see :func:`sage_fast.data.writers.prepare_output`."""
        prepare_output(self.root, resume)

    def prepare_emptying(self) -> None:
        """Make the folder, or refuse one that is not ours to empty."""
        if self.size(MARKER) is None:
            prepare_output(self.root, overwrite=True)

    def empty(self) -> None:
        """Delete what an earlier run left, and nothing else."""
        prepare_output(self.root, overwrite=True)

    def make_folder(self, name: str) -> None:
        """Make a folder unless it is there; the one it lies in must be."""
        try:
            (self.root / name).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"Folder {str(self.root / name)!r} cannot be made ({error.strerror}); {write_remedy(error, True)}."
            ) from error

    def place(self, name: str, data: bytes, number: int) -> None:
        """Write a file that is whole or absent, but durable only after :meth:`sync`; ``number`` is its own."""
        temporary = f"{self._temporary}/{number}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(descriptor, left) :]
            finally:
                os.close(descriptor)
            os.replace(temporary, f"{self.root}/{name}")
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise cannot_write(self.root / name, error, resumable=True) from error

    @contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """A binary file that appears, durable, when the block ends well."""
        temporary = f"{self._temporary}/{name.replace('/', '-')}"
        with atomic_write(self.root / name, temporary=temporary, resumable=True) as file:
            yield file

    def write(self, name: str, data: bytes) -> None:
        """Write a file that is whole or absent, and durable."""
        with self.writer(name) as file:
            file.write(data)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        try:
            descriptor = os.open(self.root, os.O_RDONLY)
            try:
                _sync_disk_of(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise cannot_write(self.root, error, resumable=True) from error

    def reader(self, name: str) -> BinaryIO:
        """A binary file to read and seek in."""
        try:
            return open(self.root / name, "rb")
        except OSError as error:
            raise _cannot_read(str(self.root / name), error.strerror) from error

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise _cannot_read(str(self.root / name), error.strerror) from error

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""
        try:
            status = os.stat(f"{self.root}/{name}")
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def names(self, folder: str) -> list[str]:
        """What lies in a folder; nothing where there is none."""
        try:
            return os.listdir(self.root / folder)
        except OSError:
            return []

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with what is in it, unless it is gone."""
        path = self.root / name
        try:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"File {str(path)!r} cannot be deleted ({error.strerror}); delete it yourself.") from error


class FsspecStore:
    """A folder of any file system that fsspec knows. What a store of objects takes is there at once and whole."""

    local = False

    def __init__(self, url: str, system: Any, root: str) -> None:
        self.url, self.system, self.root = url, system, root.rstrip("/")
        self._made: set[str] = set()

    def __str__(self) -> str:
        return self.url

    @property
    def locks(self) -> tuple[Path, Path, Path]:
        """Files of this machine: runs of another are not told apart, and write the same bytes."""
        user = os.getuid() if hasattr(os, "getuid") else 0
        name = hashlib.sha256(self.url.rstrip("/").encode()).hexdigest()[:24]
        folder = Path(tempfile.gettempdir()) / f"sage_fast-{user}" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / LOCK, folder, folder / SETUP_LOCK

    def prepare(self, resume: bool) -> None:
        """Refuse a folder with files, unless a run is to go on in it."""
        visible = [name for name in self.names("") if not name.startswith(".")]
        if visible and not resume:
            raise InputError(
                f"Output {self.url!r} is not empty; add --resume to go on in it, --overwrite to replace its contents, "
                "or give another folder."
            )
        if visible and self.size(MARKER) is None:
            raise InputError(
                f"Output {self.url!r} holds nothing to resume; give that of the earlier run or an empty one."
            )
        self.write(MARKER, b'{\n  "made_by": "sage_fast"\n}\n')

    def prepare_emptying(self) -> None:
        """Refuse a folder that is not ours to empty."""
        if self.names("") and self.size(MARKER) is None:
            raise InputError(
                f"Output {self.url!r} was not made by sage_fast (no {MARKER} in it), so --overwrite leaves it alone; "
                "empty it yourself or give another folder."
            )

    def empty(self) -> None:
        """Delete what an earlier run left."""
        with self._errors("emptied", ""):
            for name in self.names(""):
                self.system.rm(self._path(name), recursive=True)
            self._made.clear()
        self.prepare(resume=False)

    def make_folder(self, name: str) -> None:
        """Make a folder unless it is there."""
        with self._errors("made", name):
            self.system.makedirs(self._path(name), exist_ok=True)

    def place(self, name: str, data: bytes, number: int) -> None:
        """Write a file."""
        with self._errors("written", name):
            self._make_parent(name)
            self.system.pipe_file(self._path(name), data)

    @contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """A binary file that appears when the block ends well."""
        temporary = f"{_TEMPORARY}/{name.replace('/', '-')}"
        self._make_parent(temporary)
        with self._errors("written", name):
            file = self.system.open(self._path(temporary), "wb")
        try:
            with io.BufferedWriter(_Written(file, partial(self._errors, "written", name)), _BUFFER) as out:
                yield out
        except BaseException:
            with suppress(Exception):
                file.close()
                self.system.rm_file(self._path(temporary))
            raise
        with self._errors("written", name):
            file.close()
            self._make_parent(name)
            self.system.mv(self._path(temporary), self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        self.place(name, data, 0)

    def sync(self) -> None:
        """What was written is there already."""

    def reader(self, name: str) -> BinaryIO:
        """A binary file to read and seek in."""
        with self._errors("read", name):
            return cast(BinaryIO, self.system.open(self._path(name), "rb"))

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        with self._errors("read", name):
            return bytes(self.system.cat_file(self._path(name)))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""
        try:
            found = self.system.info(self._path(name))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._refused("read", name, error) from error
        return found["size"] if found["type"] == "file" else None

    def names(self, folder: str) -> list[str]:
        """What lies in a folder; nothing where there is none."""
        try:
            listed = self.system.ls(self._path(folder), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise self._refused("listed", folder, error) from error
        return [path.rstrip("/").rpartition("/")[2] for path in listed if path.rstrip("/") != self._path(folder)]

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with what is in it, unless it is gone."""
        with self._errors("deleted", name), suppress(FileNotFoundError):
            self.system.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _make_parent(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        if folder not in self._made:
            self.make_folder(folder)
            self._made.add(folder)

    @contextmanager
    def _errors(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # the systems behind fsspec have errors of their own
            raise self._refused(what, name, error) from error

    def _refused(self, what: str, name: str, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        where = f"{self.url.rstrip('/')}/{name}"
        goes_on = ", and the same command with --resume goes on" if what in ("made", "written") else ""
        return InputError(
            f"{where!r} cannot be {what} ({reason}); check the address, the rights and the free space{goes_on}."
        )


class _Written(io.RawIOBase):
    """A file behind a URL that is written to; closing it leaves the file itself open."""

    def __init__(self, file: Any, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._file, self._errors = file, errors

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with self._errors():
            self._file.write(bytes(data))
        return len(data)


Store = LocalStore | FsspecStore


def open_store(out: str | os.PathLike[str]) -> Store:
    """The store of a path or URL.

    Raises:
        InputError: a URL of a kind that fsspec does not know, or whose package is not installed.
    """
    text = os.fspath(out)
    if "://" not in text:
        return LocalStore(text)
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise InputError(f"Output {text!r} needs fsspec; pip install 'sage_fast[remote]', or give a folder.") from error
    try:
        if text.startswith(":"):
            raise ValueError("no kind of file system is named")
        system, root = url_to_fs(text)
    except Exception as error:  # the systems behind fsspec have errors of their own
        raise InputError(
            f"Output {text!r} cannot be opened ({' '.join(str(error).split())}); give a folder."
        ) from error
    kinds = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    return LocalStore(root) if "file" in kinds else FsspecStore(text, system, root)


def make_state(store: Store) -> None:
    """Make the folders of what is needed until the output is complete."""
    for folder in ("", "/tmp", "/parts", "/pieces"):
        store.make_folder(f"{STATE}{folder}")


@cache
def _syncfs() -> Any:
    """The system's syncfs; None where it has none."""
    return getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if os.name == "posix" else None


def _sync_disk_of(descriptor: int) -> None:
    """One call for all files of a shard: synchronising each by itself takes milliseconds an image."""
    call = _syncfs()
    if call is None:
        os.sync()
    elif call(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _cannot_read(path: str, reason: str | None) -> InputError:
    return InputError(f"File {path!r} cannot be read ({reason or 'no reason given'}); the output may be incomplete.")
