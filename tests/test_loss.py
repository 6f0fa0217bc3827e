"""The loss of packed rows: which tokens it counts, and that it is a mean over labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.data.packing import Tokens, pack
from tuneship.kernels.attention import Documents
from tuneship.loss import answer_loss, held_out_loss
from tuneship.model import LoadedModel

EOS = 1


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> LoadedModel:
    return tiny.tuned(BaseFiles(str(tiny_base), tiny_base, "local"))


def some_tokens(lengths: list[tuple[int, int]]) -> Tokens:
    """Rows of (prompt, answer) lengths; an answer ends with the end of sequence."""
    rows = [row.tolist() for row in tiny.rows([before + after for before, after in lengths])]
    return Tokens.build(
        [(row[:before], [*row[before:-1], EOS]) for row, (before, _) in zip(rows, lengths, strict=True)]
    )


def by_hand(model: LoadedModel, tokens: Tokens, row: int) -> torch.Tensor:
    """The cross-entropies of one row's answer and end of sequence, from all its logits."""
    ids = torch.from_numpy(tokens.ids[tokens.bounds[row] : tokens.bounds[row + 1]].astype(np.int64))
    logits = model.logits(model.states(ids, torch.arange(len(ids)), Documents([0, len(ids)])))
    start = int(tokens.prompts[row])
    return functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none")


def test_answer_and_end_of_sequence_count_and_nothing_else(model: LoadedModel) -> None:
    tokens = some_tokens([(12, 5), (30, 1), (3, 20)])
    loss = answer_loss(model, pack(tokens, [2, 0, 1]))
    expected = torch.cat([by_hand(model, tokens, row) for row in range(3)])
    assert len(expected) == 26
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-5, atol=0)


def test_a_prompts_last_token_learns_the_answers_first(model: LoadedModel) -> None:
    tokens = some_tokens([(12, 5)])
    packed = pack(tokens, [0])
    assert packed.labelled.tolist() == [11, 12, 13, 14, 15]
    assert packed.labels.tolist() == [*tokens.ids[12:16].tolist(), EOS]


@pytest.mark.parametrize("budget", [16, 40, 1000])
def test_held_out_loss_is_a_mean_over_labels_however_rows_are_batched(model: LoadedModel, budget: int) -> None:
    tokens = some_tokens([(12, 5), (30, 1), (3, 20), (8, 4), (20, 20)])
    expected = torch.cat([by_hand(model, tokens, row) for row in range(5)]).detach().mean()
    assert held_out_loss(model, tokens, tokens_per_batch=budget) == pytest.approx(expected.item(), rel=1e-5)


def test_held_out_loss_is_without_dropout_and_leaves_the_mode_alone(tiny_base: Path) -> None:
    files = BaseFiles(str(tiny_base), tiny_base, "local")
    model = tiny.tuned(files, tiny.LORA.model_copy(update={"lora_dropout": 0.5}))
    tokens = some_tokens([(12, 5), (30, 8)])
    model.causal.train()
    first, second = (held_out_loss(model, tokens, tokens_per_batch=1000) for _ in range(2))
    assert model.causal.training
    assert first == second
    model.causal.eval()
    held_out_loss(model, tokens, tokens_per_batch=1000)
    assert not model.causal.training
    assert all(parameter.grad is None for parameter in models.trainable(model).values())
