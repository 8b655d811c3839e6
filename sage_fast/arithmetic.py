"""How numbers are computed: the precision of products, and the threads that latents are computed on."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

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
    with warnings.catch_warnings():  # the older words must agree, or reading them raises
        warnings.simplefilter("ignore")  # PyTorch's, that they are to go
        if products.matmul is not None and products.cudnn is not None:
            torch.set_float32_matmul_precision(products.matmul)
            torch.backends.cudnn.allow_tf32 = products.cudnn
        for part, value in zip(_parts(), products.newer):
            part.fp32_precision = "none"  # as torch.backends.fp32_precision says, which it then goes on following
            if part.fp32_precision != value:
                part.fp32_precision = value


_PRODUCTS = {
    "float32": _Products("highest", False, ("ieee",) * 5),
    "tf32": _Products("high", True, ("tf32", "tf32", "tf32", "ieee", "ieee")),
}

_lock = threading.Lock()
_with_products: list[int] = []  # threads inside float32_products, each as often as it is
_products = _products_before = _PRODUCTS["float32"]

_with_one: list[int] = []  # threads inside one_thread, each as often as it is
_usual = 1  # threads of a thread that is not


def _begin_anew() -> None:
    """In a forked child, which has this thread alone."""
    global _lock
    _lock = threading.Lock()
    for inside in (_with_products, _with_one):
        inside[:] = [thread for thread in inside if thread == threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def float32_products(precision: str = "float32") -> Iterator[None]:
    """Inside, products of float32 tensors are float32's, or on a GPU TF32's where ``precision`` is ``"tf32"``, whatever was set;
    ``"bfloat16"``, of which :func:`autocast` makes products, leaves those of float32 as ``"float32"`` does.

    PyTorch has cuDNN round the factors of convolutions to TF32 unless told otherwise, and
    ``torch.set_float32_matmul_precision`` can ask the same of matrix products, on a CPU bfloat16. These settings are the whole
    process's: the first thread sets them, the last to leave sets them back. Afterwards convolutions on a GPU no longer follow
    ``torch.backends.fp32_precision``, where they had PyTorch's own setting before; ``torch.backends.cudnn.conv`` sets them.

    Raises:
        InputError: on entering, where another thread is inside with the other precision.
    """
    global _products, _products_before
    wanted, thread = _PRODUCTS["tf32" if precision == "tf32" else "float32"], threading.get_ident()
    with _lock:
        if _with_products and wanted != _products:
            raise InputError(
                "A run that is under way in this process has set the precision of products otherwise; wait for it, or use another "
                "process."
            )
        if not _with_products:
            _products, _products_before = wanted, _read_products()
            _write_products(wanted)
        _with_products.append(thread)
    try:
        yield
    finally:
        with _lock:
            _with_products.remove(thread)
            if not _with_products:
                _write_products(_products_before)


@contextmanager
def one_thread() -> Iterator[None]:
    """What latents are computed in: convolutions and products of torch add in another order on another number of threads.

    The number is each thread's own, but a thread begins with what another set last. So one that began while another was in here
    has one thread without having asked for it, and leaves with as many as that other had.
    """
    global _usual
    thread, number = threading.get_ident(), torch.get_num_threads()
    if number > 1 or not _with_one:
        _usual = number
    before = _usual
    _with_one.append(thread)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _with_one.remove(thread)
        if thread not in _with_one:
            torch.set_num_threads(before)
