"""ask: a server or a folder, and the SQL run."""

from __future__ import annotations

import io
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_kit import Running, StubEngine, canned, running

from tuneship import cli, credentials
from tuneship.database import Result, SqlError
from tuneship.errors import InputError, OutsideError
from tuneship.serve import client
from tuneship.serve.client import Asked, ask
from tuneship.serve.keys import KeyFile

SQL = (" SELECT", " name FROM", " t")


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(StubEngine(SQL)) as found:
        yield found


@pytest.fixture
def db(tmp_path: Path) -> Path:
    file = tmp_path / "t.sqlite"
    opened = sqlite3.connect(file)
    opened.execute("CREATE TABLE t (\n  name VARCHAR,\n  age INTEGER\n)")
    opened.execute("INSERT INTO t VALUES ('a\x1b[2Jb', 1), (NULL, 2)")
    opened.commit()
    opened.close()
    return file


def test_the_sql_is_printed(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(served.url, "which?") == Asked("which?", "SELECT name FROM t")
    assert capsys.readouterr().out == "SELECT name FROM t\n"


def test_quiet_is_quiet(served: Running, db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(served.url, "which?", db=db, quiet=True).rows == (("a\x1b[2Jb",), (None,))
    assert capsys.readouterr().out == ""


def test_rows_of_a_file_are_shown(served: Running, db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(served.url, "which?", db=db)
    assert capsys.readouterr().out.splitlines() == [
        "SELECT name FROM t",
        "name",
        "------",
        "a·[2Jb",
        "NULL",
        "(2 rows)",
    ]


def test_a_files_tables_are_the_context(db: Path) -> None:
    engine = StubEngine(SQL)
    with running(engine) as served:
        ask(served.url, "which?", db=db)
    text = "".join(map(chr, engine.wanted[0].prompts[0]))  # type: ignore[arg-type]
    assert text == "Question: which?\nContext: CREATE TABLE t ( name VARCHAR, age INTEGER )\nAnswer:"


def test_a_made_up_database_is_enough(served: Running) -> None:
    asked = ask(served.url, "which?", context="CREATE TABLE t (name VARCHAR)", run=True)
    assert asked.columns == ("name",)
    assert len(asked.rows) > 20


def test_sql_that_does_not_run_is_printed_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    with running(StubEngine([" DROP TABLE t"])) as served, pytest.raises(SqlError):
        ask(served.url, "which?", context="CREATE TABLE t (name VARCHAR)", run=True)
    assert capsys.readouterr().out == "DROP TABLE t\n"


def test_sql_that_does_not_run_is_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    with running(StubEngine([" DROP TABLE t"])) as served, pytest.raises(SqlError) as caught:
        cli.ask(served.url, "which?", context="CREATE TABLE t (name VARCHAR)", run_it=True, as_json=True)
    assert caught.value.sql == "DROP TABLE t"
    told = {"kind": "refused", "message": "not authorized"}
    expected = {"question": "which?", "sql": "DROP TABLE t", "columns": None, "rows": [], "error": told}
    assert json.loads(capsys.readouterr().out) == expected


class Terminal(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes += [text] if text else []
        return len(text)


def test_a_terminal_gets_pieces_as_they_come(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    ask(served.url, "which?")
    assert terminal.writes == ["SELECT", " name FROM", " t", "\n"]


def test_a_terminal_gets_no_blanks_first_and_no_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert client._show(iter([" ", " a\x1b", "\nb "]), quiet=False) == "a\x1b\nb"
    assert terminal.writes == ["a·", "\nb ", "\n"]


def test_a_folder_is_asked_without_a_server(
    made_adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model of random weights does not end by itself.
    monkeypatch.setattr(client, "MAX_TOKENS", 12)
    asked = ask(str(made_adapter), "how many?", context="CREATE TABLE t (age INTEGER)")
    assert asked.sql
    assert asked.sql.strip() == asked.sql
    assert capsys.readouterr().out.rstrip("\n").strip() == asked.sql


def test_keys_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("0123456789abcdef\nfedcba9876543210\n")
    with running(StubEngine(SQL), keys=KeyFile(file)) as served:
        with pytest.raises(OutsideError, match="401") as caught:
            ask(served.url, "which?")
        assert "TUNESHIP_API_KEY" in caught.value.fix
        monkeypatch.setenv("TUNESHIP_API_KEY", "fedcba9876543210")
        ask(served.url, "which?")
        monkeypatch.delenv("TUNESHIP_API_KEY")
        monkeypatch.setenv("TUNESHIP_API_KEY_FILE", str(file))
        ask(served.url, "which?")


def test_the_key_is_kept_out_of_messages() -> None:
    assert credentials.redact("x 0123 y", {"TUNESHIP_API_KEY": "0123"}) == "x [redacted] y"


def test_no_server_is_told() -> None:
    with pytest.raises(OutsideError, match="no server answers"):
        ask("http://127.0.0.1:9", "which?")


def test_a_refusal_is_the_users_to_mend(served: Running) -> None:
    with pytest.raises(InputError, match="the server answered 404: no model 'x' here"):
        ask(served.url, "which?", model="x")
    with pytest.raises(InputError, match="400: the prompt has"):
        ask(served.url, "which?" * 100)


def test_a_server_that_ends_too_early_is_told() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    for frames, message in (
        (b'data: {"text": "SELECT"}\n\n', "the server broke off"),
        (b'data: {"error": {"message": "out of memory"}}\n\n', "broke off: out of memory"),
        (b"data: {\n\n", "no gateway of ours"),
        (b'data: {"text": 5}\n\n', "no gateway of ours"),
    ):
        with canned(head + frames) as url, pytest.raises(OutsideError, match=message):
            ask(url, "which?")


def test_a_server_that_breaks_the_protocol_is_told() -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n"
    for answer, message in (
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no gateway of ours"),
        (whole + b'data: {"text": "SELECT"}\n\n', "the server broke off: RemoteProtocolError"),
    ):
        with canned(answer) as url, pytest.raises(OutsideError, match=message):
            ask(url, "which?")


def test_a_server_that_is_stopped_is_told() -> None:
    engine = StubEngine(hold=1)
    with running(engine) as served:

        def stop(text: str) -> str:
            served.server.stop()
            served.server.stop()
            return text

        pieces = client._from_server(served.url, "which?", "", None)
        stop(next(pieces))
        with pytest.raises(OutsideError, match="the server broke off"):
            list(pieces)


def test_something_else_than_a_gateway_is_told(served: Running) -> None:
    with pytest.raises(InputError, match="404: no such route"):
        ask(served.url + "/v1", "which?")


@pytest.mark.parametrize(
    "wrong",
    [
        {"where": "http://x", "question": " "},
        {"where": "http://x", "question": "a", "run": True},
        {"where": "http://x", "question": "a", "base": "b"},
        {"where": "runs/x", "question": "a", "model": "b"},
        {"where": "runs/no-such-run", "question": "a"},
        {"where": "http://x", "question": "a", "db": Path("no-such-file")},
    ],
)
def test_what_cannot_be_asked_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        ask(**wrong)  # type: ignore[arg-type]


def test_wide_and_long_results_stay_readable() -> None:
    lines = client.table(Result(("a", "b"), [("x" * 100, b"123"), *[(1, 2.5)] * 99]))
    assert max(map(len, lines)) < 60
    assert lines[2].endswith("…  <3 bytes>")
    assert lines[-1] == "(100 rows, 50 not shown)"
