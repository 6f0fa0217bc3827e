"""F5: a full disk is told with numbers, before the run where it can be and during it where not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupted import Case, at, checkpoints, copied, file_limit, log


def size_of(case: Case, name: str) -> int:
    return max(file.stat().st_size for file in case.run.rglob(name))


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors"])
def test_f5_a_checkpoint_that_does_not_fit(case: Case, halfway: Case, name: str) -> None:
    limit = file_limit(size_of(halfway, name) - 1)
    finished = case.train(prelude=at("tuneship.train.checkpoint.save", limit, call=3))
    assert finished.code == 3
    assert "error: the checkpoint of step 9 cannot be written" in finished.err
    assert re.search(r"File too large.*it needs \d+ bytes, \d+ are free", finished.err)
    assert "earlier checkpoints are intact" in finished.err
    assert "Traceback" not in finished.err
    # No half folder, neither as a checkpoint nor beside them.
    assert checkpoints(case.run) == ["step-3", "step-6"]
    assert "going on after update 6" in case.goes_on_to_the_same_end().err


@pytest.mark.parametrize(
    ("target", "call", "size"),
    [
        # Half a line more than the log has then.
        ("tuneship.replay.answer_loss", 13, "os.path.getsize('run/metrics.jsonl') + 20"),
        ("tuneship.train.models.write_adapter", 1, "1000"),
        ("tuneship.prompt.write", 1, "1000"),
    ],
    ids=["log", "adapter", "prompt"],
)
def test_f5_other_files_that_do_not_fit(case: Case, target: str, call: int, size: str) -> None:
    finished = case.train(prelude=at(target, file_limit(size), call=call))
    assert finished.code == 3, finished.err
    assert "error: the disk is full: File too large" in finished.err
    assert re.search(r"\d+ bytes are free", finished.err)
    assert "Traceback" not in finished.err
    assert not (case.run / "adapter").exists()
    case.goes_on_to_the_same_end()


def test_f5_rows_that_do_not_fit(case: Case) -> None:
    run = case.run.parent / "new"
    new = Case(case.commands, case.recipe, run, case.undisturbed)
    prelude = "import resource; " + file_limit(8000)
    finished = new.start(verb="prepare", prelude=prelude).wait()
    assert finished.code == 3, finished.err
    assert "error: the disk is full" in finished.err
    assert "Traceback" not in finished.err
    assert not (run / "data" / "prepared.json").exists()
    assert new.start(verb="prepare").wait().code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 640 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fills a disk but for so many bytes."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(b"\0" * max(0, free - leave))
    return ballast


def test_f5_a_disk_that_is_too_small_is_refused_before_the_first_update(prepared: Case, small_disk: Path) -> None:
    case = copied(prepared, small_disk / "run")
    ballast = fill(small_disk, 64 * 1024)
    finished = case.train()
    assert finished.code == 3
    assert re.search(r"error: checkpoints need \d+ bytes, \d+ are free", finished.err)
    assert "name another --run" in finished.err
    assert log(case.run) == []
    ballast.unlink()


def test_f5_a_disk_that_fills_up_during_the_run(prepared: Case, small_disk: Path) -> None:
    case = copied(prepared, small_disk / "run")
    process = case.start()
    process.until(lambda: "step-6" in checkpoints(case.run))
    process.send(signal.SIGSTOP)
    ballast = fill(small_disk, 16 * 1024)
    process.send(signal.SIGCONT)
    finished = process.wait()
    assert finished.code == 3, finished.err
    assert "No space left on device" in finished.err
    assert "Traceback" not in finished.err
    assert all(name.startswith("step-") for name in checkpoints(case.run))
    ballast.unlink()
    case.goes_on_to_the_same_end()
