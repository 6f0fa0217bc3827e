"""The command line in processes that start at once.

Importing torch and transformers takes seconds; a killed run is started again many times in the
tests. So one process imports them, runs nothing, and forks for each command: what is tested is a
process of its own, with its own signals, limits, streams and exit code.

    commands = Commands()
    process = commands.start(["train", "tiny.yaml"], cwd=tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    print(process.wait().code)
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    """Its exit code; minus the signal's number where a signal ended it."""
    out: str
    err: str


def until(condition: Callable[[], Any], *, deadline_s: float = DEADLINE_S) -> Any:
    """Waits for a condition and returns its value; a test that waits in vain fails."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if value := condition():
            return value
        # Leaves the core to what is waited for.
        time.sleep(0.0005)
    raise AssertionError(f"waited {deadline_s} s in vain")


@dataclass
class Process:
    """A command that runs."""

    pid: int
    _commands: Commands
    _streams: tuple[Path, Path]
    _finished: Finished | None = field(default=None)

    def err(self) -> str:
        """What it has said so far."""
        return self._streams[1].read_text(encoding="utf-8")

    def send(self, number: int) -> None:
        """Sends a signal; a process that has ended already gets none."""
        if self._finished is None and not self.ended():
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._finished is not None or self._commands.ask({"poll": self.pid})["ended"]

    def until(self, condition: Callable[[], Any]) -> Any:
        """Waits for a condition while the process runs."""

        def met() -> Any:
            value = condition()
            assert value or not self.ended(), f"ended before the condition was met:\n{self.err()}"
            return value

        return until(met)

    def wait(self, *, deadline_s: float = DEADLINE_S) -> Finished:
        """Waits for its end."""
        if self._finished is None:
            # Suppressed: it has been seen to have ended.
            with suppress(ProcessLookupError), os.fdopen(os.pidfd_open(self.pid)) as end:
                assert select.select([end], [], [], deadline_s)[0], f"still runs after {deadline_s} s:\n{self.err()}"
            code = self._commands.ask({"reap": self.pid})["code"]
            out, err = (stream.read_text(encoding="utf-8") for stream in self._streams)
            self._finished = Finished(code, out, err)
        return self._finished


class Commands:
    """The process that forks."""

    def __init__(self) -> None:
        self._streams = tempfile.TemporaryDirectory()
        self._count = 0
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_TOKEN", "METAFLOW"))}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            text=True,
        )

    def start(
        self, argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None, prelude: str = ""
    ) -> Process:
        """Starts `tuneship ARGV`.

        Args:
            prelude: Python that the new process runs first, to set a limit or a trap.
        """
        self._count += 1
        folder = Path(self._streams.name) / str(self._count)
        folder.mkdir()
        streams = (folder / "out", folder / "err")
        for stream in streams:
            stream.touch()
        answer = self.ask(
            {
                "argv": [str(part) for part in argv],
                "cwd": str(cwd),
                "env": dict(env or {}),
                "prelude": prelude,
                "streams": [str(stream) for stream in streams],
            }
        )
        return Process(answer["pid"], self, streams)

    def run(self, argv: Sequence[str | Path], *, deadline_s: float = DEADLINE_S, **settings: Any) -> Finished:
        """Runs `tuneship ARGV` to its end."""
        return self.start(argv, **settings).wait(deadline_s=deadline_s)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """Ends the process, and what it still runs."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._process.stdout.close()
        self._streams.cleanup()


# --- in the other process ---------------------------------------------------------------------


def _serve() -> None:
    from transformers import AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import tuneship.cli
    import tuneship.evaluate
    import tuneship.export
    import tuneship.prepare
    import tuneship.publish
    import tuneship.report
    import tuneship.train  # noqa: F401 - imported for the children

    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := request.get("poll") or request.get("reap")) is not None:
            if codes[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG if "poll" in request else 0)
                codes[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer: dict[str, Any] = {"ended": codes[pid] is not None, "code": codes[pid]}
        else:
            if (child := os.fork()) == 0:
                _become(request)
            codes[child] = None
            answer = {"pid": child}
        print(json.dumps(answer), flush=True)
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    # Taking torch down in order would take seconds.
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Turns a fork into the command; never returns."""
    from tuneship import cli

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in enumerate(request["streams"], start=1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.argv = ["tuneship", *request["argv"]]
        exec(request["prelude"], {})
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
