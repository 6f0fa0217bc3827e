"""The same curve as TRL: its own trainer on the tiny Gemma 2, packing off, the same rows in the same order.

python -m pytest tests/test_trl.py -v
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers.utils import logging as transformers_logging

from tuneship import journal
from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.data.packing import Tokens, plan
from tuneship.prepare import prepare
from tuneship.recipe import Recipe
from tuneship.train import train

MakeRecipe = Callable[..., Recipe]


def by_trl(run: journal.Run, folder: Path) -> list[dict[str, Any]]:
    """What TRL logs of the run's rows, in the order in which the run saw them."""
    pytest.importorskip("trl", reason="trl comes with the dev extra")
    with warnings.catch_warnings():
        # What its imports and its calls of others warn of is not ours.
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        settings, base = run.recipe.train, Path(run.recipe.model.model_name_or_path)
        model = models.load(BaseFiles(str(base), base, "local"), "float32")
        models.add_lora(model, run.recipe.lora, seed=settings.seed)
        tokens = Tokens.load(run.data / "train.safetensors")
        rows = []
        for row in plan(tokens.lengths, settings).rows():
            ids = tokens.ids[tokens.bounds[row] : tokens.bounds[row + 1]].tolist()
            rows.append(
                {"input_ids": ids, "completion_mask": [int(at >= tokens.prompts[row]) for at in range(len(ids))]}
            )
        transformers_logging.disable_progress_bar()
        trainer = SFTTrainer(
            model=tiny.reference(model, run.recipe.lora).train(),
            args=SFTConfig(
                str(folder),
                per_device_train_batch_size=settings.per_device_train_batch_size,
                gradient_accumulation_steps=settings.gradient_accumulation_steps,
                max_steps=settings.max_steps,
                learning_rate=settings.learning_rate,
                lr_scheduler_type=settings.lr_scheduler_type,
                warmup_steps=settings.warmup_steps,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                max_length=settings.max_length,
                completion_only_loss=True,
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=model.tokenizer,
        )
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_the_loss_curve_is_trls(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    # Eight updates of six rows: within the first pass over the rows.
    settings = {
        "packing": False,
        "tokens_per_batch": 4096,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    with journal.open_run(tmp_path / "run", make_recipe(train=settings)) as run:
        prepare(run)
        train(run)
    ours, theirs = run.metrics(), by_trl(run, tmp_path / "trl")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-3)
    norms = [line["grad_norm"] for line in ours]
    assert norms == pytest.approx([float(line["grad_norm"]) for line in theirs], rel=1e-2)
    # Something was learned, and clipping took part.
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.3
    assert max(norms) > 0.5
