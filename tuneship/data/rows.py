"""Good rows: each one checked, told apart from its duplicates, and given to its split.

A row goes to its split by a hash, never by its place: held-out rows stay held out when rows are
added, removed or reordered. With `data.split_by`, rows that share a value of that column stay
together, so that (say) no schema of the test rows was trained on.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tuneship.data import sources
from tuneship.data.sources import Broken, RawRow
from tuneship.errors import InputError
from tuneship.prompt import FIELDS
from tuneship.recipe import Data

Split = Literal["train", "validation", "test"]

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One good row."""

    number: int
    """Line or index in its source, from 1."""
    question: str
    context: str
    answer: str
    split: Split
    key: int
    """64-bit hash of the row's question and context: its place in any choice among rows."""
    columns: dict[str, Any]
    """The source's row, for breaking scores down."""

    @property
    def fields(self) -> dict[str, str]:
        """The template's fields."""
        return {"question": self.question, "context": self.context, "answer": self.answer}


@dataclass
class Tally:
    """What reading the rows has shown. Complete once `read` is exhausted."""

    splits: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)
    """The bad rows: (number, reason)."""
    duplicates: int = 0
    duplicate_examples: list[int] = field(default_factory=list)
    seen: int = 0

    @property
    def good(self) -> int:
        """Rows kept."""
        return sum(self.splits.values())


def read(data: Data, tally: Tally, on_bad: Callable[[int, str, RawRow], None] | None = None) -> Iterator[Row]:
    """The good rows of a source, without repeated ones, up to `data.dataset_limit` training rows.

    Args:
        tally: filled while reading.
        on_bad: called with each bad row, where `data.on_bad_row` is skip.

    Raises:
        InputError: naming the first bad rows; or that there are none that are good, all are
            duplicates, too many are bad, or a split stays empty.
    """
    known: set[int] = set()
    where = data.dataset_name
    for number, raw in sources.read(data):
        tally.seen += 1
        row = raw.reason if isinstance(raw, Broken) else _check(number, raw, data)
        if isinstance(row, str):
            tally.bad.append((number, row))
            if data.on_bad_row == "error" and len(tally.bad) == SHOWN:
                raise _bad_rows(tally, where)
            if on_bad is not None and data.on_bad_row == "skip":
                on_bad(number, row, raw)
            continue
        identity = _hash(f"{row.key:x}\0{row.answer}")
        if identity in known:
            tally.duplicates += 1
            if len(tally.duplicate_examples) < SHOWN:
                tally.duplicate_examples.append(number)
            continue
        known.add(identity)
        if row.split == "train" and data.dataset_limit is not None and tally.splits["train"] >= data.dataset_limit:
            if _enough(tally, data):
                break
            continue
        tally.splits[row.split] += 1
        yield row
    _judge(tally, data, where)


def _enough(tally: Tally, data: Data) -> bool:
    """Whether held-out rows are as many as their share of the training rows asks for."""
    share = 1 - data.test_fraction - data.validation_fraction
    wanted = tally.splits["train"] / share
    return (
        tally.splits["test"] >= wanted * data.test_fraction
        and tally.splits["validation"] >= wanted * data.validation_fraction
    )


def _judge(tally: Tally, data: Data, where: str) -> None:
    if tally.seen == 0:
        raise InputError("there are no rows", where=where)
    if tally.bad and data.on_bad_row == "error":
        raise _bad_rows(tally, where)
    if len(tally.bad) > data.max_bad_fraction * tally.seen:
        raise InputError(
            f"{len(tally.bad)} of {tally.seen} rows are bad, "
            f"more than data.max_bad_fraction {data.max_bad_fraction:g}; row {tally.bad[0][0]}: {tally.bad[0][1]}",
            where=where,
            fix="mend the rows, or raise data.max_bad_fraction",
        )
    if tally.good == 1 and tally.duplicates:
        raise InputError(f"all {tally.seen} rows are the same", where=where)
    if tally.splits["train"] == 0:
        raise InputError(
            f"none of the {tally.good} rows falls into the training split",
            where=where,
            fix="bring more rows, or lower data.test_fraction and data.validation_fraction",
        )


def _bad_rows(tally: Tally, where: str) -> InputError:
    shown = "\n".join(f"    row {number}: {reason}" for number, reason in tally.bad[:SHOWN])
    more = " (and perhaps more)" if len(tally.bad) >= SHOWN else ""
    return InputError(
        f"{len(tally.bad)} bad row{'s' if len(tally.bad) > 1 else ''}{more}:\n{shown}",
        where=where,
        fix="mend the rows, or set data.on_bad_row: skip to leave out up to data.max_bad_fraction of them",
    )


def _check(number: int, raw: dict[str, Any], data: Data) -> Row | str:
    """A good row, or what is wrong with it."""
    texts: list[str] = []
    for name in FIELDS:
        column = getattr(data.columns, name)
        if name not in ("question", "answer") and f"{{{name}}}" not in data.template:
            texts.append("")
            continue
        value = raw.get(column)
        if not isinstance(value, str):
            return _missing(column, name, raw)
        if not value.strip() and name != "context":
            return f"{column} is empty"
        texts.append(value)
    question, context, answer = texts
    if sum(map(len, texts)) > sources.MAX_ROW_BYTES:
        return f"longer than {sources.MAX_ROW_BYTES} characters"
    group = f"{question}\0{context}"
    owner = raw.get(data.split_by) if data.split_by is not None else None
    if data.split_by is not None and not isinstance(owner, str | int):
        return _missing(data.split_by, "split_by", raw)
    try:
        key = _hash(group)
        place = key if owner is None else _hash(str(owner))
        answer.encode()
    except UnicodeEncodeError:
        return "not UTF-8: it holds bytes or half characters that are no text"
    return Row(number, question, context, answer, _split(place / 2**64, data), key, raw)


def _missing(column: str, name: str, raw: dict[str, Any]) -> str:
    if column in raw:
        value = raw[column]
        return f"{column} is null" if value is None else f"{column} is {type(value).__name__}, not text"
    near = difflib.get_close_matches(column, [key for key in raw if isinstance(key, str)], n=1)
    there = ", ".join(map(str, list(raw)[:8])) or "nothing"
    setting = "data.split_by" if name == "split_by" else f"data.columns.{name}"
    hint = f"; set {setting}: {near[0]}?" if near else f"; the row has {there} (set {setting})"
    return f"{column} is missing{hint}"


def _split(place: float, data: Data) -> Split:
    if place < data.test_fraction:
        return "test"
    return "validation" if place < data.test_fraction + data.validation_fraction else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
