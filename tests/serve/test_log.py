"""What the log says (V11)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

import pytest
from gateway_kit import (
    KEY,
    PROMPT,
    Running,
    StubEngine,
    assert_error,
    running,
)

from tuneship.serve import gateway


def test_v11_the_log_knows_requests_but_no_prompts_and_no_keys(
    guarded: tuple[Running, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    served, _ = guarded
    caplog.set_level(logging.DEBUG)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "abc"}
    secret = {"prompt": "the private prompt", "user": "private", "max_tokens": 3}
    assert served.post("/v1/completions?api_key=private", secret, headers=headers).status_code == 200
    assert served.post("/v1/completions", {**secret, "private": 1}, headers=headers).status_code == 400
    assert served.post("/v1/completions", secret, headers={"authorization": "Bearer private"}).status_code == 401
    assert served.get("/private").status_code == 404
    served.get("/health")
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    text = b"".join(served.log).decode() + "".join(ours) + "".join(capfd.readouterr())
    assert "private" not in text
    assert KEY not in text
    line = served.lines()[0]
    assert line.pop("ms") >= 0
    assert line.pop("waited_ms") >= 0
    assert line.pop("first_ms") >= 0
    assert line.pop("time").endswith("Z")
    assert line == {
        "severity": "INFO",
        "message": "request",
        "id": "abc",
        "route": "/v1/completions",
        "status": 200,
        "model": "stub",
        "prompt_tokens": 18,
        "completion_tokens": 2,
    }
    assert len(served.log) == 4


def test_v11_an_error_of_ours_tells_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    engine = StubEngine(refusal=RuntimeError("the private prompt"))
    with running(engine) as served:
        answer = served.post("/v1/completions", PROMPT)
        assert answer.status_code == 500
        assert_error(500, answer.content, "internal_error")
        error = next(line for line in served.lines() if line["message"] == "error")
    assert (error["error"], error["severity"], error["id"]) == ("RuntimeError", "ERROR", answer.headers["x-request-id"])
    assert "kit.py:" in error["place"]
    assert b"private" not in b"".join(served.log) + answer.content
    assert "private" not in "".join(capfd.readouterr())


def test_a_log_that_nobody_reads_costs_no_answer(monkeypatch: pytest.MonkeyPatch, unread: TextIO) -> None:
    with running(StubEngine(refusal=RuntimeError())) as served:
        # Not before: what the server says of its start would already have gone nowhere.
        monkeypatch.setattr(sys, "stderr", unread)
        monkeypatch.setattr(served.gateway, "_log", gateway._to_stderr)
        assert_error(500, served.post("/v1/completions", PROMPT).content, "internal_error")
