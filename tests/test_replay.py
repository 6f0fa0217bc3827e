"""The passes of an update: filled up to fixed shapes they are what they were, and when they are worth capturing.

python -m pytest tests/test_replay.py -v
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from tuneship import model as models
from tuneship import replay, trainable
from tuneship.base import BaseFiles
from tuneship.data.packing import Plan, Tokens, pack
from tuneship.loss import answer_loss
from tuneship.recipe import Lora
from tuneship.trainable import HandModel

CPU = torch.device("cpu")
LORA = Lora(r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return tiny.make("gemma2", tmp_path_factory.mktemp("models") / "gemma2")


@pytest.fixture
def model(files: BaseFiles) -> HandModel:
    made = trainable.load_by_hand(files, "float32", LORA, seed=0, device=CPU)
    torch.manual_seed(1)
    for parameter in models.trainable(made).values():
        parameter.data = 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("size", [64, 128, 65], ids=lambda size: f"size-{size}")
@pytest.mark.parametrize("lengths", [(64,), (20, 44), (3, 18, 23), (40,)], ids=str)
def test_a_filled_pass_is_the_pass(model: HandModel, lengths: tuple[int, ...], size: int) -> None:
    tokens = Tokens.build([(row[:-2].tolist(), row[-2:].tolist()) for row in tiny.rows(lengths)])
    packed, share = pack(tokens, range(len(lengths))), 0.25
    parameters = models.trainable(model)
    expected_loss = share * answer_loss(model, packed)
    expected = torch.autograd.grad(expected_loss, list(parameters.values()))

    filled = replay.fill(packed, size, share)
    shapes = {name: tuple(tensor.shape) for name, tensor in filled.items()}
    assert set(shapes.values()) == {(size,)}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    loss = replay.run(model, filled)
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None
        assert tiny.distance(parameter.grad, gradient) < 1e-5, name
    # Another pass adds to what is there.
    replay.run(model, filled)
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        assert parameter.grad is not None
        assert tiny.distance(parameter.grad, 2 * gradient) < 1e-5


def test_what_fills_is_a_row_of_its_own() -> None:
    tokens = Tokens.build([([7, 8, 9], [10, 1]), ([11], [12])])
    filled = replay.fill(pack(tokens, [0, 1]), 10, 0.5)
    assert filled["ids"].tolist() == [7, 8, 9, 10, 1, 11, 12, 0, 0, 0]
    assert filled["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    assert filled["first"].tolist() == [0] * 5 + [5] * 2 + [7] * 3
    assert filled["last"].tolist() == [5] * 5 + [7] * 2 + [10] * 3
    assert filled["labelled"].tolist() == [2, 3, 5, *[0] * 7]
    assert filled["labels"].tolist() == [10, 1, 12, *[0] * 7]
    assert filled["shares"].tolist() == [0.5] * 3 + [0.0] * 7
    assert {filled[name].dtype for name in ("first", "last")} == {torch.int32}


def test_a_full_pass_is_not_filled() -> None:
    tokens = Tokens.build([([7, 8, 9], [10, 1]), ([11], [12])])
    filled = replay.fill(pack(tokens, [0, 1]), 7, 1.0)
    assert filled["last"].tolist() == [5] * 5 + [7] * 2
    assert filled["ids"].tolist() == [7, 8, 9, 10, 1, 11, 12]


def test_what_is_worth_capturing(model: HandModel, files: BaseFiles) -> None:
    many, few = Plan([[(0,)]] * 20), Plan([[(0,)]] * 19)
    # Never on a CPU.
    assert not replay.worth(model, 200, many)
    on_a_card: Any = model
    on_a_card.device = torch.device("cuda")
    assert replay.worth(model, 200, many)
    assert replay.worth(model, 1024, many)
    assert not replay.worth(model, 1025, many)
    assert not replay.worth(model, 200, few)
    # transformers' own layers wait for the card here and there; a capture must not.
    theirs = models.load(files, "float32", CPU)
    theirs.device = torch.device("cuda")
    assert not replay.worth(theirs, 200, many)
