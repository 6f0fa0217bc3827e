"""The golden prompts, asked of an engine that answers with canned bytes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_kit import canned, running, until

from tuneship.errors import InputError, OutsideError
from tuneship.serve import goldens
from tuneship.serve.upstream import Upstream

GOLDEN = {"prompt": "one?", "token_ids": [7, 8]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contract = {"template": "{question}{answer}", "stop": ["x"], "tokenizer_sha256": "", "goldens": [GOLDEN]}
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "prompt.json").write_text(json.dumps(contract))
    return tmp_path / "stub"


def answer(status: str = "200 OK", *, count: int = 2, **choice: Any) -> bytes:
    value = {"choices": [{"text": " SELECT 1", **choice}], "usage": {"prompt_tokens": count}}
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def check(url: str, folder: Path) -> list[str]:
    async def ask() -> list[str]:
        async with aiohttp.ClientSession() as session:
            return await goldens.check(session, url, "stub", folder)

    return asyncio.run(ask())


def test_an_engine_that_makes_the_tokens_of_training(folder: Path) -> None:
    asked: list[bytes] = []
    with canned(answer(prompt_token_ids=[7, 8]), asked) as url:
        assert check(url, folder) == [" SELECT 1"]
    body = json.loads(asked[0].partition(b"\r\n\r\n")[2])
    assert body["prompt"] == "one?" and body["model"] == "stub" and body["temperature"] == 0


def test_one_that_shows_none_is_held_to_their_number(folder: Path) -> None:
    with canned(answer()) as url:
        assert check(url, folder) == [" SELECT 1"]
    with canned(answer(count=3)) as url, pytest.raises(InputError, match="other tokens than training saw"):
        check(url, folder)


def test_other_tokens_are_told(folder: Path) -> None:
    with canned(answer(prompt_token_ids=[7, 9])) as url, pytest.raises(InputError, match="'one\\?'"):
        check(url, folder)


@pytest.mark.parametrize("bytes_", [answer("500 No"), b"HTTP/1.1 200 OK\r\n\r\nno JSON", b""])
def test_an_engine_that_does_not_answer_is_told(folder: Path, bytes_: bytes) -> None:
    with canned(bytes_) as url, pytest.raises(OutsideError):
        check(url, folder)


def test_the_program_prints_the_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with canned(answer(prompt_token_ids=[7, 8])) as url:
        asyncio.run(goldens.main([url, str(folder)]))
    assert json.loads(capsys.readouterr().out) == {"stub": [" SELECT 1"]}


def test_a_gateway_ends_in_front_of_the_wrong_engine(folder: Path) -> None:
    with (
        canned(answer(prompt_token_ids=[7, 9])) as url,
        running(Upstream(url, ["stub"], None, {"stub": folder})) as served,
    ):
        until(lambda: served.ended.is_set())
        assert isinstance(served.error, InputError) and "other tokens" in served.error.what


def test_a_gateway_is_ready_once_the_goldens_are_right(folder: Path) -> None:
    asked: list[bytes] = []

    with (
        canned(answer(prompt_token_ids=[7, 8]), asked) as url,
        running(Upstream(url, ["stub"], None, {"stub": folder})) as served,
    ):
        until(lambda: served.get("/health").status_code == 200)
    assert [request for request in asked if request.startswith(b"POST")]
