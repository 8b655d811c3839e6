"""Every way down from the best kernels, forced: lesser instruction sets, and a CUDA torch with a package built without."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from sage_fast import _build, _native, cli, ops
from sage_fast.errors import InputError, SageFastWarning

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif("cpu" not in _native.load().devices, reason="no kernels on the CPU")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_ops_on_a_lesser_instruction_set(isa):
    """In a process of its own, where the set is chosen once. `make sanitize` runs all of python_tests/ops on each."""
    run = (
        "import sys, pytest; from sage_fast.info import build_report; print(build_report()['host']['instruction_set']);"
    )
    run += "sys.exit(pytest.main(sys.argv[1:]))"
    chosen = "fuzz or empty or low_precision"
    command = [sys.executable, "-c", run, "-q", "-p", "no:cacheprovider", "python_tests/ops", "-k", chosen]
    env = {**os.environ, "SAGE_FAST_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    ran = done.stdout.splitlines()[0].lower().replace("-", "")
    sets = _native.INSTRUCTION_SETS
    assert ran in sets[: sets.index(isa) + 1]  # less on a lesser processor
    assert " passed" in done.stdout


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_loading_does_not_depend_on_the_default_device(device):
    """In a process of its own, where the objects are loaded once."""
    run = f"import torch; torch.set_default_device('{device}'); from sage_fast import _native; print(_native.load().devices)"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.strip() == str(_native.load().devices)


@pytest.mark.skipif(_build.find(ROOT / "sage_fast", "_ops_cpu") is None, reason="no objects beside the package")
def test_an_exported_program_is_read_after_the_import_of_the_ops(tmp_path):
    """By a process that has called none."""

    class Blur(torch.nn.Module):
        def forward(self, x, f):
            return ops.upfirdn2d(x, f)

    x, f = torch.arange(64.0).reshape(1, 1, 8, 8), torch.ones(2, 2)
    torch.export.save(torch.export.export(Blur(), (x, f)), tmp_path / "blur.pt2")
    run = "import sys, torch, sage_fast.ops; program = torch.export.load(sys.argv[1]).module(); "
    run += "x = torch.arange(64.0).reshape(1, 1, 8, 8); print(program(x, torch.ones(2, 2)).sum().item())"
    command = [sys.executable, "-c", run, str(tmp_path / "blur.pt2")]
    env = {**os.environ, "SAGE_FAST_BUILD": "auto"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-1000:]
    assert float(done.stdout) == ops.upfirdn2d(x, f).sum().item()


def test_an_instruction_set_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(_native, "_native", None)
    for wrong in ("avx", "AVX2", ""):
        monkeypatch.setenv("SAGE_FAST_ISA", wrong)
        with pytest.raises(
            InputError, match=f"^SAGE_FAST_ISA must be one of portable, avx2, avx512, avx512bf16, got '{wrong}'.$"
        ):
            ops.upfirdn2d(torch.ones(1, 1, 4, 4), torch.ones(2))
    assert cli.main(["info"]) == 2
    assert "SAGE_FAST_ISA must be one of" in capsys.readouterr().err


def test_a_cuda_torch_without_nvcc_builds_for_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert _build.has_cuda() == "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    assert [extension.name for extension in _build.extensions(ROOT)] == ["sage_fast._ops_cpu", "sage_fast._host"]
    assert _build.describe()["no_cuda_because"].startswith("nvcc was not found")


def test_objects_of_other_architectures_are_others_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_build, "has_cuda", lambda: None)
    folders = []
    for architectures in ("8.0", "9.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        folders.append(_build._cache())
        assert _build.describe()["architectures"] == architectures
    assert folders[0] != folders[1]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert _build.describe()["architectures"] == "8.0;9.0+PTX" and _build._cache() not in folders


@pytest.fixture
def cuda_without_kernels(monkeypatch, tmp_path):
    """As on a machine with a GPU whose package holds ``_ops_cpu`` alone; tensors of the CPU pass for those of the GPU."""
    native = _native.load()
    if "cpu" not in native.devices:
        pytest.skip("no kernels on the CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = _native._why_not(tmp_path, "cuda", _build.find(tmp_path, "_ops_cuda"))
    assert reason is not None
    only_cpu = dataclasses.replace(native, devices=("cpu",), reasons={"cuda": reason})
    has_kernel = _native.has_kernel
    monkeypatch.setattr(_native, "_native", only_cpu)
    monkeypatch.setattr(_native, "_warned", set())
    monkeypatch.setenv("SAGE_FAST_BUILD", "auto")
    monkeypatch.setattr(_native, "has_kernel", lambda op, device: has_kernel(op, "cuda" if device == "cpu" else device))


def test_a_cuda_torch_with_a_package_for_the_cpu_alone(cuda_without_kernels):
    x, f, bias = torch.randn(2, 3, 8, 8), torch.ones(4), torch.randn(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resampled = ops.upfirdn2d(x, f, up=2, padding=1)
        activated = ops.bias_act(x, bias, act="lrelu")
        blurred = ops.gaussian_low_pass(x)
        fused = ops.fuse_pixels(x, x / 2, x + 1), ops.fuse_frequencies(x, x / 2, x + 1)
    (warning,) = (w for w in caught if issubclass(w.category, SageFastWarning))
    assert str(warning.message).startswith("sage_fast runs its slower PyTorch reference on 'cuda': ")
    assert "built without CUDA" in str(warning.message) and "Install the CUDA toolkit (nvcc)" in str(warning.message)
    assert torch.equal(resampled, ops.upfirdn2d_reference(x, f, up=2, padding=1))
    assert torch.equal(activated, ops.bias_act_reference(x, bias, act="lrelu"))
    assert torch.equal(blurred, ops.gaussian_low_pass_reference(x))
    assert torch.equal(fused[0], ops.fuse_pixels_reference(x, x / 2, x + 1))
    assert torch.equal(fused[1], ops.fuse_frequencies_reference(x, x / 2, x + 1))


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        ("8.0;9.0+PTX", (8, 6), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0+PTX", (7, 5), False),
        ("9.0", (9, 0), True),
        ("9.0", (12, 0), False),
        ("9.0", (8, 0), False),
        ("8.6 12.0", (8, 0), False),
        ("9.0a+PTX", (10, 0), False),
        ("9.0a+PTX", (9, 0), True),
        ("Hopper", (12, 0), True),
        ("", (8, 9), True),
        ("", (7, 0), False),
    ],
)
def test_which_gpu_runs_what_was_compiled(built, capability, runs):
    assert _build.runs_on(built, capability) == runs


@pytest.mark.parametrize(
    "gpus, why", [([(7, 5)], "need 8.0"), ([(12, 0)], "compiled for 9.0 "), ([(7, 5), (9, 0)], "")]
)
def test_gpus_that_do_not_run_the_kernels_take_the_reference(monkeypatch, tmp_path, gpus, why):
    """Asked at the first op on a GPU, not before: a context there takes memory and time."""
    (tmp_path / _build.INFO).write_text('{"architectures": "9.0"}')
    native = _native.Native(tmp_path, ("cpu", "cuda"))
    monkeypatch.setattr(_native, "_native", native)
    monkeypatch.setattr(_native, "_warned", set())
    monkeypatch.setenv("SAGE_FAST_BUILD", "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A card")
    assert _native.has_kernel("upfirdn2d", "cpu") and not native.gpus_seen
    if not why:
        assert _native.has_kernel("upfirdn2d", "cuda")
        return
    with pytest.warns(SageFastWarning, match=rf"on 'cuda': A card has compute capability {gpus[0][0]}\..*{why}"):
        assert not _native.has_kernel("upfirdn2d", "cuda")
    assert not _native.has_kernel("styled_conv", "cuda") and _native.has_kernel("upfirdn2d", "cpu")


def test_objects_of_other_sources_are_not_used(monkeypatch):
    """As after new sources without a new build: an op that the objects do not have."""

    def register():
        torch.ops.sage_fast.an_op_of_tomorrow.default  # noqa: B018

    monkeypatch.setattr(_native, "_native", None)
    monkeypatch.setattr(_native, "_warned", set())
    monkeypatch.setattr(_native, "_callbacks", [register])
    if _build.find(Path(_native.__file__).parent, "_ops_cpu") is None:
        pytest.skip("no compiled objects beside the package")
    x, f = torch.randn(1, 1, 5, 5), torch.ones(2) / 2
    with pytest.warns(SageFastWarning, match=r"objects are of other sources .*an_op_of_tomorrow.* reinstall"):
        y = ops.upfirdn2d(x, f)
    torch.testing.assert_close(y, ops.upfirdn2d_reference(x, f))
