"""Ops on arrays of others: NumPy's by the host module, whatever has DLPack (CuPy, JAX, ...) as tensors of the same memory."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError

__all__ = ["of_one_float", "takes_arrays"]

F = TypeVar("F", bound=Callable[..., Any])
#: what an op of tensors is called with; anything else is looked at. By exact type first, which takes a third of the time.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, int, float, bool, str, type(None), tuple, list))
_PLAIN_TOO = (Tensor, int, float, str, tuple, list)
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def takes_arrays(*names: str) -> Callable[[F], F]:
    """Decorator of an op of tensors: the arguments ``names`` may be arrays of another kind, all of one, as the result is then.

    The op's file has a function ``_on_host(host, ...)`` of the op's arguments, which gives the result for NumPy arrays by the
    host module's kernel where the op would take its own, else None. Then, as for other kinds, the op runs on tensors of the
    same memory. What the host module refuses, the op says in its own words. A first argument that is a plain NumPy array is
    tried there as it came, before anything is asked of the others: to bind them takes as long as a small product.
    """

    def decorate(op: F) -> F:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def either(*args, **kwargs):
            if args and type(args[0]) is np.ndarray and (result := on_host(args, kwargs)) is not None:
                return result
            for value in args:
                if type(value) not in _PLAIN and not isinstance(value, _PLAIN_TOO):
                    return on_arrays(args, kwargs)
            for value in kwargs.values():
                if type(value) not in _PLAIN and not isinstance(value, _PLAIN_TOO):
                    return on_arrays(args, kwargs)
            return op(*args, **kwargs)

        def on_host(args, kwargs):
            host = _native.host()
            if host is None:
                return None
            kernel = op.__globals__["_on_host"]
            kernel.__defaults__ = op.__defaults__
            try:
                return kernel(host, *args, **kwargs)
            except (AttributeError, TypeError, ValueError, RuntimeError):  # not what the kernel takes
                return None

        def on_arrays(args, kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            arrays = {name: given[name] for name in names if given[name] is not None}
            kind = _one_kind(arrays)
            if kind is np.ndarray and (result := on_host((), given)) is not None:
                return result
            if kind in (Tensor, None):
                return op(*args, **kwargs)
            tensors = {name: _tensor(name, array) for name, array in arrays.items()}
            result = op(**{**given, **tensors})
            if any(result is tensor for tensor in tensors.values()):
                result = result.clone()  # an array of its own
            return result.numpy() if kind is np.ndarray else _back(result, next(iter(arrays.values())))

        return either  # type: ignore[return-value]

    return decorate


def of_one_float(*arrays: np.ndarray | None) -> bool:
    """Whether all NumPy arrays that are there are float32, or all float64, as most kernels want them."""
    first = arrays[0].dtype if arrays[0] is not None else None
    return first in _FLOATS and all(array is None or array.dtype == first for array in arrays[1:])


def _one_kind(arrays: dict[str, Any]) -> type | None:
    """Tensor, np.ndarray or another type with DLPack, that of all arrays; None where nothing is an array."""
    kinds = {name: _kind(array) for name, array in arrays.items()}
    first = next((name for name, kind in kinds.items() if kind is not None), None)
    if first is None:
        return None
    for name, kind in kinds.items():
        if kind is not kinds[first]:
            wanted, got = (_name(k or type(arrays[n])) for n, k in ((first, kinds[first]), (name, kind)))
            raise InputError(f"{name} must be a {wanted}, as {first} is, got a {got}; convert one of them.")
    return kinds[first]


def _kind(array: Any) -> type | None:
    for known in (Tensor, np.ndarray):
        if isinstance(array, known):
            return known
    return type(array) if hasattr(array, "__dlpack__") else None


def _name(kind: type) -> str:
    return "torch.Tensor" if kind is Tensor else f"{kind.__module__}.{kind.__qualname__}"


def _tensor(name: str, array: Any) -> Tensor:
    """Of the same memory; a copy of a NumPy array that is not dense or not writeable, which tensors cannot be."""
    try:
        if isinstance(array, np.ndarray):
            return torch.from_numpy(np.require(array, requirements=("C", "W")))
        return torch.from_dlpack(array)
    # of a library of any kind, and of torch: an assertion, where arrays of a GPU meet a build without
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{name} must be an array that torch can take, got {_name(type(array))}: {reason}.") from error


def _back(result: Tensor, like: Any) -> Any:
    """The result as an array of the library that ``like`` is of, or as the tensor where that takes no DLPack."""
    namespace = getattr(like, "__array_namespace__", None)
    library = namespace() if namespace is not None else sys.modules.get(type(like).__module__.partition(".")[0])
    from_dlpack = getattr(library, "from_dlpack", None)
    return result if from_dlpack is None else from_dlpack(result.detach())
