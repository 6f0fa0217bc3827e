"""A run's folder: whose it is, who writes to it, and what a kill leaves of it.

python -m pytest tests/test_journal.py -v
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneship import journal
from tuneship import recipe as recipes
from tuneship.errors import GateError, InputError, OutsideError
from tuneship.journal import open_run, read_run
from tuneship.recipe import Gate, Recipe


def make(**sections: Any) -> Recipe:
    tree: dict[str, Any] = {"name": "t", "model": {"model_name_or_path": "a/b"}, "data": {"dataset_name": "c/d"}}
    for name, changes in sections.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return recipes.validate(tree, where="test")


def prepared(folder: Path, recipe: Recipe) -> Path:
    """A run's folder with rows in it."""
    with open_run(folder, recipe) as run:
        journal.write_json(run.data / journal.PREPARED, {})
    return folder


# --- the folder -------------------------------------------------------------------------------


def test_a_new_run_holds_its_recipe(tmp_path: Path) -> None:
    with open_run(tmp_path / "runs" / "t", make()) as run:
        assert run.data.is_dir()
        assert run.checkpoints.is_dir()
    assert read_run(tmp_path / "runs" / "t").recipe == make()


def test_an_empty_folder_becomes_a_run(tmp_path: Path) -> None:
    with open_run(tmp_path, make()):
        pass
    assert journal.is_run(tmp_path)


@pytest.mark.parametrize("left", [[".lock"], [".recipe.json.partial", ".lock"]])
def test_what_a_kill_leaves_of_the_first_moment_is_no_obstacle(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("{")
    with open_run(tmp_path, make()):
        pass
    assert journal.is_run(tmp_path)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"), open_run(tmp_path, make(), fresh=fresh):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_and_a_link_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="this is a file"), open_run(tmp_path / "file", make()):
        pass
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(InputError, match="symbolic link"), open_run(tmp_path / "link", make()):
        pass
    assert list((tmp_path / "there").iterdir()) == []


def test_reading_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        read_run(tmp_path)
    (tmp_path / "recipe.json").write_text("{torn")
    with pytest.raises(InputError, match="not JSON"):
        read_run(tmp_path)


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """A user whom the rights of files bind: root's do not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0o555, 0o444], ids=["not to be written", "not to be entered"])
@pytest.mark.parametrize("place", ["parent", "run"])
def test_a_folder_without_rights_is_told(mode: int, place: str, request: pytest.FixtureRequest) -> None:
    # Not below tmp_path: its parents are closed to other users.
    with tempfile.TemporaryDirectory() as made:
        parent = Path(made)
        folder = parent / "run"
        if place == "run":
            folder.mkdir(mode=0o755)
        parent.chmod(0o755)
        (folder if place == "run" else parent).chmod(mode)
        request.getfixturevalue("ordinary_user")
        with (
            pytest.raises(OutsideError, match="cannot be written: Permission denied") as caught,
            open_run(folder, make()),
        ):
            pass
        assert caught.value.where == str(folder)
        if os.getuid() == 0:
            os.seteuid(0)
        (folder if place == "run" else parent).chmod(0o755)


# --- F7: one process at a time -----------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from tuneship import journal
run = journal.read_run(Path(sys.argv[1]))
with journal.open_run(run.path, run.recipe):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run tmp_path/run open."""
    prepared(tmp_path / "run", make())
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_process_is_refused(tmp_path: Path, holder: subprocess.Popen[str], fresh: bool) -> None:
    with pytest.raises(OutsideError, match=rf"pid {holder.pid}\b"), open_run(tmp_path / "run", make(), fresh=fresh):
        pass
    # Nothing was put aside under its feet.
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_the_lock_goes_with_its_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with open_run(tmp_path / "run", make()):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


# --- F6: another recipe ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate: 0.0002 there, 0.001 now"),
        ({"train": {"seed": 7}}, "train.seed: 42 there, 7 now"),
        ({"data": {"dataset_name": "e/f"}}, "data.dataset_name: 'c/d' there, 'e/f' now"),
        ({"data": {"columns": {"answer": "sql"}}}, "data.columns.answer: 'answer' there, 'sql' now"),
        ({"model": {"model_name_or_path": "x/y"}}, "model.model_name_or_path: 'a/b' there, 'x/y' now"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora.target_modules: 'all-linear' there, ['q_proj'] now"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = prepared(tmp_path / "run", make())
    with pytest.raises(InputError, match="belongs to another recipe") as caught, open_run(folder, make(**changes)):
        pass
    assert said in caught.value.what
    assert "--fresh" in caught.value.fix
    assert read_run(folder).recipe == make()


def test_many_differences_are_counted(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "run", make())
    other = make(
        train={"seed": 1, "learning_rate": 1e-3, "weight_decay": 0.1},
        lora={"r": 4, "lora_alpha": 4, "lora_dropout": 0.1, "layers_to_transform": [0]},
    )
    with pytest.raises(InputError, match="and 2 more"), open_run(folder, other):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"logging_steps": 1, "save_steps": 7, "save_total_limit": 5, "eval_steps": 3}},
        {"evaluate": {"max_rows": 5}},
        {"publish": {"folder": "elsewhere"}},
        {"serve": {"port": 9}},
        {"cluster": {"gpu": 2}},
        {"name": "other"},
    ],
)
def test_what_does_not_touch_the_weights_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = prepared(tmp_path / "run", make())
    with open_run(folder, make(**changes)):
        pass
    assert read_run(folder).recipe == make(**changes)


def test_a_recipe_that_was_refused_may_be_mended(tmp_path: Path) -> None:
    # As `prepare` asks for it: accept the terms, raise max_length, skip bad rows.
    with pytest.raises(InputError, match="refused"), open_run(tmp_path / "run", make()):
        raise InputError("refused")
    mended = make(model={"accept_terms": True}, train={"max_length": 2048}, data={"on_bad_row": "skip"})
    with open_run(tmp_path / "run", mended):
        pass
    assert read_run(tmp_path / "run").recipe == mended


def test_a_log_without_rows_holds_the_recipe_too(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make()) as run, run.log() as log:
        log.write(step=1)
    with pytest.raises(InputError, match="another recipe"), open_run(tmp_path / "run", make(train={"seed": 1})):
        pass


def test_fresh_keeps_the_old_run_beside_the_new(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "run", make())
    for seed in (1, 2):
        with open_run(folder, make(train={"seed": seed}), fresh=True) as run:
            assert not (run.data / journal.PREPARED).exists()
            journal.write_json(run.data / journal.PREPARED, {})
    old = sorted(tmp_path.glob("run.old-*"))
    assert [read_run(path).recipe.train.seed for path in old] == [42, 1]
    assert all((path / "data" / journal.PREPARED).exists() for path in old)
    assert read_run(folder).recipe.train.seed == 2


def test_fresh_on_nothing_is_a_new_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make(), fresh=True):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


# --- the log ----------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path: Path) -> journal.Run:
    """A run with five updates."""
    with open_run(tmp_path / "run", make()) as run, run.log() as log:
        for step in range(1, 6):
            log.write(step=step, loss=1 / step)
        return run


def test_a_run_without_a_log_has_no_updates(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make()) as run:
        assert run.metrics() == []
        run.rewind(3)
        assert not run.metrics_file.exists()


def test_a_written_line_is_with_the_operating_system(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make()) as run, run.log() as log:
        log.write(step=1)
        # Not closed, not flushed by us: a SIGKILL now loses nothing.
        assert run.metrics() == [{"step": 1}]


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', '{"step": 6}', "{", "\x00\x00\x00", "\udcff\udcfe"])
def test_a_torn_last_line_is_no_update(logged: journal.Run, torn: str) -> None:
    with logged.metrics_file.open("ab") as file:
        file.write(torn.encode("utf-8", "surrogateescape"))
    assert [line["step"] for line in logged.metrics()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', "\udcff"])
@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_rewind_drops_what_comes_after_a_step(logged: journal.Run, step: int, torn: str) -> None:
    with logged.metrics_file.open("ab") as file:
        file.write(torn.encode("utf-8", "surrogateescape"))
    logged.rewind(step)
    with logged.log() as log:
        log.write(step=step + 1)
    assert [line["step"] for line in logged.metrics()] == [*range(1, min(step, 5) + 1), step + 1]
    assert all(json.loads(line) for line in logged.metrics_file.read_text().splitlines())


def test_a_damaged_line_is_told_with_its_number(logged: journal.Run) -> None:
    with logged.metrics_file.open("ab") as file:
        file.write(b"\x00\x00\n")
    with pytest.raises(InputError, match="not JSON") as caught:
        logged.metrics()
    assert caught.value.where == f"{logged.metrics_file}:6"


# --- files ------------------------------------------------------------------------------------


def test_provenance_grows(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make()) as run:
        assert run.provenance() == {}
        run.record(a=1, b=2)
        run.record(b=3)
        assert run.provenance() == {"a": 1, "b": 3}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    journal.write_json(file, {"old": "ü"})

    def fail(*_: object) -> None:
        # The reader's view at the last moment before the rename.
        assert journal.read_json(file) == {"old": "ü"}
        raise OSError("killed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="killed"):
        journal.write_json(file, {"new": 1})
    monkeypatch.undo()
    assert journal.read_json(file) == {"old": "ü"}
    journal.write_json(file, {"new": 1})
    assert journal.read_json(file) == {"new": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b'{"a": \xff}', b"[" * 100_000])
def test_a_damaged_json_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match="not JSON") as caught:
        journal.read_json(tmp_path / "x.json")
    assert caught.value.where == str(tmp_path / "x.json")


def test_an_adapter_whose_base_has_no_fingerprint_is_told(tmp_path: Path) -> None:
    run = journal.Run(tmp_path, make())
    run.adapter.mkdir()
    journal.write_json(run.adapter / journal.PROVENANCE, {"base": {"fingerprint": None}})
    with pytest.raises(InputError, match="fingerprint is no text"):
        run.trained_on()


def test_the_codes_digest_is_that_of_its_files() -> None:
    facts = journal.code_facts()
    assert facts == journal.code_facts()
    assert len(facts["code_sha256"]) == 64
    assert {"torch", "transformers", "peft", "safetensors"} <= set(facts["packages"])


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG"])
@pytest.mark.parametrize(
    "make_error", [lambda n, t: OSError(n, t), lambda n, t: RuntimeError(f"I/O error: {t} (os error {n})")]
)
def test_a_full_disk_is_told_in_one_line(tmp_path: Path, number: str, make_error: Callable[..., Exception]) -> None:
    code = getattr(errno, number)
    with pytest.raises(OutsideError, match="the disk is full"), open_run(tmp_path / "run", make()):
        raise make_error(code, os.strerror(code))


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run", make()):
        _ = 1 / 0


# --- the gate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuned", "gain", "reasons"),
    [
        (0.7, 0.2, []),
        (0.7, 0.3 - 0.1, []),
        (0.699, 0.2, ["score 0.699 is below evaluate.gate.min_score 0.7"]),
        (0.9, 0.1, ["gain +0.100 is below evaluate.gate.min_gain 0.2"]),
        (0.1, -0.3, ["score 0.100 is below", "gain -0.300 is below"]),
    ],
)
def test_the_gate_says_why(tuned: float, gain: float, reasons: list[str]) -> None:
    said = journal.judge(tuned, gain, 10, Gate(min_score=0.7, min_gain=0.2))
    assert said["passed"] == (not reasons)
    assert [any(part in reason for reason in said["reasons"]) for part in reasons] == [True] * len(said["reasons"])


def test_without_judged_rows_the_gate_says_no() -> None:
    said = journal.judge(0.0, 0.0, 0, Gate())
    assert not said["passed"]
    assert "exact_match" in said["reasons"][0]


@pytest.mark.parametrize(
    ("settings", "said", "fix"),
    [
        ({"gate": {"min_score": 0.99}}, "score 0.800 is below evaluate.gate.min_score 0.99", "lower evaluate.gate"),
        ({"gate": {"min_gain": 0.5}}, r"gain \+0.300 is below evaluate.gate.min_gain 0.5", "lower evaluate.gate"),
        ({"metric": "exact_match"}, "evaluate.metric execution_accuracy, the recipe says exact_", "tuneship evaluate"),
        ({"split": "validation"}, "evaluate.split test, the recipe says validation", "tuneship evaluate"),
    ],
)
def test_the_gate_is_that_of_the_recipe_as_it_is_now(
    tmp_path: Path, settings: dict[str, Any], said: str, fix: str
) -> None:
    evaluation = {
        "metric": "execution_accuracy",
        "split": "test",
        "scores": [{"name": "tuned", "score": 0.8, "rows": 10}],
        "gain": {"value": 0.3},
        "gate": {"passed": True, "reasons": []},
    }
    with open_run(tmp_path, make()) as run:
        journal.write_json(run.evaluation_file, evaluation)
        assert run.gate("") == evaluation
    with open_run(tmp_path, make(evaluate=settings)) as run:
        with pytest.raises(GateError, match=said) as caught:
            run.gate("")
        assert fix in caught.value.fix
        assert run.gate("for a trial") == evaluation
