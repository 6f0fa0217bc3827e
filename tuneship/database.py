"""SQLite for SQL that a model wrote: a small database to run it on, bounds to run it in.

Whether an answer is right is decided by running it, not by its text: two queries count as equal
when they return the same rows on several differently filled databases (the idea of test-suite
accuracy, Zhong et al. 2020, arXiv:2010.02840). A database is filled from the CREATE TABLE
statements and from the literals of the right answer, so that its filters match some rows and
miss others, at the boundary too.

Covered: no writes, no files, no ATTACH, no PRAGMA, no extensions (an authoriser, and read-only
opening); time, rows, memory and value sizes are bounded. Not covered: bugs of SQLite itself;
a caller that fears those runs this in a sandboxed process.

    with fill(context, answer, seed=0) as db:
        print(run(db, "SELECT COUNT(*) FROM attendees").rows)
"""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Literal, TypeVar

from tuneship.errors import InputError, TuneshipError

T = TypeVar("T")
Value = int | float | str | bytes | None

SEEDS = (0, 1, 2)
_ROWS = 60
# How often each of a column's repeated values stands in its 60 rows: all different, so that
# "the most frequent" is one value and a HAVING threshold parts the groups.
_SHARES = (22, 14, 10, 7, 5, 2)
_HEAP_BYTES = 256 * 2**20
_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    # LIKE takes time exponential in the number of % (sqlite.org/security.html).
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
}


class SqlError(TuneshipError):
    """A query did not return rows."""

    def __init__(self, kind: Literal["error", "timeout", "refused"], message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (SqlError, (self.kind, self.what))


@dataclass(frozen=True)
class Result:
    """What a query returned."""

    columns: tuple[str, ...]
    rows: list[tuple[Value, ...]]


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


def run(db: sqlite3.Connection, sql: str, *, timeout_s: float = 1.0, max_rows: int = 10_000) -> Result:
    """Runs one SELECT within bounds.

    Raises:
        SqlError: `error` (SQLite's message), `timeout`, or `refused` (it is more than one SELECT, or too large).
    """
    deadline = time.monotonic() + timeout_s
    db.set_authorizer(_authorise)
    db.set_progress_handler(lambda: time.monotonic() > deadline, 1_000)
    for limit, value in _LIMITS.items():
        db.setlimit(limit, value)
    try:
        cursor = db.execute(sql)
        rows = cursor.fetchmany(max_rows + 1)
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            raise SqlError("timeout", f"the query ran longer than {timeout_s:g} s") from None
        raise SqlError("error", str(error)) from None
    except sqlite3.DatabaseError as error:
        kind: Literal["refused", "error"] = "refused" if "not authorized" in str(error) else "error"
        raise SqlError(kind, str(error)) from None
    except (sqlite3.Warning, sqlite3.ProgrammingError, sqlite3.DataError, MemoryError, ValueError) as error:
        raise SqlError("refused", str(error) or "out of memory") from None
    finally:
        db.set_authorizer(None)
        db.set_progress_handler(None, 0)
    if cursor.description is None:
        raise SqlError("refused", "not a query")
    if len(rows) > max_rows:
        raise SqlError("refused", f"more than {max_rows} rows")
    return Result(tuple(column[0] for column in cursor.description), rows)


@contextmanager
def open_file(path: Path) -> Iterator[sqlite3.Connection]:
    """A database file, read-only.

    Raises:
        InputError: it is no SQLite database.
    """
    if not path.is_file():
        raise InputError("no such database", where=str(path), fix="name a SQLite file")
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        try:
            db.execute("SELECT COUNT(*) FROM sqlite_master")
        except sqlite3.DatabaseError as error:
            raise InputError(f"not a SQLite database: {error}", where=str(path)) from error
        yield db
    finally:
        db.close()


@contextmanager
def fill(context: str, answer: str, *, seed: int) -> Iterator[sqlite3.Connection]:
    """An in-memory database of the context's tables, with rows that the answer's filters part.

    Args:
        context: CREATE TABLE statements, separated by semicolons.
        answer: a query on them; only its literals and keys are read. May be empty.

    Raises:
        InputError: the context is not CREATE TABLE statements.
    """
    db = sqlite3.connect(":memory:")
    try:
        db.execute(f"PRAGMA hard_heap_limit={_HEAP_BYTES}")
        db.set_authorizer(_authorise_create)
        try:
            db.executescript(context)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise InputError(f"the context is not CREATE TABLE statements: {error}", where=f"{context:.200}") from None
        finally:
            db.set_authorizer(None)
        _insert(db, answer, random.Random(seed))  # noqa: S311 - test data
        db.commit()
        db.execute("PRAGMA query_only=ON")
        yield db
    finally:
        db.close()


def tables(db: sqlite3.Connection) -> dict[str, list[tuple[str, str]]]:
    """The tables of a database: name → (column, declared type)."""
    names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")]
    return {name: [(c[1], c[2].upper()) for c in db.execute(f"PRAGMA table_info({_quoted(name)})")] for name in names}


def _authorise(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() == "load_extension":
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _authorise_create(action: int, first: str | None, *_: object) -> int:
    if action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE):
        # CREATE TABLE writes to the catalogue.
        return sqlite3.SQLITE_OK if first in ("sqlite_master", "sqlite_sequence") else sqlite3.SQLITE_DENY
    created = (sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_REINDEX)
    return sqlite3.SQLITE_OK if action in _ALLOWED or action in created else sqlite3.SQLITE_DENY


def _comparable(value: Value) -> object:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return value


def _words(sql: str) -> list[str]:
    return re.findall(r"'[^']*'|\w+|[^\w\s;]", re.sub(r"[\w]+(?=(?:[^']*'[^']*')*[^']*$)", lambda m: m[0].lower(), sql))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# --- filling ----------------------------------------------------------------------------------

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

    `officer_id` belongs to `police_officers`, or to `officer_ranks`, by its name, and not to `fines`; `id` belongs to its
    table; and so does a first key that no other table claims.
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
        try:
            number = float(text)
        except ValueError:
            number = None
        if number is not None and (numeric or not found):
            steps = (0, 1, -1) if number.is_integer() else (0, 0.5, -0.5)
            values = [number + step for step in steps]
            if numeric:
                found += [int(v) if integer or v.is_integer() else round(v, 4) for v in values]
            else:
                found += [f"{v:g}" for v in values]
        elif re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            try:
                day = date.fromisoformat(text)
            except ValueError:
                found.append(text)
            else:
                found += [(day + timedelta(days=shift)).isoformat() for shift in (0, 1, -1)]
        elif "%" in text or "_" in text:
            core = text.replace("%", "").replace("_", "x")
            found += [core, f"{core}ton", f"Old{core}", f"Old{core}ton"]
        else:
            found.append(text)
    return list(dict.fromkeys(found))


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
    days = [value for value in special if isinstance(value, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value)]
    if "DATE" in kind or "date" in name or days:
        middle = date.fromisoformat(str(days[0])) if days else date(2020, 1, 1)
        return [(middle + timedelta(days=shift)).isoformat() for shift in rng.sample(range(-700, 700), _ROWS)]
    words = [f"{first} {second}".title() for first in _WORDS for second in _WORDS if first != second]
    return list(rng.sample(words, _ROWS))
