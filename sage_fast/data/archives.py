"""What lies in .zip and .tar files, and its bytes, without unpacking anything.

Only regular members with plain relative names count. A name that points out of the archive (absolute, ``..``) refuses the
archive; links are passed over with one warning. Memory is bounded whatever a file claims: a header takes at most 16 MiB,
an image ``images.MAX_BYTES``.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from sage_fast.data.folders import Item
from sage_fast.data.images import IMAGE_SUFFIXES, MAX_BYTES, UnreadableImage
from sage_fast.errors import InputError, SageFastWarning, reason_of

__all__ = ["Member", "list_members", "read_members"]

_COMPRESSED: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": lambda path: cast(BinaryIO, gzip.open(path)),
    b"\xfd7zXZ\0": lambda path: cast(BinaryIO, lzma.open(path)),
    b"BZh": lambda path: cast(BinaryIO, bz2.open(path)),
}
_MAX_HEADER = 2**24  # bytes that one read of tarfile may ask for
_BLOCK = 512  # bytes; one of zeros ends a .tar
_MAX_LABEL = 2**16  # bytes of a label; larger files are none


class Member(NamedTuple):
    """One file in an archive.

    ``name``: relative, with ``/``, without ``.`` parts. ``stored``: its name as the archive has it (.zip). ``offset``: where
    its bytes begin in the unpacked stream (.tar). ``text``: its content, of a file that is no image and was asked for.
    """

    archive: Path
    name: str
    stored: str
    offset: int
    size: int
    text: str = ""

    @property
    def suffix(self) -> str:
        """All that follows the first dot of the file's name, in lower case: ``.png``, ``.cls``, ``.seg.png``."""
        return self.name[len(self.key) :].lower()

    @property
    def key(self) -> str:
        """The name up to the first dot after the last ``/``."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]


def list_members(path: Path, texts: Sequence[str] = ()) -> list[Member]:
    """The images in an archive and, of a .tar, the files whose suffix is one of ``texts`` with their content, in stored order.

    Raises:
        InputError: no archive, a damaged or encrypted one, or a name that points out of it.
    """
    start = _first_bytes(path)
    try:
        return _list_zip(path) if start.startswith(b"PK") else _list_tar(path, start, tuple(texts))
    except InputError:
        raise
    except Exception as error:  # readers meet damaged files with almost any exception type
        raise InputError(
            f"Archive {str(path)!r} is damaged or no .zip or .tar ({reason_of(error)}); make or fetch it again."
        ) from error


def read_members(members: dict[str, Member]) -> Callable[[Sequence[str]], Generator[Item, None, None]]:
    """An ``ImageFolder.reader``: the bytes of members by name, archive after archive in the order they are stored in."""

    def read(files: Sequence[str]) -> Generator[Item, None, None]:
        wanted = [(i, members[file]) for i, file in enumerate(files)]
        wanted.sort(key=lambda entry: (entry[1].archive, entry[1].offset))
        for path, here in groupby(wanted, key=lambda entry: entry[1].archive):
            try:
                yield from (_read_zip if _first_bytes(path).startswith(b"PK") else _read_tar)(path, here)
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"Archive {str(path)!r} has changed or its disk fails ({reason_of(error)}); start again."
                ) from error

    return read


class _Bounded(io.RawIOBase):
    """A stream that refuses to read much at once: tarfile believes whatever length a header gives."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()


def _list_zip(path: Path) -> list[Member]:
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir() and _counts(info.filename, ())]
    locked = [info.filename for info in infos if info.flag_bits & 1]
    if locked:
        raise InputError(f"Archive {str(path)!r} is encrypted ({locked[0]}); give one without a password.")
    return [
        Member(path, _plain(info.filename, path), info.filename, info.header_offset, info.file_size) for info in infos
    ]


def _list_tar(path: Path, start: bytes, texts: tuple[str, ...]) -> list[Member]:
    found, links = [], 0
    with _open_tar(path, start) as stream, tarfile.open(fileobj=_Bounded(stream), mode="r:") as archive:
        for info in archive:
            if not _counts(info.name, texts):
                continue
            if not info.isreg() or info.issparse():
                links += not info.isdir()
                continue
            member = Member(path, _plain(info.name, path), info.name, info.offset_data, info.size)
            if member.suffix in texts and info.size <= _MAX_LABEL:
                stream.seek(info.offset_data)
                member = member._replace(text=stream.read(info.size).decode("utf-8", "replace").strip())
            found.append(member)
        stream.seek(archive.offset)
        if stream.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a cut or damaged header for the end
            raise tarfile.ReadError(f"cut off or damaged at byte {archive.offset:,}")
    if links:
        remedy = "archive the files themselves (tar --dereference --hard-dereference)"
        warnings.warn(f"{links} links in {str(path)!r} are passed over; {remedy}.", SageFastWarning, stacklevel=4)
    return found


def _read_zip(path: Path, wanted: Iterable[tuple[int, Member]]) -> Generator[Item, None, None]:
    with zipfile.ZipFile(path) as archive:
        for i, member in wanted:
            try:
                with archive.open(member.stored) as file:
                    content = file.read(MAX_BYTES + 1)  # one more than is allowed: decode says so
            except Exception as error:  # damaged, or a method of compression that is not there
                yield i, UnreadableImage(member.name, f"damaged in the archive ({reason_of(error)})")
            else:
                yield i, content


def _read_tar(path: Path, wanted: Iterable[tuple[int, Member]]) -> Generator[Item, None, None]:
    with _open_tar(path, _first_bytes(path)) as stream:
        for i, member in wanted:
            stream.seek(member.offset)  # forward only: the members come in their order
            content = stream.read(min(member.size, MAX_BYTES + 1))
            if len(content) < min(member.size, MAX_BYTES + 1):
                yield i, UnreadableImage(member.name, "cut off in the archive")
            else:
                yield i, content


def _open_tar(path: Path, start: bytes) -> BinaryIO:
    opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
    return path.open("rb") if opener is None else opener(path)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_BLOCK)
    except OSError as error:
        raise InputError(f"Archive {str(path)!r} cannot be read ({error.strerror}).") from error


def _counts(name: str, texts: tuple[str, ...]) -> bool:
    """Whether a member is an image or a text that was asked for, and not hidden."""
    parts = name.replace("\\", "/").split("/")
    hidden = any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)
    return not hidden and parts[-1].lower().endswith((*IMAGE_SUFFIXES, *texts))


def _plain(name: str, path: Path) -> str:
    """The member's name with ``/`` and without empty and ``.`` parts."""
    slashed = name.replace("\\", "/")
    parts = [part for part in slashed.split("/") if part not in ("", ".")]
    if slashed.startswith("/") or ".." in parts or re.match("[A-Za-z]:", slashed) or "\0" in name or not parts:
        raise InputError(f"Archive {str(path)!r} names {name!r}, which lies outside it; make the archive anew.")
    return "/".join(parts)
