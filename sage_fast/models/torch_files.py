"""Files of ``torch.save``: zip archives (from torch 1.6) and the older stream, also within a pickle.

The pickle in them is read by :class:`~sage_fast.models.unpickling.PickleReader`; the elements of a tensor are read once,
straight into its memory, by what :attr:`~sage_fast.models.spans.Budget.unread` keeps for it.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sage_fast.models.pickled_values import CHECKPOINTS, STORAGE_DTYPES, Storage
from sage_fast.models.plain_trees import Global
from sage_fast.models.spans import Budget, Refusal, Span, Window, fill_from, open_span
from sage_fast.models.unpickling import PickleReader, Vocabulary

__all__ = ["MAGIC", "ZIP_MAGIC", "open_archive", "read_entry", "read_pickle", "read_stream", "read_torch_archive"]

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # 0x1950A86A20F9469CFC6C, pickled
ZIP_MAGIC = b"PK\x03\x04"
CHUNK = 1 << 20


def read_pickle(span: Span, budget: Budget) -> Any:
    """The value of a plain pickle, in which each tensor's storage is a torch file within a bytes object.

    Raises:
        Refusal: it is damaged, or holds what no checkpoint needs.
    """
    calls = {**CHECKPOINTS.calls, ("torch.storage", "_load_from_bytes"): _storage_from_bytes}
    return PickleReader(span, budget, replace(CHECKPOINTS, calls=calls)).load()


def _storage_from_bytes(reader: PickleReader, args: tuple[Any, ...]) -> Storage:
    """What ``torch.storage._load_from_bytes`` stands for."""
    (data,) = args
    if type(data) is bytes:
        data = Span(io.BytesIO(data), 0, len(data))
    if type(data) is not Span:
        raise Refusal("loads a storage from something that is no bytes")
    head = open_span(data).read(len(MAGIC))
    if not head.startswith((MAGIC, ZIP_MAGIC)):
        raise Refusal("holds a tensor whose bytes are no torch file")
    storage = (read_stream if head == MAGIC else read_torch_archive)(data, reader.budget)
    if type(storage) is not Storage:
        raise Refusal("holds a tensor whose bytes are no storage")
    return storage


def read_stream(span: Span, budget: Budget) -> Any:
    """The older format: magic number, protocol, system, pickle, keys of the storages; then a count and the elements of each.

    Raises:
        Refusal: it is damaged, or holds what no checkpoint needs.
    """
    storages: dict[str, Storage] = {}

    def persistent(identifier: Any) -> Any:
        if len(identifier) == 4 and identifier[0] == "module":
            return identifier[1]  # a class, and its source text, which is left out
        key, dtype, n_elements = _storage_identity(identifier)
        if key not in storages:
            budget.allocate(n_elements * dtype.itemsize)
            storages[key] = Storage(dtype, torch.empty(n_elements * dtype.itemsize, dtype=torch.uint8))
        return _view_of(storages[key], identifier[5] if len(identifier) == 6 else None)

    at = Span(span.raw, span.start + len(MAGIC), span.stop)
    _, at = _next_pickle(at, budget)
    system, at = _next_pickle(at, budget)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refusal("was written on a big-endian machine, whose numbers are not read; save it again on another")
    body = PickleReader(at, budget, CHECKPOINTS, persistent)
    content = body.load()
    keys, at = _next_pickle(Span(span.raw, body.end, span.stop), budget)
    if type(keys) is not list or {type(key) for key in keys} - {str} or sorted(keys) != sorted(storages):
        raise Refusal("holds other storages than its tensors need")
    _locate([storages[key] for key in keys], at, budget)
    return content


def _next_pickle(span: Span, budget: Budget) -> tuple[Any, Span]:
    """The value of a pickle that names nothing, and what follows it."""
    reader = PickleReader(span, budget, Vocabulary())
    return reader.load(), Span(span.raw, reader.end, span.stop)


def _locate(storages: list[Storage], span: Span, budget: Budget) -> None:
    """Finds the elements of the storages, one behind the other, each behind their number."""
    start = span.start
    for storage in storages:
        size = len(storage.raw)
        span.raw.seek(start)
        count = span.raw.read(max(0, min(8, span.stop - start)))
        if len(count) == 8 and int.from_bytes(count, "little") * storage.dtype.itemsize != size:
            raise Refusal("holds a storage of another size than its tensors need")
        at = Span(span.raw, start + 8, start + 8 + size)
        if len(count) != 8 or at.stop > span.stop:
            raise Refusal("ends in the middle of its data")
        if size:
            budget.unread[storage.raw.data_ptr()] = partial(fill_from, at, storage.raw)
        start = at.stop


def _storage_identity(identifier: Any) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements of a persistent id."""
    if type(identifier) is not tuple or len(identifier) not in (5, 6) or identifier[0] != "storage":
        raise Refusal("refers to data outside the pickle that is no storage")
    cls, key, _, n_elements = identifier[1:5]
    if type(cls) is not Global or cls.name not in STORAGE_DTYPES or cls.module.split(".")[0] != "torch":
        raise Refusal("refers to a storage of a type that is not known")
    if type(key) is not str or type(n_elements) is not int or not 0 <= n_elements < 1 << 48:
        raise Refusal("refers to a storage without a key and a size")
    return key, STORAGE_DTYPES[cls.name], n_elements


def _view_of(storage: Storage, view: Any) -> Storage:
    """The elements of a storage that torch before 0.4 pickled as (key, offset, number)."""
    if view is None:
        return storage
    _, offset, n_elements = view
    if type(offset) is not int or type(n_elements) is not int or offset < 0 or n_elements < 0:
        raise Refusal("holds a view of a storage that is none")
    size = storage.dtype.itemsize
    if (offset + n_elements) * size > len(storage.raw):
        raise Refusal("holds a view that reaches beyond its storage")
    return Storage(storage.dtype, storage.raw[offset * size : (offset + n_elements) * size])


def read_torch_archive(span: Span, budget: Budget) -> Any:
    """The zip format: in one folder ``data.pkl`` and a file for each storage, none compressed.

    Raises:
        Refusal: it is damaged, or holds what no checkpoint needs.
    """
    archive = open_archive(span)
    entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refusal("is a zip file without the data.pkl of a torch file")
    root = roots[0]
    if f"{root}constants.pkl" in entries:
        raise Refusal("is a TorchScript program, whose code is not run")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise Refusal("is a compressed zip file, which torch does not write")
    order = entries.get(f"{root}byteorder")
    if order is not None and read_entry(archive, order).numpy().tobytes() != b"little":
        raise Refusal("was written on a big-endian machine, whose numbers are not read; save it again on another")
    storages: dict[str, Tensor] = {}

    def persistent(identifier: Any) -> Storage:
        key, dtype, n_elements = _storage_identity(identifier)
        entry = entries.get(f"{root}data/{key}")
        if entry is None or entry.file_size != n_elements * dtype.itemsize:
            raise Refusal(f"lacks the {n_elements} elements of its storage {key[:20]!r}")
        if key not in storages:
            budget.allocate(entry.file_size)
            storages[key] = budget.reserve(entry.file_size, partial(_fill_entry, archive, entry))
        return Storage(dtype, storages[key])

    data = read_entry(archive, entries[f"{root}data.pkl"]).numpy().data
    return PickleReader(Span(io.BytesIO(data), 0, len(data)), budget, CHECKPOINTS, persistent).load()


class _Directory(io.BufferedReader):
    """A file for ``ZipFile``, which reads an archive's directory at once, however long that claims to be."""

    def __init__(self, span: Span) -> None:
        super().__init__(Window(span))
        self._longest = (1 << 20) + len(span) // 8

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self._longest:
            raise Refusal("is a zip file with more entries than are read")
        return super().read(size)


def open_archive(span: Span) -> zipfile.ZipFile:
    """A zip archive whose entries have plain names, each its own, and lie within the file, one beside the other.

    Raises:
        Refusal: it is not so.
    """
    archive = zipfile.ZipFile(_Directory(span))
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) != len(entries):
        raise Refusal("is a zip file that names an entry twice")
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise Refusal(f"is a zip file with an entry outside of it, {entry.filename[:60]!r}")
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refusal("is a zip file with an entry that is encrypted or compressed in a rare way")
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise Refusal("is a zip file with an entry of two sizes")
    if sum(entry.compress_size for entry in entries) > len(span):
        raise Refusal("is a zip file whose entries overlap")
    return archive


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    """The bytes of an entry, uint8; its checksum is compared."""
    raw = torch.empty(entry.file_size, dtype=torch.uint8)
    _fill_entry(archive, entry, raw)
    return raw


def _fill_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, raw: Tensor) -> None:
    view, done = raw.numpy().data, 0
    with archive.open(entry) as file:
        while chunk := file.read(CHUNK):
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
    if done != len(view):
        raise Refusal("ends in the middle of its data")
