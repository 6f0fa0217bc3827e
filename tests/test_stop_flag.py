"""SIGTERM, ctrl-C and a closed terminal as a flag.

python -m pytest tests/test_stop_flag.py -v
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tuneship.signals import StopFlag, stop_flag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_sets_the_flag_and_interrupts_nothing(number: signal.Signals) -> None:
    with stop_flag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name


def test_further_signals_change_nothing() -> None:
    with stop_flag() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.signal == "SIGTERM"


def test_handlers_are_as_before_afterwards() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(ZeroDivisionError), stop_flag():
            _ = 1 / 0
        assert signal.getsignal(signal.SIGTERM) is handler
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_flags_nest() -> None:
    with stop_flag() as outer:
        with stop_flag() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner
        # The inner work has ended; whoever started it sees its own signals only.
        assert not outer


def test_outside_the_main_thread_it_never_becomes_true() -> None:
    seen: list[StopFlag] = []
    handler = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with stop_flag() as stop:
            seen.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not seen[0]
    assert signal.getsignal(signal.SIGTERM) is handler
