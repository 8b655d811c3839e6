"""The kinds of file that checkpoints come in, told apart by their first bytes, and the plain tree in each."""

from __future__ import annotations

import io
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from sage_fast.models.pickled_values import ARRAY_LEAVES, ARRAYS, LEAVES, array_from
from sage_fast.models.plain_trees import check_plain, tensors_in
from sage_fast.models.spans import Budget, Refusal, Span, open_span
from sage_fast.models.text_pickles import begins_text_pickle
from sage_fast.models.torch_files import (
    MAGIC,
    ZIP_MAGIC,
    open_archive,
    read_entry,
    read_pickle,
    read_stream,
    read_torch_archive,
)
from sage_fast.models.unpickling import PickleReader

__all__ = ["DAMAGE", "read_container"]

# what the standard library, NumPy and safetensors raise for damaged files
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    RecursionError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)

NPY_MAGIC = b"\x93NUMPY"
MAX_HEADER = 16 << 20  # bytes of a safetensors header
EXPANSION = 16  # of compressed arrays; a zip bomb has 1000


def read_container(
    raw: BinaryIO, path: Path, size: int, choose: Callable[[Any], Any] = lambda tree: tree
) -> tuple[str, Any, dict[str, str]]:
    """Kind, tree and metadata (of safetensors, else empty) of the open file of that path and size in bytes.

    Args:
        choose: from the tree of a pickle or torch file, whose tensors have no elements yet, what of it is wanted.
    Raises:
        Refusal: it is no file of weights, or holds what no such file needs.
    """
    raw.seek(0)
    head = raw.read(16)
    span, budget = Span(raw, 0, size), Budget(size)
    if head.startswith(ZIP_MAGIC):
        archive = open_archive(span)
        if archive.namelist() and all(name.endswith(".npy") for name in archive.namelist()):
            return "npz", _read_npz(archive, size), {}
        return "torch-zip", _with_elements(read_torch_archive(span, budget), budget, choose), {}
    if head.startswith(MAGIC):
        return "torch-legacy", _with_elements(read_stream(span, budget), budget, choose), {}
    if head.startswith(NPY_MAGIC):
        return "npy", _read_npy(span), {}
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle", _with_elements(read_pickle(span, budget), budget, choose), {}
    if begins_text_pickle(*_edges(raw, size)):
        return "pickle", _with_elements(read_pickle(span, budget), budget, choose), {}
    if head[8:9] == b"{":
        return "safetensors", *_read_safetensors(span, path)
    raise Refusal("is empty" if not size else "is no pickle, torch, safetensors or NumPy file")


def _edges(raw: BinaryIO, size: int) -> tuple[bytes, bytes]:
    """The first 300 bytes of a file, and its last one."""
    raw.seek(0)
    head = raw.read(300)
    raw.seek(max(0, size - 1))
    return head, raw.read(1)


def _with_elements(tree: Any, budget: Budget, choose: Callable[[Any], Any]) -> Any:
    """What ``choose`` takes of a tree, the elements of its tensors read."""
    check_plain(tree, LEAVES)
    tree = choose(tree)
    wanted = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(tree)}
    for address, read in budget.unread.items():  # in the order of the file
        if address in wanted:
            read()
    return tree


def _read_npy(span: Span) -> Any:
    """The array; of an array of Python objects, its value (no dimension) or the list of its values (one)."""
    file = open_span(span)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise Refusal(f"is a NumPy file of version {version[0]}.{version[1]}, which is not read")
    try:
        shape, fortran, dtype = readers[version](file)
    except (TypeError, SyntaxError, tokenize.TokenError) as error:
        raise Refusal("is a NumPy file with a damaged header") from error
    data = Span(span.raw, span.start + file.tell(), span.stop)
    if not dtype.hasobject:
        return array_from(data, shape, dtype, "F" if fortran else "C")
    content = PickleReader(data, Budget(len(data)), ARRAYS).load()
    check_plain(content, ARRAY_LEAVES)
    return content


def _read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, Any]:
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > EXPANSION * size + (1 << 20):
        raise Refusal("is a zip file whose entries expand beyond measure")
    arrays = {}
    for entry in entries:
        data = read_entry(archive, entry).numpy().data
        arrays[entry.filename.removesuffix(".npy")] = _read_npy(Span(io.BytesIO(data), 0, len(data)))
    return arrays


def _read_safetensors(span: Span, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors by name, and the metadata. The library sees to it that offsets neither overlap nor leave gaps."""
    file = open_span(span)
    n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > min(MAX_HEADER, len(span) - 8):
        raise Refusal(f"claims a safetensors header of {n_bytes} bytes, more than it has or any needs")
    json.loads(file.read(n_bytes), object_pairs_hook=_without_duplicates)
    with safe_open(path, framework="pt") as tensors:
        # clone: the library's tensors lie in the file's own pages, and reading those ends the process once the file is cut
        return {name: tensors.get_tensor(name).clone() for name in tensors.keys()}, dict(tensors.metadata() or {})


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise Refusal("is a safetensors file that names a tensor twice")
    return table
