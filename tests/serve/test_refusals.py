"""Who and what the gateway refuses: keys (V1), routes (V2), bad input (V3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import (
    KEY,
    OTHER_KEY,
    PROMPT,
    Running,
    assert_error,
    exchange,
    get,
    raw_post,
    running,
)

POSTS = ("/v1/completions", "/v1/chat/completions", "/ask", "/generate")


def test_v1_a_key_is_needed(guarded: tuple[Running, Path]) -> None:
    served, _ = guarded
    headers: list[dict[str, str]] = [
        {},
        {"authorization": ""},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY}x"},
    ]
    for wrong in headers:
        answer = served.post("/v1/completions", PROMPT, headers=wrong)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert_error(401, answer.content, "invalid_api_key")
    for key in (KEY, OTHER_KEY):
        assert served.post("/v1/completions", PROMPT, headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_v1_keys_guard_all_but_health_and_metrics(guarded: tuple[Running, Path]) -> None:
    served, _ = guarded
    assert [served.post(path, {}).status_code for path in POSTS] == [401] * 4
    assert [served.get(path).status_code for path in ("/v1/models", "/health", "/metrics")] == [401, 200, 200]


def test_v1_keys_are_rotated_while_serving(guarded: tuple[Running, Path]) -> None:
    served, file = guarded
    new = "n" * 20

    def status(key: str) -> int:
        return served.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert (status(KEY), status(new)) == (200, 401)
    renewed = file.with_name("renewed")
    renewed.write_text(f"{OTHER_KEY}\n{new}\n")
    renewed.replace(file)
    assert (status(KEY), status(OTHER_KEY), status(new)) == (401, 200, 200)
    file.unlink()
    assert status(new) == 200


def test_v1_without_keys_only_this_machines_names_are_answered() -> None:
    with running(local_only=True) as served:
        for host, expected in [
            ("localhost:1", 200),
            ("LOCALHOST", 200),
            ("127.0.0.2:8000", 200),
            ("127.0.0.1.evil.example", 403),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("evil.example", 403),
            ("localhost.evil.example:80", 403),
            ("", 403),
        ]:
            assert served.get("/v1/models", headers={"host": host}).status_code == expected, host


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/invocations",
        "/pause",
        "/tokenize",
        "/update_weights",
        "/v1",
        "/v1/",
        "/v1/models/",
        "/v1/models/stub",
        "//v1/models",
        "/v1//models",
        "/./v1/models",
        "/v1/../v1/models",
        "/v1/../pause",
        "/v1/%2e%2e/pause",
        "/v1%2fmodels",
        "/v1/model%73",
        "/V1/models",
        "/health/",
        "/health%00",
        "/v1/models;x",
        "/v1/embeddings",
        "/v1/load_lora_adapter",
    ],
)
def test_v2_everything_else_is_not_found(served: Running, target: str) -> None:
    status, headers, body = exchange(served, get(target))
    assert status == 404
    assert_error(status, body, "not_found")
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/completions"),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models"),
        ("PUT", "/ask"),
        ("POST", "/health"),
    ],
)
def test_v2_another_method_is_not_allowed(served: Running, method: str, path: str) -> None:
    status, headers, body = exchange(served, get(path, method))
    assert status == 405
    assert headers["allow"] in ("get, head", "post")
    assert_error(status, body, "method_not_allowed")


def test_v2_an_absolute_target_opens_no_way(served: Running) -> None:
    assert exchange(served, get("http://127.0.0.1/pause"))[0] == 404
    assert exchange(served, get("http://127.0.0.1//v1/models"))[0] == 404


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"prompt": "x"',
        b'{"prompt": "\xff"}',
        b"[]",
        b"[" * 2000 + b"]" * 2000,
        b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"temperature": NaN}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": {}, "messages": {}, "question": {}}',
        b'{"prompt": "x", "n": 1000000}',
        b'{"prompt": "x", "max_tokens": 1000000000}',
    ],
)
def test_v3_bad_input_is_refused_in_openais_shape(served: Running, path: str, body: bytes) -> None:
    status, headers, answer = exchange(served, raw_post(path, body))
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": "x", "model": "other"}, 404, "model_not_found"),
        ({"prompt": ""}, 400, "invalid_value"),
        ({"prompt": "x" * 200}, 400, "context_length_exceeded"),
        ({"prompt": "x" * 100, "max_tokens": 101}, 400, "context_length_exceeded"),
        ({"prompt": ["x"] * 3, "n": 3}, 400, "invalid_value"),
    ],
)
def test_v3_what_the_model_cannot_do_is_refused(served: Running, body: dict[str, Any], status: int, code: str) -> None:
    answer = served.post("/v1/completions", body)
    assert answer.status_code == status
    assert_error(status, answer.content, code)


def test_v3_a_chat_without_a_question_is_refused(served: Running) -> None:
    answer = served.post("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]})
    assert_error(answer.status_code, answer.content, "invalid_value")


def test_v3_only_json_is_read(served: Running) -> None:
    """A web page can send a form or plain text to another origin without being asked first; JSON it cannot."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"):
        status, _, body = exchange(served, raw_post("/ask", b'{"question": "x"}', kind))
        assert status == 415
        assert_error(status, body, "unsupported_media_type")
    assert exchange(served, raw_post("/ask", b'{"question": "x"}', "application/json; charset=utf-8"))[0] == 200


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "ü"])
def test_v3_a_strange_request_id_is_replaced(served: Running, given: str) -> None:
    answer = served.get("/health", headers=[(b"x-request-id", given.encode())])
    assert len(answer.headers["x-request-id"]) == 24
