"""One long tiny run for every fault: what it gives when nothing happens, and how to make things happen to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zygote import Commands, Finished, Process

from tuneship.journal import sha256_file

UPDATES, SAVE, EVAL = 14, 3, 5
# With dropout and a validation loss: all that a resumed run must find again.
SECTIONS: dict[str, Any] = {
    "lora": {"lora_dropout": 0.1},
    "train": {
        "max_steps": UPDATES,
        "save_steps": SAVE,
        "eval_steps": EVAL,
        "warmup_steps": 2,
        "gradient_accumulation_steps": 2,
    },
}


def log(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without times."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def checkpoints(run: Path) -> list[str]:
    """What stands in the checkpoints' folder."""
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    log: list[dict[str, Any]]
    adapter: str
    """sha256 of the weights."""


@dataclass(frozen=True)
class Case:
    """A prepared run in a folder of its own, and what it comes to undisturbed."""

    commands: Commands
    recipe: Path
    run: Path
    undisturbed: Outcome

    def start(self, *arguments: str, verb: str = "train", prelude: str = "") -> Process:
        """Starts a verb on the run."""
        argv = [verb, self.recipe, "--run", self.run, *arguments]
        return self.commands.start(argv, cwd=self.run.parent, prelude=prelude)

    def train(self, *arguments: str, prelude: str = "") -> Finished:
        """Trains, or goes on."""
        return self.start(*arguments, prelude=prelude).wait()

    def goes_on_to_the_same_end(self) -> Finished:
        """Runs the same command once more and holds the result against the undisturbed run's."""
        finished = self.train()
        assert finished.code == 0, finished.err
        assert outcome(self.run) == self.undisturbed
        assert checkpoints(self.run) == ["step-12", "step-14"]
        return finished


def outcome(run: Path) -> Outcome:
    return Outcome(log(run), sha256_file(run / "adapter" / "adapter_model.safetensors"))


def copied(case: Case, folder: Path) -> Case:
    """The same case in another folder."""
    return Case(case.commands, case.recipe, Path(shutil.copytree(case.run, folder)), case.undisturbed)


def at(target: str, do: str, *, call: int = 1) -> str:
    """Python that runs `do` at the n-th call of a function: `at("tuneship.replay.answer_loss", SIGTERM, call=3)`."""
    return f"""
import importlib, os, pkgutil, resource, signal
target = {target!r}
holder, name = pkgutil.resolve_name(target.rpartition(".")[0]), target.rpartition(".")[2]
original, calls = getattr(holder, name), 0
def trapped(*arguments, **settings):
    global calls
    calls += 1
    if calls == {call}:
        {do}
    return original(*arguments, **settings)
setattr(holder, name, trapped)
"""


SIGTERM = "os.kill(os.getpid(), signal.SIGTERM)"
SIGINT = "os.kill(os.getpid(), signal.SIGINT)"
SIGKILL = "os.kill(os.getpid(), signal.SIGKILL)"


def file_limit(size: int | str) -> str:
    """No file of the process may become larger: a disk that is full, without a disk."""
    return f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2)"
