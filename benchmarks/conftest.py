"""What the benchmarks share: parity first, then interleaved medians against rivals, a table and one JSON line a file.

Every row compares one op with the best forms that others offer, in one process and on the same tensors. The calls are
interleaved, so that a change of clock or load meets all of them. On one thread (the default) the time is the thread's
own, which other programs on the machine do not lengthen. A ratio is the rival's time over ours: above 1 we are ahead.

    make bench                                  all files
    pytest benchmarks/bench_upfirdn2d.py --benchmark-enable --bench-threads 2

Without ``--benchmark-enable`` only the parity is checked. Where an op has no kernel, its benchmark refuses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from sage_fast import _native

ROUNDS, ROUND_SECONDS = 11, 0.006
#: rivals that are programs of others
NOT_COMPILED = ("OpenCV", "NumPy", "scipy", "kornia", "CuPy", "ada", "sg3", "ros", "stylegan")
_ROWS: pytest.StashKey[dict[str, list[dict]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-threads", type=int, default=1, help="threads of torch in benchmarks")
    parser.addoption("--bench-images", type=int, default=20_000, help="images of bench_data")
    parser.addoption("--bench-compile", action="store_true", help="torch.compile of each row's best eager form too")
    parser.addoption("--peer-path", action="append", default=[], help="a clone of other people's StyleGAN2; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """bench_<op>.py, also when only the folder is named; files named themselves are collected by pytest."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    threads = config.getoption("--bench-threads")
    for name, rows in config.stash[_ROWS].items():
        terminalreporter.section(f"{name}: ours, and how many times as long the others take")
        for row in rows:
            rivals = "   ".join(f"{rival} {ratio:.2f}" for rival, ratio in row["ratios"].items())
            extra = f"{row['gb_per_s']:6.1f} GB/s   " if row["gb_per_s"] else ""
            if row["gflop_per_s"]:
                extra = f"{row['gflop_per_s']:6.0f} GFLOP/s ({row['of_peak']:.2f} of peak)   "
            terminalreporter.write_line(f"{row['case']:<44} {row['ms']:9.3f} ms   {extra}{rivals}")
        lowest = min((min(row["ratios"].values()) for row in rows), default=None)
        line = dict(bench=name, threads=threads, torch=torch.__version__, lowest_ratio=lowest, rows=rows)
        terminalreporter.write_line(json.dumps(line))


@dataclass
class Comparison:
    """Collects the rows of one benchmark file."""

    rows: list[dict]
    benchmark: object
    one_thread: bool
    compiled: bool = False
    tolerance: float = 2e-5
    rounds: int = ROUNDS
    clock: Callable[[], float] = field(init=False)

    def __post_init__(self) -> None:
        self.clock = time.thread_time if self.one_thread else time.perf_counter

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
        seconds = self._medians({"ours": ours, **rivals})
        if self.compiled:
            seconds |= self._compiled_medians(ours, rivals, seconds)
        mine = seconds.pop("ours")
        ratios = {name: round(value / mine, 3) for name, value in seconds.items()}
        row = dict(case=case, ms=round(mine * 1e3, 4), gb_per_s=round(moved / mine / 1e9, 2), ratios=ratios)
        row |= dict(gflop_per_s=round(flops / mine / 1e9, 1), of_peak=0.0)
        if flops:
            row["of_peak"] = round(flops / mine / self._peak(dtype), 3)
        self.rows.append(row)
        if not self.benchmark._mode:  # pytest-benchmark takes one call a test: the first
            self.benchmark.extra_info.update(row)
            self.benchmark.pedantic(ours, rounds=5, iterations=max(1, int(0.002 / mine)), warmup_rounds=1)

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
        again = self._medians({"ours": ours, "compiled": compiled})
        return {f"{best}, compiled": again["compiled"] * seconds["ours"] / again["ours"]}

    def _peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of a 3 x 3 convolution of 512 to 512 channels, measured now: the best of five."""
        x, w = torch.randn(2, 512, 32, 32).to(dtype), torch.randn(512, 512, 3, 3).to(dtype)
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
        with torch.inference_mode():
            seconds = min(self._time(lambda: torch.nn.functional.conv2d(x, w, padding=1), 1) for _ in range(5))
        return 2 * 9 * 512 * 512 * 2 * 32 * 32 / seconds

    def _medians(self, calls: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
        repeats = {name: max(1, int(ROUND_SECONDS / self._time(call, 3))) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(self.rounds):
            for name in list(calls)[:: 1 if i % 2 else -1]:  # there and back, so that nobody always comes first
                times[name].append(self._time(calls[name], repeats[name]))
        return {name: median(values) for name, values in times.items()}

    def _time(self, call: Callable[[], Tensor], repeats: int) -> float:
        start = self.clock()
        for _ in range(repeats):
            call()
        return max((self.clock() - start) / repeats, 1e-9)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark) -> Comparison:
    """A :class:`Comparison` for the file of the test."""
    name = request.path.stem.removeprefix("bench_")
    needed = [op for op in _native.NATIVE_OPS if not _native.has_kernel(op, "cpu")]
    if needed:
        pytest.fail(f"no kernels of {', '.join(needed)}: {_native.load().reasons['cpu']}; there is nothing to measure")
    rows = request.config.stash[_ROWS].setdefault(name, []) if not benchmark.disabled else []
    options = request.config.getoption
    return Comparison(rows, benchmark, options("--bench-threads") == 1, options("--bench-compile"))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--bench-threads"))
    yield
    torch.set_num_threads(before)
