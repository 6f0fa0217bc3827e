"""Packed rows against one row at a time in transformers' own eager attention and PEFT's own layers.

python -m pytest tests/kernels -v
"""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from tuneship import model as models
from tuneship.kernels import attention
from tuneship.kernels.attention import Documents
from tuneship.model import ARCHITECTURES, LoadedModel

# Shorter and longer than the sliding window, and one that is long enough for torch's fused attention.
LENGTHS = (5, 40, 97, attention.SHORT + 48)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny.tuned(tiny.make(request.param, tmp_path_factory.mktemp("models") / request.param))


def packed(rows: list[Tensor]) -> tuple[Tensor, Tensor, Documents]:
    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + len(row))
    return torch.cat(rows), torch.cat([torch.arange(len(row)) for row in rows]), Documents(bounds)


def loss_of(logits: Tensor, row: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:-1], row[1:], reduction="sum")


@pytest.mark.parametrize("short", [attention.SHORT, 8], ids=["written-out", "fused"])
def test_packed_rows_equal_one_row_at_a_time(tuned: LoadedModel, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    rows = tiny.rows(LENGTHS)
    logits = tuned.logits(tuned.states(*packed(rows))).split(LENGTHS)
    sum(loss_of(*pair) for pair in zip(logits, rows, strict=True)).backward()  # type: ignore[union-attr]
    ours = {name: parameter.grad for name, parameter in models.trainable(tuned).items()}
    tuned.causal.zero_grad()

    peft = tiny.reference(tuned)
    for row, mine in zip(rows, logits, strict=True):
        theirs = peft(input_ids=row[None]).logits[0]
        assert tiny.distance(mine.detach(), theirs.detach()) < 1e-5
        loss_of(theirs, row).backward()
    expected = {name: p.grad for name, p in peft.base_model.model.named_parameters() if p.requires_grad}
    assert len(expected) == 3 * 7 * 2
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert tiny.distance(ours[name], gradient) < 1e-5, name


def test_no_row_sees_another(tuned: LoadedModel) -> None:
    first, second, other = tiny.rows((20, 50, 20), seed=1)
    with torch.no_grad():
        beside_first = tuned.states(*packed([first, second]))[20:]
        beside_other = tuned.states(*packed([other, second]))[20:]
    assert torch.equal(beside_first, beside_other)


def test_the_fused_path_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    fused = functional.scaled_dot_product_attention

    def noted(*args: Tensor, **settings: object) -> Tensor:
        calls.append(settings.get("is_causal") is True)
        return fused(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    query, key = torch.randn(4, attention.SHORT + 1, 8), torch.randn(2, attention.SHORT + 1, 8)
    attention.causal(query, key, key, 1.0, None, None)
    attention.causal(query, key, key, 1.0, None, attention.SHORT + 1)
    assert calls == [True, True]
    attention.causal(query, key, key, 1.0, None, 16)
    assert calls == [True, True, False]
    # The cap is not among what torch's attention can do.
    attention.causal(query, key, key, 1.0, 5.0, None)
    attention.causal(query[:, :-1], key[:, :-1], key[:, :-1], 1.0, None, None)
    assert len(calls) == 3
