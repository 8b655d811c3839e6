"""Pickles written word by word, so that a test can say what no pickler would, and files in formats of others."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
import zipfile
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def pickled(*words: bytes, protocol: int = 4) -> bytes:
    """A pickle of these words."""
    return pickle.PROTO + bytes([protocol]) + b"".join(words) + pickle.STOP


def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def data(value: bytes) -> bytes:
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    n_bytes = value.bit_length() // 8 + 1
    return pickle.LONG1 + bytes([n_bytes]) + value.to_bytes(n_bytes, "little", signed=True)


def word(value: Any) -> bytes:
    """A plain value, or words as they are."""
    if isinstance(value, bytes):
        return value
    if value is None or isinstance(value, bool):
        return {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return number(value)
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(map(word, value)) + pickle.TUPLE
    if isinstance(value, list):
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(word, value)) + pickle.APPENDS
    pairs = b"".join(word(key) + word(entry) for key, entry in value.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def call(function: bytes, *args: Any) -> bytes:
    return function + word(args) + pickle.REDUCE


def instance(cls: bytes, *args: Any) -> bytes:
    return cls + word(args) + pickle.NEWOBJ


def with_state(target: bytes, state: Any) -> bytes:
    return target + word(state) + pickle.BUILD


@contextmanager
def importable(**modules: dict[str, Any]):
    """Modules of these names (dots as double underscores), with these attributes, while a pickler looks for them."""
    made = {}
    for module, attributes in modules.items():
        module = module.replace("__", ".")
        parents = module.split(".")[:-1]
        made.update({".".join(parents[: i + 1]): types.ModuleType(parents[i]) for i in range(len(parents))})
        made[module] = types.ModuleType(module)
        made[module].__dict__.update(attributes)
        for attribute, value in attributes.items():
            value.__module__, value.__qualname__ = module, attribute
    with mock.patch.dict(sys.modules, made):
        yield


class Persistent:
    """What pickles as an ``nn.Module`` of NVLabs: a call of their reconstruction with source text, class and state."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = "raise SystemExit") -> None:
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct, (self.meta,)


def _reconstruct(meta: dict[str, Any]) -> None:
    raise AssertionError("the reader never calls it")


def persistent_pickle(content: Any, protocol: int = 4) -> bytes:
    """The pickle of a tree with :class:`Persistent` in it."""
    with importable(torch_utils__persistence={"_reconstruct_persistent_obj": _reconstruct}):
        return pickle.dumps(content, protocol=protocol)


def module_state(
    tensors: dict[str, torch.Tensor], modules: dict[str, Any] | None = None, **rest: Any
) -> dict[str, Any]:
    """The ``__dict__`` of an ``nn.Module``, as far as a reader needs it."""
    return {"_parameters": tensors, "_buffers": {}, "_modules": modules or {}, **rest}


def torch_file(content: Any, archive: bool = True) -> bytes:
    """What ``torch.save`` writes: the zip archive, or the older stream."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def torch_archive(pickle_bytes: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip archive of torch with that data.pkl, those storages and more entries."""
    entries = {"data.pkl": pickle_bytes, **{f"data/{key}": value for key, value in (storages or {}).items()}, **more}
    return zip_file({f"archive/{key}": value for key, value in entries.items()})


def torch_stream(pickle_bytes: bytes, keys: Any = (), rest: bytes = b"", little_endian: bool = True) -> bytes:
    """The older torch format with that pickle, those keys and what follows them."""
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    magic = 0x1950A86A20F9469CFC6C
    headers = b"".join(pickle.dumps(value, protocol=2) for value in (magic, 1001, system))
    return headers + pickle_bytes + pickle.dumps(list(keys), protocol=2) + rest


def zip_file(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return file.getvalue()
