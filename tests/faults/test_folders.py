"""F6, F7, F10: a run's folder belongs to one recipe, one base and one process."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from interrupted import UPDATES, Case, at, log


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.learning_rate=0.02", "train.learning_rate: 0.01 there, 0.02 now"),
        ("train.seed=7", "train.seed: 42 there, 7 now"),
        ("train.max_steps=15", "train.max_steps: 14 there, 15 now"),
        ("lora.r=2", "lora.r: 4 there, 2 now"),
        ("data.dataset_limit=20", "data.dataset_limit: None there, 20 now"),
        ("data.template='{question} {context} {answer}'", "data.template: "),
        ("model.precision=bfloat16", "model.precision: 'float32' there, 'bfloat16' now"),
    ],
)
def test_f6_another_recipe_is_refused_key_by_key(halfway: Case, change: str, said: str) -> None:
    before = log(halfway.run)
    finished = halfway.train("--set", change)
    assert finished.code == 2
    assert "error: the folder belongs to another recipe" in finished.err
    assert said in finished.err
    assert "--fresh" in finished.err
    assert log(halfway.run) == before
    assert json.loads((halfway.run / "recipe.json").read_text())["train"]["seed"] == 42


def test_f6_what_changes_no_weight_may_change(halfway: Case) -> None:
    settings = ["train.save_steps=10", "train.logging_steps=13", "evaluate.max_rows=3", "train.save_total_limit=5"]
    finished = halfway.train(*(part for setting in settings for part in ("--set", setting)))
    assert finished.code == 0, finished.err
    assert log(halfway.run) == halfway.undisturbed.log
    assert f"updates 13/{UPDATES}" in finished.err


def test_f6_changed_rows_are_refused(halfway: Case, tmp_path: Path) -> None:
    recipe = json.loads((halfway.run / "recipe.json").read_text())
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(recipe["data"]["dataset_name"], rows)
    run = tmp_path / "own"
    own = Case(halfway.commands, halfway.recipe, run, halfway.undisturbed)
    arguments = ("--set", f"data.dataset_name={rows}", "--set", "train.max_steps=2")
    assert own.start(*arguments, verb="prepare").wait().code == 0
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    finished = own.train(*arguments)
    assert finished.code == 2
    assert "error: the data changed since this run was prepared" in finished.err


def test_f7_a_second_process_is_refused_and_the_first_goes_on(case: Case) -> None:
    go = case.run.parent / "go"
    wait = f"\n        while not os.path.exists({str(go)!r}):\n            os.sched_yield()"
    first = case.start(prelude=at("tuneship.replay.answer_loss", wait, call=7))
    first.until(lambda: len(log(case.run)) == 3)
    for verb in ("train", "evaluate", "prepare"):
        second = case.start(verb=verb).wait()
        assert second.code == 3
        assert f"error: another process (pid {first.pid}) writes to this run" in second.err
    assert case.train("--fresh").code == 3
    go.touch()
    assert first.wait().code == 0
    assert log(case.run) == case.undisturbed.log


def test_f7_the_folder_of_another_run_is_refused(halfway: Case, tmp_path: Path, small_base: Path) -> None:
    other = Path(shutil.copytree(small_base, tmp_path / "other"))
    finished = halfway.train("--set", f"model.model_name_or_path={other}")
    assert finished.code == 2
    assert f"model.model_name_or_path: '{small_base}' there, '{other}' now" in finished.err


@pytest.mark.parametrize("kind", ["a folder of something else", "a file", "a link"])
def test_f7_what_is_no_run_is_left_alone(case: Case, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "a file":
        place.write_text("mine")
    elif kind == "a link":
        place.symlink_to(case.run)
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    finished = Case(case.commands, case.recipe, place, case.undisturbed).train()
    assert finished.code == 2
    assert "Traceback" not in finished.err
    if kind != "a link":
        assert (place if kind == "a file" else place / "thesis.txt").read_text() == "mine"
    assert not (case.run / "metrics.jsonl").exists()


def test_f7_a_folder_that_cannot_be_written(case: Case, tmp_path: Path) -> None:
    # For root, too, nothing can be made there.
    finished = Case(case.commands, case.recipe, Path("/proc/tuneship"), case.undisturbed).train()
    assert finished.code == 3
    assert "error: the run's folder cannot be written" in finished.err
    assert "--run" in finished.err


def test_f7_a_read_only_disk(prepared: Case, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        run = Path(shutil.copytree(prepared.run, disk / "run"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        finished = Case(prepared.commands, prepared.recipe, run, prepared.undisturbed).train()
        assert finished.code == 3
        assert "error: the run's folder cannot be written: Read-only file system" in finished.err
    finally:
        subprocess.run(["umount", disk], check=True)


def test_f10_a_base_that_changed_is_refused_by_every_stage(case: Case, tiny_base: Path, tmp_path: Path) -> None:
    from samples import make_gemma2

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    other = make_gemma2(tmp_path / "other", seed=1)
    own = Case(case.commands, case.recipe, tmp_path / "own", case.undisturbed)
    arguments: tuple[Any, ...] = ("--set", f"model.model_name_or_path={base}", "--set", "train.max_steps=2")
    assert own.start(*arguments, verb="prepare").wait().code == 0

    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    finished = own.train(*arguments)
    assert finished.code == 2
    assert "error: the base model changed since this run was prepared" in finished.err
    assert log(own.run) == []

    (base / "model.safetensors").write_bytes(weights)
    assert own.train(*arguments).code == 0
    (base / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    for verb in ("evaluate", "export"):
        finished = own.start(*arguments, verb=verb).wait()
        assert finished.code == 2, finished.err
        assert "error: the base model changed since the adapter was trained" in finished.err
