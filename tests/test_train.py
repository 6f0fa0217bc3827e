"""train: against a plain loop, against itself, and what it leaves behind.

python -m pytest tests/test_train.py -v
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import TrainingArguments, get_scheduler

from tuneship import journal, prompt, replay
from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.data import heldout
from tuneship.data.packing import Tokens, plan
from tuneship.errors import InputError, TuneshipError
from tuneship.journal import sha256_file
from tuneship.loss import held_out_loss
from tuneship.prepare import prepare
from tuneship.prompt import Prompt
from tuneship.recipe import Recipe, Train
from tuneship.train import Trained, learning_rate, train

MakeRecipe = Callable[..., Recipe]
NO_PACKING = {"packing": False, "tokens_per_batch": 4096}


def done(recipe: Recipe, folder: Path, **settings: Any) -> tuple[Trained, list[dict[str, Any]]]:
    """A run from rows to adapter, and its log without times."""
    with journal.open_run(folder, recipe) as run:
        prepare(run)
        result = train(run, **settings)
        return result, [{key: value for key, value in line.items() if key != "seconds"} for line in run.metrics()]


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in log]


# --- the learning rate ------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 3, 2.7, 0.1, 0.26])
@pytest.mark.parametrize(
    ("kind", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_the_learning_rate_is_that_of_transformers(kind: str, theirs: str, warmup: float, tmp_path: Path) -> None:
    total = 20
    settings = Train(learning_rate=3e-3, lr_scheduler_type=kind, warmup_steps=warmup)  # type: ignore[arg-type]
    steps = TrainingArguments(str(tmp_path), warmup_steps=warmup, use_cpu=True).get_warmup_steps(total)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = get_scheduler(theirs, optimizer, num_warmup_steps=steps, num_training_steps=total)
    for step in range(1, total + 1):
        assert learning_rate(step, total, settings) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        schedule.step()


# --- against a plain loop ---------------------------------------------------------------------


def plain_loop(run: journal.Run) -> list[float]:
    """The same training as TRL would do it: padded micro-batches, transformers' eager attention, PEFT's own layers.

    It stands in for TRL: packing off, answers only, and the loss over an update's micro-batches
    divided by the update's labels (`num_items_in_batch`).
    """
    settings = run.recipe.train
    name = run.recipe.model.model_name_or_path
    files = BaseFiles(name, Path(name), "local")
    model = models.load(files, "float32")
    models.add_lora(model, run.recipe.lora, seed=settings.seed)
    peft = tiny.reference(model, run.recipe.lora).train()
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    tokens = Tokens.load(run.data / "train.safetensors")
    todo = plan(tokens.lengths, settings)
    schedule = get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(settings.warmup_steps),
        num_training_steps=len(todo),
    )
    size = settings.per_device_train_batch_size
    assert size is not None
    curve = []
    for update in todo.updates:
        rows = [row for part in update for row in part]
        batches = [padded(tokens, rows[at : at + size]) for at in range(0, len(rows), size)]
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = peft(**batch, num_items_in_batch=torch.tensor(labels)).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        curve.append(total)
    return curve


def padded(tokens: Tokens, rows: list[int]) -> dict[str, torch.Tensor]:
    longest = max(int(tokens.lengths[row]) for row in rows)
    ids, labels = np.zeros((len(rows), longest), np.int64), np.full((len(rows), longest), -100, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for at, row in enumerate(rows):
        text = tokens.ids[tokens.bounds[row] : tokens.bounds[row + 1]]
        ids[at, : len(text)], mask[at, : len(text)] = text, 1
        start = int(tokens.prompts[row])
        labels[at, start : len(text)] = text[start:]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }


def test_the_loss_curve_is_a_plain_loops(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        train={
            **NO_PACKING,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "max_steps": 14,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
        }
    )
    _, log = done(recipe, tmp_path / "run")
    expected = plain_loop(journal.read_run(tmp_path / "run"))
    assert losses(log) == pytest.approx(expected, rel=1e-3)
    # Something was learned, and clipping took part.
    assert expected[-1] < expected[0] - 0.3
    assert max(line["grad_norm"] for line in log) > 0.5


# --- against itself ---------------------------------------------------------------------------


def test_accumulation_equals_one_big_batch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    curves = []
    for name, size, accumulation, budget in (("big", 8, 1, 4096), ("small", 2, 4, 4096), ("cut", 8, 1, 256)):
        settings = {
            **NO_PACKING,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "tokens_per_batch": budget,
        }
        _, log = done(make_recipe(train=settings), tmp_path / name)
        curves.append(losses(log))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] != curves[0]


def test_the_same_recipe_gives_the_same_folder_twice(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(lora={"lora_dropout": 0.2})
    logs = [done(recipe, tmp_path / name)[1] for name in ("first", "second")]
    assert logs[0] == logs[1]
    digests = [
        {file.name: sha256_file(file) for file in (tmp_path / name / "adapter").iterdir()}
        for name in ("first", "second")
    ]
    assert digests[0] == digests[1]


def test_dropout_depends_on_the_seed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first, other, none = (
        losses(
            done(make_recipe(lora={"lora_dropout": dropout}, train={"max_steps": 3, "seed": seed}), tmp_path / name)[1]
        )
        for name, dropout, seed in (("first", 0.3, 1), ("other", 0.3, 2), ("none", 0.0, 1))
    )
    assert len({tuple(first), tuple(other), tuple(none)}) == 3


def test_a_finished_run_is_not_trained_again(make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    recipe = make_recipe(model={"model_name_or_path": str(base)}, train={"max_steps": 2})
    result, log = done(recipe, tmp_path / "run")
    # Not even the base is needed.
    shutil.rmtree(base)
    with journal.open_run(tmp_path / "run", recipe) as run:
        again = train(run)
    assert (again.adapter, again.updates, again.loss) == (result.adapter, result.updates, result.loss)
    assert (result.updates, result.loss) == (2, log[-1]["loss"])
    assert result.tokens_per_second > 0
    assert again.tokens_per_second == 0


# --- what it leaves behind --------------------------------------------------------------------


def test_every_update_is_in_the_log(trained: Path) -> None:
    lines = journal.read_run(trained).metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert {"loss", "grad_norm", "lr", "tokens", "seconds"} <= line.keys()
        assert 0 < line["tokens"] <= 256
    assert lines[0]["loss"] > lines[-1]["loss"]


def test_the_validation_loss_is_logged_at_its_steps(trained: Path, tiny_base: Path) -> None:
    run = journal.read_run(trained)
    assert [line["step"] for line in run.metrics() if "validation_loss" in line] == [3, 6]
    model = models.load(BaseFiles("base", tiny_base, "local"), "float32")
    models.load_adapter(model, run.adapter)
    rows = heldout.read(run.data / "validation.jsonl", 100)
    assert rows
    tokens = heldout.tokenise(rows, Prompt(run.recipe.data.template, run.recipe.data.stop), model.tokenizer)
    expected = held_out_loss(model, tokens, tokens_per_batch=256)
    assert run.metrics()[-1]["validation_loss"] == pytest.approx(expected, rel=1e-6)


def test_without_eval_steps_no_validation_loss_is_measured(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    _, log = done(make_recipe(train={"max_steps": 2, "eval_steps": None}), tmp_path / "run")
    assert not any("validation_loss" in line for line in log)


def test_the_adapters_folder_is_whole(trained: Path, tiny_base: Path) -> None:
    run = journal.read_run(trained)
    assert {file.name for file in run.adapter.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "prompt.json",
        "tuneship.json",
    }
    model = models.load(BaseFiles("base", tiny_base, "local"), "float32")
    models.load_adapter(model, run.adapter)
    prompt.verify(run.adapter, model.tokenizer)
    assert prompt.read(run.adapter).template == run.recipe.data.template
    assert [entry.name for entry in run.path.iterdir() if "partial" in entry.name] == []


def test_the_adapter_says_where_it_came_from(trained: Path, tiny_base: Path, rows_file: Path) -> None:
    run = journal.read_run(trained)
    facts = json.loads((run.adapter / "tuneship.json").read_text())
    files = BaseFiles(str(tiny_base), tiny_base, "local")
    assert facts["base"] == {"name": str(tiny_base), "revision": "local", "fingerprint": files.fingerprint()}
    assert facts["data"]["source"] == {"name": str(rows_file), "sha256": sha256_file(rows_file)}
    assert facts["data"]["train_sha256"] == sha256_file(run.data / "train.safetensors")
    assert sum(facts["data"]["splits"].values()) == 60
    assert facts["recipe"].keys() == {"name", "model", "data", "lora", "train"}
    assert facts["updates"] == 6
    assert facts["loss"] == run.metrics()[-1]["loss"]
    assert facts["code"] == journal.code_facts()
    # The wheel may leave out which CUDA it was built for, as `torch.__version__` does not.
    assert facts["code"]["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["device"].startswith("cpu")
    whole = run.provenance()
    assert whole["base"] == facts["base"]
    assert whole["tokens_per_second"] > 0


def test_only_so_many_checkpoints_are_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    done(make_recipe(train={"max_steps": 7, "save_steps": 1, "save_total_limit": 3}), tmp_path / "run")
    assert sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-5",
        "step-6",
        "step-7",
    ]


def test_another_machine_goes_on_from_the_mirror(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, mirror = make_recipe(), str(tmp_path / "mirror")
    _, log = done(recipe, tmp_path / "here", mirror=mirror)
    assert sorted(entry.name for entry in (tmp_path / "mirror").iterdir()) == ["metrics.jsonl", "step-4", "step-6"]
    shutil.rmtree(tmp_path / "mirror" / "step-6")
    _, rest = done(recipe, tmp_path / "there", mirror=mirror)
    assert rest == log
    assert sha256_file(tmp_path / "here/adapter" / models.WEIGHTS) == sha256_file(
        tmp_path / "there/adapter" / models.WEIGHTS
    )


def test_a_line_is_said_each_logging_steps(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done(make_recipe(train={"logging_steps": 2, "max_steps": 5}), tmp_path / "run")
    said = [line.split("  ")[0] for line in capfd.readouterr().err.splitlines() if line.startswith("updates")]
    assert said == ["updates 2/5", "updates 4/5"]


# --- what is refused --------------------------------------------------------------------------


def test_a_run_that_is_not_prepared_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with journal.open_run(tmp_path / "run", make_recipe()) as run, pytest.raises(InputError, match="is not prepared"):
        train(run)


def test_rows_longer_than_the_bases_context_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"max_length": 1000, "tokens_per_batch": 1000})
    with pytest.raises(InputError, match="more than the base's context of 512 tokens") as refusal:
        done(recipe, tmp_path / "run")
    assert refusal.value.where == "train.max_length"


def test_a_device_that_is_too_small_names_the_dials(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU never raises this error, so it is raised for it."""

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replay, "answer_loss", out_of_memory)
    with pytest.raises(TuneshipError, match="memory does not hold") as failure:
        done(make_recipe(), tmp_path / "run")
    assert "tokens_per_batch: 256" in failure.value.where
    assert "train.max_length" in failure.value.fix
