"""Archives, streams and tables of tensors made to do harm, each with a part of the sentence that refuses it."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from typing import Any

import numpy as np
from hostile_pickles import HOSTILE, SYSTEM, rebuilt
from pickle_words import call, name, pickled, text, torch_archive, torch_stream, word, zip_file

GOOD = pickled(word({"a": 1}))
FOUR = b"\0" * 16  # four float32


def stored(n_elements: Any = 4, key: Any = "0", cls: bytes = name("torch", "FloatStorage"), *view: Any) -> bytes:
    """Words for the storage of a persistent id."""
    return word((text("storage"), cls, key, "cpu", n_elements, *view)) + pickle.BINPERSID


def tensor(size: tuple, stride: tuple, offset: Any = 0, storage: bytes | None = None) -> bytes:
    """An archive with a tensor of that geometry; its storage has four elements."""
    return torch_archive(pickled(rebuilt(storage or stored(), size, stride, offset)), {"0": FOUR})


def directory_field(archive: bytes, offset: int, value: bytes) -> bytes:
    """The archive with a field of its first directory record set."""
    at = archive.index(b"PK\1\2") + offset
    return archive[:at] + value + archive[at + len(value) :]


def with_names(*names: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on duplicates
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for entry in names:
                archive.writestr(entry, GOOD)
        return file.getvalue()


def overlapping() -> bytes:
    """Two directory records of one entry, as large archives in few bytes have."""
    archive = torch_archive(GOOD + b"\0" * 1000)
    start = archive.index(b"PK\1\2")
    end = archive.index(b"PK\5\6")
    record = archive[start:end]
    other = record.replace(b"data.pkl", b"data.two")
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, 2 * len(record), start, 0)
    return archive[:start] + record + other + tail


def many_entries() -> bytes:
    """A directory of 30 MB in an archive of 30 MB."""
    record = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 33, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    records = record * (30_000_000 // len(record))
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(records), 4, 0)
    return b"PK\3\4" + records + tail


WEIGHTS = tensor((4,), (1,))
BOMB = b"\0" * (200 << 20)

ARCHIVES = {
    "os.system": (torch_archive(HOSTILE), "os.system"),
    "a path that leaves": (with_names("archive/data.pkl", "archive/../../x"), "outside of it"),
    "a path that leaves, by backslashes": (with_names("archive/data.pkl", "archive\\..\\..\\x"), "outside of it"),
    "a path from the root": (with_names("archive/data.pkl", "/etc/x"), "outside of it"),
    "a path with a drive": (with_names("archive/data.pkl", "C:/x"), "outside of it"),
    "a name twice": (with_names("archive/data.pkl", "archive/data.pkl"), "twice"),
    "two pickles": (with_names("a/data.pkl", "b/data.pkl"), "without the data.pkl"),
    "no pickle": (with_names("archive/version"), "without the data.pkl"),
    "no entry": (b"PK\3\4" + zip_file({}), "without the data.pkl"),
    "a program": (torch_archive(GOOD, **{"constants.pkl": GOOD, "code/x.py": b"import os"}), "TorchScript"),
    "encrypted": (directory_field(torch_archive(GOOD), 8, b"\1\0"), "encrypted"),
    "strongly encrypted": (directory_field(torch_archive(GOOD), 8, b"\x41\0"), "encrypted"),
    "a rare compression": (zip_file({"archive/data.pkl": GOOD}, zipfile.ZIP_LZMA), "rare way"),
    "an unknown compression": (directory_field(torch_archive(GOOD), 10, b"\x63\0"), "rare way"),
    "compressed": (zip_file({"archive/data.pkl": GOOD}, zipfile.ZIP_DEFLATED), "compressed"),
    "a bomb": (zip_file({"archive/data.pkl": BOMB}, zipfile.ZIP_DEFLATED), "compressed"),
    "elements that were changed": (WEIGHTS.replace(FOUR, b"\1" * 16), "Bad CRC-32"),
    "a checksum of the pickle": (directory_field(torch_archive(GOOD), 16, b"\0\0\0\0"), "Bad CRC-32"),
    "an entry of a terabyte": (directory_field(torch_archive(GOOD), 24, b"\xfe\xff\xff\xff"), "two sizes"),
    "overlapping entries": (overlapping(), "overlap"),
    "a directory of 30 MB": (many_entries(), "more entries"),
    "another machine": (torch_archive(GOOD, byteorder=b"big"), "big-endian"),
    "a byte order of 100 kB": (torch_archive(GOOD, byteorder=b"x" * 100_000), "big-endian"),
    "a storage that is not there": (torch_archive(pickled(stored(4, "1")), {"0": FOUR}), "lacks"),
    "a storage by a path": (torch_archive(pickled(stored(4, "../data.pkl")), {"0": FOUR}), "lacks"),
    "a storage of a terabyte": (torch_archive(pickled(stored(1 << 40)), {"0": FOUR}), "lacks"),
    "a storage of -1": (torch_archive(pickled(stored(-1)), {"0": FOUR}), "without a key and a size"),
    "a storage of 4.0": (torch_archive(pickled(stored(pickle.BINFLOAT + b"\x40" + b"\0" * 7)), {"0": FOUR}), "a size"),
    "a storage of an unknown class": (torch_archive(pickled(stored(4, "0", name("a", "FloatStorage")))), "not known"),
    "a storage of a function": (
        torch_archive(pickled(stored(4, "0", name("torch._utils", "_rebuild_tensor")))),
        "not known",
    ),
    "a storage alone": (torch_archive(pickled(stored()), {"0": FOUR}), "holds a Storage"),
    "a persistent id of text": (torch_archive(pickled(text("0") + pickle.BINPERSID)), "no storage"),
    "a persistent id of nothing": (torch_archive(pickled(word(None) + pickle.BINPERSID)), "no storage"),
    "a view beyond the storage": (tensor((5,), (1,)), "beyond its storage"),
    "an offset beyond the storage": (tensor((1,), (1,), 4), "beyond its storage"),
    "a stride beyond the storage": (tensor((2,), (1 << 40,)), "beyond its storage"),
    "a product of 2 ** 64": (tensor((1 << 32, 1 << 32), (0, 0)), "larger than its storage"),
    "a size of 2 ** 70": (tensor((1 << 70,), (0,)), "natural numbers"),
    "a negative size": (tensor((-4,), (1,)), "natural numbers"),
    "a negative stride": (tensor((4,), (-1,), 3), "natural numbers"),
    "a negative offset": (tensor((1,), (1,), -1), "natural numbers"),
    "a size of true": (tensor((True,), (1,)), "natural numbers"),
    "a size of text": (tensor(("4",), (1,)), "natural numbers"),
    "more sizes than strides": (tensor((2, 2), (1,)), "natural numbers"),
    "a thousand dimensions": (tensor((1,) * 1000, (0,) * 1000), "natural numbers"),
    "one element, 10 GB wide": (tensor((10**10,), (0,)), "far larger"),
    "one element, wide a thousand times": (
        torch_archive(pickled(word([rebuilt(stored(), (10**6,), (0,))] * 1000)), {"0": FOUR}),
        "far larger",
    ),
}

STREAMS = {
    "os.system": (torch_stream(HOSTILE), "os.system"),
    "os.system in its head": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickled(SYSTEM, protocol=2), "os.system"),
    "os.system in its keys": (torch_stream(GOOD)[:-4] + pickled(SYSTEM, protocol=2), "os.system"),
    "another machine": (torch_stream(GOOD, little_endian=False), "big-endian"),
    "keys without tensors": (torch_stream(GOOD, ["0"], b"\0" * 24), "other storages"),
    "tensors without keys": (torch_stream(pickled(stored())), "other storages"),
    "a key twice": (torch_stream(pickled(stored()), ["0", "0"], b"\0" * 48), "other storages"),
    "a key that is a list": (torch_stream(pickled(stored()), [["0"]]), "other storages"),
    "no elements": (torch_stream(pickled(stored()), ["0"]), "in the middle"),
    "too few elements": (torch_stream(pickled(stored()), ["0"], struct.pack("<q", 4) + FOUR[:-1]), "in the middle"),
    "another number of elements": (torch_stream(pickled(stored()), ["0"], struct.pack("<q", 5) + FOUR), "another size"),
    "a negative number of elements": (
        torch_stream(pickled(stored()), ["0"], struct.pack("<q", -4) + FOUR),
        "another size",
    ),
    "a storage of a terabyte": (torch_stream(pickled(stored(1 << 40)), ["0"]), "more data than it has bytes"),
    "a view of a storage beyond it": (
        torch_stream(pickled(stored(4, "0", name("torch", "FloatStorage"), ("v", 2, 3))), ["0"], FOUR),
        "beyond its storage",
    ),
    "a module with source text": (
        torch_stream(pickled(word((text("module"), name("os", "system"), "x.py", "import os")) + pickle.BINPERSID)),
        "os.system",
    ),
}


def safetensors(header: Any, data: bytes = FOUR, size: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if size is None else size) + content + data


def entry(shape: list, *offsets: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


TABLES = {
    "overlapping offsets": (safetensors({"a": entry([4], 0, 16), "b": entry([2], 8, 16)}), "damaged"),
    "the same offsets": (safetensors({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}), "damaged"),
    "a gap": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 12, 16)}), "damaged"),
    "offsets beyond the file": (safetensors({"a": entry([8], 0, 32)}), "damaged"),
    "offsets backwards": (safetensors({"a": entry([4], 16, 0)}), "damaged"),
    "a tensor of a terabyte": (safetensors({"a": entry([1 << 38], 0, 1 << 40)}), "damaged"),
    "a product of 2 ** 64": (safetensors({"a": entry([1 << 32, 1 << 32], 0, 16)}), "damaged"),
    "a shape of another size": (safetensors({"a": entry([5], 0, 16)}), "damaged"),
    "a negative shape": (safetensors({"a": entry([-4], 0, 16)}), "damaged"),
    "an unknown type": (safetensors({"a": entry([4], 0, 16, dtype="PICKLE")}), "damaged"),
    "a name twice": (
        safetensors(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
        ),
        "twice",
    ),
    "bytes behind": (safetensors({"a": entry([4], 0, 16)}, FOUR + b"x"), "damaged"),
    "a header of an exabyte": (safetensors({"a": entry([4], 0, 16)}, size=1 << 60), "header"),
    "a header of -1 bytes": (safetensors({"a": entry([4], 0, 16)}, size=(1 << 64) - 1), "header"),
    "a header of 20 MB": (safetensors(b"{" + b" " * (20 << 20) + b"}"), "header"),
    "a header 100,000 deep": (safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "damaged"),
    "a header that is no JSON": (safetensors(b"{nothing}"), "damaged"),
    "a header with a huge number": (safetensors(b'{"a":' + b"1" * 100_000 + b"}"), "damaged"),
}


def npy(header: str, data: bytes = FOUR, version: bytes = b"\1\0") -> bytes:
    content = header.encode() + b"\n"
    size = struct.pack("<H", len(content)) if version == b"\1\0" else struct.pack("<I", len(content))
    return b"\x93NUMPY" + version + size + content + data


def array_header(descr: str = "'<f4'", order: str = "False", shape: str = "(4,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def object_array(pickle_bytes: bytes) -> bytes:
    return npy(array_header("'|O'", shape="()"), pickle_bytes)


def npz(**arrays: bytes) -> bytes:
    return zip_file({f"{key}.npy": value for key, value in arrays.items()}, zipfile.ZIP_DEFLATED)


ARRAYS = {
    "os.system": (object_array(HOSTILE), "os.system"),
    "os.system in a list": (object_array(pickled(word([SYSTEM]))), "os.system"),
    "an instance": (object_array(pickled(call(name("a", "B")))), "a.B"),
    "a tensor": (object_array(pickle.dumps(__import__("torch").zeros(1))), "torch._utils._rebuild_tensor_v2"),
    "a set": (object_array(pickled(call(name("builtins", "set"), ["a"]))), "builtins.set"),
    "a persistent id": (object_array(pickled(stored())), "torch.FloatStorage"),
    "a list in itself": (object_array(pickled(b"]" + pickle.MEMOIZE + pickle.BINGET + b"\0a")), "contains itself"),
    "no pickle": (object_array(b""), "in the middle"),
    "a terabyte": (npy(array_header(shape="(1099511627776,)")), "bytes"),
    "a product of 2 ** 64": (npy(array_header(shape="(4294967296, 4294967296)")), "bytes"),
    "a negative shape": (npy(array_header(shape="(-2, -2)")), "shape is none"),
    "a shape of text": (npy(array_header(shape="('4',)")), "damaged"),
    "a shape of truth": (npy(array_header(shape="(True,)")), "shape is none"),
    "too few bytes": (npy(array_header(), FOUR[:-1]), "15 bytes"),
    "too many bytes": (npy(array_header(), FOUR + b"x"), "17 bytes"),
    "records": (npy(array_header("[('a', '<f4')]")), "which is not read"),
    "records with objects": (npy(array_header("[('a', '|O')]"), HOSTILE), "os.system"),
    "text": (npy(array_header("'<U4'", shape="(1,)")), "which is not read"),
    "dates": (npy(array_header("'<M8[s]'", shape="(2,)")), "which is not read"),
    "code in its header": (npy("__import__('os').system('touch canary')"), "damaged"),
    "a header 5,000 deep": (npy(array_header(shape="(" * 5000 + ")" * 5000)), "damaged"),
    "a header of 4 GB": (b"\x93NUMPY\2\0\xff\xff\xff\xff{", "damaged"),
    "a header of 100 kB": (npy(" " * 100_000 + array_header(), version=b"\2\0"), "damaged"),
    "another version": (npy(array_header(), version=b"\7\0"), "version 7.0"),
    "a bomb": (npz(a=npy(array_header("'|u1'", shape=f"({len(BOMB)},)"), BOMB)), "expand"),
    "os.system in an archive": (npz(a=object_array(HOSTILE)), "os.system"),
    "a terabyte in an archive": (npz(a=npy(array_header(shape="(1099511627776,)"))), "bytes"),
    "a path that leaves an archive": (zip_file({"../a.npy": npy(array_header())}), "outside of it"),
}


def tar() -> bytes:
    """As torch wrote before 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(HOSTILE)
        archive.addfile(info, io.BytesIO(HOSTILE))
    return file.getvalue()


OTHERS = {
    "empty": (b"", "is empty"),
    "one byte": (b"\x80", "is no pickle"),
    "text": (b"generator: stylegan2\n" * 100, "is no pickle"),
    "a script": (b"#!/bin/sh\ntouch canary\n", "is no pickle"),
    "random": (b"\x17" + random.Random(0).randbytes(100_000), "is no pickle"),
    "zeros": (bytes(100_000), "is no pickle"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is no pickle"),
    "a tar archive": (tar(), "is no pickle"),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is no pickle"),
    "a pickle of a pickle's beginning": (pickle.dumps(np.zeros(3))[:10], "in the middle"),
}

HOSTILE_FILES = {
    f"{kind}: {what}": case
    for kind, cases in {
        "archive": ARCHIVES,
        "stream": STREAMS,
        "safetensors": TABLES,
        "NumPy": ARRAYS,
        "file": OTHERS,
    }.items()
    for what, case in cases.items()
}
