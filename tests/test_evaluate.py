"""evaluate: base and tuned judged alike, whatever they answer.

python -m pytest tests/test_evaluate.py -v
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from samples import write_rows

from tuneship import evaluate as evaluation
from tuneship import journal
from tuneship.data import heldout
from tuneship.errors import InputError
from tuneship.evaluate import _bootstrap, evaluate, table, wilson
from tuneship.generation import Completion, Generator, Request
from tuneship.recipe import Recipe

CONTEXT = "CREATE TABLE people (name VARCHAR, age INTEGER)"
RIGHT = "SELECT COUNT(*) FROM people WHERE age > 30"


def held_out(number: int, **changes: Any) -> dict[str, Any]:
    row = {"number": number, "question": f"How many {number}?", "context": CONTEXT, "answer": RIGHT}
    return row | {"columns": {"domain": "people"}} | changes


def open_with(run: Path, **sections: Any) -> Any:
    """Opens a trained run with other settings for the evaluation."""
    tree = journal.read_run(run).recipe.model_dump(mode="json")
    tree["evaluate"] |= sections
    return journal.open_run(run, Recipe.model_validate_json(json.dumps(tree)))


def answering(monkeypatch: pytest.MonkeyPatch, *systems: Sequence[str]) -> None:
    """Puts texts in the place of what base, base with examples, and tuned would write."""
    turns = iter(systems)

    def complete(generator: Generator, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        texts = next(turns)
        # Some end later than others.
        for index in reversed(range(len(requests))):
            yield index, Completion(texts[index], [5] * 3, "stop", ended_itself=index % 2 == 0)

    monkeypatch.setattr(evaluation, "complete", complete)


# --- statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_against_published_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_gain_is_that_of_its_mean() -> None:
    differences = [1] * 60 + [0] * 30 + [-1] * 10
    low, high = _bootstrap(differences)
    deviation = math.sqrt((60 + 10) / 100 - 0.5**2) / 10
    assert (low, high) == pytest.approx((0.5 - 1.96 * deviation, 0.5 + 1.96 * deviation), abs=0.02)
    assert (low, high) == _bootstrap(differences)
    assert _bootstrap([1] * 5) == (1.0, 1.0)
    assert _bootstrap([]) == (0.0, 0.0)


# --- verdicts ---------------------------------------------------------------------------------

# What a model may write, and what it is worth.
WRITTEN = [
    (f" {RIGHT}", "equal"),
    (" select count(*) from people where not age <= 30;", "equal"),
    (f" {RIGHT}\nQuestion: and what else?\nContext: CREATE", "equal"),
    (" SELECT COUNT(*) FROM people WHERE age >= 30", "different"),
    # A constant, whatever the rows are.
    (" SELECT 30", "different"),
    (" SELECT COUNT(*), age FROM people WHERE age > 30", "different"),
    (" SELECT COUNT(*) FROM persons WHERE age > 30", "error"),
    (" the answer is 42", "error"),
    (" WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n", "timeout"),
    (" DELETE FROM people", "refused"),
    (f" {RIGHT}; DROP TABLE people", "refused"),
    (" ATTACH DATABASE 'x.db' AS x", "refused"),
    (" PRAGMA table_info(people)", "refused"),
    ("", "refused"),
    ("\nContext: nothing before it", "refused"),
]


@pytest.fixture(scope="module")
def judged(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The evaluation of everything in WRITTEN, and of two rows that nobody can judge."""
    trained = Path(shutil.copytree(trained_once, tmp_path_factory.mktemp("judged") / "run"))
    rows = [held_out(n, columns={"kind": "good" if n < 3 else "bad", "n": n}) for n, _ in enumerate(WRITTEN)]
    rows += [
        held_out(90, answer="SELECT age FROM nowhere", columns={"kind": "good"}),
        held_out(91, context="people have ages", columns={"kind": "lost"}),
    ]
    write_rows(trained / "data" / "test.jsonl", rows)
    texts = [text for text, _ in WRITTEN] + [RIGHT, RIGHT]
    settings = {"max_rows": 100, "by": ["kind", "n"], "gate": {"min_score": 0.2, "min_gain": 0.5}}
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        answering(patch, [" SELECT 1"] * len(rows), [f" {RIGHT}"] + [""] * (len(rows) - 1), texts)
        with open_with(trained, **settings) as run:
            result = evaluate(run)
    written = journal.read_json(trained / "evaluation.json")
    return {"result": result, "rows": written.pop("rows"), "written": written, "said": said.getvalue()}


def test_every_kind_of_answer_gets_its_verdict(judged: dict[str, Any]) -> None:
    rows = judged["rows"]
    assert [row["answers"]["tuned"]["verdict"] for row in rows] == [v for _, v in WRITTEN] + ["unjudged"] * 2
    assert {row["answers"]["base"]["verdict"] for row in rows} == {"different", "unjudged"}
    # Cut at the first stop, without blanks: what is judged is what a user would get.
    assert rows[2]["answers"]["tuned"]["text"] == RIGHT
    assert [row["answers"]["tuned"]["exact"] for row in rows[:4]] == [True, False, True, False]
    assert "no such table: persons" in rows[6]["answers"]["tuned"]["detail"]
    assert "longer than" in rows[8]["answers"]["tuned"]["detail"]


def test_scores_leave_out_what_nobody_can_judge(judged: dict[str, Any]) -> None:
    base, shots, tuned = judged["result"]["scores"]
    count = len(WRITTEN)
    assert [base["name"], shots["name"], tuned["name"]] == ["base", "base, 2 examples", "tuned"]
    assert [entry["rows"] for entry in (base, shots, tuned)] == [count] * 3
    assert tuned["score"] == pytest.approx(3 / count)
    assert tuned["interval"] == pytest.approx(wilson(3, count))
    assert tuned["exact_match"] == pytest.approx(2 / count)
    assert tuned["ended"] == pytest.approx(math.ceil(count / 2) / count)
    assert (base["score"], shots["score"]) == pytest.approx((0.0, 1 / count))
    # The loss is the model's own, whatever it wrote.
    assert base["loss"] > tuned["loss"] > 0
    assert shots["loss"] is None
    assert judged["result"]["unjudged"] == 2
    assert "2 rows were left out: their own answer does not run" in judged["said"]


def test_the_gain_is_over_the_better_base(judged: dict[str, Any]) -> None:
    gain = judged["result"]["gain"]
    assert gain["over"] == "base, 2 examples"
    assert gain["value"] == pytest.approx(2 / len(WRITTEN))
    assert gain["interval"][0] <= gain["value"] <= gain["interval"][1]
    assert judged["result"]["gate"] == {
        "passed": False,
        "reasons": [f"gain {2 / len(WRITTEN):+.3f} is below evaluate.gate.min_gain 0.5"],
    }
    assert "gate: no – gain +0.133" in judged["said"]


def test_scores_are_broken_down(judged: dict[str, Any]) -> None:
    by = judged["result"]["scores"][-1]["by"]
    assert {k: tuple(v) for k, v in by["kind"].items()} == {"good": (1.0, 3), "bad": (0.0, len(WRITTEN) - 3)}
    assert by["n"].keys() == {str(n) for n in range(len(WRITTEN))}


def test_what_is_written_is_what_is_returned(judged: dict[str, Any]) -> None:
    assert judged["written"] == json.loads(json.dumps(judged["result"]))
    assert [row["number"] for row in judged["rows"]] == [*range(len(WRITTEN)), 90, 91]
    assert all(row["answers"].keys() == {"base", "base, 2 examples", "tuned"} for row in judged["rows"])
    for line in table(judged["result"]):
        assert line in judged["said"]


def test_a_model_that_knows_all_answers_gets_everything(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (trained / "data" / "test.jsonl").read_text().splitlines()][:6]
    right = [f" {row['answer']}" for row in rows]
    answering(monkeypatch, [""] * 6, [" SELECT 1"] * 6, right)
    with open_with(trained, gate={"min_score": 1.0, "min_gain": 1.0}) as run:
        result = evaluate(run)
    assert result["scores"][-1]["score"] == result["gain"]["value"] == result["scores"][-1]["exact_match"] == 1.0
    assert result["gate"] == {"passed": True, "reasons": []}


def test_exact_match_runs_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [held_out(n, context="no tables", answer=f"yes,  {n}") for n in range(3)]
    write_rows(trained / "data" / "test.jsonl", rows)
    monkeypatch.setattr(evaluation.database, "execution_match", None)
    answering(monkeypatch, ["yes"] * 3, ["yes"] * 3, [" yes, 0", " yes, 0", " Yes, 2"])
    with open_with(trained, metric="exact_match") as run:
        result = evaluate(run)
    verdicts = [row["answers"]["tuned"]["verdict"] for row in journal.read_json(run.evaluation_file)["rows"]]
    assert verdicts == ["equal", "different", "different"]
    assert (result["metric"], result["unjudged"]) == ("exact_match", 0)


def test_where_no_row_can_be_judged_the_gate_says_no(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(trained / "data" / "test.jsonl", [held_out(n, answer="SELECT age FROM nowhere") for n in range(2)])
    answering(monkeypatch, *[[RIGHT] * 2] * 3)
    with open_with(trained, gate={"min_score": 0.0, "min_gain": 0.0}) as run:
        result = evaluate(run)
    assert result["unjudged"] == 2
    assert not result["gate"]["passed"]
    assert "no row was judged" in result["gate"]["reasons"][0]
    assert "evaluate.metric: exact_match" in result["gate"]["reasons"][0]


# --- what the model is given ------------------------------------------------------------------


def test_the_examples_are_training_rows_and_never_held_out(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Generator] = []

    class Noted(Generator):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(evaluation, "Generator", Noted)
    with open_with(trained, few_shot=4) as run:
        evaluate(run)
    base, shots, tuned = made
    assert (base.prefix, tuned.prefix) == ([], [])
    text = shots.model.tokenizer.decode(shots.prefix)
    assert text.startswith("<bos>Question: ") and text.endswith("\n")
    assert text.count("Question: ") == text.count("\nContext: ") == text.count("\nAnswer: SELECT") == 4
    assert text.count("<bos>") == 1
    data = trained / "data"
    rows = {name: heldout.read(data / f"{name}.jsonl", 100) for name in ("test", "validation", "examples")}
    assert not any(row.question in text for row in rows["test"] + rows["validation"])
    assert all(row.question in text for row in rows["examples"][:4])


def test_a_prompt_that_is_too_long_is_a_wrong_answer(trained: Path) -> None:
    rows = [
        held_out(0, question="many " * 600),
        held_out(1, question="many " * 600, context="no table"),
        held_out(2),
    ]
    write_rows(trained / "data" / "test.jsonl", rows)
    with open_with(trained) as run:
        result = evaluate(run)
    rows = journal.read_json(run.evaluation_file)["rows"]
    for name in ("base", "base, 2 examples", "tuned"):
        assert rows[0]["answers"][name]["detail"] == "the prompt is longer than the model's context"
        assert [row["answers"][name]["verdict"] for row in rows[:2]] == ["error", "unjudged"]
    assert [entry["rows"] for entry in result["scores"]] == [2, 2, 2]


def test_few_shot_0_leaves_the_measurement_out(trained: Path) -> None:
    with open_with(trained, few_shot=0, max_rows=2) as run:
        result = evaluate(run)
    assert [entry["name"] for entry in result["scores"]] == ["base", "tuned"]
    assert [entry["rows"] for entry in result["scores"]] == [2, 2]


def test_twice_is_the_same(trained: Path) -> None:
    before = (trained / "evaluation.json").read_text()
    with open_with(trained) as run:
        evaluate(run)
    assert (trained / "evaluation.json").read_text() == before


@pytest.mark.parametrize("split", ["test", "validation"])
def test_without_held_out_rows_it_is_refused(trained: Path, split: str) -> None:
    (trained / "data" / f"{split}.jsonl").write_text("")
    with (
        open_with(trained, split=split) as run,
        pytest.raises(InputError, match=f"no held-out rows in the {split}") as e,
    ):
        evaluate(run)
    assert f"data.{split}_fraction" in e.value.fix


def test_without_an_adapter_it_is_refused(trained: Path) -> None:
    (trained / "adapter" / "adapter_model.safetensors").unlink()
    with open_with(trained) as run, pytest.raises(InputError, match="the run has no adapter yet"):
        evaluate(run)


def test_a_breakdown_by_a_column_that_no_row_has_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before the base is looked for.
    monkeypatch.setattr(evaluation.base, "resolve", None)
    with open_with(trained, by=["domain", "nosuch"]) as run, pytest.raises(InputError, match="no held-out row") as e:
        evaluate(run)
    assert e.value.where == "evaluate.by: nosuch"
    assert "domain" in e.value.fix
    write_rows(trained / "data" / "test.jsonl", [held_out(0, columns={})])
    with open_with(trained, by=["nosuch"]) as run, pytest.raises(InputError, match="no columns to break down by") as e:
        evaluate(run)
    assert e.value.fix == "remove evaluate.by"
