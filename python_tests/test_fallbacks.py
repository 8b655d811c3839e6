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
