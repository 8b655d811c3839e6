"""How fast a run is, how busy each of its stages, and which of them the others wait for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from sage_fast.data.writers import cannot_write

__all__ = ["STAGES", "Meter"]

STAGES = ("sampling", "drawing", "encoding", "committing")
"""Latents and the preparation of categories; synthesis, fusion and 8 bits, with what a GPU encodes; files; shards. They run at
the same time."""


class Meter:
    """Seconds that each stage was at work, and images that are done. Time is the monotonic clock's.

    ``total`` and ``done`` count the images of this rank, ``kept`` those that an earlier run had written.
    """

    def __init__(self) -> None:
        self.total = self.done = self.kept = 0
        self.threads = dict.fromkeys(STAGES, 1)
        self.queued = {"latents": 0.0, "drawings": 0.0, "files": 0.0}  # share of the room that waits or is worked on
        self._busy = dict.fromkeys(STAGES, 0.0)
        self._lock = Lock()
        self._start = time.monotonic()

    def start(self, total: int, kept: int) -> None:
        """The clock runs from now."""
        self.total, self.done, self.kept = total, kept, kept
        self._start = time.monotonic()

    def start_stages(self, **threads: int) -> None:
        """How many threads stages have."""
        self.threads |= threads

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of the block to a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            with self._lock:
                self._busy[stage] += spent

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    @property
    def speed(self) -> float:
        """Images per second since the start."""
        return (self.done - self.kept) / self.seconds

    @property
    def busy(self) -> dict[str, float]:
        """Share of its threads' time that each stage was at work."""
        return {stage: self._busy[stage] / (self.seconds * self.threads[stage]) for stage in STAGES}

    @property
    def slowest(self) -> str:
        """The stage that the others wait for: the busiest."""
        busy = self.busy
        return max(STAGES, key=busy.__getitem__)

    def line(self) -> dict[str, Any]:
        """The state as plain values."""
        return {
            "seconds": round(self.seconds, 3),
            "images": self.done,
            "of": self.total,
            "images_per_s": round(self.speed, 3),
            "busy": {stage: round(share, 3) for stage, share in self.busy.items()},
            "queued": {name: round(share, 3) for name, share in self.queued.items()},
            "slowest": self.slowest,
        }

    def append_to(self, path: Path) -> None:
        """Add the state to a file of JSON lines."""
        try:
            with open(path, "a", encoding="ascii") as file:
                file.write(json.dumps(self.line()) + "\n")
        except OSError as error:
            raise cannot_write(path, error, resumable=True) from error
