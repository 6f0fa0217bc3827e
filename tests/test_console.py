"""What a person sees while waiting.

python -m pytest tests/test_console.py -v
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from tuneship import console
from tuneship.console import progress, say


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    turned = Clock()
    monkeypatch.setattr(console, "time", turned)
    return turned


def test_everything_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("one line")
    with progress("rows", 2, every=1) as shown:
        shown.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["one line", "rows 1/2"]


def test_without_a_terminal_a_line_each_ten_seconds(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with progress("rows") as shown:
        for _ in range(100):
            clock.now += 1
            shown.advance(10, "fine")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"rows {count}  fine" for count in range(100, 1001, 100)]


def test_without_a_terminal_a_line_each_so_many(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with progress("updates", 100, every=7) as shown:
        shown.advance(5, "resumed")
        for step in range(6, 31):
            clock.now += 60
            shown.advance(1, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"updates {step}/100  loss {step}" for step in (7, 14, 21, 28)]


def test_something_short_says_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with progress("rows", 5) as shown:
        for _ in range(5):
            shown.advance()
    assert capsys.readouterr().err == ""


def test_a_note_stays_until_there_is_another(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("rows", every=1) as shown:
        shown.advance(1, "a")
        shown.advance(1)
        shown.advance(1, "")
    assert capsys.readouterr().err.splitlines() == ["rows 1  a", "rows 2  a", "rows 3"]


SCRIPT = """
from tuneship.console import progress, say
with progress("rows", 3) as shown:
    shown.advance(2, "a note")
    say("a line beside the bar")
print("result")
"""


def test_on_a_terminal_there_is_a_bar_which_goes_away() -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=follower, env=environment, timeout=60
    )
    os.close(follower)
    written = b""
    try:
        while piece := os.read(leader, 65536):
            written += piece
    except OSError:
        # Linux's way of saying that a terminal's other side is closed.
        pass
    os.close(leader)
    assert done.returncode == 0
    assert done.stdout == b"result\n"
    text = written.decode()
    assert "rows" in text
    assert "2/3" in text
    assert "a note" in text
    assert "a line beside the bar" in text
    # The last thing that is written erases the bar's line.
    assert text.rstrip("\r\n").endswith("\x1b[2K")


def test_without_a_terminal_rich_is_not_loaded() -> None:
    script = f"{SCRIPT}\nimport sys; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&1 >/dev/null | true"], ids=["no room", "no reader"])
def test_what_nobody_hears_does_not_end_the_work(redirected: str) -> None:
    lines = [
        "from tuneship.console import say",
        "for _ in range(20000): say('a line')",
        "open('/dev/fd/3', 'w').write('done')",
    ]
    script = "\n".join(lines)
    # In bash, so that the code is that of Python and not of what reads it.
    argv = ["bash", "-c", f'exec 3>&1; "$0" -c "$1" {redirected}; exit "${{PIPESTATUS[0]}}"', sys.executable, script]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done")


def test_lines_of_several_threads_stay_whole() -> None:
    script = (
        "import sys, threading\nfrom tuneship.console import say\nsys.setswitchinterval(1e-6)\n"
        "threads = [threading.Thread(target=lambda c=c: [say(c * 20) for _ in range(2000)]) for c in 'abcd']\n"
        "[thread.start() for thread in threads]\n[thread.join() for thread in threads]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert sorted(done.stderr.splitlines()) == [c * 20 for c in "abcd" for _ in range(2000)]
