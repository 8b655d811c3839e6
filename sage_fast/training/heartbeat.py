"""Which rank of a training run no longer lives: each says once a second that it does, all the others listen."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch import distributed as dist

__all__ = ["Heartbeat"]

_BEAT = 1.0  # seconds between two signs of life
_ALARMED = 6.0  # seconds without one that suffice once a connection has broken
_NAP = 3.0  # most seconds between two looks that count as silence of others: in what goes beyond, this process stood still itself
_GRACE = 10.0  # seconds that the main thread gets to leave by itself
_NOBODY = "-"


class Heartbeat(threading.Thread):
    """Counts up in the store of the run and watches the others count.

    The first to notice that a rank is silent writes one sentence into the store, and every rank ends with that sentence:
    the ranks that end because of the first loss are not taken for the cause. A main thread that hangs in a call that
    cannot be interrupted (a silent peer, a GPU that waits for it) is ended after a grace of ten seconds. Ranks that stood still
    together, as a suspended job or a halted machine does, find each other alive afterwards.

    Args:
        store: of this thread alone: a call that waits would hold up the others of the same connection.
        lost_seconds: silence that counts as death.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, lost_seconds: float) -> None:
        super().__init__(name="sage_fast-heartbeat", daemon=True)
        self.rank, self.world, self.lost_seconds = rank, world, lost_seconds
        self.verdict: str | None = None
        self._store = store
        self._keys = [f"beat/{other}" for other in range(world)]
        self._looked = time.monotonic()
        self._seen = [(b"", self._looked)] * world
        self._beats = 0
        self._alarmed, self._ended = threading.Event(), threading.Event()
        self._store.set_timeout(timedelta(seconds=lost_seconds))
        self._store.compare_set("verdict", "", _NOBODY)
        self._store.set(self._keys[rank], "0")

    def run(self) -> None:
        """Beat and listen until :meth:`end` or a verdict."""
        while self.verdict is None and not self._ended.wait(_BEAT):
            try:
                self._round()
            except RuntimeError:  # the store went with the process that held it
                if not self._ended.is_set():
                    self.verdict = self._sentence(
                        "rank 0, or the launcher that holds the run together, no longer answers"
                    )
        if self.verdict is not None and not self._ended.wait(_GRACE):
            print(f"sage-fast: {self.verdict}", file=sys.stderr, flush=True)
            os._exit(1)

    def find_lost(self) -> str | None:
        """The verdict after a collective failed; None when every rank goes on answering."""
        self._alarmed.set()
        deadline = time.monotonic() + _ALARMED + 4 * _BEAT
        while self.verdict is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.verdict is None:
            self._alarmed.clear()
        return self.verdict

    def announce(self, reason: str) -> None:
        """Tell the others that this rank leaves before the end, and why."""
        with suppress(RuntimeError):
            self._store.compare_set(
                "verdict", _NOBODY, self._sentence(f"rank {self.rank} of {self.world} stopped ({reason})")
            )

    def end(self) -> None:
        """Stop beating; the others must have stopped listening, or take this rank for dead.

        Waits for the call that is under way, which the store ends after ``lost_seconds``: an interpreter that ends takes
        its threads along, and one inside C++ takes the process along too, by ``std::terminate``.
        """
        self._ended.set()
        if self.is_alive():
            self.join(self.lost_seconds + 2 * _BEAT)

    def _round(self) -> None:
        self._beats += 1
        self._store.set(self._keys[self.rank], str(self._beats))
        *beats, verdict = self._store.multi_get([*self._keys, "verdict"])
        now = time.monotonic()
        stood_still, self._looked = max(0.0, now - self._looked - _NAP), now
        self._seen = [
            (beat, since + stood_still if before == beat else now) for (before, since), beat in zip(self._seen, beats)
        ]
        limit = min(_ALARMED, self.lost_seconds) if self._alarmed.is_set() else self.lost_seconds
        silent = [other for other, (_, since) in enumerate(self._seen) if now - since > limit and other != self.rank]
        told = verdict.decode()
        if told == _NOBODY and silent:
            names = " and ".join(f"rank {other} of {self.world}" for other in silent)
            told = self._store.compare_set("verdict", _NOBODY, self._sentence(f"{names} no longer answers")).decode()
        if told != _NOBODY:
            self.verdict = told

    @staticmethod
    def _sentence(what: str) -> str:
        return f"{what}; the others stop too, start all of them again with --resume."
