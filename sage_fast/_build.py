"""One description of the compiled objects, used by setup.py (ahead of time) and by the first-use build.

Three objects: ``_ops_cpu`` (schemas and CPU kernels), ``_ops_cuda`` (CUDA kernels, where nvcc and a CUDA build of torch are
present) and ``_host`` (pybind11, no torch header: the same CPU kernels on NumPy arrays). The first two use the LibTorch stable
ABI: one binary serves torch 2.11 and later. This file imports nothing of the package, since setup.py reads it before the
package exists.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.machinery
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INFO = "_build_info.json"
#: what SAGE_FAST_BUILD may say
MODES = ("auto", "aot", "jit", "none")
#: stable ABI of torch 2.11 and later
OLDEST_TORCH = "2.11"
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CUDA_ARCHS = ("80", "90")
#: asynchronous copies and products of bfloat16 begin with it
LEAST_CAPABILITY = (8, 0)
#: what SAGE_FAST_SANITIZE=1 adds for `make sanitize`: a bad access or undefined behaviour ends the process with a report
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-wrapv", "-g1", "-O1"]
SANITIZE += ["-fno-omit-frame-pointer"]


class BuildError(RuntimeError):
    """The objects could not be built; the message is one line with the reason."""


def csrc() -> Path:
    """The folder of the C++ and CUDA sources: beside the package in a checkout, inside it once installed."""
    inside, beside = Path(__file__).parent / "csrc", Path(__file__).parent.parent / "csrc"
    return inside if inside.is_dir() else beside


def sources() -> str:
    """A digest of the C++ and CUDA sources, by which objects know whether they were made from others."""
    key = hashlib.sha256()
    for path in sorted(csrc().rglob("*.*")):
        key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()[:16]


def find(folder: Path, stem: str) -> Path | None:
    """The compiled object ``stem`` of a folder that this Python can load, or None; those of other Pythons may lie beside it."""
    names = (folder / f"{stem}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in names if path.is_file()), None)


def read_info(folder: Path) -> dict[str, Any]:
    """What the build left in ``_build_info.json``; empty when there is none."""
    try:
        return json.loads((folder / INFO).read_text())
    except (OSError, ValueError):
        return {}


def failure(folder: Path) -> str | None:
    """Why the build of a folder's objects failed, or None."""
    return read_info(folder).get("failure")


def has_cuda() -> str | None:
    """None when CUDA kernels can be built, else the reason. A visible GPU plays no part."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    return None


def architectures() -> str:
    """What the CUDA object is compiled for, in torch's words: ``8.0;9.0+PTX``."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(f"{a[:-1]}.{a[-1]}" for a in CUDA_ARCHS) + "+PTX"


def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether objects compiled for the architectures ``built`` run on a GPU of some compute capability.

    Machine code runs within its major version, from its minor one on; PTX is compiled on later ones too. What is not told in
    numbers counts as right.
    """
    words = built.replace(";", " ").replace(",", " ").split()
    known = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word) for word in words]
    if not words or not all(known) or capability < LEAST_CAPABILITY:
        return capability >= LEAST_CAPABILITY
    for major, minor, only, ptx in (found.groups() for found in known if found):
        arch = int(major), int(minor)
        later = arch <= capability and only != "a" and (bool(ptx) or arch[0] == capability[0])
        if arch == capability or later:
            return True
    return False


def check_torch() -> None:
    """Refuse a torch whose stable ABI is not there yet.

    Raises:
        BuildError: it is older than what the package asks for; pip may be about to replace it.
    """
    import torch

    if torch.__version__ < OLDEST_TORCH:
        raise BuildError(f"torch {torch.__version__} is older than {OLDEST_TORCH}, which the kernels are for")


def extensions(root: Path) -> list[Any]:
    """The setuptools extensions, for :func:`build_command`; sources relative to ``root``."""
    check_torch()
    import pybind11
    from setuptools import Extension
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    def sources(*patterns: str) -> list[str]:
        found = [path for pattern in patterns for path in sorted(csrc().glob(pattern))]
        return [os.path.relpath(path, root) for path in found]

    include = [str(csrc().resolve())]
    # -g0: many a Python passes its own -g on, which makes objects six times as large and a build a third longer
    common = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *_sanitize()]
    found = [
        CppExtension(
            "sage_fast._ops_cpu",
            sources("library.cpp", "cpu/*.cpp"),
            include_dirs=include,
            extra_compile_args={"cxx": [*common, TARGET]},
            extra_link_args=_sanitize(),
            py_limited_api=True,
        ),
        Extension(
            "sage_fast._host",
            sources("module.cpp", "host*.cpp"),
            include_dirs=[*include, pybind11.get_include()],
            extra_compile_args={"cxx": [*common, "-pthread"]},
            extra_link_args=["-pthread", *_sanitize()],
            language="c++",
        ),
    ]
    if has_cuda() is None and not _sanitize():
        nvcc = ["-O3", "-std=c++20", "--use_fast_math", TARGET, "-DUSE_CUDA"]
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # torch adds what it says, unless flags name an architecture
            nvcc += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
            nvcc += [f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}"]
        found.append(
            CUDAExtension(
                "sage_fast._ops_cuda",
                sources("cuda/*.cu"),
                include_dirs=include,
                extra_compile_args={"cxx": [*common, TARGET, "-DUSE_CUDA"], "nvcc": nvcc},
                py_limited_api=True,
            )
        )
    return found


def build_command() -> type:
    """torch's build command, which hands the CPU kernels that ``_ops_cpu`` compiled to ``_host`` too.

    They know neither torch nor Python, and take most of the time of a build.
    """
    # ninja is installed with the package, and on no PATH where an environment is not active
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), ninja.BIN_DIR])
    from torch.utils.cpp_extension import BuildExtension

    class BuildOnce(BuildExtension):
        extensions: list[Any]

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # headers are in no list, and a killed build may have left half an object
            self.parallel = None  # one object after the other, each in parallel by ninja: _host takes from _ops_cpu
            self.no_cuda = None
            self.building = ""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # a CUDA toolkit is sooner broken, or another than torch's, than a C++ compiler
                rest = [ext for ext in self.extensions if not ext.name.endswith("_ops_cuda")]
                of_another = self.building and not self.building.endswith("_ops_cuda")  # "": torch looks at nvcc first
                if of_another or len(rest) == len(self.extensions) or os.environ.get("SAGE_FAST_BUILD") == "aot":
                    raise
                self.no_cuda = " ".join(str(error).split())[:200]
                print(f"sage_fast: no CUDA kernels, those of the CPU are built alone: {self.no_cuda}", file=sys.stderr)
                self.extensions = rest
                super().build_extensions()

        def build_extension(self, ext):
            self.building = ext.name
            if ext.name.endswith("_host"):
                kernels = [source for other in self.extensions for source in other.sources if is_kernel(source)]
                folder = os.path.abspath(self.build_temp)
                ext.extra_objects = self.compiler.object_filenames(kernels, output_dir=folder)
            super().build_extension(ext)

    return BuildOnce


def is_kernel(source: str) -> bool:
    """Whether a source of ``_ops_cpu`` is one of ``_host`` too."""
    path = Path(source)
    return path.parent.name == "cpu" and (path.stem.startswith("isa") or path.stem == "workspace")


def _sanitize() -> list[str]:
    return SANITIZE if os.environ.get("SAGE_FAST_SANITIZE") == "1" else []


def describe(failure: str | None = None, no_cuda: str | None = None) -> dict[str, Any]:
    """What ``_build_info.json`` records of this machine's build; ``no_cuda``: why the CUDA object failed alone."""
    import torch

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "compiler": _version_of(os.environ.get("CXX", "c++")),
        "nvcc": _version_of(_nvcc()) if has_cuda() is None else None,
        "architectures": architectures() if has_cuda() is None else None,
        "no_cuda_because": no_cuda or has_cuda(),
        "sources": sources(),
        "failure": failure,
    }


def compile_into(folder: Path) -> None:
    """Compile every object into ``folder / "sage_fast"`` with setuptools and ninja."""
    from setuptools import Distribution

    folder.mkdir(parents=True, exist_ok=True)
    found = extensions(Path.cwd())
    for extension in found:  # setuptools lays objects out as the sources lie: relative ones would leave the folder
        extension.sources = [os.path.abspath(source) for source in extension.sources]
    distribution = Distribution({"name": "sage_fast", "ext_modules": found})
    command = build_command()(distribution, use_ninja=shutil.which("ninja") is not None)
    command.build_lib, command.build_temp = str(folder), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    # last: objects without it are of a build that was killed
    (folder / "sage_fast" / INFO).write_text(json.dumps(describe(None, command.no_cuda), indent=2))


def build_cached() -> Path:
    """Build in a process of its own into the cache, once for these sources, this torch and this compiler.

    The lock is the kernel's (flock), so a killed process cannot leave it behind; a failure is remembered and not tried
    again until the sources, torch or the compiler change, or its folder is deleted. What is there is only read.

    Raises:
        BuildError: with the first line of the compiler's complaint, or why the cache cannot be written.
    """
    check_torch()
    folder = _cache()
    try:
        if not _is_done(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if not _is_done(folder):
                    print("sage_fast: building its kernels once (about a minute) ...", file=sys.stderr)
                    if reason := _run_build(folder):
                        (folder / INFO).write_text(json.dumps(describe(reason), indent=2))
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be written ({error.strerror}); set SAGE_FAST_CACHE") from error
    if reason := failure(folder):
        raise BuildError(reason)
    return folder / "sage_fast"


def _is_done(folder: Path) -> bool:
    """Whether a build in the cache came to its end, a good one or a bad one."""
    target = folder / "sage_fast"
    return failure(folder) is not None or (read_info(target) != {} and find(target, "_ops_cpu") is not None)


def _run_build(folder: Path) -> str | None:
    script = "import runpy, sys, pathlib; m = runpy.run_path(sys.argv[1]); m['compile_into'](pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", script, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=folder)
    (folder / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode == 0:
        return None
    again = f" (log: {folder / 'build.log'}; delete its folder to have it tried again)"
    return no_compiler() or complaint(done.stdout + done.stderr) + again


def no_compiler() -> str | None:
    """The reason when there is no C++ compiler to call."""
    name = os.environ.get("CXX", "c++")
    return None if _version_of(name) else f"the C++ compiler {name!r} was not found"


def complaint(log: str) -> str:
    """The line of a build's output that says what was wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if any(w in line for w in ("error:", "Error:", "not found", "command not"))]
    return (telling or lines or ["the build failed without a message"])[0 if telling else -1][:200]


def _cache() -> Path:
    import torch

    root = os.environ.get("SAGE_FAST_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "sage_fast"
    )
    root = os.path.expanduser(root)
    if root.startswith("~"):  # a user without a name, as containers have them, and no HOME
        raise BuildError(f"the home folder in {root} is not known; set SAGE_FAST_CACHE")
    compiler = _version_of(os.environ.get("CXX", "c++"))
    cuda = has_cuda() or [_version_of(_nvcc()), architectures()]
    made_of = json.dumps([sources(), torch.__version__, sys.version, compiler, cuda, *_sanitize()])
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    return Path(root).absolute() / key  # absolute: the build runs in the folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # file systems without such locks
                raise
        yield


def _nvcc() -> str:
    """The compiler that torch calls, which need not be on the PATH."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shlex.quote(os.path.join(CUDA_HOME or "", "bin", "nvcc"))


def _version_of(command: str) -> str | None:
    """What a compiler says of itself; ``command`` may have words before and behind, as ``CXX="ccache g++"`` has."""
    try:
        words = [*shlex.split(command), "--version"]
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return next((line for line in reversed(lines) if "release" in line), lines[0] if lines else None)
