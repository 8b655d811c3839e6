"""The build: what the objects depend on, what happens without a compiler, and that the CUDA sources compile without a GPU."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from setuptools import Extension

from sage_fast import _build, _native
from sage_fast.errors import InputError

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
CHECK = """
import json, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from sage_fast.ops import bias_act, upfirdn2d
    for _ in range(2):
        y = bias_act(torch.tensor([[-1.0, 2.0]]), act="lrelu", gain=1.0)
        upfirdn2d(torch.ones(1, 1, 4, 4), torch.ones(2))
from sage_fast import _native
print(json.dumps({"y": y.tolist(), "devices": _native.load().devices,
                  "warnings": [str(w.message) for w in caught if "sage_fast" in str(w.message)]}))
"""


def _run(folder: Path, script: str = CHECK, **env: str):
    import json

    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **env},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("built", [{"sources": "of last week"}, {"sources": _build.sources()}, {}])
def test_objects_of_other_sources_are_said_to_be_old(built, monkeypatch, recwarn):
    monkeypatch.setenv("SAGE_FAST_BUILD", "aot")
    monkeypatch.setattr(_build, "read_info", lambda folder: built)
    monkeypatch.setattr(_native, "_load_from", lambda folder: _native.Native(folder=folder))
    assert _native._load().folder == Path(_native.__file__).parent
    assert ["built from other sources" in str(w.message) for w in recwarn] == [True] * (
        built.get("sources") == "of last week"
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the package and its sources as a plain Python install leaves them: nothing compiled."""
    folder = tmp_path_factory.mktemp("bare")
    ignore = shutil.ignore_patterns("*.so", _build.INFO, "__pycache__", "model")
    shutil.copytree(ROOT / "sage_fast", folder / "sage_fast", ignore=ignore)
    shutil.copytree(ROOT / "csrc", folder / "sage_fast" / "csrc")
    return folder


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_first_use_builds_once_and_then_reads_the_cache(bare, tmp_path):
    cache = {"SAGE_FAST_CACHE": str(tmp_path), "SAGE_FAST_BUILD": "auto"}
    got = _run(bare, **cache)
    assert got["devices"][0] == "cpu" and got["warnings"] == []
    assert got["y"][0] == pytest.approx([-0.2, 2.0])
    (built,) = tmp_path.glob("*/sage_fast/_ops_cpu*.so")
    before = built.stat().st_mtime_ns
    # a lock file of a killed build is no lock: the lock is the kernel's
    assert (built.parent.parent / "lock").exists()
    assert _run(bare, **cache)["devices"][0] == "cpu"
    assert built.stat().st_mtime_ns == before


def test_a_broken_compiler_leaves_a_working_package_and_one_warning(bare, tmp_path):
    cache = {"SAGE_FAST_CACHE": str(tmp_path), "SAGE_FAST_BUILD": "auto", "CXX": "/nonexistent/c++"}
    got = _run(bare, **cache)
    assert got["y"][0] == pytest.approx([-0.2, 2.0]) and got["devices"] == []
    (warning,) = got["warnings"]
    assert (
        "slower PyTorch reference" in warning and "/nonexistent/c++" in warning and "Install a C++ compiler" in warning
    )
    log = next(tmp_path.glob("*/build.log"))
    before = log.stat().st_mtime_ns
    assert len(_run(bare, **cache)["warnings"]) == 1
    assert log.stat().st_mtime_ns == before, "a failed build must not be tried again at every start"


def test_an_install_without_a_compiler_leaves_the_reason_and_nothing_else(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    ignore = shutil.ignore_patterns("*.so", _build.INFO, "__pycache__", "model")
    shutil.copytree(ROOT / "sage_fast", tmp_path / "sage_fast", ignore=ignore)
    (tmp_path / "sage_fast" / "_ops_cpu.abi3.so").write_bytes(b"of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = {**os.environ, "CXX": "/nonexistent/c++", "SAGE_FAST_BUILD": "auto"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "'/nonexistent/c++' was not found" in done.stderr
    got = _run(tmp_path, SAGE_FAST_BUILD="auto", SAGE_FAST_CACHE=str(tmp_path / "cache"))
    (warning,) = got["warnings"]
    assert got["devices"] == [] and "'/nonexistent/c++' was not found" in warning
    assert not (tmp_path / "cache").exists(), "a failed installation is not tried again at first use"
    env["SAGE_FAST_BUILD"] = "aot"
    assert subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300).returncode != 0


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_a_broken_cuda_object_leaves_the_others(tmp_path, monkeypatch, capfd):
    for name, text in (("good", "int x;"), ("bad", "int")):
        (tmp_path / f"{name}.cpp").write_text(text)

    def extensions(root):
        named = {"sage_fast._ops_cpu": "good", "sage_fast._ops_cuda": "bad"}
        return [Extension(name, [str(tmp_path / f"{source}.cpp")]) for name, source in named.items()]

    monkeypatch.setattr(_build, "extensions", extensions)
    monkeypatch.setenv("SAGE_FAST_BUILD", "auto")
    _build.compile_into(tmp_path / "built")
    folder = tmp_path / "built" / "sage_fast"
    assert _build.find(folder, "_ops_cpu") and not _build.find(folder, "_ops_cuda")
    assert "those of the CPU are built alone: Error compiling objects" in capfd.readouterr().err
    assert "built without CUDA (Error compiling objects" in str(_native._why_not(folder, "cuda", None))
    monkeypatch.setenv("SAGE_FAST_BUILD", "aot")
    with pytest.raises(RuntimeError, match="Error compiling objects"):
        _build.compile_into(tmp_path / "again")


def _finish(folder: Path) -> None:
    target = folder / "sage_fast"
    target.mkdir(parents=True, exist_ok=True)
    (target / "_ops_cpu.abi3.so").write_bytes(b"whole")
    (target / _build.INFO).write_text('{"failure": null}')


def test_what_a_killed_build_left_is_built_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAGE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_build, "_run_build", _finish)
    half = _build._cache() / "sage_fast" / "_ops_cpu.abi3.so"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"ha")
    assert _build.build_cached() == half.parent and half.read_bytes() == b"whole"
    half.unlink()
    assert _build.build_cached() == half.parent and half.exists(), "what somebody deleted is built again"
    assert capsys.readouterr().err.count("building its kernels once") == 2


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_half_an_object_is_no_reason_to_skip_a_build(tmp_path, monkeypatch):
    """As a build that was killed while it linked leaves one, newer than every source; without ninja too."""
    (tmp_path / "good.cpp").write_text("int x;")
    extension = Extension("sage_fast._ops_cpu", [str(tmp_path / "good.cpp")])
    monkeypatch.setattr(_build, "extensions", lambda root: [extension])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "sage_fast").mkdir()
    half = tmp_path / "sage_fast" / f"_ops_cpu{EXTENSION_SUFFIXES[0]}"
    half.write_bytes(b"ha")
    _build.compile_into(tmp_path)
    assert half.read_bytes()[:4] == b"\x7fELF"


def test_a_cache_that_is_there_is_only_read(tmp_path, monkeypatch):
    """One on a disk that cannot be written: the lock cannot be opened there, nor a log written."""
    monkeypatch.setenv("SAGE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_build, "_run_build", _finish)
    folder = _build._cache()
    (folder / "lock").mkdir(parents=True)
    with pytest.raises(_build.BuildError, match=r"cache .* cannot be written \(Is a directory\); set SAGE_FAST_CACHE"):
        _build.build_cached()
    _finish(folder)
    assert _build.build_cached() == folder / "sage_fast"


def test_a_file_system_without_locks_holds_nobody_up(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv("SAGE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_build, "_run_build", _finish)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert _build.find(_build.build_cached(), "_ops_cpu")


def test_a_user_without_a_home_is_asked_for_a_cache(tmp_path, monkeypatch):
    """As in a container that runs under a bare number."""

    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "SAGE_FAST_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(_build, "_run_build", _finish)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(_build.BuildError, match=r"home folder in ~/.cache/sage_fast is not known; set SAGE_FAST_CACHE"):
        _build.build_cached()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_an_object_that_does_not_load_is_named_with_what_it_lacks(tmp_path):
    source, built = tmp_path / "later.cpp", tmp_path / "_ops_cpu.abi3.so"
    source.write_text('extern "C" int torch_of_a_later_day();\nint x = torch_of_a_later_day();\n')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(built)], check=True, timeout=100)
    reason = _native._load_from(tmp_path).reasons["cpu"]
    assert reason == (
        "_ops_cpu.abi3.so does not load (undefined symbol: torch_of_a_later_day); "
        "it was built for another torch or another machine"
    )


def test_objects_of_other_pythons_are_passed_over(tmp_path):
    for version in ("30", "399"):
        (tmp_path / f"_host.cpython-{version}-x86_64-linux-gnu.so").write_bytes(b"")
    assert _build.find(tmp_path, "_host") is None
    mine = tmp_path / f"_host{EXTENSION_SUFFIXES[0]}"
    mine.write_bytes(b"")
    assert _build.find(tmp_path, "_host") == mine


def test_an_older_torch_is_not_built_against(monkeypatch):
    """pip builds first and then replaces it by the one that the package asks for."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0+cpu"))
    for build in (lambda: _build.extensions(ROOT), _build.build_cached):
        with pytest.raises(_build.BuildError, match=r"torch 2\.10\.0\+cpu is older than 2\.11"):
            build()
    assert f'"torch>={_build.OLDEST_TORCH}"' in (ROOT / "pyproject.toml").read_text()


def test_ninja_is_found_in_an_environment_that_is_not_active(tmp_path, monkeypatch):
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") is None
    _build.build_command()
    assert shutil.which("ninja") is not None


def test_a_compiler_may_have_words_before_it(monkeypatch):
    monkeypatch.setenv("CXX", f"env {sys.executable}")
    assert _build.no_compiler() is None and _build.describe()["compiler"] == f"Python {platform.python_version()}"
    for missing in ("/nonexistent/c++ -m64", "c++ '"):
        monkeypatch.setenv("CXX", missing)
        assert "was not found" in str(_build.no_compiler())


def test_a_compiler_may_speak_in_bytes_of_its_own(bare, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\ncase $1 in -*version) echo 12.0.0; exit;; esac\nprintf '\\303\\266\\377.cpp: error: no\\n' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (warning,) = _run(bare, SAGE_FAST_CACHE=str(tmp_path), SAGE_FAST_BUILD="auto", CXX=str(compiler), **locale)[
        "warnings"
    ]
    (log,) = tmp_path.glob("*/build.log")
    assert f"(log: {log}; delete its folder to have it tried again)" in warning
    assert "error: no" in log.read_text(encoding="utf-8")


def test_an_installation_refuses_a_mode_that_does_not_exist():
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    env = {**os.environ, "SAGE_FAST_BUILD": "AOT"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.strip() == "SAGE_FAST_BUILD must be one of auto, aot, jit, none, got 'AOT'."


@pytest.mark.parametrize("compiler", ["g++-11", "g++-12", "g++-13", "g++-14", "clang++"])
@pytest.mark.parametrize("isa", _native.INSTRUCTION_SETS if platform.machine() == "x86_64" else ["portable"])
def test_kernels_are_understood_by_the_compilers_of_others(compiler, isa):
    """The oldest is that of Ubuntu 22.04."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on this machine")
    source = ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp"
    command = [compiler, "-fsyntax-only", "-std=c++20", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[:2000]


def test_none_is_silent(bare):
    got = _run(bare, SAGE_FAST_BUILD="none")
    assert got["devices"] == [] and got["warnings"] == []


def test_an_unwritable_cache_is_named(bare, tmp_path):
    (tmp_path / "file").write_text("")
    got = _run(bare, SAGE_FAST_BUILD="auto", SAGE_FAST_CACHE=str(tmp_path / "file"))
    assert "set SAGE_FAST_CACHE" in got["warnings"][0]


def test_import_neither_builds_nor_loads(bare, tmp_path):
    script = "import sage_fast, sage_fast.ops, json; from sage_fast import _native; print(json.dumps(_native._native is None))"
    assert _run(bare, script, SAGE_FAST_CACHE=str(tmp_path), SAGE_FAST_BUILD="auto") is True
    assert not list(tmp_path.iterdir())


def test_what_is_installed_can_be_built_again_without_isolation():
    """As the warning about missing kernels says; the README names the same to begin with."""
    text, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "README.md"))
    needed, installed = (re.search(rf"^{key} = \[(.*?)\]$", text, re.M | re.S) for key in ("requires", "dependencies"))
    assert needed and installed
    for requirement in re.findall(r'"([^"]*)"', needed[1]):
        assert f'"{requirement}"' in installed[1], requirement
        assert re.search(rf'pip install [^`]*{re.escape(requirement)}["`]', readme), requirement


def test_build_mode_is_checked(monkeypatch):
    monkeypatch.setenv("SAGE_FAST_BUILD", "later")
    with pytest.raises(InputError, match="SAGE_FAST_BUILD must be one of auto, aot, jit, none"):
        _native.build_mode()


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine")
def test_the_ops_use_the_stable_abi_alone():
    path = _build.find(_native.load().folder or ROOT / "sage_fast", "_ops_cpu")
    if path is None:
        pytest.skip("no compiled object on this machine")
    names = subprocess.run(["nm", "-DC", "--undefined-only", str(path)], capture_output=True, text=True).stdout
    assert "aoti_torch" in names or "torch_" in names
    unstable = [line for line in names.splitlines() if re.search(r"\b(c10|at)::", line)]
    assert unstable == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_a_wheel_holds_objects_and_sources(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", _build.INFO, "__pycache__", "build", ".*", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=500, env={**os.environ, "SAGE_FAST_BUILD": "aot"})
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel)
    names = packed.namelist()
    for pattern in (r"_ops_cpu.*\.so", r"_host.*\.so", r"csrc/library\.cpp", r"csrc/cuda/upfirdn2d\.cu", r"py\.typed"):
        assert any(re.search(pattern, name) for name in names), pattern
    objects = [name for name in names if name.endswith(".so")]
    assert not any(b".debug_info" in packed.read(name) for name in objects), "Python's own -g is left out"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on this machine")
def test_cmake_finds_what_it_needs(tmp_path):
    """With nvcc where there is one, whatever the torch."""
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine: the CUDA sources are not compiled here")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_cuda_sources_compile_without_spills(source, tmp_path):
    include = Path(torch.__file__).parent / "include"
    command = [NVCC, "-c", str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "out.o"), "-std=c++20", "-O3"]
    command += [
        "--use_fast_math",
        "-Xptxas",
        "-v",
        "-DUSE_CUDA",
        _build.TARGET,
        f"-I{include}",
        f"-I{include}/torch/csrc/api/include",
    ]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _build.CUDA_ARCHS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout + done.stderr)
    assert spills and set(spills) == {("0", "0")}
