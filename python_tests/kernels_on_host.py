"""The CUDA kernels on the CPU: their sources compiled by a C++ compiler, each thread of a block a fiber of its own.

:func:`build` gives a library whose ops ``torch.ops.sage_fast_on_host`` take CPU tensors to the kernels of ``csrc/cuda``. Two things
are rewritten before: a launch ``kernel<<<...>>>(...)`` becomes a call, a ``__shared__`` array a reference to memory of the block.
``cuda_on_host/include`` stands in for CUDA's headers, ``cuda_on_host/blocks.cpp`` runs the blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sage_fast import _build, _native

HERE = Path(__file__).parent / "cuda_on_host"
CSRC = _build.csrc()
ORDERS = {"forward": (0, 0), "backward": (1, 0), "shuffled": (2, 1), "shuffled again": (2, 2)}
#: ops of the schema without a CUDA kernel
ONLY_ON_CPU = ("conv3x3", "synthesis")


class CompileError(RuntimeError):
    """A source does not compile for the host."""


def on_host(source: str) -> str:
    """CUDA source -> C++: launches and shared arrays rewritten, line for line."""
    return _with_calls(_with_arrays(source))


def _with_calls(source: str) -> str:
    while (at := source.find("<<<")) >= 0:
        start = _start_of_name(source, at)
        middle = source.index(">>>", at)
        opening = source.index("(", middle)
        closing = _matching(source, opening)
        name, config = source[start:at], source[at + 3 : middle]
        arguments = source[opening + 1 : closing]
        call = (
            f'::sage_fast::host_cuda::launch(::std::source_location::current(), "{" ".join(name.split())}", '
            f"::sage_fast::host_cuda::Config({config}), [&](auto... of) {{ {name}(of...); }}"
        )
        source = f"{source[:start]}{call}, {arguments}){source[closing + 1 :]}"
    return source


def _start_of_name(source: str, end: int) -> int:
    """Where ``kernel<A, b<C>>`` begins that ends before ``end``."""
    start, depth = end, 0
    while depth or source[start - 1] in ">_" or source[start - 1].isalnum():
        start -= 1
        depth += (source[start] == ">") - (source[start] == "<")
    return start


def _matching(source: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(source)):
        depth += (source[i] in "([{") - (source[i] in ")]}")
        if depth == 0:
            return i
    raise CompileError("a parenthesis of a launch is never closed")


def _with_arrays(source: str) -> str:
    source = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\w+\)\s+|alignas\(\w+\)\s+)?([^;]+?)\s+(\w+)\s*\[\s*\]\s*;",
        r"\1* const \2 = static_cast<\1*>(::sage_fast::host_cuda::dynamic_shared_array());",
        source,
    )
    return re.sub(
        r"__shared__\s+(?:__align__\(\w+\)\s+|alignas\(\w+\)\s+)?([^;]+);", lambda m: _arrays(m.group(1)), source
    )


def _arrays(declaration: str) -> str:
    """``T a[2][3], b[4]`` -> two references, each found by the address of a variable of its own."""
    first, *others = _split(declaration)
    found = re.fullmatch(r"(.+?)\s+(\w+\s*(?:\[.*\])?)", first.strip(), re.DOTALL)
    assert found, declaration
    type_, lines = found.group(1), []
    for declarator in (found.group(2), *others):
        name, *dims = declarator.strip().partition("[")
        array = f"{name.strip()}_array"
        lines.append(
            f"using {array} = {type_}{''.join(dims)}; static const char {array}_key = 0; "
            f"{array}& {name} = *static_cast<{array}*>(::sage_fast::host_cuda::shared_array("
            f"&{array}_key, sizeof({array})));"
        )
    return " ".join(lines)


def _split(text: str) -> list[str]:
    """At the commas outside of all brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path, sources: list[Path]) -> Path:
    """The library of some sources in ``folder``; what is up to date there is not compiled again.

    Raises:
        CompileError: with the end of the compiler's complaint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for header in CSRC.rglob("*.cuh"):  # with launches of their own
            target = folder / "csrc" / header.relative_to(CSRC)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(on_host(header.read_text()))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda source: _compiled(folder, source), sources))
        name = hashlib.sha256(b"".join(path.with_suffix(".key").read_bytes() for path in objects)).hexdigest()[:12]
        library = folder / f"{name}.so"
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"
            _run([*_command(), "-shared", *map(str, objects), *torch_libraries, "-o", str(library)])
    return library


def _compiled(folder: Path, source: Path) -> Path:
    cpp, out = folder / f"{source.stem}.cpp", folder / f"{source.stem}.o"
    text = source.read_text()
    text = on_host(text) if source.suffix == ".cu" else text
    key = _key(text)
    if out.exists() and out.with_suffix(".key").exists() and out.with_suffix(".key").read_text() == key:
        return out
    cpp.write_text(f'#line 1 "{source}"\n{text}')
    include = Path(torch.__file__).parent / "include"
    flags = [f"-I{HERE / 'include'}", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    flags += ["-include", "cuda_runtime.h", _build.TARGET, "-DUSE_CUDA"]
    _run(
        [
            *_command(),
            *flags,
            f"-I{folder / 'csrc' / 'cuda'}",
            f"-I{CSRC / 'cuda'}",
            f"-I{CSRC}",
            "-c",
            str(cpp),
            "-o",
            str(out),
        ]
    )
    out.with_suffix(".key").write_text(key)
    return out


def _command() -> list[str]:
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-U_FORTIFY_SOURCE",
        "-fvisibility=hidden",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    return [str(compiler()), *flags, *_build._sanitize()]


def _key(text: str) -> str:
    key = hashlib.sha256(text.encode())
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh"), *HERE.glob("include/*")]
    for path in sorted(headers):
        key.update(path.read_bytes())
    key.update(" ".join([torch.__version__, *_command(), str(_build._version_of(str(compiler())))]).encode())
    return key.hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    if done.returncode != 0:
        raise CompileError(done.stderr[-4000:])


class Library:
    """The loaded library: in which order threads run, and which launches have run."""

    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self._functions = ctypes.CDLL(str(path))
        self._functions.sage_fast_host_launched.restype = ctypes.c_char_p

    def launched(self) -> set[str]:
        """``file:line`` of every launch so far."""
        return {line.split()[0] for line in self._functions.sage_fast_host_launched().decode().splitlines()}

    @contextlib.contextmanager
    def shared_memory(self, most: int) -> Iterator[None]:
        """Inside, a block may have ``most`` bytes of shared memory, as on cards with less than an H200's 227 KiB."""
        set_most = self._functions.sage_fast_host_set_most_shared
        set_most(ctypes.c_size_t(most))
        try:
            yield
        finally:
            set_most(ctypes.c_size_t(227 << 10))

    def in_every_order(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``op(...)``, a tensor or a tuple of them, after an assertion that its bits are those of every order of threads."""
        results = []
        for order in ORDERS:
            self._functions.sage_fast_host_set_order(*ORDERS[order])
            try:
                results.append(op(*args, **kwargs))
            finally:
                self._functions.sage_fast_host_set_order(*ORDERS["forward"])
        for order, result in zip(ORDERS, results):
            for first, other in zip(*map(torch.utils._pytree.tree_leaves, (results[0], result))):
                assert first.shape == other.shape
                assert torch.equal(_bits(first), _bits(other)), f"other bits when threads run {order}"
        return results[0]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@functools.cache
def load() -> Library:
    """The library of every CUDA source and of the tests' own; the test that asks for it is skipped without a compiler."""
    if compiler() is None:
        pytest.skip("no C++ compiler on this machine: the CUDA kernels do not run on the host")
    if "cpu" not in _native.load().devices:
        pytest.skip("the schemas of the ops are not compiled")
    name = "cuda_on_host_sanitized" if _build._sanitize() else "cuda_on_host"
    return Library(build(CSRC.parent / "build" / name, sources()))


def sources() -> list[Path]:
    """What :func:`load` compiles."""
    return [HERE / "blocks.cpp", HERE / "probe.cu", CSRC / "library.cpp", *sorted(CSRC.glob("cuda/*.cu"))]


def launches() -> set[str]:
    """``file:line`` of every launch in the CUDA sources."""
    found = set()
    for path in (*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "<<<" in line:
                found.add(f"{path.name}:{number}")
    return found


@contextlib.contextmanager
def routed() -> Iterator[None]:
    """Inside, the ops of ``sage_fast`` take CPU tensors to the CUDA kernels on the host."""
    _native.load()  # what registers last is taken
    has_kernel, route = _native.has_kernel, torch.library.Library("sage_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the kernels for the CPU step back
        for name in (*_native.NATIVE_OPS, "bias_act_backward", "scaled_bias_act_backward", *_native.CUDA_OPS):
            if hasattr(torch.ops.sage_fast_on_host, name) and name not in ONLY_ON_CPU:
                route.impl(name, _to_host(name), "CPU", allow_override=True)
    _native.has_kernel = lambda op, device: op in _native.CUDA_OPS or has_kernel(op, device)
    try:
        yield
    finally:
        _native.has_kernel = has_kernel
        route._destroy()


def _to_host(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.sage_fast_on_host, name).default
    if name == "upfirdn2d":  # a filter is converted for tensors on a GPU alone
        return lambda x, f, *settings: op(x, (torch.outer(f, f) if f.ndim == 1 else f).to(x), *settings)
    return op
