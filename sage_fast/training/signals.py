"""SIGTERM and the first SIGINT as a wish that the training loop fulfils at the end of its step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopWish"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopWish:
    """Between ``with`` and its end, the signals are noted; a second SIGINT interrupts at once, as it does elsewhere.

    Attributes:
        signal: number of the first signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopWish:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.signal = self.signal or number
