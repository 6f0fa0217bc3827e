"""The run that every fault happens to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from interrupted import SECTIONS, Case, Outcome, copied, outcome
from samples import make_gemma2, tiny_recipe
from zygote import Commands

from tuneship import recipe as recipes


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two layers: these runs are many."""
    return make_gemma2(tmp_path_factory.mktemp("base") / "small-gemma2", num_hidden_layers=2)


@pytest.fixture(scope="session")
def prepared(commands: Commands, small_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The run, prepared, and its outcome when nothing happens to it."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipes.dump(tiny_recipe(small_base, rows_file, **SECTIONS)), encoding="utf-8")
    case = Case(commands, recipe, folder / "prepared", Outcome([], ""))
    assert case.start(verb="prepare").wait().code == 0
    quiet = copied(case, folder / "undisturbed")
    finished = quiet.train()
    assert finished.code == 0, finished.err
    return Case(commands, recipe, case.run, outcome(quiet.run))


@pytest.fixture
def case(prepared: Case, tmp_path: Path) -> Case:
    """The prepared run in a folder of its own."""
    return copied(prepared, tmp_path / "run")


@pytest.fixture
def finished(prepared: Case, tmp_path: Path) -> Case:
    """The run, trained undisturbed, in a folder of its own."""
    run = Path(shutil.copytree(prepared.run.with_name("undisturbed"), tmp_path / "finished"))
    return Case(prepared.commands, prepared.recipe, run, prepared.undisturbed)


@pytest.fixture(scope="session")
def halfway_once(prepared: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder, stopped in the middle, with two checkpoints."""
    from interrupted import SIGTERM, at

    case = copied(prepared, tmp_path_factory.mktemp("halfway") / "run")
    # Two forward passes an update: this is in update 11.
    assert case.train(prelude=at("tuneship.replay.answer_loss", SIGTERM, call=21)).code == 75
    return case.run


@pytest.fixture
def halfway(prepared: Case, halfway_once: Path, tmp_path: Path) -> Case:
    """The run, stopped in the middle, in a folder of its own."""
    run = Path(shutil.copytree(halfway_once, tmp_path / "halfway"))
    return Case(prepared.commands, prepared.recipe, run, prepared.undisturbed)
