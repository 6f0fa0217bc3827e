"""Good rows: checked, told apart from their duplicates, and given to their split.

python -m pytest tests/data/test_rows.py -v
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneship.data import rows
from tuneship.data.rows import Row, Tally
from tuneship.errors import InputError
from tuneship.recipe import Columns, Data

GOOD = {"question": "q", "context": "c", "answer": "a"}


def source(folder: Path, lines: list[Any], **changes: Any) -> Data:
    """A JSONL file of rows; a text stands for itself."""
    file = folder / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_bytes("".join(f"{text}\n" for text in texts).encode("utf-8", "surrogateescape"))
    return Data(**{"dataset_name": str(file), "test_fraction": 0.2, "validation_fraction": 0.1, **changes})


def many(count: int) -> list[dict[str, str]]:
    return [
        {"question": f"q{i}", "context": f"c{i % 7}", "answer": f"a{i}", "domain": f"d{i % 13}"} for i in range(count)
    ]


def read(data: Data) -> tuple[list[Row], Tally]:
    tally = Tally()
    return list(rows.read(data, tally)), tally


def refusal(data: Data) -> InputError:
    with pytest.raises(InputError) as caught:
        read(data)
    assert caught.value.where == data.dataset_name
    return caught.value


# --- D1: what is wrong with a row -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            {"question": "q", "context": "c"},
            "answer is missing; the row has question, context (set data.columns.answer)",
        ),
        ({"question": "q", "context": "c", "anwser": "a"}, "answer is missing; set data.columns.answer: anwser?"),
        ({"Question": "q", "context": "c", "answer": "a"}, "question is missing; set data.columns.question: Question?"),
        ({}, "question is missing; the row has nothing (set data.columns.question)"),
        ({**GOOD, "question": None}, "question is null"),
        ({**GOOD, "answer": None}, "answer is null"),
        ({**GOOD, "context": None}, "context is null"),
        ({**GOOD, "answer": ""}, "answer is empty"),
        ({**GOOD, "question": " \t\n"}, "question is empty"),
        ({**GOOD, "answer": "\u2003"}, "answer is empty"),
        ({**GOOD, "answer": 5}, "answer is int, not text"),
        ({**GOOD, "answer": ["a"]}, "answer is list, not text"),
        ({**GOOD, "answer": {"text": "a"}}, "answer is dict, not text"),
        ({**GOOD, "context": False}, "context is bool, not text"),
        ('{"question": NaN, "context": "c", "answer": "a"}', "question is float, not text"),
        ('{"question": "\\ud800", "context": "c", "answer": "a"}', "not UTF-8"),
        ('{"question": "q", "context": "c", "answer": "half \\udc00"}', "not UTF-8"),
        ('{"question": "caf\udce9", "context": "c", "answer": "a"}', "not UTF-8"),
        ('{"question": "q"', "not JSON: Expecting ',' delimiter"),
        ("[]", "not a JSON object but list"),
        ({**GOOD, "context": "x" * 2**19, "question": "y" * 2**19}, "longer than"),
    ],
)
def test_a_bad_row_is_told_with_its_number_and_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    error = refusal(source(tmp_path, [*many(3), bad, *many(3)]))
    assert error.what.startswith("1 bad row:\n    row 4: ")
    assert reason in error.what
    assert "on_bad_row: skip" in error.fix


def test_a_whole_line_of_20_megabytes_is_one_bad_row(tmp_path: Path) -> None:
    assert "row 2: longer than" in refusal(source(tmp_path, [GOOD, {**GOOD, "context": "x" * 20 * 2**20}, GOOD])).what


@pytest.mark.parametrize("owner", [None, 1.5, ["x"]])
def test_a_row_without_its_group_is_bad(tmp_path: Path, owner: Any) -> None:
    lines = [{**row, "domain": owner} for row in many(1)]
    assert "row 1: domain is" in refusal(source(tmp_path, lines, split_by="domain")).what
    assert "domein is missing; set data.split_by: domain?" in refusal(source(tmp_path, many(1), split_by="domein")).what


def test_a_group_that_is_no_text_is_bad(tmp_path: Path) -> None:
    bad = '{"question": "q", "context": "c", "answer": "a", "domain": "\\ud800"}'
    assert "row 2: not UTF-8" in refusal(source(tmp_path, [*many(1), bad], split_by="domain")).what


def test_the_first_five_are_listed_and_nothing_after_them_is_read(tmp_path: Path) -> None:
    lines = [row for good in many(8) for row in (good, {**good, "answer": ""})]
    error = refusal(source(tmp_path, lines))
    assert error.what.splitlines() == [
        "5 bad rows (and perhaps more):",
        *(f"    row {number}: answer is empty" for number in (2, 4, 6, 8, 10)),
    ]


def test_the_context_may_be_empty_and_unused(tmp_path: Path) -> None:
    (row,), _ = read(source(tmp_path, [{**GOOD, "context": ""}], test_fraction=0.0, validation_fraction=0.0))
    assert row.context == ""
    # A template without a context asks for none.
    data = source(tmp_path, [{"question": "q", "answer": "a"}], template="{question} {answer}", test_fraction=0.001)
    (row,), _ = read(data)
    assert row.fields == {"question": "q", "context": "", "answer": "a"}


def test_columns_are_taken_by_the_names_that_the_recipe_gives(tmp_path: Path) -> None:
    data = source(
        tmp_path,
        [{"Frage": "q", "Schema": "c", "SQL": "a", "question": "not this"}],
        columns=Columns(question="Frage", context="Schema", answer="SQL"),
        test_fraction=0.001,
        validation_fraction=0.0,
    )
    (row,), _ = read(data)
    assert row.fields == {"question": "q", "context": "c", "answer": "a"}
    assert row.columns["question"] == "not this"


def test_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    raw = {"question": "  q\r\n{answer} ", "context": "\t<eos>", "answer": " SELECT 1;\n"}
    (row,), _ = read(source(tmp_path, [raw], test_fraction=0.001, validation_fraction=0.0))
    assert row.fields == raw


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "there are no rows"),
        (["", "  "], "there are no rows"),
        ([GOOD] * 7, "all 7 rows are the same"),
        ([{**GOOD, "answer": ""}], "1 bad row:"),
    ],
)
def test_data_that_is_none_is_told(tmp_path: Path, lines: list[Any], message: str) -> None:
    assert message in refusal(source(tmp_path, lines)).what


def test_an_empty_training_split_is_told(tmp_path: Path) -> None:
    error = refusal(source(tmp_path, many(3), test_fraction=0.98, validation_fraction=0.01))
    assert error.what == "none of the 3 rows falls into the training split"


# --- on_bad_row: skip -----------------------------------------------------------------------------


def test_skipped_rows_are_handed_over_and_counted(tmp_path: Path) -> None:
    lines = [*many(98), {**GOOD, "answer": ""}, "{"]
    data = source(tmp_path, lines, on_bad_row="skip", max_bad_fraction=0.02)
    tally, rejected = Tally(), []
    kept = list(rows.read(data, tally, lambda number, reason, raw: rejected.append((number, reason))))
    assert len(kept) == tally.good == 98
    assert tally.seen == 100
    assert [number for number, _ in rejected] == [99, 100]
    assert tally.bad == rejected


def test_too_large_a_share_of_bad_rows_is_refused(tmp_path: Path) -> None:
    lines = [*many(97), *[{**GOOD, "answer": ""}] * 3]
    assert len(read(source(tmp_path, lines, on_bad_row="skip", max_bad_fraction=0.03))[0]) == 97
    error = refusal(source(tmp_path, lines, on_bad_row="skip", max_bad_fraction=0.02))
    assert error.what == "3 of 100 rows are bad, more than data.max_bad_fraction 0.02; row 98: answer is empty"
    assert "3 of 3 rows are bad" in refusal(source(tmp_path, lines[97:], on_bad_row="skip", max_bad_fraction=0.5)).what


# --- duplicates -------------------------------------------------------------------------------------


def test_repeated_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = many(20)
    kept, tally = read(source(tmp_path, [*lines, *lines[:8], lines[0]]))
    assert sorted(row.number for row in kept) == list(range(1, 21))
    assert tally.duplicates == 9
    assert tally.duplicate_examples == [21, 22, 23, 24, 25]


def test_another_answer_or_context_is_another_row(tmp_path: Path) -> None:
    lines = [GOOD, {**GOOD, "answer": "b"}, {**GOOD, "context": "d"}, {**GOOD, "question": "r"}, {**GOOD, "extra": 1}]
    kept, tally = read(source(tmp_path, [*lines, *many(30)]))
    assert tally.duplicates == 1
    assert {row.number for row in kept} >= {1, 2, 3, 4}
    # Fields are apart: no two rows are the same because their texts are, joined.
    joined = [{"question": "ab", "context": "c", "answer": "d"}, {"question": "a", "context": "bc", "answer": "d"}]
    assert read(source(tmp_path, [*joined, *many(30)]))[1].duplicates == 0


# --- D4: splits -------------------------------------------------------------------------------------


def splits(data: Data) -> dict[str, str]:
    return {row.question: row.split for row in read(data)[0]}


def test_the_shares_are_those_of_the_recipe(tmp_path: Path) -> None:
    counts = Counter(splits(source(tmp_path, many(4000))).values())
    assert abs(counts["test"] / 4000 - 0.2) < 0.03
    assert abs(counts["validation"] / 4000 - 0.1) < 0.02


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), added=st.integers(0, 100), removed=st.integers(0, 100))
def test_rows_stay_in_their_split_when_others_come_go_or_move(
    tmp_path: Path, seed: int, added: int, removed: int
) -> None:
    lines = many(300)
    before = splits(source(tmp_path, lines))
    changed = [*lines[removed:], *[{**row, "question": f"new {row['question']}"} for row in many(added)]]
    random.Random(seed).shuffle(changed)
    after = splits(source(tmp_path, changed))
    assert {question: after[question] for question in before if question in after} == {
        question: split for question, split in before.items() if question in after
    }
    assert len(after) == 300 - removed + added


def test_raising_a_share_moves_rows_one_way_only(tmp_path: Path) -> None:
    small = splits(source(tmp_path, many(500), test_fraction=0.1, validation_fraction=0.0))
    large = splits(source(tmp_path, many(500), test_fraction=0.3, validation_fraction=0.0))
    assert {q for q, split in small.items() if split == "test"} < {q for q, split in large.items() if split == "test"}


def test_the_same_question_is_never_on_both_sides(tmp_path: Path) -> None:
    lines = [{**row, "answer": f"{row['answer']} {version}"} for row in many(200) for version in range(3)]
    kept, _ = read(source(tmp_path, lines))
    sides: dict[tuple[str, str], set[str]] = {}
    for row in kept:
        sides.setdefault((row.question, row.context), set()).add(row.split)
    assert len(kept) == 600
    assert all(len(side) == 1 for side in sides.values())


def test_rows_of_one_group_stay_together(tmp_path: Path) -> None:
    lines = [{**row, "domain": index % 100} for index, row in enumerate(many(1000))]
    kept, tally = read(source(tmp_path, lines, split_by="domain"))
    sides: dict[int, set[str]] = {}
    for row in kept:
        sides.setdefault(row.columns["domain"], set()).add(row.split)
    assert all(len(side) == 1 for side in sides.values())
    assert set(tally.splits) == {"train", "validation", "test"}
    # Without it they do not.
    apart: dict[int, set[str]] = {}
    for row in read(source(tmp_path, lines))[0]:
        apart.setdefault(row.columns["domain"], set()).add(row.split)
    assert any(len(side) > 1 for side in apart.values())


# --- dataset_limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 10, 100])
def test_the_limit_counts_training_rows_and_held_out_ones_keep_their_share(tmp_path: Path, limit: int) -> None:
    lines = many(2000)
    kept, tally = read(source(tmp_path, lines, dataset_limit=limit))
    assert tally.splits["train"] == limit
    assert tally.splits["test"] >= limit / 0.7 * 0.2
    assert tally.splits["validation"] >= limit / 0.7 * 0.1
    # Enough is enough: the rest of the file is not read.
    assert tally.seen < 2000
    # The same rows as without a limit, in the same splits.
    everything = splits(source(tmp_path, lines))
    assert all(everything[row.question] == row.split for row in kept)
    train = [row.number for row in kept if row.split == "train"]
    assert train == [row.number for row in read(source(tmp_path, lines))[0] if row.split == "train"][:limit]


def test_a_limit_above_the_rows_changes_nothing(tmp_path: Path) -> None:
    assert read(source(tmp_path, many(50), dataset_limit=10**6))[0] == read(source(tmp_path, many(50)))[0]
