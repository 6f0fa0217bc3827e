"""What a file of shares may say. How shares are drawn, moved and counted is in test_canary.py."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from gateway_kit import StubEngine

from tuneship.errors import InputError, OutsideError
from tuneship.recipe import Serve
from tuneship.serve.server import serve
from tuneship.serve.shares import Shares

GOOD = {"model": "sql", "shares": {"a": 90, "b": 10}}


def shares(folder: Path, value: object) -> Shares:
    file = folder / "shares.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return Shares(StubEngine(names=("a", "b")), file, ("a", "b"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "wrong"),
        ({"model": "sql"}, "shares: Field required"),
        ({"model": "", "shares": {"a": 1}}, "model"),
        ({"model": "sql", "shares": {}}, "shares"),
        ({"model": "sql", "shares": {"a": -1}}, "shares.a"),
        ({"model": "sql", "shares": {"a": 0.5}}, "shares.a"),
        ({"model": "sql", "shares": {"a": 0, "b": 0}}, "name nobody"),
        ({"model": "sql", "shares": {"c": 1}}, "a share for c"),
        ({"model": "a", "shares": {"a": 1}}, "is an adapter's"),
        ({**GOOD, "more": 1}, "more"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, value: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        shares(tmp_path, value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutsideError, match="cannot be read"):
        Shares(StubEngine(), tmp_path / "none", ("stub",))


@pytest.mark.parametrize("later", ["{", '{"model": "sql", "shares": {"c": 1}}', None])
def test_a_file_that_turns_bad_leaves_the_last_shares(tmp_path: Path, later: str | None) -> None:
    engine = shares(tmp_path, GOOD)
    os.utime(tmp_path / "shares.json", ns=(1, 1))
    if later is None:
        (tmp_path / "shares.json").unlink()
    else:
        (tmp_path / "shares.json").write_text(later)
    assert b'tuneship_adapter_share{adapter="a"} 0.9' in asyncio.run(engine.metrics())
    (tmp_path / "shares.json").write_text(json.dumps({"model": "other", "shares": {"b": 1}}))
    text = asyncio.run(engine.metrics())
    assert b'tuneship_adapter_share{adapter="b"} 1.0' in text
    assert engine.models() == ["sql", "a", "b"], "the shared name stays"


def test_the_shortest_of_the_lengths_counts(tmp_path: Path) -> None:
    class Uneven(StubEngine):
        def length(self, model: str) -> int | None:
            return {"a": 300, "b": 200}[model]

    file = tmp_path / "shares.json"
    file.write_text(json.dumps(GOOD))
    assert Shares(Uneven(names=("a", "b")), file, ("a", "b")).length("sql") == 200


def test_adapters_with_other_contracts_do_not_share_a_name(tiny_adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_adapter, tmp_path / "other"))
    contract = json.loads((other / "prompt.json").read_text())
    (other / "prompt.json").write_text(json.dumps({**contract, "stop": ["\nEnd"]}))
    file = tmp_path / "shares.json"
    file.write_text(json.dumps({"model": "sql", "shares": {tiny_adapter.name: 1, "other": 1}}))
    with pytest.raises(InputError, match="need the same prompt contract"):
        serve([tiny_adapter, other], settings=Serve(port=0), engine="http://127.0.0.1:9", shares=file)
