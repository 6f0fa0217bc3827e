"""SIGTERM, ctrl-C and a closed terminal as a flag, so that work ends where it can be taken up again; or as an error.

A terminal that is closed sends SIGHUP. Under nohup, which ignores it, the work goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from tuneship.errors import Stopped


class StopFlag:
    """Set by the first signal; further ones change nothing, the work is ending already."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catches the signals that want an end while inside. Outside the main thread it never becomes true."""
    flag = StopFlag()

    def note(name: str) -> None:
        flag.signal = flag.signal or name

    with caught(note):
        yield flag


@contextmanager
def caught(stop: Callable[[str], object]) -> Iterator[None]:
    """Calls `stop` with the name of each signal that wants an end, while inside. Other threads get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        stop(signal.Signals(number).name)

    wanted = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped_by_sigterm(where: str) -> Iterator[None]:
    """SIGTERM raises `Stopped` while inside, but for where a `stop_flag` takes it."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise Stopped(
            f"stopped by {signal.Signals(number).name}", where=where, fix="run the same command again to go on"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
