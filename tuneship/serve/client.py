"""ask: one question to a tuned model, and its SQL run where there is something to run it on.

    ask("http://127.0.0.1:8000", "How many heads are older than 56?", context="CREATE TABLE head (age INTEGER)")

Asks a server, or loads a run's, adapter's or merged model's folder for this one question. SQL that
a model wrote is run as `tuneship.database` runs it: read-only, bounded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuneship import database
from tuneship.credentials import api_key
from tuneship.database import Result, Value
from tuneship.errors import InputError, OutsideError, TuneshipError

MAX_TOKENS = 256
_WIDEST = 40
_MOST_ROWS = 50


@dataclass(frozen=True)
class Asked:
    """A question's answer."""

    question: str
    sql: str
    columns: tuple[str, ...] | None = None
    """Of the result; None where the SQL was not run."""
    rows: tuple[tuple[Value, ...], ...] = ()


def ask(
    where: str,
    question: str,
    *,
    context: str | None = None,
    db: Path | None = None,
    run: bool = False,
    model: str | None = None,
    base: str | None = None,
    quiet: bool = False,
) -> Asked:
    """Prints the SQL as it comes, and then its rows.

    Args:
        where: a server's URL, or the folder of a run, an adapter or a merged model.
        context: CREATE TABLE statements; by default those of `db`.
        db: a SQLite file to run the SQL on.
        run: without a `db`, run the SQL on a small database made up from the context.
        model: of a server that has several.
        base: of a folder: where the base is now, if elsewhere than when the adapter was trained.
        quiet: print nothing.

    Raises:
        InputError: there is nothing to ask about, or the server refuses the question.
        OutsideError: no server answers there.
        SqlError: the SQL does not run; it has been printed.
    """
    if context is None:
        context = schema(db) if db is not None else ""
    if run and db is None and not context:
        raise InputError("there is nothing to run the SQL on", fix="name tables with --context or a file with --db")
    if not question.strip():
        raise InputError("the question is empty")
    elsewhere = where.startswith(("http://", "https://"))
    if (base if elsewhere else model) is not None:
        raise InputError(
            "--base is for a folder, and --model for a server", where=where, fix="remove the one that has no effect"
        )
    pieces = (
        _from_server(where, question, context, model) if elsewhere else _from_folder(where, question, context, base)
    )
    sql = _show(pieces, quiet)
    if db is not None:
        with database.open_file(db) as opened:
            result = database.run(opened, sql)
    elif run:
        with database.fill(context, sql, seed=0) as filled:
            result = database.run(filled, sql)
    else:
        return Asked(question, sql)
    if not quiet:
        print("\n".join(table(result)))
    return Asked(question, sql, result.columns, tuple(result.rows))


def schema(db: Path) -> str:
    """A database's tables as a context: one CREATE TABLE statement behind the other."""
    with database.open_file(db) as opened:
        found = opened.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        return "; ".join(" ".join(str(sql).split()) for (sql,) in found)


def table(result: Result) -> list[str]:
    """Rows as lines for a person."""
    rows = [[_cell(value) for value in row] for row in (result.columns, *result.rows[:_MOST_ROWS])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(result.columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    more = len(result.rows) - _MOST_ROWS
    return [*lines, f"({len(result.rows)} rows{f', {more} not shown' if more > 0 else ''})"]


def _cell(value: Value) -> str:
    text = "NULL" if value is None else f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
    # What a database holds must not move the cursor of a terminal.
    text = "".join(character if character.isprintable() else "·" for character in text)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def _show(pieces: Iterator[str], quiet: bool) -> str:
    """Prints pieces as they come on a terminal, or all at once elsewhere; returns them as one."""
    live = not quiet and sys.stdout.isatty()
    text = ""
    for piece in pieces:
        piece = piece if text else piece.lstrip()
        text += piece
        if live:
            print("".join(c if c.isprintable() or c == "\n" else "·" for c in piece), end="", flush=True)
    if live:
        print()
    elif not quiet:
        print(text.strip())
    return text.strip()


def _from_folder(where: str, question: str, context: str, base: str | None) -> Iterator[str]:
    from tuneship.serve import adapter as adapters

    found = adapters.find(Path(where))
    contract = adapters.Contract(found.folder)
    files = adapters.base_of(found, base)
    from tuneship.serve import local

    ids = contract.ids(contract.prompt.render({"question": question, "context": context, "answer": ""}))
    yield from local.answer(found, files, ids, stop=contract.prompt.stop, max_tokens=MAX_TOKENS)


def _from_server(url: str, question: str, context: str, model: str | None) -> Iterator[str]:
    import httpx

    body = {"question": question, "context": context, "stream": True}
    if model is not None:
        body["model"] = model
    key = api_key()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    address = url.rstrip("/") + "/ask"
    answered = ended = False
    try:
        with httpx.stream("POST", address, json=body, headers=headers, timeout=httpx.Timeout(10, read=300)) as response:
            if response.status_code != 200:
                raise _refusal(response.status_code, response.read(), address)
            answered = True
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    ended = True
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        raise OutsideError(f"the server broke off: {event['error']['message']}", where=address)
                    if not isinstance(text := event["text"], str):
                        raise TypeError(f"text is {type(text).__name__}")
                    yield text
    except TuneshipError:
        raise
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise OutsideError(
            "no server answers", where=address, fix="tuneship serve RUN, or name its URL or a run's folder"
        ) from error
    except httpx.TransportError as error:
        if isinstance(error, httpx.ProtocolError | httpx.UnsupportedProtocol) and not answered:
            raise OutsideError(f"this is no gateway of ours: {error}", where=address) from error
        raise OutsideError(f"the server broke off: {type(error).__name__}", where=address, fix="ask again") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise OutsideError(f"this is no gateway of ours: {type(error).__name__}", where=address) from error
    if not ended:
        raise OutsideError("the server broke off", where=address, fix="ask again")


def _refusal(status: int, body: bytes, address: str) -> InputError | OutsideError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = "no gateway of ours"
    kind = InputError if status in (400, 404, 413) else OutsideError
    fix = "set TUNESHIP_API_KEY or TUNESHIP_API_KEY_FILE" if status == 401 else ""
    return kind(f"the server answered {status}: {message}", where=address, fix=fix)
