"""F1: SIGKILL at any instant. The same command goes on, and the result is the undisturbed run's, bit for bit.

python -m pytest tests/faults/test_kills.py -v
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from interrupted import SAVE, SIGKILL, UPDATES, Case, at, checkpoints, log
from zygote import Commands


def test_f1_ten_kills_at_random_instants(case: Case) -> None:
    chance = random.Random()
    for kills in range(10):
        process = case.start()
        last = max((int(name.split("-")[1]) for name in checkpoints(case.run) if name[0] == "s"), default=0)
        goal = min(last + chance.randrange(2 * SAVE), UPDATES - SAVE)
        if kills % 2 == 0 and last < UPDATES - 2 * SAVE:
            # While a checkpoint is written, if the eye is quick enough.
            process.until(lambda: any(name[0] == "." for name in checkpoints(case.run)))
        else:
            process.until(lambda goal=goal: len(log(case.run)) >= goal)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        assert not (case.run / "adapter").exists()
    case.goes_on_to_the_same_end()
    steps = [line["step"] for line in log(case.run)]
    assert steps == list(range(1, UPDATES + 1))


@pytest.mark.parametrize(
    ("target", "call"),
    [
        # The first forward pass; in update 3, before any checkpoint; in update 11.
        ("tuneship.replay.answer_loss", 1),
        ("tuneship.replay.answer_loss", 6),
        ("tuneship.replay.answer_loss", 21),
        # Each update's line is written before its checkpoint.
        ("tuneship.checkpoint.save", 1),
        ("tuneship.checkpoint.save", 3),
        # Between the checkpoint's rename and the removal of the oldest.
        ("tuneship.checkpoint.steps", 4),
        # The last checkpoint stands, the adapter does not.
        ("tuneship.model.write_adapter", 1),
        ("tuneship.prompt.write", 1),
        ("tuneship.train.put_in_place", 1),
        ("tuneship.journal.Run.record", 1),
    ],
)
def test_f1_a_kill_at_a_given_instant(case: Case, target: str, call: int) -> None:
    process = case.start(prelude=at(target, SIGKILL, call=call))
    assert process.wait().code == -signal.SIGKILL
    case.goes_on_to_the_same_end()


# A child that kills itself at the n-th line that is executed of what writes a checkpoint.
SAVES = """
import os, signal, sys
from pathlib import Path
import torch
from tuneship import checkpoint

def made(step):
    tensors = {{"weight": torch.full((64,), float(step))}}
    return checkpoint.Checkpoint(step, tensors, {{"moment": tensors["weight"] * 2}}, {{"loss": step / 8}})

lines = 0
def line(frame, event, argument):
    global lines
    lines += event == "line"
    if lines == {line}:
        os.kill(os.getpid(), signal.SIGKILL)
    return line

def call(frame, event, argument):
    return line if frame.f_code.co_filename.endswith(("tuneship/checkpoint.py", "tuneship/journal.py")) else None

sys.settrace(call)
checkpoint.save(Path({folder!r}), made({step}), keep=2)
os._exit(0)
"""


@pytest.mark.parametrize(("step", "first"), [(6, 1), (4, 60)], ids=["a new one", "one that stands there already"])
def test_f1_a_kill_at_each_line_of_a_save(commands: Commands, tmp_path: Path, step: int, first: int) -> None:
    import torch

    from tuneship import checkpoint

    def made(number: int) -> checkpoint.Checkpoint:
        weight = torch.full((64,), float(number))
        return checkpoint.Checkpoint(number, {"weight": weight}, {"moment": weight * 2}, {"loss": number / 8})

    folder, before = tmp_path / "checkpoints", tmp_path / "before"
    for number in (2, 4):
        checkpoint.save(before, made(number), keep=2)
    found = set()
    for line in range(first, 500):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        program = SAVES.format(line=line, folder=str(folder), step=step)
        code = commands.run([], cwd=tmp_path, prelude=program).code
        latest = checkpoint.latest(folder)
        assert latest is not None
        found.add(latest.step)
        expected = made(latest.step)
        assert torch.equal(latest.adapter["weight"], expected.adapter["weight"])
        assert torch.equal(latest.optimizer["moment"], expected.optimizer["moment"])
        assert latest.state == {"step": latest.step, **expected.state}
        # The next save finds nothing in its way and leaves nothing behind.
        checkpoint.save(folder, made(8), keep=2)
        assert [entry.name for entry in folder.iterdir() if not entry.name.startswith("step-")] == []
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert line > 80
    # Replacing one, an instant belongs to the one before.
    assert found == ({4, 6} if step == 6 else {2, 4})


def test_f1_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show this, only a power cut: the order of the calls is what there is to see."""
    import torch

    from tuneship import checkpoint

    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    tensors = {"weight": torch.zeros(4)}
    checkpoint.save(tmp_path / "checkpoints", checkpoint.Checkpoint(2, tensors, tensors, {}), keep=2)
    at_rename = events.index(("rename", "step-2"))
    before = {name for kind, name in events[:at_rename] if kind == "fsync"}
    assert before >= {*checkpoint.FILES, checkpoint.MANIFEST, ".partial-2"}
    assert ("fsync", "checkpoints") in events[at_rename:]
