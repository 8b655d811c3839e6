"""The kinds of file that checkpoints come in: how each lies on disk, and the plain tree in it.

Every ``read_...`` takes an open file and its size, and raises :class:`~sage_fast.models.unpickling.Refusal` or one of
:data:`DAMAGE`. Tensors are read straight into their own memory.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sage_fast.models.pickled_values import (
    BUILD_RULES,
    LEAVES,
    RULES,
    STORAGE_DTYPES,
    Storage,
)
from sage_fast.models.unpickling import (
    Budget,
    Global,
    PickleReader,
    Refusal,
    Rule,
    Span,
    check_plain,
    open_span,
)

__all__ = ["DAMAGE", "container_of", "read_container"]

# what the standard library and NumPy raise for damaged files
DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, MemoryError)

TORCH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # 0x1950A86A20F9469CFC6C, pickled
MAX_DIRECTORY = 8 << 20  # bytes of a zip file's directory
MAX_HEADER = 16 << 20  # bytes of a safetensors header


def container_of(head: bytes, size: int) -> str | None:
    """The kind of a file, from its first 16 bytes and its size; None when it is none of them."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(TORCH_MAGIC):
        return "torch-legacy"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    return None


def read_container(raw: BinaryIO, size: int) -> tuple[str, Any, dict[str, str]]:
    """Kind, tree and (safetensors) metadata of an open file.

    Raises:
        Refusal: it is no file of weights, or holds what no such file needs.
    """
    raw.seek(0)
    head = raw.read(16)
    kind = container_of(head, size)
    whole, budget = Span(raw, 0, size), Budget(size)
    if kind == "pickle":
        return kind, _plain(_pickle(whole, budget).load()), {}
    if kind == "torch-legacy":
        return kind, _plain(_read_legacy(whole, budget, RULES)), {}
    if kind == "zip":
        return _read_zip(whole, budget)
    raise Refusal("is empty" if not size else "is no file of weights (no pickle, zip, safetensors or NumPy file)")


def _plain(tree: Any) -> Any:
    check_plain(tree, LEAVES)
    return tree


def _pickle(span: Span, budget: Budget) -> PickleReader:
    return PickleReader(span, budget, {**RULES, ("torch.storage", "_load_from_bytes"): _load_from_bytes}, BUILD_RULES)


def _load_from_bytes(reader: PickleReader, args: tuple[Any, ...]) -> Storage:
    """What ``torch.storage._load_from_bytes`` stands for: the one storage in a torch file within the pickle."""
    (data,) = args
    if type(data) is bytes:
        data = Span(io.BytesIO(data), 0, len(data))
    if type(data) is not Span:
        raise Refusal("loads a storage from something that is no bytes")
    with open_span(data) as file:
        head = file.read(16)
    if head.startswith(TORCH_MAGIC):
        storage = _read_legacy(data, reader.budget, RULES)
    elif head.startswith(b"PK\x03\x04"):
        storage = _read_torch_zip(data, reader.budget)
    else:
        raise Refusal("holds a tensor whose bytes are no torch file")
    if type(storage) is not Storage:
        raise Refusal("holds a tensor whose bytes are no storage")
    return storage


# torch, before 1.6


def _read_legacy(span: Span, budget: Budget, rules: Mapping[tuple[str, str], Rule]) -> Any:
    """Magic number, protocol, system, the pickle, the keys of its storages, and those: a count and the elements each."""
    storages: dict[str, Storage] = {}

    def persistent(identifier: Any) -> Any:
        if type(identifier) is tuple and len(identifier) == 4 and identifier[0] == "module":
            return identifier[1]  # a class, and its source text, which is left out
        key, dtype, n_elements, view = _storage_identity(identifier)
        if key not in storages:
            _expect_room(n_elements, dtype, budget)
            storages[key] = Storage(dtype, torch.zeros(n_elements * dtype.itemsize, dtype=torch.uint8))
        return _view_of(storages[key], view)

    at = Span(span.raw, span.start + len(TORCH_MAGIC), span.stop)
    for _ in range(2):
        header = PickleReader(at, budget, {}, {})
        value = header.load()
        if type(value) is dict and value.get("little_endian") is False:
            raise Refusal("was written on a big-endian machine")
        at = Span(span.raw, header.end, span.stop)
    body = PickleReader(at, budget, rules, BUILD_RULES, persistent)
    content = body.load()
    names = PickleReader(Span(span.raw, body.end, span.stop), budget, {}, {})
    keys = names.load()
    if type(keys) is not list or sorted(map(str, keys)) != sorted(storages):
        raise Refusal("holds other storages than its tensors need")
    _fill(storages, keys, Span(span.raw, names.end, span.stop))
    return content


def _fill(storages: dict[str, Storage], keys: list[str], span: Span) -> None:
    """Reads the storages, one behind the other."""
    with open_span(span) as file:
        for key in keys:
            storage = storages[key]
            count = file.read(8)
            if len(count) != 8 or int.from_bytes(count, "little") * storage.dtype.itemsize != len(storage.raw):
                raise Refusal("is truncated or holds a storage of another size than its tensors need")
            if len(storage.raw) and file.readinto(storage.raw.numpy().data) != len(storage.raw):
                raise Refusal("ends in the middle of its data")


def _storage_identity(identifier: Any) -> tuple[str, torch.dtype, int, Any]:
    """Key, dtype, number of elements and (legacy) view of a persistent id."""
    if type(identifier) is not tuple or len(identifier) not in (5, 6) or identifier[0] != "storage":
        raise Refusal("refers to data outside the pickle that is no storage")
    cls, key, _, n_elements = identifier[1:5]
    if type(cls) is not Global or cls.name not in STORAGE_DTYPES or cls.module.split(".")[0] != "torch":
        raise Refusal("refers to a storage of a type that is not known")
    if type(key) is not str or type(n_elements) is not int or not 0 <= n_elements < 1 << 48:
        raise Refusal("refers to a storage without a key and a size")
    return key, STORAGE_DTYPES[cls.name], n_elements, identifier[5] if len(identifier) == 6 else None


def _expect_room(n_elements: int, dtype: torch.dtype, budget: Budget) -> None:
    budget.allocate(n_elements * dtype.itemsize)


def _view_of(storage: Storage, view: Any) -> Storage:
    if view is None:
        return storage
    _, offset, n_elements = view
    if type(offset) is not int or type(n_elements) is not int or not 0 <= offset <= offset + n_elements:
        raise Refusal("holds a view of a storage that is none")
    size = storage.dtype.itemsize
    if (offset + n_elements) * size > len(storage.raw):
        raise Refusal("holds a view that reaches beyond its storage")
    return Storage(storage.dtype, storage.raw[offset * size : (offset + n_elements) * size])


# torch, from 1.6


def _read_zip(span: Span, budget: Budget) -> tuple[str, Any, dict[str, str]]:
    return "torch-zip", _plain(_read_torch_zip(span, budget)), {}


class _Directory(io.BufferedReader):
    """A buffered file whose reads are bounded: a zip file's directory is read at once, however long it says it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise Refusal("is a zip file with a directory of more entries than are read")
        return super().read(size)


def _open_zip(span: Span) -> zipfile.ZipFile:
    """The archive, whose entries are whole, plain and named once.

    Raises:
        Refusal: an entry is encrypted, named twice or by a path that leaves the archive, or they overlap.
    """
    from sage_fast.models.unpickling import _Window

    archive = zipfile.ZipFile(_Directory(_Window(span)))
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise Refusal("is a zip file that names an entry twice")
    for entry in entries:
        if entry.flag_bits & 1:
            raise Refusal("is a zip file that is encrypted")
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise Refusal(f"is a zip file with the entry name {entry.filename[:60]!r}")
    if sum(entry.compress_size for entry in entries) > len(span):
        raise Refusal("is a zip file whose entries overlap")
    return archive


def _read_torch_zip(span: Span, budget: Budget) -> Any:
    """``data.pkl``, and a file for each storage, all in one folder and not compressed."""
    archive = _open_zip(span)
    names = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refusal("is a zip file without the data.pkl of a torch file")
    root = roots[0]
    if f"{root}constants.pkl" in names or any(name.startswith(f"{root}code/") for name in names):
        raise Refusal("is a TorchScript program")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in names.values()):
        raise Refusal("is a compressed zip file, which torch does not write")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise Refusal("was written on a big-endian machine")
    storages: dict[str, Tensor] = {}

    def persistent(identifier: Any) -> Storage:
        key, dtype, n_elements, _ = _storage_identity(identifier)
        entry = names.get(f"{root}data/{key}")
        if entry is None or entry.file_size != n_elements * dtype.itemsize:
            raise Refusal(f"lacks the {n_elements} elements of its storage {key[:20]!r}")
        if key not in storages:
            _expect_room(n_elements, dtype, budget)
            storages[key] = _read_entry(archive, entry)
        return Storage(dtype, storages[key])

    data = _read_entry(archive, names[f"{root}data.pkl"]).numpy()
    body = Span(io.BytesIO(data.data), 0, len(data))
    return PickleReader(body, budget, RULES, BUILD_RULES, persistent).load()


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    """The bytes of an entry, its checksum compared."""
    raw = torch.empty(entry.file_size, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    with archive.open(entry) as file:
        while done < len(view):
            n_read = file.readinto(  # type: ignore[attr-defined]
                view[done : done + (1 << 20)]
            )
            if not n_read:
                raise Refusal("ends in the middle of its data")
            done += n_read
        file.read(1)  # at the end the checksum is compared
    return raw
