"""SQL that a model wrote, run within bounds: one SELECT, so long, so much, and nothing else."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneship.errors import InputError, TuneshipError

Value = int | float | str | bytes | None

MAX_SQL = 10_000
HEAP_BYTES = 256 * 2**20
# A result leaves SQLite's heap for Python's.
RESULT_BYTES = 16 * 2**20
# SQLite asks for the time after so many of its steps. One step may be a function on a text of the greatest length.
STEPS = 100
# instr, replace and trim take time that grows with the square of it.
MAX_TEXT = 100_000

READ_ONLY = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
# printf counts to its precision, and nothing interrupts it.
_DENIED = {"load_extension", "printf", "format"}
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_TEXT,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_SQL,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    # LIKE takes time exponential in the number of % (sqlite.org/security.html).
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
}


class SqlError(TuneshipError):
    """A query did not return rows."""

    def __init__(self, kind: Literal["error", "timeout", "refused"], message: str, sql: str = "") -> None:
        super().__init__(message)
        self.kind, self.sql = kind, sql

    def __reduce__(self) -> tuple[object, ...]:
        return (SqlError, (self.kind, self.what, self.sql))


@dataclass(frozen=True)
class Result:
    """What a query returned."""

    columns: tuple[str, ...]
    rows: list[tuple[Value, ...]]


def run(db: sqlite3.Connection, sql: str, *, timeout_s: float = 1.0, max_rows: int = 10_000) -> Result:
    """Runs one SELECT within bounds.

    Raises:
        SqlError: `error` (SQLite's message), `timeout`, or `refused` (it is more than one SELECT, or too large).
    """
    try:
        return _run(db, sql, timeout_s, max_rows)
    except SqlError as error:
        raise SqlError(error.kind, error.what, sql) from None


def _run(db: sqlite3.Connection, sql: str, timeout_s: float, max_rows: int) -> Result:
    deadline = time.monotonic() + timeout_s
    db.set_authorizer(_authorise)
    db.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
    for limit, value in _LIMITS.items():
        db.setlimit(limit, value)
    try:
        cursor = db.execute(sql)
        if cursor.description is None:
            raise SqlError("refused", "not a query")
        return Result(tuple(column[0] for column in cursor.description), _fetch(cursor, max_rows))
    except (sqlite3.Warning, sqlite3.ProgrammingError, sqlite3.DataError, MemoryError, ValueError) as error:
        # A second statement, a parameter, a zero byte, half a character, a text or a heap too large.
        raise SqlError("refused", str(error) or "out of memory") from None
    except sqlite3.Error as error:
        message = str(error)
        if message == "interrupted":
            raise SqlError("timeout", f"the query ran longer than {timeout_s:g} s") from None
        denied = message.startswith(("not authorized", "authorization denied"))
        raise SqlError("refused" if denied else "error", message) from None
    finally:
        db.set_authorizer(None)
        db.set_progress_handler(None, 0)


def _fetch(cursor: sqlite3.Cursor, max_rows: int) -> list[tuple[Value, ...]]:
    rows: list[tuple[Value, ...]] = []
    size = 0
    for row in cursor:
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) == max_rows:
            raise SqlError("refused", f"more than {max_rows} rows")
        if size > RESULT_BYTES:
            raise SqlError("refused", f"more than {RESULT_BYTES} bytes of rows")
        rows.append(row)
    return rows


def _authorise(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _DENIED:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in READ_ONLY else sqlite3.SQLITE_DENY


@contextmanager
def open_file(path: Path) -> Iterator[sqlite3.Connection]:
    """A database file, read-only.

    Raises:
        InputError: it is no SQLite database.
    """
    if not path.is_file():
        raise InputError("no such database", where=str(path), fix="name a SQLite file")
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        raise InputError(f"the database cannot be opened: {error}", where=str(path)) from error
    try:
        try:
            limit_heap(db)
            db.execute("SELECT COUNT(*) FROM sqlite_master")
        except sqlite3.DatabaseError as error:
            raise InputError(f"not a SQLite database: {error}", where=str(path)) from error
        yield db
    finally:
        db.close()


def limit_heap(db: sqlite3.Connection) -> None:
    """Bounds what SQLite takes from now on, in this process."""
    db.execute(f"PRAGMA hard_heap_limit={HEAP_BYTES}")
