"""What a running stage shows of itself: a bar on a terminal, now and then a line anywhere else.

Speed, memory and the last value of everything logged; the JSONL log is the run's own and has every line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["StageProgress", "memory", "progress_line"]

_EVERY_S = 60.0  # between two lines where there is no terminal
_UNSEEN = ("step", "time", "seconds")  # known to the bar or of no use to a reader


class _BarOverWords(Progress):
    """A progress bar with what ``words()`` says below it, on as many lines as it takes; beside it, words would crowd it out."""

    def __init__(self, words: Callable[[], str], *columns: Any, **options: Any) -> None:
        self._words = words
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if words := self._words():
            yield Padding(Text(words), (0, 0, 0, 3))


class StageProgress:
    """Progress of one stage: iterate over it for the steps, and :meth:`show` what was logged.

    Args:
        stage: name in front of the bar.
        start, total: first step and number of steps.
        device: whose memory is shown.
        quiet: show nothing, as the ranks of a run beyond the first.
        console: where to; None: standard output, for standard error is for what went wrong.
    """

    def __init__(
        self,
        stage: str,
        start: int,
        total: int,
        device: str | torch.device = "cpu",
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self.stage, self.start, self.total = stage, start, total
        self.device, self.quiet = torch.device(device), quiet
        self.console = console or Console()
        self.values: dict[str, float] = {}
        self._status, self._said = "", 0.0
        self._mark, self._s_per_step = (start, time.monotonic()), 0.0

    def __iter__(self) -> Generator[int, None, None]:
        """``start, ..., total - 1``."""
        columns = (
            TextColumn(f"{self.stage:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = self.quiet or not self.console.is_terminal
        options = dict(console=self.console, refresh_per_second=2, disable=hidden)
        with _BarOverWords(lambda: self._status, *columns, **options) as bar:
            task = bar.add_task("", total=self.total, completed=self.start)
            for step in range(self.start, self.total):
                yield step
                bar.update(task, completed=step + 1)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Put ``values`` and speed and memory under the bar, beside what was shown before, each name with its last value.

        Speed is in seconds for a thousand images where ``values`` have ``kimg``, else for a step, since the last call.
        """
        self.values |= {**values, **self._speed(step, values.get("kimg", 0.0)), **memory(self.device)}
        self._status = progress_line(self.values)
        now = time.monotonic()
        if self.quiet or self.console.is_terminal or (now - self._said < _EVERY_S and step < self.total):
            return
        self._said = now
        left = timedelta(seconds=round((self.total - step) * self._s_per_step))
        text = f"{self.stage} {step}/{self.total}  ETA {left}  {self._status}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _speed(self, step: int, kimg: float) -> dict[str, float]:
        now = time.monotonic()
        done, seconds = step - self._mark[0], now - self._mark[1]
        if done <= 0:  # something else was logged after the same step
            return {}
        self._mark, self._s_per_step = (step, now), seconds / done
        return {"s_per_kimg": self._s_per_step * step / kimg} if kimg else {"s_per_step": self._s_per_step}


def progress_line(values: Mapping[str, float]) -> str:
    """Values as one line of words, four digits each: speed and memory first, then the others in their order."""
    words = {"s_per_kimg": "{:.3g} s/kimg", "s_per_step": "{:.3g} s/step"}
    words |= {"rss_gb": "{:.2f} GB", "cuda_peak_gb": "{:.2f} GB on the GPU"}
    first = [word.format(values[name]) for name, word in words.items() if name in values]
    rest = [f"{name} {value:.4g}" for name, value in values.items() if name not in words and name not in _UNSEEN]
    return "  ".join(first + rest)


def memory(device: str | torch.device = "cpu") -> dict[str, float]:
    """``rss_gb``, what the process holds of the main memory (where /proc says it), and for a CUDA device ``cuda_peak_gb``,
    the most that tensors have held; GB of 10^9 bytes."""
    values: dict[str, float] = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        values["rss_gb"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    if torch.device(device).type == "cuda":
        values["cuda_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return values
