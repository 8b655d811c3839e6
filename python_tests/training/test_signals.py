"""Signals as wishes: noted while a loop runs, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sage_fast.training.signals import StopWish


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(number):
    before = signal.getsignal(number)
    with StopWish() as wish:
        assert wish.signal == 0
        os.kill(os.getpid(), number)
        assert wish.signal == number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts():
    with StopWish() as wish, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_leave_the_handlers_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopWish():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
