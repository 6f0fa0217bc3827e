"""Errors: one tree, one exit code a branch, one form of message.

python -m pytest tests/test_errors.py -v
"""

from __future__ import annotations

import copy
import pickle

import pytest

from tuneship.database import SqlError
from tuneship.errors import GateError, InputError, OutsideError, Stopped, TuneshipError

KINDS = {TuneshipError: 1, InputError: 2, OutsideError: 3, GateError: 4, Stopped: 75}


@pytest.mark.parametrize(("kind", "code"), KINDS.items())
def test_each_branch_has_its_exit_code(kind: type[TuneshipError], code: int) -> None:
    assert kind("no").exit_code == code


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_says_what_where_and_what_to_do(kind: type[TuneshipError]) -> None:
    error = kind("the row is bad", where="rows.jsonl:3", fix="mend it")
    assert str(error) == "the row is bad\n  where: rows.jsonl:3\n  fix:   mend it"
    assert str(kind("the row is bad")) == "the row is bad"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_survives_the_way_between_processes(kind: type[TuneshipError], clone: object) -> None:
    error = kind("what", where="where", fix="fix")
    again = clone(error)  # type: ignore[operator]
    assert type(again) is kind
    assert (again.what, again.where, again.fix, str(again)) == ("what", "where", "fix", str(error))


def test_an_sql_error_survives_it_too() -> None:
    again = pickle.loads(pickle.dumps(SqlError("timeout", "too long", "SELECT 1")))
    assert (again.kind, again.what, again.sql) == ("timeout", "too long", "SELECT 1")


def test_a_caller_may_catch_what_python_would_have_raised() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(OutsideError, OSError)
