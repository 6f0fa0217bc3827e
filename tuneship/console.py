"""What a person sees while waiting: a bar on a terminal, plain lines elsewhere.

Everything here goes to stderr; stdout belongs to results, so that `--json` can be piped.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

PLAIN_SECONDS = 10.0


def say(line: str) -> None:
    """One line of what is going on; whole, whatever other threads say at the same time."""
    # print would write the line's end on its own, and another thread's line could come between.
    _Said(sys.stderr).write(f"{line}\n")


class _Said(io.TextIOBase):
    """A stream of what is going on, which must not end the work.

    Its terminal is closed, or `tee` was ended by the same ctrl-C, or the log's disk is full: from then on what
    is said goes nowhere.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        return len(text)

    def isatty(self) -> bool:
        return self._stream.isatty()


def print_anything() -> None:
    """Lets stdout write the escape of a character that its encoding lacks: an old locale must not end a verb."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Progress:
    """A running count. Make one with `progress`."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.done, self.note = label, total, 0, ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """So many more are done; `note` is shown behind the count."""
        self.done += count
        if note is not None:
            self.note = note
        self._show()

    def _show(self) -> None:
        raise NotImplementedError

    def _text(self) -> str:
        total = f"/{self.total}" if self.total else ""
        return f"{self.label} {self.done}{total}" + (f"  {self.note}" if self.note else "")


class _Plain(Progress):
    """A line each ten seconds, or each so many, so that a log stays readable."""

    def __init__(self, label: str, total: int | None, every: int | None) -> None:
        super().__init__(label, total)
        self._every, self._last, self._last_done = every, time.monotonic(), 0

    def _show(self) -> None:
        now = time.monotonic()
        if self._every is not None:
            due = self.done // self._every > self._last_done // self._every
        else:
            due = now - self._last >= PLAIN_SECONDS
        if due:
            self._last, self._last_done = now, self.done
            say(self._text())


@contextmanager
def progress(label: str, total: int | None = None, *, every: int | None = None) -> Iterator[Progress]:
    """Counts something that may take longer than two seconds.

    Args:
        label: what is counted, as `rows` or `evaluate: base`.
        total: how many there will be, if known.
        every: how many lie between two lines where there is no terminal; without it, ten seconds do.
    """
    if not sys.stderr.isatty():
        yield _Plain(label, total, every)
        return
    # rich takes 50 ms to import; a pipe needs none of it.
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=30),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    console = Console(file=cast(TextIO, _Said(sys.stderr)))
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, note="")

        class _Bar(Progress):
            def _show(self) -> None:
                bar.update(task, completed=self.done, note=self.note)

        yield _Bar(label, total)
