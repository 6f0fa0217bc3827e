"""Gemma 2 by hand: packed rows against one row at a time in transformers' eager attention and PEFT's own layers.

python -m pytest tests/kernels/test_gemma2.py -v
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import get_args

import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor

from tuneship import model as models
from tuneship import trainable
from tuneship.base import BaseFiles
from tuneship.kernels import reference
from tuneship.kernels.attention import Documents
from tuneship.kernels.frozen import Frozen, Joined, Plain
from tuneship.kernels.gemma2 import Keep
from tuneship.kernels.low import Adapter, Low, sides
from tuneship.kernels.reference import Rows, Want
from tuneship.recipe import Lora
from tuneship.trainable import HandModel

# A row of one token; shorter and longer than the sliding window.
LENGTHS = (1, 5, 40, 33)
KEEPS: tuple[Keep, ...] = get_args(Keep)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return tiny.make("gemma2", tmp_path_factory.mktemp("models") / "gemma2")


def by_hand(files: BaseFiles, lora: Lora, *, keep: Keep = "all", size: float = 0.1) -> HandModel:
    """On our own layers, with an adapter that does something."""
    model = trainable.load_by_hand(files, "float32", lora, seed=0, device=torch.device("cpu"), keep=keep)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in models.trainable(model).values():
            parameter.copy_(size * torch.randn_like(parameter))
    return model


def states_of(model: HandModel, rows: list[Tensor], at: Tensor | None = None) -> Tensor:
    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + len(row))
    return model.states(torch.cat(rows), torch.cat([torch.arange(len(row)) for row in rows]), Documents(bounds), at)


def one_at_a_time(peft: PeftModel, rows: list[Tensor]) -> Tensor:
    """The states in transformers' eager attention and PEFT's own layers."""
    return torch.cat([peft.base_model.model.model(input_ids=row[None]).last_hidden_state[0] for row in rows])


def weights_of(states: Tensor) -> Tensor:
    """What each number of the states counts in the tests' loss."""
    return torch.randn(states.shape, generator=torch.Generator().manual_seed(2))


def gradients(model: HandModel, rows: list[Tensor]) -> dict[str, Tensor]:
    parameters = models.trainable(model)
    states = states_of(model, rows)
    found = torch.autograd.grad((states * weights_of(states)).sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


LORAS = {
    "q,v": Lora(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")),
    "all seven": Lora(r=4, lora_alpha=8),
    "one layer": Lora(r=4, lora_alpha=8, layers_to_transform=(1,)),
    "not the last": Lora(r=4, lora_alpha=8, target_modules=("k_proj", "up_proj"), layers_to_transform=(0, 1)),
    **{name: Lora(r=3, lora_alpha=8, target_modules=(name,)) for name in LINEARS},
}


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_packed_rows_equal_one_row_at_a_time(files: BaseFiles, lora: Lora) -> None:
    model, rows = by_hand(files, lora), tiny.rows(LENGTHS)
    peft = tiny.reference(model, lora)
    theirs = one_at_a_time(peft, rows)
    (theirs * weights_of(theirs)).sum().backward()
    expected = {name: p.grad for name, p in peft.base_model.model.named_parameters() if p.requires_grad}

    layers = 3 if lora.layers_to_transform is None else len(lora.layers_to_transform)
    assert len(expected) == layers * (7 if lora.target_modules == "all-linear" else len(lora.target_modules)) * 2
    assert tiny.distance(states_of(model, rows).detach(), theirs.detach()) < 1e-5
    for model.keep in KEEPS:
        ours = gradients(model, rows)
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            assert tiny.distance(ours[name], gradient) < 1e-5, (model.keep, name)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_window_counts_as_soon_as_a_row_is_longer(files: BaseFiles, more: int) -> None:
    model = by_hand(files, LORAS["all seven"])
    rows = tiny.rows((5, model.shape.window + more))
    peft = tiny.reference(model, LORAS["all seven"])
    with torch.no_grad():
        theirs = one_at_a_time(peft, rows)
        assert tiny.distance(states_of(model, rows), theirs) < 1e-5


def test_gradients_are_handed_over_and_not_copied(files: BaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven linears of 42 layers are 588 copies otherwise."""
    made, find = set(), Low.gradients

    def watched(low: Low) -> list[Tensor]:
        found = find(low)
        made.update(gradient.data_ptr() for gradient in found)
        return found

    monkeypatch.setattr(Low, "gradients", watched)
    model = by_hand(files, LORAS["all seven"])
    states_of(model, tiny.rows(LENGTHS)).sum().backward()
    gradients = [parameter.grad for parameter in models.trainable(model).values()]
    assert {gradient.data_ptr() for gradient in gradients if gradient is not None} == made


def test_no_row_sees_another(files: BaseFiles) -> None:
    model = by_hand(files, LORAS["all seven"])
    first, second, other = tiny.rows((20, 50, 20), seed=1)
    with torch.no_grad():
        assert torch.equal(states_of(model, [first, second])[20:], states_of(model, [other, second])[20:])


def test_what_is_kept_is_what_was_asked_for(files: BaseFiles) -> None:
    rows = tiny.rows(LENGTHS)
    sizes = {}
    for keep, name in itertools.product(KEEPS, ("q,v", "all seven")):
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            states = states_of(by_hand(files, LORAS[name], keep=keep), rows)
        states.sum().backward()
        sizes[keep, name] = sum(kept.values())
    active = 3 * sum(LENGTHS) * 48 * 4
    for name, more in (("q,v", 0), ("all seven", active)):
        assert sizes["all", name] - sizes["most", name] == more
        assert sizes["most", name] - sizes["some", name] == 2 * active
        assert sizes["input", name] < sizes["some", name] - 2 * active


class _OneWay(Plain):
    def backward(self, rows: Rows) -> Tensor:
        raise AssertionError("the gradient of an input that needs none")


def test_the_first_layers_input_needs_no_gradient(files: BaseFiles) -> None:
    model = by_hand(files, LORAS["all seven"])
    rows = tiny.rows(LENGTHS)
    expected = gradients(model, rows)
    first, second = (layer.products for layer in model.layers[:2])
    first["qkv"] = _OneWay(first["qkv"].weight)  # type: ignore[attr-defined]
    ours = gradients(model, rows)
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())
    # Every other layer's does.
    second["qkv"] = _OneWay(second["qkv"].weight)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="needs none"):
        gradients(model, rows)


@pytest.mark.parametrize("name", ["q,v", "all seven"])
def test_the_last_layer_runs_where_it_is_asked(files: BaseFiles, name: str) -> None:
    model, rows = by_hand(files, LORAS[name]), tiny.rows(LENGTHS)
    # At both ends, between, and none of the second row.
    at = torch.tensor([0, 17, 18, 60, 78])
    whole = states_of(model, rows)
    weights = weights_of(whole)[at]
    parameters = models.trainable(model)
    expected = torch.autograd.grad((whole[at] * weights).sum(), list(parameters.values()))
    seen = {name: _Counting(product.weight) for name, product in model.layers[-1].products.items()}  # type: ignore[attr-defined]
    model.layers[-1].products = dict(seen)
    for model.keep in KEEPS:
        ours = states_of(model, rows, at)
        assert tiny.distance(ours.detach(), whole[at].detach()) < 1e-6
        found = torch.autograd.grad((ours * weights).sum(), list(parameters.values()))
        assert all(tiny.distance(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)), model.keep
    assert {name: product.rows for name, product in seen.items()} == {
        "qkv": {len(whole)},
        **{key: {len(at)} for key in ("o", "gate_up", "down")},
    }


class _Counting(Plain):
    """Notes how many rows it is asked to multiply."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.rows: set[int] = set()

    def forward(self, rows: Rows) -> Tensor:
        assert rows.plain is not None
        self.rows.add(len(rows.plain))
        return super().forward(rows)

    def backward(self, rows: Rows) -> Tensor:
        assert rows.plain is not None
        self.rows.add(len(rows.plain))
        return super().backward(rows)


# --- dropout ----------------------------------------------------------------------------------

DROPPED = Lora(r=4, lora_alpha=8, lora_dropout=0.4)


def test_the_same_masks_on_the_way_back_whatever_is_kept(files: BaseFiles) -> None:
    rows = tiny.rows(LENGTHS)
    found = []
    for keep in KEEPS:
        model = by_hand(files, DROPPED, keep=keep)
        torch.manual_seed(7)
        found.append(gradients(model, rows))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)
    torch.manual_seed(8)
    other = gradients(model, rows)
    assert not any(torch.equal(other[name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("name", LINEARS)
def test_gradients_under_dropout_are_the_slope_of_the_loss(files: BaseFiles, name: str) -> None:
    lora = DROPPED.model_copy(update={"target_modules": (name,)})
    model, rows = by_hand(files, lora, keep="some"), tiny.rows(LENGTHS)
    torch.manual_seed(7)
    found = gradients(model, rows)
    # Along the gradient itself the slope is its length.
    length = torch.cat([gradient.flatten() for gradient in found.values()]).norm()
    step = 2e-3
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, gradient in zip(models.trainable(model).values(), found.values(), strict=True):
                parameter += sign * step * gradient / length
            torch.manual_seed(7)
            states = states_of(model, rows)
            losses.append(float((states * weights_of(states)).double().sum()))
            for parameter, gradient in zip(models.trainable(model).values(), found.values(), strict=True):
                parameter -= sign * step * gradient / length
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(length), rel=0.02)


def test_dropout_changes_no_mean_and_is_off_in_evaluation(files: BaseFiles) -> None:
    # An adapter so small that the model is a straight line in it.
    model, rows = by_hand(files, DROPPED, size=0.003), tiny.rows((12, 20))
    plain = by_hand(files, DROPPED, size=0.0)
    with torch.no_grad():
        base = states_of(plain, rows)
        model.causal.eval()
        whole = states_of(model, rows) - base
        assert torch.equal(states_of(model, rows) - base, whole)
        model.causal.train()
        torch.manual_seed(0)
        effects = torch.stack([states_of(model, rows) - base for _ in range(200)])
    # The mean of 200 is known to a fourteenth of one's spread.
    spread = effects.std(0).norm() / 14
    assert (effects.mean(0) - whole).norm() < 1.5 * spread
    assert whole.norm() > 5 * spread


FORMS: dict[str, Callable[[Tensor], Frozen]] = {
    "plain": Plain,
    "beside": lambda weight: Joined(weight, 9, below=False),
    "below": lambda weight: Joined(weight, 9, below=True),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_the_low_rank_side_equals_autograds(form: Callable[[Tensor], Frozen], dropout: float) -> None:
    """Two adapters side by side, and one beyond outputs that have none."""
    torch.manual_seed(0)
    places = [("q_proj", 0, 8, 0.5), ("k_proj", 8, 12, 2.0), ("v_proj", 20, 24, 1.0)]
    adapters = [Adapter(name, "qkv", start, end, scale, dropout) for name, start, end, scale in places]
    shapes = [shape for _, start, end, _ in places for shape in ((3, 40), (end - start, 3))]
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    x, dy = torch.randn(50, 40, requires_grad=True), torch.randn(50, 24)
    whole = torch.randn(24, 40)
    frozen = form(whole)
    low = Low(sides([(adapters, weights)], [{"qkv": frozen}], torch.float32)[0])
    masks = low.masks("qkv", x)
    assert len(masks) == (3 if dropout else 0)

    expected = x @ whole.t()
    for index, (_, start, end, scale) in enumerate(places):
        seen = x * masks[index] / (1 - dropout) if dropout else x
        added = scale * seen @ weights[2 * index].t() @ weights[2 * index + 1].t()
        expected = expected + torch.nn.functional.pad(added, (start, 24 - end))
    expected.backward(dy)

    room = Want(room=9)
    y = low.forward("qkv", frozen, reference.rows(x.detach(), room), masks)
    dx = low.backward("qkv", frozen, reference.rows(dy, room), masks)
    low.note("qkv", x.detach(), dy, masks)
    assert dx is not None
    assert tiny.distance(y, expected.detach()) < 1e-6
    assert tiny.distance(dx, x.grad) < 1e-6
    for ours, weight in zip(low.gradients(), weights, strict=True):
        assert tiny.distance(ours, weight.grad) < 1e-6


def test_each_adapter_draws_its_own_mask() -> None:
    adapters = [Adapter(name, "qkv", at, at + 8, 1.0, 0.5) for name, at in (("q_proj", 0), ("k_proj", 8))]
    weights = [torch.zeros(2, 40), torch.zeros(8, 2)] * 2
    low = Low(sides([(adapters, weights)], [{"qkv": Plain(torch.zeros(16, 40))}], torch.float32)[0])
    masks = low.masks("qkv", torch.empty(50, 40))
    assert masks.keys() == {0, 1}
    assert not torch.equal(masks[0], masks[1])
    assert all(float(mask.float().mean()) == pytest.approx(0.5, abs=0.05) for mask in masks.values())
