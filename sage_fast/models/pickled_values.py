"""What the names in pickles of checkpoints stand for: the allow-list of :class:`~sage_fast.models.unpickling.PickleReader`.

Each rule makes plain values, arrays or tensors by code of this file. None calls what the pickle names.
"""

from __future__ import annotations

import io
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast.models.plain_trees import Global, Stub
from sage_fast.models.spans import Budget, Refusal, Span, read_into
from sage_fast.models.unpickling import PickleReader, Vocabulary, checked_key

__all__ = ["ARRAYS", "ARRAY_LEAVES", "CHECKPOINTS", "LEAVES", "STORAGE_DTYPES", "Storage", "array_from", "strided"]

ARRAY_LEAVES = (type(None), bool, int, float, complex, str, bytes, np.ndarray)
LEAVES = (*ARRAY_LEAVES, Tensor, Global)

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES.values()}


Rule = Callable[[PickleReader, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Storage:
    """The elements that tensors share: ``raw`` is their bytes, uint8 of one dimension."""

    dtype: torch.dtype
    raw: Tensor


def strided(storage: Storage, offset: Any, size: Any, stride: Any, budget: Budget) -> Tensor:
    """The tensor of that offset, size and stride in a storage, all of it within the storage.

    Raises:
        Refusal: a part of it lies outside.
    """
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 32 or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise Refusal("holds a tensor whose offset, size and strides are no small natural numbers")
    if math.prod(size) >= 1 << 48:
        raise Refusal(f"holds a tensor of size {list(size)}, larger than its storage")
    elements = storage.raw.view(storage.dtype)
    if math.prod(size) == 0:
        return elements.new_empty(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if last >= len(elements):
        raise Refusal(
            f"holds a tensor of size {list(size)} that reaches beyond its storage of {len(elements)} elements"
        )
    # of float32 no reader makes copies, so the same elements under many names cost nothing
    dense = storage.dtype == torch.float32 and math.prod(size) <= last - offset + 1
    same = (storage.raw.data_ptr(), offset, tuple(size), tuple(stride)) if dense else None
    budget.address(math.prod(size) * elements.element_size(), same)
    return elements.as_strided(size, stride, elements.storage_offset() + offset)


# torch


def _tensor(reader: PickleReader, args: tuple[Any, ...]) -> Tensor:
    storage, offset, size, stride = args[:4]
    if type(storage) is not Storage or len(args) > 7:
        raise Refusal("rebuilds a tensor from something that is no storage")
    return strided(storage, offset, size, stride, reader.budget)


def _typed_tensor(reader: PickleReader, args: tuple[Any, ...]) -> Tensor:
    """``_rebuild_tensor_v3``: the bytes of an untyped storage, and a dtype behind the hooks."""
    storage, offset, size, stride, _, _, dtype = args[:7]
    if type(storage) is not Storage or type(dtype) is not Global or dtype.module != "torch":
        raise Refusal("rebuilds a tensor from something that is no storage")
    return strided(Storage(_DTYPES[dtype.name], storage.raw), offset, size, stride, reader.budget)


def _parameter(reader: PickleReader, args: tuple[Any, ...]) -> Tensor:
    if not isinstance(args[0], Tensor):
        raise Refusal("makes a parameter of something that is no tensor")
    return args[0]


def _tensor_of_type(reader: PickleReader, args: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2``: a tensor with Python attributes, which are dropped."""
    function, _, inner, _ = args
    if type(function) is not Global or function.name not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        raise Refusal("rebuilds a tensor by a function that makes none")
    return reader.call(function, inner)


def _device_tensor(reader: PickleReader, args: tuple[Any, ...]) -> Tensor:
    """``_rebuild_device_tensor_from_numpy``: what a tensor on an XLA or similar device becomes."""
    array = args[0]
    if type(array) is not np.ndarray:
        raise Refusal("rebuilds a tensor from something that is no array")
    return torch.from_numpy(array)


def _device(reader: PickleReader, args: tuple[Any, ...]) -> str:
    return ":".join(str(part) for part in args if type(part) in (str, int))


def _tuple(reader: PickleReader, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_items(reader, args))


def _storage_class(reader: PickleReader, args: tuple[Any, ...]) -> Any:
    raise Refusal("makes a storage that is not in the file")


# Python


def _items(reader: PickleReader, args: tuple[Any, ...]) -> Any:
    """The values of the one list or tuple that a constructor gets, or of none."""
    if not args:
        return ()
    (values,) = args
    if type(values) not in (list, tuple):
        raise Refusal("makes a container of something that is no list")
    reader.budget.allocate(64 * len(values))
    return values


def _ordered_dict(reader: PickleReader, args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    return OrderedDict((checked_key(key), value) for key, value in _items(reader, args))


def _dict(reader: PickleReader, args: tuple[Any, ...]) -> dict[Any, Any]:
    return {checked_key(key): value for key, value in _items(reader, args)}


def _default_dict(reader: PickleReader, args: tuple[Any, ...]) -> dict[Any, Any]:
    if len(args) > 1:
        raise Refusal("makes a defaultdict with values")
    return {}


def _set(reader: PickleReader, args: tuple[Any, ...]) -> set[Any]:
    return {checked_key(value) for value in _items(reader, args)}


def _path(reader: PickleReader, args: tuple[Any, ...]) -> str:
    if not all(type(part) is str for part in args) or sum(map(len, args)) > 4096:
        raise Refusal("holds a path that is none")
    return "/".join(args)


def _encode(reader: PickleReader, args: tuple[Any, ...]) -> bytes:
    text, encoding = args
    if encoding not in ("latin1", "latin-1"):
        raise Refusal(f"encodes a text as {encoding!r}")
    reader.budget.allocate(len(text))
    return text.encode("latin1")


def _no_bytes(reader: PickleReader, args: tuple[Any, ...]) -> bytes:
    """``bytes()``: how protocol 2 pickles empty bytes."""
    if args:
        raise Refusal("makes bytes of something else")
    return b""


_DICTS = (Global("dnnlib", "EasyDict"), Global("dnnlib.util", "EasyDict"))


def _reconstructor(reader: PickleReader, args: tuple[Any, ...]) -> Any:
    cls, base, state = args
    if base == Global("builtins", "dict") and type(state) is dict and cls in _DICTS:  # up to protocol 1
        return reader.call(cls, (list(state.items()),))
    if base != Global("builtins", "object") or state is not None:
        raise Refusal("makes an instance of a class that is no plain one")
    return reader.instance(cls, ())


def _not_callable(reader: PickleReader, args: tuple[Any, ...]) -> Any:
    raise Refusal("makes an instance of a class that has none in a file of weights")


def _namespace(reader: PickleReader, stub: Stub, state: Any) -> dict[Any, Any]:
    if type(state) is not dict:
        raise Refusal("holds a namespace without a dict")
    return state


# NumPy

_NUMBERS = re.compile(r"[<>=|]?(?:[iu][1248]|f[248]|c(?:8|16)|b1|\?)")
_OBJECTS = re.compile(r"\|?O8?")


def array_from(span: Span, shape: tuple[int, ...], dtype: np.dtype[Any], order: str) -> np.ndarray:
    """The array of numbers whose bytes a span holds, order "C" or "F", in the byte order of this machine.

    Raises:
        Refusal: shape, type and number of bytes do not go together.
    """
    if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise Refusal("holds an array whose shape is none")
    if not _NUMBERS.fullmatch(dtype.str):
        raise Refusal(f"holds an array of the type {dtype.str[:40]!r}, which is not read")
    if len(span) != math.prod(shape) * dtype.itemsize:
        raise Refusal(f"claims an array of shape {list(shape)} where it has {len(span)} bytes")
    array = read_into(span).numpy().view(dtype)
    return array.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F" if order == "F" else "C")


def _dtype_stub(reader: PickleReader, args: tuple[Any, ...]) -> Stub:
    code = args[0]
    if type(code) is not str or not (_NUMBERS.fullmatch(code) or _OBJECTS.fullmatch(code)):
        raise Refusal(f"holds an array of the type {str(code)[:40]!r}, which is not read")
    return Stub("numpy", "dtype", (code,))


def _dtype_built(reader: PickleReader, stub: Stub, state: Any) -> Stub:
    if type(state) is not tuple or state[1] not in ("<", ">", "=", "|") or any(x is not None for x in state[2:5]):
        raise Refusal("holds an array of a structured type, which is not read")
    return Stub("numpy", "dtype", stub.args, state[1])


def _dtype(stub: Any) -> np.dtype[Any]:
    if type(stub) is not Stub or (stub.module, stub.name) != ("numpy", "dtype"):
        raise Refusal("holds an array without a type")
    return np.dtype(stub.args[0]).newbyteorder(stub.state or "=")


def _array_stub(reader: PickleReader, args: tuple[Any, ...]) -> Stub:
    if args[0] != Global("numpy", "ndarray"):
        raise Refusal("rebuilds an array of a class that is none")
    return Stub("numpy", "ndarray")


def _array_built(reader: PickleReader, stub: Stub, state: Any) -> Any:
    _, shape, dtype, fortran, data = state
    if _dtype(dtype).hasobject:
        return _object_array(reader, shape, data)
    return _array(reader, shape, _dtype(dtype), "F" if fortran else "C", data)


def _array(reader: PickleReader, shape: Any, dtype: np.dtype[Any], order: Any, data: Any) -> np.ndarray:
    """The array of the bytes that a pickle holds; Python 2 pickled them as text."""
    data = data.encode("latin1") if type(data) is str else data
    if type(data) is bytes:
        data = Span(io.BytesIO(data), 0, len(data))
    if type(data) is not Span:
        raise Refusal("holds an array of something that is no bytes")
    reader.budget.allocate(len(data))
    return array_from(data, shape, dtype, order)


def _object_array(reader: PickleReader, shape: Any, data: Any) -> Any:
    """The values of an array of Python objects: the one of no dimension, a list for one dimension."""
    if type(data) is not list or len(shape) > 1 or len(data) != math.prod(shape):
        raise Refusal("holds an array of Python objects that is no list")
    return data if shape else data[0]


def _from_buffer(reader: PickleReader, args: tuple[Any, ...]) -> np.ndarray:
    data, dtype, shape, order = args
    return _array(reader, shape, _dtype(dtype), order, data)


def _scalar(reader: PickleReader, args: tuple[Any, ...]) -> Any:
    dtype, data = args
    return _array(reader, (), _dtype(dtype), "C", data).item()


def _numpy_rules() -> dict[tuple[str, str], Rule]:
    rules: dict[tuple[str, str], Rule] = {
        ("numpy", "dtype"): _dtype_stub,
        ("numpy", "ndarray"): _not_callable,
    }
    for core in ("numpy.core", "numpy._core"):
        rules[f"{core}.multiarray", "_reconstruct"] = _array_stub
        rules[f"{core}.multiarray", "scalar"] = _scalar
        rules[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return rules


def _torch_rules() -> dict[tuple[str, str], Rule]:
    rules: dict[tuple[str, str], Rule] = {
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _device_tensor,
        ("torch._utils", "_rebuild_xla_tensor"): _device_tensor,
        ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_type,
        ("torch", "Tensor"): _not_callable,
        ("torch.nn.parameter", "Parameter"): _not_callable,
        ("torch", "device"): _device,
        ("torch", "Size"): _tuple,
    }
    for name in STORAGE_DTYPES:
        rules["torch", name] = rules["torch.cuda", name] = rules["torch.storage", name] = _storage_class
    for name in _DTYPES:
        rules["torch", name] = _not_callable
    return rules


def _recorded(reader: PickleReader, args: tuple[Any, ...]) -> Stub:
    """``torch_utils.persistence._reconstruct_persistent_obj(meta)``: a record of the class and its state.

    The source text in ``meta`` is left out.
    """
    (meta,) = args
    if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise Refusal("holds a persistent object that is no class")
    return Stub("torch_utils.persistence", meta["class_name"], (), meta.get("state"))


_ARRAY_CALLS: dict[tuple[str, str], Rule] = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("builtins", "dict"): _dict,
    ("builtins", "list"): _not_callable,
    ("builtins", "bytes"): _no_bytes,
    **_numpy_rules(),
}
_ARRAY_STATES = {("numpy", "dtype"): _dtype_built, ("numpy", "ndarray"): _array_built}

ARRAYS = Vocabulary(_ARRAY_CALLS, _ARRAY_STATES)
"""Arrays, dicts and numbers: what an .npy file of Python objects may hold."""

CHECKPOINTS = Vocabulary(
    {
        **_ARRAY_CALLS,
        **_torch_rules(),
        ("builtins", "set"): _set,
        ("builtins", "frozenset"): lambda reader, args: frozenset(_set(reader, args)),
        ("builtins", "object"): _not_callable,
        ("copyreg", "_reconstructor"): _reconstructor,
        ("argparse", "Namespace"): lambda reader, args: Stub("argparse", "Namespace"),
        ("types", "SimpleNamespace"): lambda reader, args: Stub("argparse", "Namespace"),
        ("dnnlib", "EasyDict"): _dict,
        ("dnnlib.util", "EasyDict"): _dict,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _recorded,
        **{("pathlib", name): _path for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")},
    },
    {**_ARRAY_STATES, ("argparse", "Namespace"): _namespace},
    records=True,
)
"""What published checkpoints hold."""
