"""SIGTERM and ctrl-C as a flag, so that work ends where it can be taken up again; or as an error, where it is soon."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
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
    """Catches SIGTERM and SIGINT while inside. Outside the main thread it never becomes true."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, _: object) -> None:
        flag.signal = flag.signal or signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
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
