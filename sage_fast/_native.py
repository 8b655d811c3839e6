"""Loading of the compiled objects: which op has a native kernel on which device, and why not.

Nothing is compiled at import. ``import sage_fast.ops`` loads the objects built at installation; when there are none, the
first op that runs builds them once into a cache (``SAGE_FAST_BUILD=auto``). Whatever goes wrong leaves the reference ops
working, with one :class:`~sage_fast.errors.SageFastWarning` that names the reason and the remedy.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from sage_fast.errors import InputError, SageFastWarning

__all__ = [
    "CUDA_OPS",
    "NATIVE_OPS",
    "Native",
    "call",
    "has_bf16_products",
    "has_kernel",
    "has_schemas",
    "host",
    "load",
    "load_installed",
    "register_autograd",
    "when_loaded",
    "without_kernels",
]

#: ops with kernels of their own; the other ops of ``sage_fast.ops`` are compositions of these and of PyTorch
NATIVE_OPS = (
    "bias_act",
    "scaled_bias_act",
    "upfirdn2d",
    "project_onto_basis",
    "least_squares_codes",
    "edit_latents",
    "combine_rows",
    "gaussian_low_pass",
    "fuse_frequencies",
    "fuse_pixels",
    "conv3x3",
    "synthesis",
)
#: ops with a kernel on CUDA alone: parts of its fused synthesis
CUDA_OPS = ("styled_epilogue", "blur_epilogue", "styled_conv", "counter_normal")
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16")
_NEEDED = {"cuda": "the CUDA toolkit (nvcc) beside a CUDA build of torch"}
_TOO_OLD = "the kernels need 8.0 (Ampere) or later"
_REMEDY = "Install {} and reinstall (pip install --no-build-isolation .), or set SAGE_FAST_BUILD=none to stay without."


@dataclass
class Native:
    """What was loaded: ``folder`` of the objects, ``devices`` with kernels, ``reasons`` per device without.

    ``bf16_products``: the processor multiplies bfloat16, and the CPU kernels that need it may run. ``gpus_seen``: the kernels were
    compared with the GPUs, which is left to the first op on one: to ask for a GPU takes its memory.
    """

    folder: Path | None = None
    devices: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    bf16_products: bool = False
    gpus_seen: bool = False

    @functools.cached_property
    def host(self) -> Any:
        """The host module (kernels on NumPy arrays) beside the objects; None where there is none."""
        from sage_fast import _build

        path = None if self.folder is None else _build.find(self.folder, "_host")
        spec = None if path is None else importlib.util.spec_from_file_location("sage_fast._host", path)
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            self.reasons["host"] = _first_line(error)
            return None
        return module


_lock = threading.RLock()
_native: Native | None = None
_callbacks: list[Callable[[], None]] = []
_warned: set[str] = set()
_plain: ContextVar[bool] = ContextVar("sage_fast_plain", default=False)


#: ops with derivatives -> the function that records them in eager mode
_functions: dict[Any, type[torch.autograd.Function]] = {}


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Derivatives of the op ``name``: by ``torch.library`` for graphs, by a function of our own for :func:`call`.

    ``torch.library`` reads the op's schema at every call, which takes longer than a small layer.
    """
    op = getattr(torch.ops.sage_fast, name).default
    torch.library.register_autograd(f"sage_fast::{name}", backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op._op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[op] = type(name, (torch.autograd.Function,), methods)


def call(op: Any, tensors: tuple[torch.Tensor | None, ...], *settings: Any) -> torch.Tensor:
    """Run ``op`` with all of its arguments, below autograd when no derivative is wanted."""
    if torch.compiler.is_compiling():
        return op(*tensors, *settings)
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                if op in _functions and not torch._C._are_functorch_transforms_active():
                    return _functions[op].apply(*tensors, *settings)
                return op(*tensors, *settings)
    with torch._C._AutoDispatchBelowAutograd():
        return op._op(*tensors, *settings)  # what op's own __call__ does, a frame less


def has_kernel(op: str, device_type: str) -> bool:
    """Whether ``op`` runs natively on ``device_type`` ("cpu", "cuda"); warns once a device when it should but cannot."""
    if _plain.get() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False  # kernels would lose the tangent of forward-mode derivatives, and know nothing of torch.func's batches
    native = _native or load()
    if device_type == "cuda" and not native.gpus_seen:
        _look_at_gpus(native)
    if device_type in native.devices:
        return op in NATIVE_OPS or (device_type == "cuda" and op in CUDA_OPS)
    if op in NATIVE_OPS and device_type not in (*_warned, "meta") and build_mode() != "none":
        _warned.add(device_type)
        reason = native.reasons.get(device_type, "there are no kernels for this kind of device")
        remedy = _REMEDY.format(_NEEDED.get(device_type, "a C++ compiler"))
        if reason.endswith(_TOO_OLD):
            remedy = "Set SAGE_FAST_BUILD=none to be spared this."
        message = f"sage_fast runs its slower PyTorch reference on '{device_type}': {reason}. {remedy}"
        warnings.warn(message, SageFastWarning, stacklevel=3)
    return False


def has_schemas() -> bool:
    """Whether torch knows the ops by name, with kernels on this or that device, so that a graph can hold them."""
    return not _plain.get() and bool((_native or load()).devices)


def has_bf16_products() -> bool:
    """Whether CPU kernels that multiply bfloat16 run here: on processors with AVX-512 BF16."""
    return not _plain.get() and (_native or load()).bf16_products


for _asked in (has_kernel, has_schemas, has_bf16_products):  # torch.compile calls it and keeps the answer
    _asked._dynamo_marked_constant = True  # type: ignore[attr-defined, union-attr]


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, every op of this thread is its plain-PyTorch reference: for graphs that are to run without this package."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def load() -> Native:
    """Load the objects, once a process; builds them first when none were installed and ``SAGE_FAST_BUILD`` allows it."""
    global _native
    if _native is None:
        with _lock:
            if _native is None:
                _native = _load()
    return _native


def load_installed() -> None:
    """Load the objects of the installation, if it has some: torch then knows the ops by name, as ``torch.export.load`` of a
    program that holds them needs."""
    from sage_fast import _build

    if os.environ.get("SAGE_FAST_BUILD", "auto") in ("auto", "aot") and _build.find(Path(__file__).parent, "_ops_cpu"):
        with contextlib.suppress(InputError):  # of another setting: the first op says it
            load()


def host() -> Any:
    """The pybind11 module of the same kernels on NumPy arrays, from where the ops were loaded; None without one."""
    return (_native or load()).host


def when_loaded(register: Callable[[], None]) -> Callable[[], None]:
    """Decorator: run ``register`` (fake kernels, derivatives) as soon as the op schemas exist."""
    _callbacks.append(register)
    if _native is not None and _native.devices:
        register()
    return register


def build_mode() -> str:
    """``SAGE_FAST_BUILD``: auto (installed objects, else a first-use build), aot, jit (always the cache), none."""
    from sage_fast import _build

    mode = os.environ.get("SAGE_FAST_BUILD", "auto")
    if mode not in _build.MODES:
        raise InputError(f"SAGE_FAST_BUILD must be one of {', '.join(_build.MODES)}, got '{mode}'.")
    return mode


def _check_instruction_set() -> None:
    """``SAGE_FAST_ISA``, which ``csrc/cpu/isa.cpp`` reads, caps the instruction set of the CPU kernels."""
    cap = os.environ.get("SAGE_FAST_ISA")
    if cap is not None and cap not in INSTRUCTION_SETS:
        raise InputError(f"SAGE_FAST_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got '{cap}'.")


def _load() -> Native:
    mode = build_mode()
    _check_instruction_set()
    if mode == "none":
        return Native(reasons=dict.fromkeys(("cpu", "cuda"), "SAGE_FAST_BUILD=none"))
    from sage_fast import _build

    folder = Path(__file__).parent
    if mode == "jit" or (mode == "auto" and not _build.find(folder, "_ops_cpu") and not _build.failure(folder)):
        try:
            folder = _build.build_cached()
        except _build.BuildError as error:
            return Native(reasons=dict.fromkeys(("cpu", "cuda"), str(error)))
    elif (made_of := _build.read_info(folder).get("sources")) is not None and made_of != _build.sources():
        # a checkout that was brought up to date
        warnings.warn(
            f"sage_fast's kernels in {str(folder)!r} were built from other sources than those in {str(_build.csrc())!r}; "
            "build them again (pip install --no-build-isolation -e .).",
            SageFastWarning,
            stacklevel=3,
        )
    return _load_from(folder)


def _load_from(folder: Path) -> Native:
    from sage_fast import _build

    native = Native(folder=folder)
    for device in ("cpu", "cuda"):
        path = _build.find(folder, f"_ops_{device}")
        reason = _why_not(folder, device, path)
        if reason is None and path is not None:
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                # torch's own words are the path alone
                why = str(error.__cause__ or error).removeprefix(f"{path}: ")[:160]
                reason = f"{path.name} does not load ({why}); it was built for another torch or another machine"
        if reason is None:
            native.devices += (device,)
        else:
            native.reasons[device] = reason
            if device == "cpu":  # it holds the schemas: without it nothing else can be registered
                native.reasons["cuda"] = reason
                return native
    try:
        for register in _callbacks:
            register()
        with _disable_current_modes():  # a graph may be captured meanwhile
            native.bf16_products = torch.ops.sage_fast.has_bf16_products(torch.empty(0, device="cpu"))
    except (AttributeError, RuntimeError) as error:
        reason = f"the compiled objects are of other sources than this package ({_first_line(error)})"
        return Native(reasons=dict.fromkeys(("cpu", "cuda"), reason))
    return native


def _why_not(folder: Path, device: str, path: Path | None) -> str | None:
    from sage_fast import _build

    if path is None:
        if device == "cpu":
            return _build.failure(folder) or "no compiled object was found"
        why = _build.read_info(folder).get("no_cuda_because") or "it needs nvcc and a CUDA build of torch"
        return f"the package was built without CUDA ({why})"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _look_at_gpus(native: Native) -> None:
    """Take the CUDA kernels back where no GPU runs what they were compiled to."""
    from sage_fast import _build

    native.gpus_seen = True
    if "cuda" not in native.devices or native.folder is None:
        return
    built = _build.read_info(native.folder).get("architectures") or ""
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not found or any(_build.runs_on(built, capability) for capability in found):
        return
    name, (major, minor) = torch.cuda.get_device_name(0), found[0]
    native.devices = tuple(device for device in native.devices if device != "cuda")
    native.reasons["cuda"] = f"{name} has compute capability {major}.{minor}, " + (
        f"the kernels were compiled for {built} (TORCH_CUDA_ARCH_LIST)"
        if found[0] >= _build.LEAST_CAPABILITY
        else _TOO_OLD
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
