"""The benchmarks themselves: tensors and clocks of a GPU that is not there, and their last line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clocks import CpuClock, CudaClock, copy_rate, medians, product_rate

ROOT = Path(__file__).parents[1]
ON_A_GPU = ["bias_act", "edit_latents", "fusion", "gaussian_low_pass", "least_squares_codes", "modulated_conv2d"]
ON_A_GPU += ["project_onto_basis", "scaled_bias_act", "upfirdn2d"]
#: left out: autograd (it has threads for its devices), numbers of classes (they are looked at), and forms alike
NOT_FAKE = "not gradient and not several and not bfloat16 and not last"


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    environment = alone | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests")])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has the real guard")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_all_tensors_of_op_benchmarks_are_made_on_the_device():
    files = [f"benchmarks/bench_{op}.py" for op in ON_A_GPU]
    done = run("-p", "fake_gpu", "--bench-device", "cuda:0", "-k", NOT_FAKE, *files)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_the_last_line_is_one_json_object_and_stands_in_the_file(tmp_path):
    kept = tmp_path / "rows.json"
    words = ("--benchmark-enable", "--bench-json", str(kept), "-k", "32 and category and not arrays")
    done = run(*words, "benchmarks/bench_project_onto_basis.py")
    assert done.returncode == 0, done.stdout[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(kept.read_text()) and last["bench"] == "project_onto_basis"
    (row,) = last["rows"]
    assert row["of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"], abs=0.01)
    assert {"einsum", "NumPy"} <= set(row["ratios"]) and "gflop_per_s" not in row


def test_several_files_end_in_one_object_too():
    done = run(
        *("--benchmark-enable", "-k", "(32 and category) or (32 and one and latent)"),
        *("benchmarks/bench_project_onto_basis.py", "benchmarks/bench_least_squares_codes.py"),
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["bench"] == "all" and {file["bench"] for file in last["files"]} == {
        "project_onto_basis",
        "least_squares_codes",
    }


class Event:
    """What ``torch.cuda.Event`` is to a clock; its time is moved by the calls."""

    now = 0.0  # milliseconds

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def work(milliseconds: float) -> None:
    Event.now += milliseconds


@pytest.fixture
def gpu_clock(monkeypatch) -> CudaClock:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return CudaClock(torch.device("cpu"))


def test_the_clock_of_a_gpu_times_the_call_alone_behind_a_flush(gpu_clock):
    gpu_clock.scratch.fill_(1)
    seen, spent = [], iter([5.0, 7.0, 90.0])

    def call():
        seen.append(gpu_clock.scratch[-1].item())
        work(next(spent))

    assert gpu_clock(call, 3) == pytest.approx(0.007)
    assert seen == [0, 0, 0]


def test_medians_of_interleaved_calls(gpu_clock):
    order = []
    calls = {name: (lambda name=name, ms=ms: (order.append(name), work(ms))) for name, ms in (("a", 40.0), ("b", 10.0))}
    assert medians(gpu_clock, calls, rounds=3) == pytest.approx({"a": 0.04, "b": 0.01})
    assert order[6:] == ["b", "a", "a", "b", "b", "a"]  # behind three of each, which say how often to repeat


def test_what_the_processor_reaches():
    clock = CpuClock(one_thread=True)
    assert 1e8 < copy_rate(clock) < 1e13
    assert 1e8 < product_rate(clock, torch.float32) < 1e14


GPU_SH = ROOT / "benchmarks" / "gpu.sh"
PARTS = ["build", "info", "every_kernel", "peers", "bench_synthesis", "bench_convolutions", "bench_training_step"]
PARTS += ["bench_fusion", "bench_project_onto_basis", "memcheck", "racecheck", "synccheck", "generate", "tests"]
PARTS += ["tests_large", "demo", "train"]
PARTS += [f"bench_{op}" for op in ON_A_GPU if op not in ("fusion", "project_onto_basis")] + ["registers"]


def gpu_sh(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(GPU_SH), *words], env=os.environ | environment, capture_output=True, text=True, timeout=100
    )


def test_the_script_for_a_gpu_parses_and_lists_its_parts():
    assert subprocess.run(["bash", "-n", str(GPU_SH)]).returncode == 0
    done = gpu_sh("--dry-run", PEERS="/a/stylegan3 /a/ada")
    parts = {name: text for name, _, text in (line.partition(": ") for line in done.stdout.splitlines())}
    assert set(PARTS) <= set(parts)
    assert "--peer-path /a/stylegan3 --peer-path /a/ada" in parts["bench_training_step"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer" in parts[tool] and f"--tool {tool}" in parts[tool]
        assert "python_tests/ops/test_every_kernel.py -k cuda" in parts[tool]
    assert "SAGE_FAST_LARGE_TESTS=1" in parts["tests_large"]
    for name in (part for part in PARTS if part.startswith("bench_")):
        assert "--bench-device cuda --bench-json" in parts[name]


def test_the_script_goes_on_when_a_part_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = setup.py ] && exit 3\necho "$@"\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = gpu_sh(PYTHON=str(python), OUT=str(out), ONLY="build bench_fusion tests_large")
    assert done.returncode == 1, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert {name: part["exit"] for name, part in summary.items()} == {"build": 3, "bench_fusion": 0, "tests_large": 0}
    assert "benchmarks/bench_fusion.py --benchmark-enable" in (out / "bench_fusion.log").read_text()


def test_the_script_starts_nothing_when_the_time_is_over(tmp_path):
    done = gpu_sh(PYTHON="true", OUT=str(tmp_path), ONLY="build info", SECONDS_IN_ALL="5")
    assert done.returncode == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {part["exit"] for part in summary.values()} == {"not started, no time left"}
