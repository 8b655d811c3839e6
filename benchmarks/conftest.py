"""What the benchmarks share: parity first, then interleaved medians against rivals, a table and one JSON line.

Every row compares one op with the best forms that others offer, in one process and on the same tensors. The calls are
interleaved, so that a change of clock or load meets all of them; how a call is timed stands in ``clocks``. A ratio is the
rival's time over ours: above 1 we are ahead. Beside each row stands what a large convolution or copy reaches on the device at
that moment: ``of_peak`` and ``of_copy`` are our part of it. What fits in a cache can go beyond a copy through memory.

    make bench                                  all files
    pytest benchmarks/bench_upfirdn2d.py --benchmark-enable --bench-threads 2
    pytest benchmarks/bench_fusion.py --benchmark-enable --bench-device cuda --bench-json fusion.json

Without ``--benchmark-enable`` only the parity is checked. Where an op has no kernel, its benchmark refuses. The last line
that is printed is one JSON object: of the file, or of all files as ``{"bench": "all", "files": [...]}``.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

# Before NumPy is loaded: products as this processor can have them, by threads that sleep soon after (they wait on a
# processor for 0.1 s else, and whoever is timed next has one less).
os.environ.pop("OPENBLAS_CORETYPE", None)
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "20"

import pytest
import torch
from array_rivals import imported
from clocks import ROUNDS, Clock, CpuClock, CudaClock, copy_rate, medians, product_rate
from torch import Tensor

from sage_fast import _native

#: rivals that are programs of others, or our own ops
NOT_COMPILED = ("ours", "OpenCV", "NumPy", "scipy", "kornia", "CuPy", "ada", "sg3", "ros", "stylegan")
_ROWS: pytest.StashKey[dict[str, list[dict]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", help="cpu, cuda or cuda:N: where the ops and their rivals run")
    parser.addoption("--bench-threads", type=int, default=1, help="threads of torch in benchmarks")
    parser.addoption("--bench-images", type=int, default=20_000, help="images of bench_data")
    parser.addoption("--bench-large", action="store_true", help="on a CPU too what takes it minutes a row")
    parser.addoption("--bench-compile", action="store_true", help="torch.compile of each row's best eager form too")
    parser.addoption("--bench-json", type=Path, help="file for the JSON of the last line, written anew after each test")
    parser.addoption("--peer-path", action="append", default=[], help="a clone of other people's StyleGAN2; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """bench_<op>.py, also when only the folder is named; files named themselves are collected by pytest."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """So that what was measured stays when the run is cut off."""
    path, report = item.config.getoption("--bench-json"), _report(item.config)
    if path is not None and report:
        half = path.with_suffix(".half")
        half.write_text(json.dumps(report) + "\n")
        os.replace(half, path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, rows in config.stash[_ROWS].items():
        terminalreporter.section(f"{name}: ours, and how many times as long the others take")
        for row in rows:
            terminalreporter.write_line(_line(row))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Behind everything that pytest and its plugins print."""
    report, terminal = _report(config), config.pluginmanager.get_plugin("terminalreporter")
    if report and terminal is not None:
        terminal.write_line(json.dumps(report))


def _line(row: dict) -> str:
    if "mib" in row:
        return f"{row['case']:<44} peak in MiB: " + "   ".join(f"{who} {mib:.0f}" for who, mib in row["mib"].items())
    rivals = "   ".join(f"{rival} {ratio:.2f}" for rival, ratio in row["ratios"].items())
    parts = [f"{row['case']:<44} {row['ms']:9.3f} ms"]
    if row.get("gflop_per_s"):
        parts.append(f"{row['gflop_per_s']:6.0f} GFLOP/s ({row['of_peak']:.2f} of peak)")
    if row.get("gb_per_s"):
        parts.append(f"{row['gb_per_s']:6.1f} GB/s ({row['of_copy']:.2f} of a copy)")
    return "   ".join([*parts, rivals])


def _report(config: pytest.Config) -> dict:
    """What the last line says; empty where nothing was measured."""
    about = dict(device=_device_name(config), threads=config.getoption("--bench-threads"), torch=torch.__version__)
    files = []
    for name, rows in config.stash[_ROWS].items():
        if rows:
            lowest = min((min(row["ratios"].values()) for row in rows if row.get("ratios")), default=None)
            files.append(dict(bench=name, **about, lowest_ratio=lowest, rows=rows))
    return files[0] if len(files) == 1 else dict(bench="all", files=files) if files else {}


def _device_name(config: pytest.Config) -> str:
    device = torch.device(config.getoption("--bench-device"))
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


@dataclass
class Comparison:
    """Collects the rows of one benchmark file, which makes its tensors on ``device``."""

    rows: list[dict]
    benchmark: object
    device: torch.device
    one_thread: bool
    compiled: bool = False
    tolerance: float = 2e-5
    rounds: int = ROUNDS
    _clock: Clock | None = None

    def __call__(
        self,
        case: str,
        ours: Callable[[], Tensor],
        rivals: Mapping[str, Callable[[], Tensor]],
        moved: int = 0,
        flops: float = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Check that all give what ours gives; then time them.

        ``moved``: bytes that must at least be read and written. ``flops``: of the direct algorithm; set against what a
        large convolution of ``dtype`` reaches here, so fewer multiplications may go beyond 1.
        """
        expected = ours()
        scale = expected.abs().max().item()
        for name, rival in rivals.items():
            error = (rival() - expected).abs().max().item()
            assert error <= self.tolerance * max(scale, 1), f"{name} differs by {error:.2e}"
        if self.benchmark.disabled:
            return
        seconds = medians(self.clock, {"ours": ours, **rivals}, self.rounds)
        if self.compiled:
            seconds |= self._compiled_medians(ours, rivals, seconds)
        row = self.add(case, seconds, moved, flops, dtype)
        if not self.benchmark._mode:  # pytest-benchmark takes one call a test: the first
            self.benchmark.extra_info.update(row)
            iterations = max(1, int(0.002 / seconds["ours"]))
            self.benchmark.pedantic(self._finished(ours), rounds=5, iterations=iterations, warmup_rounds=1)

    def add(
        self,
        case: str,
        seconds: Mapping[str, float],
        moved: int = 0,
        flops: float = 0,
        dtype: torch.dtype = torch.float32,
        **more: object,
    ) -> dict:
        """A row of what was timed: "ours" and the rivals."""
        mine = seconds["ours"]
        ratios = {name: round(value / mine, 3) for name, value in seconds.items() if name != "ours"}
        row = dict(case=case, ms=round(mine * 1e3, 4), ratios=ratios)
        if moved:
            copied = copy_rate(self.clock)
            row |= dict(gb_per_s=round(moved / mine / 1e9, 2), copy_gb_per_s=round(copied / 1e9, 2))
            row["of_copy"] = round(moved / mine / copied, 3)
        if flops:
            peak = product_rate(self.clock, dtype)
            row |= dict(gflop_per_s=round(flops / mine / 1e9, 1), peak_gflop_per_s=round(peak / 1e9, 1))
            row["of_peak"] = round(flops / mine / peak, 3)
        self.rows.append(row | more)
        return self.rows[-1]

    @property
    def clock(self) -> Clock:
        if self._clock is None:
            self._clock = CudaClock(self.device) if self.device.type == "cuda" else CpuClock(self.one_thread)
        return self._clock

    def _finished(self, call: Callable[[], Tensor]) -> Callable[[], object]:
        """For pytest-benchmark, whose clock is the host's."""
        return call if self.device.type == "cpu" else lambda: (call(), torch.cuda.synchronize())

    def _compiled_medians(
        self, ours: Callable[[], Tensor], rivals: Mapping[str, Callable[[], Tensor]], seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """The fastest eager form once more, by torch.compile; empty where there is none that it takes."""
        eager = [name for name in rivals if not name.startswith(NOT_COMPILED)]
        if not eager:
            return {}
        best = min(eager, key=lambda name: seconds[name])
        torch.compiler.reset()
        compiled = torch.compile(rivals[best], dynamic=False)
        error = (compiled() - rivals[best]()).abs().max().item()
        assert error <= self.tolerance * max(rivals[best]().abs().max().item(), 1), f"compiled differs by {error:.2e}"
        again = medians(self.clock, {"ours": ours, "compiled": compiled}, self.rounds)
        return {f"{best}, compiled": again["compiled"] * seconds["ours"] / again["ours"]}


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark) -> Comparison:
    """A :class:`Comparison` for the file of the test."""
    name, options = request.path.stem.removeprefix("bench_"), request.config.getoption
    device, native = torch.device(options("--bench-device")), _native.load()
    if device.type not in native.devices:
        pytest.fail(f"no kernels on '{device.type}': {native.reasons.get(device.type)}; there is nothing to measure")
    rows = request.config.stash[_ROWS].setdefault(name, []) if not benchmark.disabled else []
    return Comparison(rows, benchmark, device, options("--bench-threads") == 1, options("--bench-compile"))


@pytest.fixture(autouse=True)
def _settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads as asked for, NumPy's and those of kernels on arrays too.

    On a GPU float32 products are float32's unless a test says TF32; cuDNN searches its best.
    """
    backends = torch.backends
    before = (
        torch.get_num_threads(),
        backends.cudnn.benchmark,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
    )
    threads, host = request.config.getoption("--bench-threads"), _native.host()
    host_before = host.num_threads() if host else 0
    torch.set_num_threads(threads)
    if host:
        host.set_num_threads(threads)
    backends.cudnn.benchmark = True
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
    limits = imported("threadpoolctl")  # not on every GPU machine, where NumPy is no rival
    with limits.threadpool_limits(threads, user_api="blas") if limits else nullcontext():
        yield
    torch.set_num_threads(before[0])
    if host:
        host.set_num_threads(host_before)
    backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before[1:]
