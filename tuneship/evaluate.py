"""evaluate: base and tuned, measured the same way on rows that neither was trained on.

Three measurements: the base with the recipe's prompt, the base with a few examples in front (what
a user would try before tuning), and the tuned model. Each answers greedily, ends where the prompt
contract says, and is scored by running its SQL (`tuneship.database`) or by exact match. The gate
compares the tuned model with the better of the two base measurements.

Written to evaluation.json: scores with 95 % confidence intervals, broken down by `evaluate.by`,
and every answer, so that a reader can check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tuneship import base, database, prompt
from tuneship import model as models
from tuneship.console import progress, say
from tuneship.damage import remake
from tuneship.data import heldout
from tuneship.data.heldout import HeldOut
from tuneship.errors import InputError, Stopped
from tuneship.generation import Completion, Generator, Request, complete
from tuneship.journal import PROVENANCE, Run, judge, write_json
from tuneship.kernels import cpu
from tuneship.loss import held_out_loss
from tuneship.model import LoadedModel
from tuneship.prompt import Prompt
from tuneship.recipe import Evaluate
from tuneship.signals import StopFlag, stop_flag

# Of a two-sided 95 % interval of the normal distribution.
_Z = 1.959964
_RESAMPLES = 2000


@dataclass(frozen=True)
class Answer:
    """One system's answer to one row."""

    text: str
    verdict: str
    """`equal`, or how it failed: different, error, timeout, refused, or unjudged (the row itself does not run)."""
    detail: str
    exact: bool
    """Whether it is the right answer to the letter, blanks aside."""
    ended: bool
    """Whether the model ended the answer by itself."""
    tokens: int


@dataclass(frozen=True)
class Score:
    """How one system did."""

    name: str
    score: float
    """Share of rows that are right, by the recipe's metric."""
    interval: tuple[float, float]
    """95 %, Wilson."""
    exact_match: float
    ended: float
    """Share of answers that the model ended by itself."""
    loss: float | None
    """Mean cross-entropy a label on the same rows, with the recipe's prompt."""
    rows: int
    by: dict[str, dict[str, tuple[float, int]]]
    """Column → value → (score, rows)."""


def evaluate(run: Run) -> dict[str, Any]:
    """Measures base and tuned, and writes evaluation.json; returns what it holds, without the answers.

    The gate's word is in it: `gate.passed`, and `gate.reasons` if not.

    Raises:
        InputError: there is no adapter, the base is not the one that it was trained on, no row was held out, or
            evaluate.by names a column that no row has.
        Stopped: a signal came; nothing was written.
    """
    if not (run.adapter / models.WEIGHTS).exists():
        raise InputError("the run has no adapter yet", where=str(run.path), fix="tuneship train RECIPE")
    recipe = run.recipe
    rows = heldout.read(run.data / f"{recipe.evaluate.split}.jsonl", recipe.evaluate.max_rows)
    if not rows:
        raise InputError(
            f"there are no held-out rows in the {recipe.evaluate.split} split",
            where=str(run.path),
            fix=f"raise data.{recipe.evaluate.split}_fraction, or bring more rows",
        )
    examples = heldout.read(run.data / "examples.jsonl", recipe.evaluate.few_shot) if recipe.evaluate.few_shot else []
    _check_columns(recipe.evaluate.by, rows)
    base.check_weights(run.adapter, fix=remake(run.adapter / PROVENANCE))
    files = base.resolve(recipe.model)
    files.expect(run.trained_on(), "the adapter was trained")
    cpu.keep_memory()
    contract = Prompt(recipe.data.template, recipe.data.stop)
    model = models.load(files, recipe.model.precision)
    tokens = heldout.tokenise(rows, contract, model.tokenizer)

    def loss() -> float:
        return held_out_loss(model, tokens, tokens_per_batch=recipe.train.tokens_per_batch)

    answers: dict[str, list[Answer]] = {}
    losses: dict[str, float | None] = {}
    with stop_flag() as stop:
        answers["base"] = _measure(model, "base", rows, contract, recipe.evaluate, stop)
        losses["base"] = loss()
        if recipe.evaluate.few_shot:
            name = f"base, {len(examples)} examples"
            answers[name] = _measure(model, name, rows, contract, recipe.evaluate, stop, examples)
            losses[name] = None
        models.load_adapter(model, run.adapter)
        prompt.verify(run.adapter, model.tokenizer)
        answers["tuned"] = _measure(model, "tuned", rows, contract, recipe.evaluate, stop)
        losses["tuned"] = loss()

    scores = [_score(name, given, rows, losses[name], recipe.evaluate) for name, given in answers.items()]
    result = _result(scores, answers, recipe.evaluate)
    lines = [
        {
            "number": row.number,
            **row.fields,
            "columns": row.columns,
            "answers": {n: asdict(a[i]) for n, a in answers.items()},
        }
        for i, row in enumerate(rows)
    ]
    write_json(run.evaluation_file, {**result, "rows": lines})
    for line in table(result):
        say(line)
    return result


def table(result: dict[str, Any]) -> list[str]:
    """The scores as lines for a person."""
    width = max(len(score["name"]) for score in result["scores"])
    head = f"{'':{width}}  {result['metric'].replace('_', ' '):>18}   95 % interval   exact   ended    loss"
    lines = [head]
    for score in result["scores"]:
        low, high = score["interval"]
        loss = "     –" if score["loss"] is None else f"{score['loss']:6.3f}"
        lines.append(
            f"{score['name']:{width}}  {score['score']:18.1%}   {low:5.1%} – {high:5.1%}   {score['exact_match']:5.1%}"
            f"  {score['ended']:6.1%}  {loss}"
        )
    gain = result["gain"]
    lines.append(
        f"gain over the better base: {gain['value']:+.1%} ({gain['interval'][0]:+.1%} to {gain['interval'][1]:+.1%})"
    )
    if result["unjudged"]:
        lines.append(f"{result['unjudged']} rows were left out: their own answer does not run")
    lines.append("gate: passed" if result["gate"]["passed"] else "gate: no – " + "; ".join(result["gate"]["reasons"]))
    return lines


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, _Z * _Z / total
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def _check_columns(by: Sequence[str], rows: Sequence[HeldOut]) -> None:
    """Refuses a breakdown by a column that no row has, before a model is read."""
    # Long texts are not among them: prepare keeps what scores can be broken down by.
    known = sorted({column for row in rows for column in row.columns})
    if unknown := [column for column in by if column not in known]:
        raise InputError(
            "no held-out row has such a column" if known else "the held-out rows have no columns to break down by",
            where=f"evaluate.by: {unknown[0]}",
            fix=f"the columns are: {', '.join(known)}" if known else "remove evaluate.by",
        )


def _measure(
    model: LoadedModel,
    name: str,
    rows: Sequence[HeldOut],
    contract: Prompt,
    settings: Evaluate,
    stop: StopFlag,
    examples: Sequence[HeldOut] = (),
) -> list[Answer]:
    judge = _by_execution if settings.metric == "execution_accuracy" else _by_text
    prefix_text = "".join(f"{contract.render(e.fields)}{contract.completion(e.answer)}\n" for e in examples)
    prefix = prompt.encode(model.tokenizer, [prefix_text], start=True)[0] if examples else []
    prompts = prompt.encode(model.tokenizer, [contract.render(row.fields) for row in rows], start=not examples)
    room = model.context_length - len(prefix) - settings.max_new_tokens
    short = [index for index, ids in enumerate(prompts) if len(ids) <= room]
    longest = max((len(prompts[index]) for index in short), default=0)
    length = len(prefix) + longest + settings.max_new_tokens
    generator = Generator(
        model, slots=min(settings.per_device_eval_batch_size, len(rows)), length=length, prefix=prefix
    )
    requests = [Request(prompts[index], settings.max_new_tokens, stop=contract.stop) for index in short]

    done: dict[int, Completion] = {}
    with progress(f"evaluate: {name}", len(rows)) as shown:
        for at, completion in complete(generator, requests):
            done[short[at]] = completion
            shown.advance()
            if stop:
                raise Stopped(f"stopped by {stop.signal}; nothing was written", fix="run the same command again")
    return [_answer(row, done.get(index), contract, judge) for index, row in enumerate(rows)]


def _answer(
    row: HeldOut, completion: Completion | None, contract: Prompt, judge: Callable[[HeldOut, str], tuple[str, str]]
) -> Answer:
    if completion is None:
        # Judged all the same: a row that cannot be judged is left out for every system.
        verdict, detail = judge(row, "")
        if verdict != "unjudged":
            verdict, detail = "error", "the prompt is longer than the model's context"
        return Answer("", verdict, detail, False, False, 0)
    text = contract.answer(completion.text)
    verdict, detail = judge(row, text)
    exact = text.split() == row.answer.split()
    return Answer(text, verdict, detail, exact, completion.ended_itself, len(completion.tokens))


def _by_execution(row: HeldOut, text: str) -> tuple[str, str]:
    try:
        verdict = database.execution_match(row.context, row.answer, text)
    except InputError as error:
        # The row's own answer or schema does not run on SQLite: nothing can be said about it.
        return "unjudged", error.what
    return verdict.kind, verdict.detail


def _by_text(row: HeldOut, text: str) -> tuple[str, str]:
    return ("equal" if text.split() == row.answer.split() else "different"), ""


def _score(name: str, answers: list[Answer], rows: Sequence[HeldOut], loss: float | None, settings: Evaluate) -> Score:
    judged = [(row, answer) for row, answer in zip(rows, answers, strict=True) if answer.verdict != "unjudged"]
    right = sum(answer.verdict == "equal" for _, answer in judged)
    by: dict[str, dict[str, tuple[float, int]]] = {}
    for column in settings.by:
        groups: dict[str, list[bool]] = {}
        for row, answer in judged:
            groups.setdefault(str(row.columns.get(column, "–")), []).append(answer.verdict == "equal")
        by[column] = {value: (sum(hits) / len(hits), len(hits)) for value, hits in sorted(groups.items())}
    total = max(1, len(judged))
    return Score(
        name,
        right / total,
        wilson(right, len(judged)),
        sum(answer.exact for _, answer in judged) / total,
        sum(answer.ended for _, answer in judged) / total,
        loss,
        len(judged),
        by,
    )


def _result(scores: list[Score], answers: dict[str, list[Answer]], settings: Evaluate) -> dict[str, Any]:
    *bases, tuned = scores
    better = max(bases, key=lambda score: score.score)
    gain = tuned.score - better.score
    hits = [
        (t.verdict == "equal") - (b.verdict == "equal")
        for t, b in zip(answers["tuned"], answers[better.name], strict=True)
        if t.verdict != "unjudged"
    ]
    return {
        "metric": settings.metric,
        "split": settings.split,
        "scores": [asdict(score) for score in scores],
        "gain": {"over": better.name, "value": gain, "interval": _bootstrap(hits)},
        "unjudged": sum(answer.verdict == "unjudged" for answer in answers["tuned"]),
        "gate": judge(tuned.score, gain, tuned.rows, settings.gate),
    }


def _bootstrap(differences: Sequence[int]) -> tuple[float, float]:
    """95 % interval of a mean of paired differences, by resampling rows; seeded, so always the same."""
    if not differences:
        return (0.0, 0.0)
    rng = np.random.default_rng(0)
    values = np.array(differences)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
