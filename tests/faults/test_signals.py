"""F2, F3: SIGTERM and ctrl-C end a run where the same command takes it up again."""

from __future__ import annotations

import json
import signal
import time

import pytest
from interrupted import EVAL, SIGINT, SIGTERM, UPDATES, Case, at, checkpoints, log, outcome


def test_f2_sigterm_in_the_middle_of_an_update(case: Case) -> None:
    process = case.start()
    process.until(lambda: len(log(case.run)) >= 5)
    sent = time.monotonic()
    process.send(signal.SIGTERM)
    finished = process.wait()
    assert time.monotonic() - sent < 10
    last = log(case.run)[-1]["step"]
    assert finished.code == 75
    assert f"stopped by SIGTERM after update {last} of {UPDATES}; it is saved" in finished.err
    assert "run the same command again" in finished.err
    assert f"step-{last}" in checkpoints(case.run)
    assert not (case.run / "adapter").exists()
    assert f"going on after update {last}" in case.goes_on_to_the_same_end().err


@pytest.mark.parametrize(
    ("prelude", "after"),
    [
        (at("tuneship.replay.answer_loss", SIGTERM, call=1), 1),
        (at("tuneship.replay.answer_loss", f"{SIGTERM}; {SIGTERM}", call=11), 6),
        (at("tuneship.replay.answer_loss", f"{SIGTERM}; {SIGINT}; {SIGTERM}", call=12), 6),
        (at("tuneship.replay.answer_loss", SIGINT, call=7), 4),
        (at("tuneship.checkpoint.save_file", SIGTERM, call=1), 3),
        (at("tuneship.checkpoint.put_in_place", f"{SIGTERM}; {SIGTERM}", call=2), 6),
        (at("tuneship.train.held_out_loss", SIGTERM, call=1), EVAL),
    ],
    ids=["first batch", "two", "three of two kinds", "ctrl-C", "during a save", "two at a rename", "validation"],
)
def test_f3_signals_at_awkward_instants(case: Case, prelude: str, after: int) -> None:
    finished = case.train(prelude=prelude)
    assert finished.code == 75, finished.err
    assert f"after update {after} of {UPDATES}" in finished.err
    assert log(case.run)[-1]["step"] == after
    assert f"step-{after}" in checkpoints(case.run)
    case.goes_on_to_the_same_end()


# A terminal of the process's own; another process holds its other end, and closes it by its death.
TERMINAL = """
import fcntl, os, signal, termios
os.setsid()
signal.signal(signal.SIGHUP, signal.{handler})
ours, inner = os.openpty()
person = os.fork()
if person == 0:
    os.close(inner)
    os.close(2)
    while os.read(ours, 65536):
        pass
os.close(ours)
fcntl.ioctl(inner, termios.TIOCSCTTY, 0)
{streams}
"""
CLOSED = "os.kill(person, signal.SIGKILL); os.waitpid(person, 0)"


def test_f3_a_terminal_that_is_closed(case: Case) -> None:
    terminal = TERMINAL.format(handler="SIG_DFL", streams="os.dup2(inner, 1); os.dup2(inner, 2)")
    finished = case.train(prelude=terminal + at("tuneship.replay.answer_loss", CLOSED, call=7))
    assert finished.code == 75
    assert log(case.run)[-1]["step"] == 4
    assert "step-4" in checkpoints(case.run)
    case.goes_on_to_the_same_end()


def test_f3_ctrl_c_ends_the_reader_of_the_log_too(case: Case) -> None:
    """As in `tuneship train … 2>&1 | tee log`."""
    piped = "import os\nends, inner = os.pipe()\nos.dup2(inner, 1)\nos.dup2(inner, 2)\n"
    trap = at("tuneship.replay.answer_loss", f"os.close(ends); {SIGINT}", call=7)
    finished = case.train("--set", "train.logging_steps=1", prelude=piped + trap)
    assert finished.code == 75
    assert "step-4" in checkpoints(case.run)
    case.goes_on_to_the_same_end()


def test_f3_under_nohup_a_closed_terminal_stops_nothing(case: Case) -> None:
    terminal = TERMINAL.format(handler="SIG_IGN", streams="")
    finished = case.train(prelude=terminal + at("tuneship.replay.answer_loss", CLOSED, call=7))
    assert finished.code == 0, finished.err
    assert outcome(case.run) == case.undisturbed


def test_f3_a_signal_in_the_last_update_finds_the_run_done(case: Case) -> None:
    finished = case.train(prelude=at("tuneship.replay.answer_loss", SIGTERM, call=2 * UPDATES))
    assert finished.code == 0
    assert outcome(case.run) == case.undisturbed


@pytest.mark.parametrize("call", [1, 12, 20])
def test_f3_sigterm_while_evaluating_writes_nothing(finished: Case, call: int) -> None:
    prelude = at("tuneship.generation.Generator.step", SIGTERM, call=call)
    stopped = finished.start(verb="evaluate", prelude=prelude).wait()
    assert stopped.code == 75
    assert "stopped by SIGTERM; nothing was written" in stopped.err
    assert not (finished.run / "evaluation.json").exists()
    assert finished.start(verb="evaluate").wait().code == 0
    assert json.loads((finished.run / "evaluation.json").read_text())["gate"]["passed"]
