"""report: the run as one HTML page that needs nothing else: no script, no font, no network.

The same page is the laptop's report.html and the flow's Metaflow card. It shows what a person asks
first: did tuning help, by how much, did the loss settle, what do answers look like before and
after, and where did it all come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tuneship.damage import guarded
from tuneship.errors import InputError, OutsideError
from tuneship.journal import Run, write_text

EXAMPLES = 8
# The chart's drawing area, in SVG units.
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 220, 46, 24


def report(run: Run) -> Path:
    """Writes the run's report.html; returns its path.

    Raises:
        InputError: the run has neither trained nor been evaluated, or a file of it is damaged.
        OutsideError: the page cannot be written.
    """
    page = render(run)
    try:
        write_text(run.report_file, page)
    except OSError as error:
        raise OutsideError(
            f"the page cannot be written: {error.strerror}",
            where=str(run.report_file),
            fix="free some room, or see whose folder it is",
        ) from error
    return run.report_file


def render(run: Run) -> str:
    """The page as text."""
    metrics = run.metrics()
    evaluation = run.evaluation()
    if not metrics and not evaluation:
        raise InputError("there is nothing to report yet", where=str(run.path), fix="tuneship train RECIPE")
    with guarded(run.metrics_file):
        chart = loss_chart(metrics) if len(metrics) > 1 else None
        tokens, seconds = (sum(line[key] for line in metrics) for key in ("tokens", "seconds"))
    with guarded(run.evaluation_file):
        breakdown = _breakdown(evaluation) if evaluation else {}
        examples = _examples(evaluation) if evaluation else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    return environment.get_template("report.html.j2").render(
        recipe=run.recipe,
        run=str(run.path),
        metrics=metrics,
        chart=chart,
        evaluation=evaluation or None,
        breakdown=breakdown,
        examples=examples,
        provenance=run.provenance(),
        settings=run.recipe.model_dump(mode="json", include={"lora", "train"}),
        tokens=tokens,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Chart:
    """The loss curve as SVG coordinates."""

    raw: str
    smooth: str
    validation: list[tuple[float, float, float]]
    """(x, y, value)"""
    grid: list[tuple[float, str]]
    """(y, label)"""
    ticks: list[tuple[float, int]]
    """(x, update)"""
    last: float


def loss_chart(metrics: Sequence[dict[str, Any]]) -> Chart:
    """The loss of every update, and its moving average over a twentieth of the run."""
    steps: list[int] = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    validation = [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]
    window = max(1, len(losses) // 20)
    smooth = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - window + 1) : i + 1])]
    top = _nice(max([*losses, *(value for _, value in validation)]))

    def x(step: int) -> float:
        return LEFT + (step - steps[0]) / max(1, steps[-1] - steps[0]) * (WIDTH - LEFT - 12)

    def y(loss: float) -> float:
        return 10 + (1 - loss / top) * (HEIGHT - BOTTOM - 10)

    def line(values: Sequence[float]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))

    return Chart(
        raw=line(losses),
        smooth=line(smooth),
        validation=[(round(x(step), 1), round(y(value), 1), value) for step, value in validation],
        grid=[(round(y(top * k / 4), 1), f"{top * k / 4:.3g}") for k in range(5)],
        ticks=[(round(x(step), 1), step) for step in _ticks(steps)],
        last=smooth[-1],
    )


def _nice(value: float) -> float:
    """The next round number above a value: 1, 2, 4 or 8 times a power of ten; 1 above 0."""
    if value <= 0:
        return 1.0
    scale: float = 10.0 ** len(str(int(value)))
    while scale / 10 > value:
        scale /= 10
    return min(scale * part for part in (0.1, 0.2, 0.4, 0.8, 1.0) if scale * part >= value)


def _ticks(steps: Sequence[int]) -> list[int]:
    return sorted({steps[round(k * (len(steps) - 1) / 5)] for k in range(6)})


def _breakdown(evaluation: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Column → its values with the scores of the better base and of tuned."""
    by_name = {score["name"]: score["by"] for score in evaluation["scores"]}
    base, tuned = by_name[evaluation["gain"]["over"]], by_name["tuned"]
    return {
        column: [
            {"value": value, "rows": rows, "tuned": share, "base": base[column][value][0]}
            for value, (share, rows) in sorted(values.items(), key=lambda item: -item[1][0])
        ]
        for column, values in tuned.items()
    }


def _examples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows to show: right ones and wrong ones in their true proportion, at least one of each if there are."""
    rows = evaluation["rows"]
    right = [row for row in rows if row["answers"]["tuned"]["verdict"] == "equal"]
    wrong = [row for row in rows if row["answers"]["tuned"]["verdict"] != "equal"]
    share = round(EXAMPLES * len(wrong) / max(1, len(rows)))
    failures = min(len(wrong), max(1 if wrong else 0, share))
    return _spread(right, EXAMPLES - failures) + _spread(wrong, failures)


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Rows evenly spaced over a list."""
    count = min(count, len(rows))
    return [rows[k * len(rows) // count] for k in range(count)]
