"""F8: a loss that is not a number stops the run, names the update and its rows, and keeps the last checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from interrupted import Case, at, checkpoints, log


def test_f8_a_learning_rate_that_blows_up(case: Case) -> None:
    arguments = ("--set", "train.learning_rate=1e30", "--set", "train.warmup_steps=0", "--fresh")
    finished = case.train(*arguments)
    assert finished.code == 1
    assert re.search(r"error: update 2: the loss is (nan|inf)", finished.err), finished.err
    assert re.search(r"rows \[\d+(, \d+)*\] of data/train.safetensors", finished.err)
    assert "lower train.learning_rate or set train.max_grad_norm" in finished.err
    assert "there was no checkpoint yet" in finished.err
    assert "Traceback" not in finished.err
    # What is no number is not in the log: it is JSON.
    assert [line["step"] for line in log(case.run)] == [1]


def test_f8_the_last_checkpoint_is_kept(case: Case) -> None:
    poison = "original(*arguments, **settings); return float('nan') * original(*arguments, **settings)"
    finished = case.train(prelude=at("tuneship.replay.answer_loss", poison, call=19))
    assert finished.code == 1
    assert "error: update 10: the loss is nan" in finished.err
    assert "checkpoint step-9 is kept" in finished.err
    assert checkpoints(case.run) == ["step-6", "step-9"]
    # The very rows of the update are named.
    from tuneship.data.packing import Tokens, plan
    from tuneship.recipe import Train

    settings = Train.model_validate_json(json.dumps(json.loads((case.run / "recipe.json").read_text())["train"]))
    update = plan(Tokens.load(case.run / "data/train.safetensors").lengths, settings).updates[9]
    assert str([row for rows in update for row in rows]) in finished.err
    # The same command goes on from there.
    case.goes_on_to_the_same_end()


def test_f8_a_base_with_a_weight_that_is_no_number(case: Case, tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    own = Case(case.commands, case.recipe, tmp_path / "own", case.undisturbed)
    finished = own.train("--set", f"model.model_name_or_path={base}")
    assert finished.code == 1
    assert "error: update 1: the loss is nan" in finished.err
    assert checkpoints(own.run) == []
