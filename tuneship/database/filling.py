"""A small database of a context's tables, with rows that a query's filters part."""

from __future__ import annotations

import math
import random
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TypeVar

from tuneship.database.bounds import MAX_SQL, MAX_TEXT, STEPS, limit_heap
from tuneship.errors import InputError

T = TypeVar("T")

FILL_SECONDS = 5.0
_ROWS = 60
# How often each of a column's repeated values stands in its 60 rows: all different, so that
# "the most frequent" is one value and a HAVING threshold parts the groups.
_SHARES = (22, 14, 10, 7, 5, 2)
# What CREATE TABLE needs. No SELECT: it could run for ever.
_CREATE = frozenset(
    {
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_REINDEX,
    }
)


@contextmanager
def fill(context: str, answer: str, *, seed: int) -> Iterator[sqlite3.Connection]:
    """An in-memory database of the context's tables, with rows that the answer's filters part.

    Args:
        context: CREATE TABLE statements, separated by semicolons.
        answer: a query on them; only its literals and keys are read. May be empty.

    Raises:
        InputError: the context is not CREATE TABLE statements, or its tables take no rows.
    """
    db = sqlite3.connect(":memory:")
    deadline = time.monotonic() + FILL_SECONDS
    try:
        limit_heap(db)
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT)
        db.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
        try:
            db.set_authorizer(_authorise_create)
            db.executescript(context)
            db.set_authorizer(None)
            _insert(db, answer[:MAX_SQL], random.Random(seed))  # noqa: S311 - test data
        except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError) as error:
            raise InputError(
                f"the context is not CREATE TABLE statements: {error or 'out of memory'}", where=f"{context:.200}"
            ) from None
        db.commit()
        db.execute("PRAGMA query_only=ON")
        db.set_progress_handler(None, 0)
        yield db
    finally:
        db.close()


def tables(db: sqlite3.Connection) -> dict[str, list[tuple[str, str]]]:
    """The tables of a database: name → (column, declared type)."""
    # SQLite's own tables are named sqlite_…, and no others may be.
    found = db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid"
    )
    names = [row[0] for row in found]
    return {name: [(c[1], c[2].upper()) for c in db.execute(f"PRAGMA table_info({_quoted(name)})")] for name in names}


def _authorise_create(action: int, first: str | None, *_: object) -> int:
    if action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE):
        # CREATE TABLE writes to the catalogue.
        return sqlite3.SQLITE_OK if first in ("sqlite_master", "sqlite_sequence") else sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _CREATE else sqlite3.SQLITE_DENY


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|\d+(?:\.\d+)?|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?|[^\s\w]")
_KEYWORDS = frozenset(
    """
    select from where and or not in between like is null group by having order limit as on join inner left outer
    distinct count sum avg min max asc desc case when then else end union all exists offset cast round
    """.split()
)
_WORDS = """
    amber birch cedar delta ember fable grove heron ivory jade kestrel lumen maple north ocean pearl quartz raven
    slate tulip umber vivid willow xenon yarrow zephyr
    """.split()


@dataclass
class _Hints:
    """What a query says about a column."""

    literals: list[str]
    null: bool = False
    repeated: bool = False
    distinct: bool = False


def _insert(db: sqlite3.Connection, answer: str, rng: random.Random) -> None:
    schema = tables(db)
    hints, keys = _read_hints(answer, schema)
    for table, columns in schema.items():
        values = []
        own = _own_key(table, schema)
        for column, kind in columns:
            hint = hints.get((table.lower(), column.lower()), _Hints([]))
            key = (table.lower(), column.lower()) in keys or _is_key(column)
            values.append(_column(column.lower(), kind, hint, key, column == own, rng))
        marks = ", ".join("?" * len(columns))
        # OR IGNORE: a UNIQUE or CHECK constraint of the context may refuse a row.
        insert = f"INSERT OR IGNORE INTO {_quoted(table)} VALUES ({marks})"  # noqa: S608 - the name is quoted
        db.executemany(insert, zip(*values, strict=True))


def _read_hints(
    answer: str, schema: dict[str, list[tuple[str, str]]]
) -> tuple[dict[tuple[str, str], _Hints], set[tuple[str, str]]]:
    """Hints by (table, column), and the columns that the query joins on."""
    owners: dict[str, list[tuple[str, str]]] = {}
    for table, columns in schema.items():
        for column, _ in columns:
            place = (table.lower(), column.lower())
            owners.setdefault(column.lower(), []).append(place)
            owners.setdefault(f"{table.lower()}.{column.lower()}", []).append(place)
    aliases = {a.lower(): t.lower() for t, a in re.findall(r"(?:FROM|JOIN)\s+(\w+)\s+(?:AS\s+)?(\w+)", answer, re.I)}
    hints: dict[tuple[str, str], _Hints] = {}
    keys: set[tuple[str, str]] = set()
    last: list[tuple[str, str]] = []
    clause, previous = "", ""
    for token in _TOKEN.findall(answer):
        word = token.lower()
        if word in ("where", "having", "order", "group", "select", "from", "on", "distinct", "limit"):
            clause = word
        if word == "limit":
            last = []
        if "." in word and not word[0].isdigit():
            prefix, _, column = word.partition(".")
            word = f"{aliases.get(prefix, prefix)}.{column}"
        if word in owners and word not in _KEYWORDS:
            if previous == "=":
                # column = column: a join.
                keys.update(last, owners[word])
            last = owners[word]
            for place in last:
                hint = hints.setdefault(place, _Hints([]))
                hint.distinct |= clause == "order"
                hint.repeated |= clause in ("group", "distinct")
        elif word[0] in "'\"" or word[0].isdigit():
            text = token[1:-1].replace("''", "'") if word[0] in "'\"" else token
            for place in last:
                hints.setdefault(place, _Hints([])).literals.append(text)
        elif word == "null":
            for place in last:
                hints.setdefault(place, _Hints([])).null = True
        previous = word
    return hints, keys


def _is_key(column: str) -> bool:
    return column.lower() in ("id", "code", "number") or column.lower().endswith(("_id", "_code"))


def _own_key(table: str, schema: dict[str, list[tuple[str, str]]]) -> str | None:
    """The key column whose values differ from row to row; the table's other keys refer to others.

    `officer_id` belongs to `police_officers`, or to `officer_ranks`, by its name, and not to `fines`; `id` belongs to
    its table; and so does a first key that no other table claims.
    """
    keys = {name: [column for column, _ in columns if _is_key(column)] for name, columns in schema.items()}
    claims = {(name, column) for name, some in keys.items() for column in some if _names(name, column)}
    for column in {column for some in keys.values() for column in some} - {column for _, column in claims}:
        stem = re.sub(r"_(id|code)$", "", column.lower())
        holders = [name for name, some in keys.items() if column in some and stem in name.lower()]
        claims |= {(name, column) for name in holders[:1]}
    if mine := [column for column in keys[table] if (table, column) in claims]:
        return mine[0]
    if plain := [column for column in keys[table] if column.lower() in ("id", "code", "number")]:
        return plain[0]
    claimed = {column for _, column in claims}
    return next((column for column in keys[table] if column not in claimed), None)


def _names(table: str, column: str) -> bool:
    stem = re.sub(r"_(id|code)$", "", column.lower())
    name = table.lower()
    return name.endswith((stem, f"{stem}s", f"{stem}es", f"{stem.removesuffix('y')}ies"))


def _column(
    name: str, kind: str, hint: _Hints, key: bool, owner: bool, rng: random.Random
) -> Sequence[int | float | str | None]:
    """The values of one column."""
    numeric = "INT" in kind or any(word in kind for word in ("REAL", "FLOA", "DOUB", "DEC", "NUM"))
    values: list[int | float | str | None]
    if key and not hint.literals:
        plain: list[int] = list(range(1, _ROWS + 1)) if owner else _shared(list(range(1, 15)), rng)
        if owner:
            rng.shuffle(plain)
        values = list(plain) if numeric else [f"K{value:02d}" for value in plain]
    else:
        special = _around(hint.literals, numeric=numeric, integer="INT" in kind)
        fresh = _fresh(name, kind, numeric, special, rng)
        if hint.repeated or not (numeric or hint.distinct or "date" in name or "DATE" in kind):
            values = _nullable(_shared((special + fresh)[: max(len(_SHARES), len(special))], rng))
        elif hint.distinct:
            # Ordered by: without ties, so that the order is one.
            values = _nullable(dict.fromkeys(special + fresh))[:_ROWS]
        else:
            repeats = [value for value in special for _ in range(4)][: _ROWS * 2 // 3]
            values = _nullable(repeats + fresh)[:_ROWS]
        rng.shuffle(values)
    if hint.null:
        for index in rng.sample(range(_ROWS), _ROWS // 3):
            values[index] = None
    return values


def _nullable(values: Iterable[int | float | str]) -> list[int | float | str | None]:
    return list(values)


def _shared(pool: Sequence[T], rng: random.Random) -> list[T]:
    """A column of few values, each another number of times."""
    pool = list(pool)
    rng.shuffle(pool)
    shares = list(_SHARES)
    while len(shares) < len(pool):
        # A longer pool takes single rows from the largest shares.
        shares[shares.index(max(shares))] -= 1
        shares.append(1)
    values = [value for value, share in zip(pool, shares, strict=False) for _ in range(share)]
    values += pool[:1] * (_ROWS - len(values))
    rng.shuffle(values)
    return values


def _around(literals: Sequence[str], *, numeric: bool, integer: bool) -> list[int | float | str]:
    """The literals of a query and their neighbours: what a wrong comparison would get wrong."""
    found: list[int | float | str] = []
    for text in dict.fromkeys(literals):
        number, day = _number(text), _day(text)
        if number is not None and (numeric or not found):
            steps = (0, 1, -1) if number.is_integer() else (0, 0.5, -0.5)
            values = [number + step for step in steps]
            near = [int(v) if integer or v.is_integer() else round(v, 4) for v in values]
            # In a column of text, 007 is not 7.
            found += near if numeric else [text, *map(str, near)]
        elif day is not None:
            found += [(day + timedelta(days=shift)).isoformat() for shift in (0, 1, -1)]
        elif "%" in text or "_" in text:
            core = text.replace("%", "").replace("_", "x")
            found += [core, f"{core}ton", f"Old{core}", f"Old{core}ton"]
        else:
            found.append(text)
    return list(dict.fromkeys(found))


def _number(text: str) -> float | None:
    """A number that has neighbours, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    # Beyond, a float is no longer the number that was written.
    return number if math.isfinite(number) and abs(number) < 2**53 else None


def _day(text: str) -> date | None:
    """A day of the calendar with room for others around it, or None."""
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return None
    return day if 10 < day.year < 9990 else None


def _fresh(
    name: str, kind: str, numeric: bool, special: Sequence[int | float | str], rng: random.Random
) -> list[int | float | str]:
    """Further values of a column's kind, all different."""
    if numeric:
        anchors = [float(value) for value in special if isinstance(value, int | float)]
        if anchors:
            low, high = min(anchors), max(anchors)
            width = max(high - low, abs(high) * 0.5, 10.0)
            low, high = (max(0.0, low - width) if low >= 0 else low - width), high + width
        elif "year" in name:
            low, high = 1980.0, 2024.0
        else:
            low, high = 1.0, 500.0
        if "INT" in kind:
            span = range(int(low), max(int(high), int(low) + 2 * _ROWS))
            return list(rng.sample(span, _ROWS))
        # Cents, so that no two are the same.
        return [cents / 100 for cents in rng.sample(range(int(low * 100), int(high * 100) + 2 * _ROWS), _ROWS)]
    days = [day for value in special if (day := _day(str(value))) is not None]
    if "DATE" in kind or "date" in name or days:
        middle = days[0] if days else date(2020, 1, 1)
        return [(middle + timedelta(days=shift)).isoformat() for shift in rng.sample(range(-700, 700), _ROWS)]
    words = [f"{first} {second}".title() for first in _WORDS for second in _WORDS if first != second]
    return list(rng.sample(words, _ROWS))
