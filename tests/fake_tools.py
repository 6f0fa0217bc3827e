"""terraform, gcloud and kubectl on PATH, as small programs that write down what they are called with.

    tools = fake_tools.install(tmp_path, monkeypatch, "terraform", "gcloud")
    tools.answer("terraform plan", out="Plan: 3 to add", code=0)
    …
    assert tools.calls == ["terraform -chdir=… init -input=false", …]

PATH holds nothing else. An answer is for the calls that hold its words in this order; several answers
to the same words are given one after the other, the last one again and again.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zygote import until

from tuneship.signals import stop_flag

if TYPE_CHECKING:
    import pytest


class Tools:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers: list[dict[str, object]] = []

    def answer(self, words: str, *, out: str = "", err: str = "", code: int = 0, stay: bool = False) -> None:
        """What a call is answered; `stay` keeps it running until it is ended."""
        self._answers.append({"words": words.split(), "out": out, "err": err, "code": code, "stay": stay})
        (self.folder / "answers.json").write_text(json.dumps(self._answers))

    def _recorded(self) -> list[dict[str, object]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def calls(self) -> list[str]:
        """Every command so far."""
        return [shlex.join(call["argv"]) for call in self._recorded()]

    @property
    def inputs(self) -> list[str]:
        """What each of them got on its standard input."""
        return [str(call["stdin"]) for call in self._recorded()]


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Tools:
    folder = tmp_path / "tools"
    folder.mkdir()
    program = Path(__file__).with_name("fake_tool.py").read_text()
    for name in names:
        file = folder / name
        file.write_text(f"#!{sys.executable} -IS\n{program}")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return Tools(folder)


@contextmanager
def pressed(*presses: tuple[Callable[[], Any], signal.Signals]) -> Iterator[None]:
    """Somebody who sends this process a signal once a condition holds, and then the next."""

    def press() -> None:
        for condition, number in presses:
            try:
                until(condition, deadline_s=20)
            finally:
                os.kill(os.getpid(), number)

    person = threading.Thread(target=press)
    person.start()
    # For a signal that comes when what it was for has ended: it must not end the tests.
    with stop_flag():
        yield
        person.join()


def signalled(
    number: signal.Signals, words: str, begun: list[subprocess.Popen[str]] | None = None
) -> type[subprocess.Popen[str]]:
    """A Popen of which this process gets a signal as soon as the tool with these words has begun.

    Args:
        begun: takes every tool that has begun.
    """

    class Signalled(subprocess.Popen[str]):
        def __init__(self, argv: Sequence[str], **options: Any) -> None:
            super().__init__(argv, **options)
            if begun is not None:
                begun.append(self)
            if words in " ".join(argv):
                os.kill(os.getpid(), number)

    return Signalled
