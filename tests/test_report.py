"""report: one HTML page that stands alone, whatever the rows say.

python -m pytest tests/test_report.py -v
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tuneship import journal
from tuneship.errors import InputError
from tuneship.report import HEIGHT, LEFT, WIDTH, _examples, _nice, loss_chart, render, report

VOID = {"meta", "line", "polyline", "br", "link", "img"}


class Page(HTMLParser):
    """A page's elements and visible text; refuses one that is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data + " "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(run: Path) -> Page:
    return Page(render(journal.read_run(run)))


def evaluation(run: Path, **changes: Any) -> dict[str, Any]:
    """Changes the run's evaluation.json."""
    content = journal.read_json(run / "evaluation.json") | changes
    (run / "evaluation.json").write_text(json.dumps(content))
    return content


def test_the_page_says_how_it_went(trained: Path) -> None:
    shown = page(trained)
    for text in ("tiny-test", "gate passed", "Base and tuned, measured alike", "By domain", "Before and after", "Loss"):
        assert text in shown.text
    assert "base, 2 examples" in shown.text
    assert "6 held-out rows of the test split" in shown.text
    assert "over 6 updates" in re.sub(r"\s+", " ", shown.text)
    assert journal.read_run(trained).provenance()["base"]["fingerprint"] in shown.text
    assert '"learning_rate": 0.01' in shown.text


def test_nothing_is_loaded_from_elsewhere(trained: Path) -> None:
    shown = page(trained)
    assert {name for name, _ in shown.elements} & {"script", "link", "img", "iframe", "object", "base", "form"} == set()
    for _, attributes in shown.elements:
        assert not {"src", "href", "action", "data"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    source = render(journal.read_run(trained))
    assert not re.search(r"url\(|@import|https?://", source)


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> \"'&amp;{{ 7*7 }}"


def test_what_rows_say_is_text(trained: Path) -> None:
    content = evaluation(trained)
    for row in content["rows"]:
        row["question"] = row["context"] = row["answer"] = EVIL
        for answer in row["answers"].values():
            answer["text"] = EVIL
    for score in content["scores"]:
        score["by"] = {EVIL: {EVIL: [0.5, 2]}}
    content["gate"] = {"passed": False, "reasons": [EVIL]}
    evaluation(trained, **content)
    journal.write_json(trained / "provenance.json", {"note": EVIL})
    shown = page(trained)
    assert not shown.of("script") and not shown.of("img")
    assert shown.text.count("<script>alert(1)</script>") > 10
    assert "{{ 7*7 }}" in shown.text


def test_the_gates_no_is_shown_with_its_reasons(trained: Path) -> None:
    evaluation(trained, gate={"passed": False, "reasons": ["score 0.1 is below"]}, unjudged=3)
    shown = page(trained)
    assert "gate: no" in shown.text and "Why the gate said no" in shown.text and "score 0.1 is below" in shown.text
    assert "3 more were left out" in shown.text


def test_without_an_evaluation(trained: Path) -> None:
    (trained / "evaluation.json").unlink()
    shown = page(trained)
    assert "Loss" in shown.text and "gate" not in shown.text and "Before and after" not in shown.text
    assert len(shown.of("polyline")) == 2


def test_without_metrics(trained: Path) -> None:
    (trained / "metrics.jsonl").unlink()
    shown = page(trained)
    assert "gate passed" in shown.text and "tokens/s" not in shown.text
    assert shown.of("svg") == []


def test_with_one_update(trained: Path) -> None:
    file = trained / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    assert page(trained).of("svg") == []


def test_with_nothing_there_is_nothing_to_report(trained: Path) -> None:
    (trained / "metrics.jsonl").unlink()
    (trained / "evaluation.json").unlink()
    with pytest.raises(InputError, match="there is nothing to report yet"):
        render(journal.read_run(trained))


def test_the_page_is_written_whole(trained: Path) -> None:
    run = journal.read_run(trained)
    assert report(run) == trained / "report.html"
    assert (trained / "report.html").read_text(encoding="utf-8") == render(run)


# --- the chart --------------------------------------------------------------------------------


def metrics(losses: list[float], first: int = 1) -> list[dict[str, Any]]:
    return [{"step": first + n, "loss": loss} for n, loss in enumerate(losses)]


def points(line: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.split()]  # type: ignore[misc]


def test_the_chart_is_to_scale() -> None:
    chart = loss_chart(metrics([4.0, 2.0, 1.0, 0.0]))
    drawn = points(chart.raw)
    assert [x for x, _ in drawn] == pytest.approx([LEFT, LEFT + 662 / 3, LEFT + 2 * 662 / 3, WIDTH - 12], abs=0.1)
    bottom, top = HEIGHT - 24, 10
    assert [y for _, y in drawn] == pytest.approx([top, (top + bottom) / 2, bottom - 46.5, bottom], abs=0.1)
    assert [label for _, label in chart.grid] == ["0", "1", "2", "3", "4"]
    assert [y for y, _ in chart.grid] == pytest.approx([bottom, bottom - 46.5, 103, 56.5, top], abs=0.1)


def test_the_curve_is_smoothed_over_a_twentieth() -> None:
    losses = [float(n % 2) for n in range(100)]
    chart = loss_chart(metrics(losses))
    assert len(points(chart.raw)) == len(points(chart.smooth)) == 100
    assert chart.last == pytest.approx(sum(losses[-5:]) / 5)


def test_validation_stands_where_it_was_measured() -> None:
    lines = metrics([4.0, 3.0, 2.0], first=11)
    lines[1]["validation_loss"] = 5.0
    chart = loss_chart(lines)
    ((x, y, value),) = chart.validation
    # Higher than every loss: the scale makes room for it.
    assert value == 5.0
    assert points(chart.raw)[1][0] == x
    assert 10 <= y < points(chart.raw)[0][1]
    assert [step for _, step in chart.ticks] == [11, 12, 13]


@pytest.mark.parametrize(
    ("value", "nice"),
    [(1.0, 1.0), (1.01, 2.0), (3.7, 4.0), (4.1, 8.0), (8.5, 10.0), (12, 20), (0.03, 0.04), (1e-5, 1e-5), (950, 1000)],
)
def test_the_scale_ends_at_a_round_number(value: float, nice: float) -> None:
    assert _nice(value) == pytest.approx(nice)


def test_a_loss_of_nothing_is_drawn_too() -> None:
    chart = loss_chart(metrics([0.0, 0.0]))
    assert [y for _, y in points(chart.raw)] == [HEIGHT - 24] * 2


# --- examples ---------------------------------------------------------------------------------


def rows(*verdicts: str) -> dict[str, Any]:
    return {"rows": [{"n": n, "answers": {"tuned": {"verdict": verdict}}} for n, verdict in enumerate(verdicts)]}


@pytest.mark.parametrize(
    ("right", "wrong", "shown"),
    [
        (100, 0, (8, 0)),
        (0, 100, (0, 8)),
        (99, 1, (7, 1)),
        (50, 50, (4, 4)),
        (2, 98, (0, 8)),
        (3, 1, (3, 1)),
        (0, 0, (0, 0)),
    ],
)
def test_examples_are_shown_in_their_true_proportion(right: int, wrong: int, shown: tuple[int, int]) -> None:
    chosen = _examples(rows(*["equal"] * right, *["different"] * wrong))
    verdicts = [row["answers"]["tuned"]["verdict"] for row in chosen]
    assert (verdicts.count("equal"), verdicts.count("different")) == shown
    assert len({row["n"] for row in chosen}) == len(chosen)
