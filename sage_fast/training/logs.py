"""The log of one stage: a JSON object a line, and TensorBoard's event files beside it on request."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError

__all__ = ["TrainingLog", "check_tensorboard", "read_log"]


class TrainingLog:
    """Appends to ``<folder>/<stage>.jsonl``, where each line stands once, whatever was killed and resumed.

    Args:
        tensorboard: write ``<folder>/<stage>/events.out.tfevents...`` too.
    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, stage: str, tensorboard: bool = False) -> None:
        self.path = folder / f"{stage}.jsonl"
        self._events = folder / stage
        self._writer = _writer_class() if tensorboard else None
        self._board: Any = None
        self._first_step = 1
        self._last = time.monotonic()

    def cut(self, step: int) -> None:
        """Drop the lines of steps after ``step``, and a last one that was not written to its end."""
        self._first_step = step + 1
        if not self.path.exists():
            return
        kept = [json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] <= step]
        text = "".join(kept).encode()
        if text != self.path.read_bytes():
            with atomic_write(self.path, resumable=True) as file:
                file.write(text)

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Append one line; returns the values as written, with 6 digits."""
        now = time.monotonic()
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        line = {"step": step, **rounded, "seconds": round(now - self._last, 3), "time": round(time.time(), 1)}
        self._last = now
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            self._show(step, rounded)
        return rounded

    def flush(self) -> None:
        """Bring the events to the disk."""
        if self._board is not None:
            self._board.flush()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is None:  # what an interrupted run wrote of these steps is passed over by the reader
            assert self._writer is not None
            self._board = self._writer(str(self._events), purge_step=self._first_step, filename_suffix=".tfevents")
        for key, value in values.items():
            self._board.add_scalar(key, value, step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; those that are no JSON object with a step (a kill or a full disk cut them) are left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def check_tensorboard(wanted: bool) -> None:
    """Raise InputError where TensorBoard is wanted and not installed."""
    if wanted:
        _writer_class()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard is asked for and not installed; pip install 'sage_fast[logs]' brings it, or leave the setting out."
        ) from error
    return SummaryWriter
