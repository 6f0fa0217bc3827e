"""How tokens fill a forward pass, and which rows each update sees.

python -m pytest tests/data/test_packing.py -v
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.data.packing import Plan, Tokens, pack, plan
from tuneship.recipe import Train

EOS = 1


def train(**changes: Any) -> Train:
    return Train(**{"max_length": 16, "tokens_per_batch": 64, **changes})


def packed(**changes: Any) -> Train:
    return train(packing=True, **changes)


def lognormal(count: int, mean: float, most: int, seed: int = 0) -> list[int]:
    """Lengths as those of text-to-SQL rows are: a few words mostly, and a long tail."""
    sigma = 0.5
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return [int(length) for length in np.clip(drawn, 8, most)]


# Rows as prompt ids and answer ids; an answer ends with the end of sequence.
row = st.tuples(st.lists(st.integers(5, 99), min_size=1, max_size=9), st.lists(st.integers(5, 99), max_size=6)).map(
    lambda pair: (pair[0], [*pair[1], EOS])
)


# --- tokens -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=12), cut=st.integers(0, 12))
def test_tokens_are_the_rows_one_behind_the_other(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list[int], list[int]]], cut: int
) -> None:
    tokens = Tokens.join([Tokens.build(rows[:cut]), Tokens.build(rows[cut:])])
    file = tmp_path_factory.mktemp("tokens") / "train.safetensors"
    tokens.save(file)
    for made in (tokens, Tokens.load(file), Tokens.build(rows)):
        assert len(made) == len(rows)
        assert made.lengths.tolist() == [len(before) + len(after) for before, after in rows]
        for index, (before, after) in enumerate(rows):
            assert made.ids[made.bounds[index] : made.bounds[index + 1]].tolist() == before + after
            assert made.prompts[index] == len(before)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=8), data=st.data())
def test_labels_are_the_answers_and_their_ends(rows: list[tuple[list[int], list[int]]], data: st.DataObject) -> None:
    tokens = Tokens.build(rows)
    order = data.draw(st.permutations(range(len(rows))))
    made = pack(tokens, order)
    assert made.rows == tuple(order)
    assert made.ids.tolist() == [token for index in order for token in rows[index][0] + rows[index][1]]
    # D3, D5: exactly answer + EOS of each row, in order, and nothing of a prompt.
    assert made.labels.tolist() == [token for index in order for token in rows[index][1]]
    # Each label is predicted from the token before it, in its own row.
    assert (made.ids[made.labelled + 1] == made.labels).all()
    for index, start, end in zip(order, made.bounds, made.bounds[1:], strict=False):
        assert made.positions[start:end].tolist() == list(range(end - start))
        mine = [place for place in made.labelled.tolist() if start <= place < end]
        first = start + len(rows[index][0]) - 1
        assert mine == list(range(first, end - 1))


# --- plans ------------------------------------------------------------------------------------

lengths_of_rows = st.lists(st.integers(1, 16), min_size=1, max_size=120)
settings_of_a_run = st.one_of(
    st.builds(
        packed,
        seed=st.integers(0, 9),
        gradient_accumulation_steps=st.integers(1, 4),
        tokens_per_batch=st.integers(16, 80),
    ),
    st.builds(
        train,
        seed=st.integers(0, 9),
        gradient_accumulation_steps=st.integers(1, 4),
        tokens_per_batch=st.integers(16, 80),
        per_device_train_batch_size=st.integers(1, 9),
    ),
)


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of_rows, recipe=settings_of_a_run, epochs=st.integers(1, 3))
def test_every_row_is_seen_once_an_epoch_and_no_pass_is_too_full(
    lengths: list[int], recipe: Train, epochs: int
) -> None:
    made = plan(lengths, recipe.model_copy(update={"num_train_epochs": float(epochs)}))
    assert Counter(made.rows()) == dict.fromkeys(range(len(lengths)), epochs)
    for update in made.updates:
        assert update
        for rows in update:
            assert rows
            assert sum(lengths[index] for index in rows) <= recipe.tokens_per_batch
        if recipe.packing:
            assert len(update) <= recipe.gradient_accumulation_steps
        else:
            assert recipe.per_device_train_batch_size is not None
            rows_of_update = sum(map(len, update))
            assert rows_of_update <= recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    # Epochs do not mix: the first one alone is the plan's beginning.
    first = plan(lengths, recipe.model_copy(update={"num_train_epochs": 1.0}))
    assert made.updates[: len(first)] == first.updates
    assert Counter(first.rows()) == dict.fromkeys(range(len(lengths)), 1)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_rows, recipe=settings_of_a_run)
def test_a_plan_is_a_function_of_lengths_and_recipe(lengths: list[int], recipe: Train) -> None:
    np.random.seed(len(lengths))
    once = plan(lengths, recipe)
    np.random.seed(7)
    assert plan(np.array(lengths), recipe) == once


def test_the_seed_and_the_epoch_change_the_order() -> None:
    lengths = lognormal(200, 12, 16)
    for recipe in (packed(), train(per_device_train_batch_size=4)):
        whole = plan(lengths, recipe.model_copy(update={"num_train_epochs": 2.0})).updates
        half = len(whole) // 2
        assert whole[:half] != whole[half : 2 * half]
        assert plan(lengths, recipe).updates != plan(lengths, recipe.model_copy(update={"seed": 1})).updates
        assert plan(lengths, recipe).updates[0][0] != tuple(range(len(plan(lengths, recipe).updates[0][0])))


def test_without_packing_an_update_is_as_in_trl() -> None:
    made = plan([4] * 50, train(per_device_train_batch_size=3, gradient_accumulation_steps=4))
    assert [sum(map(len, update)) for update in made.updates] == [12, 12, 12, 12, 2]
    # The budget of a pass, 64 tokens, is 16 rows: an update is one pass here.
    assert [len(update) for update in made.updates] == [1] * 5
    # And two where a pass holds less; the update stays the same.
    cut = plan([4] * 50, train(per_device_train_batch_size=3, gradient_accumulation_steps=4, tokens_per_batch=32))
    assert [len(update) for update in cut.updates] == [2, 2, 2, 2, 1]
    assert list(cut.rows()) == list(made.rows())


def test_a_row_as_long_as_the_budget_has_a_pass_of_its_own() -> None:
    for recipe in (packed(max_length=64), train(max_length=64, per_device_train_batch_size=8)):
        made = plan([64, 3, 64, 5], recipe)
        passes = [rows for update in made.updates for rows in update]
        assert sum(len(rows) == 1 and rows[0] in (0, 2) for rows in passes) == 2


@pytest.mark.parametrize(
    ("mean", "most", "budget"), [(92, 512, 1024), (92, 512, 4096), (92, 1024, 8192), (60, 256, 512), (300, 1024, 4096)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_packs_of_real_lengths_waste_less_than_a_twentieth(mean: float, most: int, budget: int, seed: int) -> None:
    lengths = lognormal(4000, mean, most, seed)
    made = plan(lengths, Train(packing=True, tokens_per_batch=budget, max_length=most))
    passes = sum(map(len, made.updates))
    waste = 1 - sum(lengths) / (passes * budget)
    assert waste < 0.05


def test_packs_are_not_sorted_by_length() -> None:
    lengths = lognormal(4000, 92, 512)
    made = plan(lengths, Train(packing=True, tokens_per_batch=1024, max_length=512))
    rows_a_pass = [len(rows) for update in made.updates for rows in update]
    half = len(rows_a_pass) // 2
    # Long rows are placed first within a window; passes are shuffled, so that no part of an epoch is theirs.
    first, second = sum(rows_a_pass[:half]) / half, sum(rows_a_pass[half:]) / (len(rows_a_pass) - half)
    assert abs(first / second - 1) < 0.1


# --- how long ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "updates"),
    [(1.0, 10), (2.0, 20), (0.5, 5), (1.5, 15), (0.25, 2), (0.01, 1), (2.04, 21), (1e-9, 1), (3, 30)],
)
def test_part_of_an_epoch_is_part_of_its_updates(epochs: float, updates: int) -> None:
    recipe = train(per_device_train_batch_size=4, num_train_epochs=float(epochs))
    made = plan([4] * 40, recipe)
    assert len(made) == updates
    assert made.updates == plan([4] * 40, recipe.model_copy(update={"num_train_epochs": 9.0})).updates[:updates]


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 35])
def test_max_steps_goes_through_as_many_epochs_as_it_takes(steps: int) -> None:
    made = plan([4] * 40, Train(per_device_train_batch_size=4, max_steps=steps, max_length=16, tokens_per_batch=64))
    assert len(made) == steps
    counts = Counter(made.rows())
    assert max(counts.values()) - min(counts.get(index, 0) for index in range(40)) <= 1
    assert max(counts.values()) == math.ceil(steps / 10)


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    lengths = lognormal(300, 12, 16)
    short, long = (plan(lengths, packed(max_steps=steps)) for steps in (5, 50))
    assert long.updates[:5] == short.updates


def test_rows_are_listed_in_the_order_in_which_they_are_seen() -> None:
    assert list(Plan([[(3, 1), (2,)], [(0,)]]).rows()) == [3, 1, 2, 0]
