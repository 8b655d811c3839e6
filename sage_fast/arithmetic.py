"""How numbers are computed: the precision of products, and the threads that latents are computed on."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch

from sage_fast.errors import InputError

__all__ = [
    "DRAWING_PRECISIONS", "PRECISIONS", "autocast", "computed", "float32_products", "multiplies_bfloat16", "one_thread",
    "substitution",
]  # fmt: skip

#: arithmetic of the convolutions and products in a training step; weights, optimizers and averages are always float32
PRECISIONS = ("float32", "bfloat16")

#: arithmetic of a synthesis without gradients: float32's own products; on GPUs since Ampere float32 rounded to TF32, 10 bits of
#: mantissa for 23; or bfloat16, 7 bits, with sums in float32
DRAWING_PRECISIONS = ("float32", "tf32", "bfloat16")

_CPU = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86 and ARM, in PyTorch's words
_T = TypeVar("_T")


def autocast(precision: str, device: str | torch.device, keep_copies: bool = True) -> torch.autocast:
    """``torch.autocast`` for products in ``precision``: on for ``"bfloat16"`` alone, which halves the time of the convolutions.

    It is off too where a device does not multiply bfloat16 (:func:`multiplies_bfloat16`): there PyTorch computes in float32 inside
    and rounds, which takes one and a half to two times as long as float32.

    Args:
        keep_copies: of weights in 16 bits, for further calls inside.
    """
    kind = torch.device(device).type
    return torch.autocast(
        kind, torch.bfloat16, enabled=computed(precision, kind) == "bfloat16", cache_enabled=keep_copies
    )


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether a kind of device has instructions for products of bfloat16: GPUs since Ampere, processors with AVX-512 BF16 or AMX,
    ARM with BF16.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in _CPU)
    return True


def computed(precision: str, device: str | torch.device) -> str:
    """The precision that is computed in where ``precision`` is set: ``"float32"`` for a bfloat16 that the device does not multiply."""
    low = precision == "bfloat16" and not multiplies_bfloat16(torch.device(device).type)
    return "float32" if low else precision


def substitution(precision: str, device: str | torch.device) -> str | None:
    """A sentence where another precision than ``precision`` is computed in; None where it is that one."""
    device = torch.device(device)
    if computed(precision, device) == precision:
        return None
    kind = "this processor" if device.type == "cpu" else "this GPU"
    return f"{kind} does not multiply bfloat16, so what is set to it is computed in float32, which is faster here"


class _ProcessSetting(Generic[_T]):
    """A setting of the whole process that threads may need at the same time: the first sets it, the last sets it back."""

    def __init__(self, name: str, read: Callable[[], _T], write: Callable[[_T], None]) -> None:
        self._name, self._read, self._write = name, read, write
        self._value: _T | None = None
        self._begin_anew()
        if hasattr(os, "register_at_fork"):  # a forked child has one thread of its own and none that is inside
            os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    @contextmanager
    def at(self, value: _T) -> Iterator[None]:
        """Inside, the setting is ``value``."""
        with self._lock:
            if self._inside and value != self._value:
                raise InputError(
                    f"A run that is under way in this process has set {self._name} otherwise; wait for it, or use another process."
                )
            if not self._inside:
                self._before, self._value = self._read(), value
                self._write(value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._write(self._before)


class _Products(NamedTuple):
    """PyTorch's settings of float32 products, by its older words and its newer ones; None: the two contradict each other."""

    matmul: str | None
    cudnn: bool | None
    newer: tuple[str, ...]


def _parts() -> tuple[Any, ...]:
    """What has a setting of its own; a CPU's matrix products and convolutions last."""
    b: Any = torch.backends
    return b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv


def _read_products() -> _Products:
    matmul, cudnn = None, None
    try:
        matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by newer words, which the older ones do not know
        pass
    return _Products(matmul, cudnn, tuple(part.fp32_precision for part in _parts()))


def _write_products(products: _Products) -> None:
    with (
        warnings.catch_warnings()
    ):  # PyTorch's, that its older words are to go; they must agree, or reading them raises
        warnings.simplefilter("ignore")
        if products.matmul is not None and products.cudnn is not None:
            torch.set_float32_matmul_precision(products.matmul)
            torch.backends.cudnn.allow_tf32 = products.cudnn
        for part, value in zip(_parts(), products.newer):
            part.fp32_precision = value


_PRODUCTS = {
    "float32": _Products("highest", False, ("ieee",) * 5),
    "tf32": _Products("high", True, ("tf32", "tf32", "tf32", "ieee", "ieee")),
}
_products = _ProcessSetting("the precision of products", _read_products, _write_products)
_threads = _ProcessSetting("the number of threads", torch.get_num_threads, torch.set_num_threads)


def float32_products(precision: Literal["float32", "tf32"] | str = "float32") -> AbstractContextManager[None]:
    """Inside, products of float32 tensors are float32's, or on a GPU TF32's where ``precision`` is ``"tf32"``, whatever was set.

    PyTorch has cuDNN round the factors of convolutions to TF32 unless told otherwise, and
    ``torch.set_float32_matmul_precision`` can ask the same of matrix products, on a CPU bfloat16. These settings are the whole
    process's: the last to leave sets them back.

    Raises:
        InputError: on entering, where another thread is inside with the other precision.
    """
    return _products.at(_PRODUCTS["tf32" if precision == "tf32" else "float32"])


def one_thread() -> AbstractContextManager[None]:
    """What latents are computed in: convolutions and products of torch add in another order on another number of threads.

    The number is the whole process's: the last to leave sets it back.
    """
    return _threads.at(1)
