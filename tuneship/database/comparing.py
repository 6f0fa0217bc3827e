"""Whether two queries are the same query: whether they return the same rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tuneship.database.bounds import Result, SqlError, Value, run
from tuneship.database.filling import fill
from tuneship.errors import InputError

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Verdict:
    """Whether a predicted query does what the right one does, and if not, how it failed."""

    kind: Literal["equal", "different", "error", "timeout", "refused"]
    detail: str = ""

    @property
    def equal(self) -> bool:
        """Whether the two returned the same rows on every database."""
        return self.kind == "equal"


def execution_match(context: str, gold: str, predicted: str) -> Verdict:
    """Whether two queries return the same rows on differently filled databases.

    Rows count as a multiset, or in order where the right query orders them. Where the right query
    returns nothing on every database (so that any empty answer would pass), the text decides.

    Raises:
        InputError: the context or the right query does not run.
    """
    tried = 0
    for seed in range(4 * len(SEEDS)):
        with fill(context, gold, seed=seed) as db:
            try:
                expected = run(db, gold)
            except SqlError as error:
                raise InputError(f"the right answer does not run: {error.what}", where=gold) from error
            try:
                actual = run(db, predicted)
            except SqlError as error:
                return Verdict(error.kind, error.what)
        if not same_rows(expected, actual, ordered=orders(gold)):
            return Verdict("different")
        tried += is_telling(expected)
        if tried == len(SEEDS):
            return Verdict("equal")
    return Verdict("equal" if tried or _words(gold) == _words(predicted) else "different")


def is_telling(result: Result) -> bool:
    """Whether a result says something: there are rows, and not only NULLs."""
    return any(value is not None for row in result.rows for value in row)


def same_rows(a: Result, b: Result, *, ordered: bool) -> bool:
    """Whether two results are the same rows; column names do not matter, their order does."""
    if len(a.columns) != len(b.columns) or len(a.rows) != len(b.rows):
        return False
    left, right = ([tuple(map(_comparable, row)) for row in result.rows] for result in (a, b))
    return left == right if ordered else Counter(left) == Counter(right)


def orders(sql: str) -> bool:
    """Whether a query orders its result at the top level."""
    bare = re.sub(r"'[^']*'", "''", sql)
    while (inner := re.sub(r"\([^()]*\)", " ", bare)) != bare:
        bare = inner
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def _comparable(value: Value) -> object:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return value


def _words(sql: str) -> list[str]:
    """The words and signs of a query; only texts keep their case."""
    found = re.findall(r"'(?:[^']|'')*'|\w+|[^\w\s;]", sql)
    return [word if word.startswith("'") else word.lower() for word in found]
