"""The gateway over real sockets, in front of an engine that does what the test says."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import WAIT_S, Running, StubEngine, frames, in_background, running

from tuneship.serve.keys import KeyFile
from tuneship.serve.limits import Limits
from tuneship.serve.server import listen
from tuneship.serve.shapes import ApiError
from tuneship.serve.wire import tire

PROMPT = {"prompt": "Question: one?\nContext: \nAnswer:"}
POSTS = ("/v1/completions", "/v1/chat/completions", "/ask", "/generate")
KEY, OTHER_KEY = "k" * 16 + "-one", "k" * 16 + "-two"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


def exchange(served: Running, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Bytes in, (status, headers, body) out; the connection is closed after the answer."""
    with served.connect() as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def get(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()


def assert_error(status: int, body: bytes, code: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert 400 <= status < 600
    return error


# --- answers ----------------------------------------------------------------------------------


def test_generate_answers_the_tutorials_curl(served: Running) -> None:
    prompt = 'Question: At kubecon "EU"? Context: CREATE TABLE t (age INTEGER)\nAnswer:'
    answer = served.post("/generate", {"prompt": prompt, "temperature": 0.9, "top_p": 1.0, "max_tokens": 32})
    assert answer.json() == {"predictions": [f"Prompt:\n{prompt}\nOutput:\n SELECT 1"]}


def test_ask_renders_the_contract() -> None:
    engine = StubEngine()
    with running(engine) as served:
        answer = served.post("/ask", {"question": "how {context} many?", "context": "CREATE TABLE t (a INT)"})
        assert answer.json() == {"answer": "SELECT 1"}
        plain = served.post("/ask", {"question": "one?"})
        assert plain.json() == {"answer": "SELECT 1"}
    texts = ["".join(map(chr, wanted.prompts[0])) for wanted in engine.wanted]
    assert texts[0] == "Question: how {context} many?\nContext: CREATE TABLE t (a INT)\nAnswer:"
    assert engine.wanted[0].temperature == 0.0
    assert engine.wanted[0].stop == ("\nQuestion:", "\nContext:")


def test_a_completion_has_openais_shape(served: Running) -> None:
    answer = served.post("/v1/completions", {**PROMPT, "n": 2}, headers={"x-request-id": "mine"})
    body = answer.json()
    assert answer.headers["x-request-id"] == "mine"
    assert body["id"] == "cmpl-mine"
    assert (body["object"], body["model"]) == ("text_completion", "stub")
    choice = {"text": " SELECT 1", "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [{"index": 0, **choice}, {"index": 1, **choice}]
    count = len(PROMPT["prompt"])
    assert body["usage"] == {"prompt_tokens": count, "completion_tokens": 4, "total_tokens": count + 4}


def test_a_streamed_completion_has_openais_shape(served: Running) -> None:
    answer = served.post("/v1/completions", {**PROMPT, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *pieces, usage, done = frames(answer)
    assert done == "[DONE]"
    assert [piece["choices"][0]["text"] for piece in pieces] == [" SELECT", " 1"]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, "stop"]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)


def test_a_stream_tells_its_usage_only_where_asked(served: Running) -> None:
    events = frames(served.post("/v1/completions", {**PROMPT, "stream": True}))
    assert all("usage" not in event for event in events[:-1])


def test_a_chat_is_the_contracts_one_turn() -> None:
    engine = StubEngine()
    messages = [
        {"role": "system", "content": "CREATE TABLE a (b INT)"},
        {"role": "user", "content": "an earlier one"},
        {"role": "assistant", "content": "SELECT 0"},
        {"role": "user", "content": "how many?"},
    ]
    with running(engine) as served:
        body = served.post("/v1/chat/completions", {"messages": messages}).json()
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "SELECT 1"}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    text = "".join(map(chr, engine.wanted[0].prompts[0]))
    assert text == "Question: how many?\nContext: CREATE TABLE a (b INT)\nAnswer:"


def test_a_streamed_chat_has_openais_shape(served: Running) -> None:
    body = {"messages": [{"role": "user", "content": "one?"}], "stream": True, "n": 2}
    *events, done = frames(served.post("/v1/chat/completions", body))
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    first = [event["choices"][0] for event in events if event["choices"][0]["index"] == 1]
    assert [choice["delta"] for choice in first] == [
        {"role": "assistant", "content": ""},
        {"content": "SELECT"},
        {"content": " 1"},
    ]
    assert [choice["finish_reason"] for choice in first] == [None, None, "stop"]


def test_a_streamed_answer_is_its_text_alone(served: Running) -> None:
    events = frames(served.post("/ask", {"question": "one?", "stream": True}))
    assert events == [{"text": "SELECT"}, {"text": " 1"}, "[DONE]"]


def test_pieces_come_as_they_are_made() -> None:
    engine = StubEngine(hold=1)
    with running(engine) as served, served.streamed("/v1/completions", PROMPT) as lines:
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == " SELECT"
        engine.release()
        assert "[DONE]" in list(lines)[-2]


def test_the_requests_own_stop_replaces_the_contracts() -> None:
    engine = StubEngine()
    with running(engine) as served:
        served.post("/v1/completions", {**PROMPT, "stop": [";"]})
        served.post("/v1/completions", PROMPT)
    assert [wanted.stop for wanted in engine.wanted] == [(";",), ("\nQuestion:", "\nContext:")]


def test_completions_have_the_length_that_is_asked_or_set() -> None:
    engine = StubEngine(length=60)
    with running(engine, max_new_tokens=16) as served:
        served.post("/v1/completions", {"prompt": "x" * 20, "max_tokens": 40})
        served.post("/v1/completions", {"prompt": "x" * 20})
        served.post("/v1/completions", {"prompt": "x" * 55})
    assert [wanted.max_tokens for wanted in engine.wanted] == [40, 16, 5]


def test_several_models_are_told_apart() -> None:
    engine = StubEngine(names=("one", "two"))
    with running(engine, contracts={}) as served:
        models = served.get("/v1/models").json()
        assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("one", 200), ("two", 200)]
        assert served.post("/v1/completions", {**PROMPT, "model": "two"}).json()["model"] == "two"
        assert served.post("/v1/completions", PROMPT).json()["model"] == "one"
    assert engine.wanted[0].prompts == (PROMPT["prompt"],)


def test_without_a_contract_a_chat_goes_on_as_it_is() -> None:
    engine = StubEngine()
    with running(engine, contracts={}) as served:
        served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
        status = served.post("/ask", {"question": "one?"}).status_code
    assert engine.wanted[0].messages == [{"role": "user", "content": "hello"}]
    assert engine.wanted[0].prompts == ()
    assert status == 404


# --- V1: keys ---------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Running, Path]]:
    file = tmp_path / "keys"
    file.write_text(f"# two, so that one can go\n{KEY}\n{OTHER_KEY}\n")
    with running(keys=KeyFile(file)) as served:
        yield served, file


def test_a_key_is_needed(guarded: tuple[Running, Path]) -> None:
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


def test_keys_guard_all_but_health_and_metrics(guarded: tuple[Running, Path]) -> None:
    served, _ = guarded
    assert [served.post(path, {}).status_code for path in POSTS] == [401] * 4
    assert [served.get(path).status_code for path in ("/v1/models", "/health", "/metrics")] == [401, 200, 200]


def test_keys_are_rotated_while_serving(guarded: tuple[Running, Path]) -> None:
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


def test_without_keys_only_this_machines_names_are_answered() -> None:
    with running(local_only=True) as served:
        for host, expected in [
            ("localhost:1", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("evil.example", 403),
            ("localhost.evil.example:80", 403),
            ("", 403),
        ]:
            assert served.get("/v1/models", headers={"host": host}).status_code == expected, host


# --- V2: routes -------------------------------------------------------------------------------


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
def test_everything_else_is_not_found(served: Running, target: str) -> None:
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
def test_another_method_is_not_allowed(served: Running, method: str, path: str) -> None:
    status, _, body = exchange(served, get(path, method))
    assert status == 405
    assert_error(status, body, "method_not_allowed")


def test_an_absolute_target_opens_no_way(served: Running) -> None:
    assert exchange(served, get("http://127.0.0.1/pause"))[0] == 404
    assert exchange(served, get("http://127.0.0.1//v1/models"))[0] == 404


# --- V3: bad input ----------------------------------------------------------------------------


def raw_post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


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
def test_bad_input_is_refused_in_openais_shape(served: Running, path: str, body: bytes) -> None:
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
def test_what_the_model_cannot_do_is_refused(served: Running, body: dict[str, Any], status: int, code: str) -> None:
    answer = served.post("/v1/completions", body)
    assert answer.status_code == status
    assert_error(status, answer.content, code)


def test_a_chat_without_a_question_is_refused(served: Running) -> None:
    answer = served.post("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]})
    assert_error(answer.status_code, answer.content, "invalid_value")


def test_only_json_is_read(served: Running) -> None:
    """A web page can send a form or plain text to another origin without being asked first; JSON it cannot."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"):
        status, _, body = exchange(served, raw_post("/ask", b'{"question": "x"}', kind))
        assert status == 415
        assert_error(status, body, "unsupported_media_type")
    assert exchange(served, raw_post("/ask", b'{"question": "x"}', "application/json; charset=utf-8"))[0] == 200


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "ü"])
def test_a_strange_request_id_is_replaced(served: Running, given: str) -> None:
    answer = served.get("/health", headers=[(b"x-request-id", given.encode())])
    assert len(answer.headers["x-request-id"]) == 24


# --- V4: overload -----------------------------------------------------------------------------


def test_one_too_many_is_told_at_once_and_the_others_are_answered() -> None:
    engine = StubEngine(hold=0)
    with running(engine, limits=Limits(running=2, waiting=3)) as served:
        calls = [in_background(lambda: served.post("/v1/completions", PROMPT).status_code) for _ in range(5)]
        engine.wait_running(2)
        wait_for_waiting(served, 3)
        began = time.monotonic()
        answer = served.post("/v1/completions", PROMPT)
        assert time.monotonic() - began < 1.0
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert_error(429, answer.content, "overloaded")
        engine.release()
        for thread, results in calls:
            thread.join(WAIT_S)
            assert results == [200]
        assert engine.most == 2
        assert served.post("/v1/completions", PROMPT).status_code == 200


def wait_for_waiting(served: Running, count: int) -> None:
    """Until so many wait for the engine, by the gateway's own word."""
    deadline = time.monotonic() + WAIT_S
    while f"tuneship_requests_waiting {count}.0" not in served.get("/metrics").text:
        assert time.monotonic() < deadline


def test_refused_requests_leave_no_trace(served: Running) -> None:
    """V10 in small: whatever ends a request gives its place back."""
    for _ in range(20):
        for body in (b"{", b'{"prompt": "x", "model": "other"}', b'{"prompt": "x"}'):
            exchange(served, raw_post("/v1/completions", body))
    text = served.get("/metrics").text
    assert "tuneship_requests_waiting 0.0" in text
    assert "tuneship_requests_running 0.0" in text


def test_whatever_ends_a_request_leaves_nothing_open() -> None:
    """V10 in small: answers, refusals, broken requests, and clients that leave at any moment."""
    engine = StubEngine([" x"] * 20)
    good = json.dumps(PROMPT).encode()
    requests = [
        raw_post("/v1/completions", good),
        raw_post("/v1/completions", json.dumps({**PROMPT, "stream": True}).encode()),
        raw_post("/v1/completions", b"{"),
        b"BROKEN\r\n\r\n",
        get("/health"),
    ]
    with running(engine) as served:
        # Once before counting: the loop opens files of its own when it starts.
        assert exchange(served, requests[0])[0] == 200
        open_before = open_files()
        for number in range(300):
            request = requests[number % len(requests)]
            if number % 2:
                exchange(served, request)
            else:
                with served.connect() as connection:
                    connection.sendall(request[: 1 + number * 7 % len(request)])
        engine.wait_running(0)
        wait_for_waiting(served, 0)
        deadline = time.monotonic() + WAIT_S
        while open_files() > open_before:
            assert time.monotonic() < deadline, f"{open_before} files before, {open_files()} after"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- V5, V8: the engine -----------------------------------------------------------------------


def test_not_ready_is_told_and_not_fatal() -> None:
    engine = StubEngine()
    engine.ready = False
    with running(engine) as served:
        for answer in (served.get("/health"), served.post("/ask", {"question": "x"}), served.get("/v1/models")):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert_error(503, answer.content, "not_ready")
        assert served.get("/health?live").status_code == 200
        assert "tuneship_ready 0.0" in served.get("/metrics").text
        engine.ready = True
        assert served.get("/health").status_code == 200
        engine.hung = True
        assert served.get("/health?live").status_code == 503


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    engine = StubEngine(hold=0)
    with running(engine, limits=Limits(request_s=0.2)) as served:
        answer = served.post("/v1/completions", PROMPT)
        assert answer.status_code == 504
        assert_error(504, answer.content, "deadline_exceeded")
        engine.wait_running(0)


def test_the_deadline_counts_from_arrival() -> None:
    """Also for one who waited first: else it would get as long again."""
    engine = StubEngine(hold=0)
    with running(engine, limits=Limits(running=1, request_s=1.0)) as served:
        first = in_background(lambda: served.post("/v1/completions", PROMPT).status_code)
        engine.wait_running(1)
        began = time.monotonic()
        assert served.post("/v1/completions", PROMPT).status_code == 504
        assert time.monotonic() - began < 1.5
        first[0].join(WAIT_S)


def test_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    engine = StubEngine(hold=1)
    with running(engine, limits=Limits(request_s=0.3)) as served:
        first, error = frames(served.post("/v1/completions", {**PROMPT, "stream": True}))
    assert first["choices"][0]["text"] == " SELECT"
    assert error["error"]["code"] == "deadline_exceeded"


def test_an_engines_refusal_keeps_its_status() -> None:
    engine = StubEngine(refusal=ApiError(503, "gone", code="engine_gone", retry_after=5))
    with running(engine) as served:
        for stream in (False, True):
            answer = served.post("/v1/completions", {**PROMPT, "stream": stream})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert_error(503, answer.content, "engine_gone")


def test_an_error_of_ours_tells_nothing(capfd: pytest.CaptureFixture[str]) -> None:
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


# --- V6, V7: slow, large and leaving clients --------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_generation(stream: bool) -> None:
    engine = StubEngine(hold=1)
    with running(engine) as served:
        with served.connect() as connection:
            connection.sendall(raw_post("/v1/completions", json.dumps({**PROMPT, "stream": stream}).encode()))
            engine.wait_running(1)
        engine.wait_running(0)
        text = served.get("/metrics").text
        assert "tuneship_clients_gone_total 1.0" in text
        assert "tuneship_requests_running 0.0" in text
    assert served.lines()[-1]["code"] == "client_gone"


def test_who_leaves_while_waiting_gives_the_place_back() -> None:
    engine = StubEngine(hold=0)
    with running(engine, limits=Limits(running=1, waiting=1)) as served:
        first = in_background(lambda: served.post("/v1/completions", PROMPT).status_code)
        engine.wait_running(1)
        with served.connect() as connection:
            connection.sendall(raw_post("/v1/completions", json.dumps(PROMPT).encode()))
            wait_for_waiting(served, 1)
        wait_for_waiting(served, 0)
        engine.release()
        first[0].join(WAIT_S)
    assert len(engine.wanted) == 1


def test_a_body_that_does_not_come_is_given_up() -> None:
    with running(limits=Limits(body_s=0.2)) as served:
        head = b"POST /ask HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        began = time.monotonic()
        status, _, body = exchange(served, head + b'Content-Length: 100\r\n\r\n{"que')
        assert status == 408
        assert time.monotonic() - began < 3.0
        assert_error(408, body, "body_timeout")
        assert "tuneship_requests_waiting 0.0" in served.get("/metrics").text


def test_a_declared_large_body_is_not_waited_for() -> None:
    with running(limits=Limits(body_bytes=1000)) as served:
        head = b"POST /ask HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        for length in (b"1001", b"9" * 15):
            status, _, body = exchange(served, head + b"Content-Length: " + length + b"\r\n\r\n")
            assert status == 413
            assert_error(413, body, "body_too_large")


def test_a_chunked_large_body_is_not_kept() -> None:
    with running(limits=Limits(body_bytes=1000)) as served:
        head = b"POST /ask HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        chunk = b"1f4\r\n" + b"x" * 500 + b"\r\n"
        status, _, body = exchange(served, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
        assert status == 413
        assert_error(413, body, "body_too_large")


def test_a_head_that_does_not_come_is_cut_off() -> None:
    with running(limits=Limits(head_s=0.3)) as served:
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost:"):
            with served.connect() as connection:
                connection.sendall(sent)
                with pytest.raises(ConnectionResetError):
                    assert connection.recv(100) == b""
                    raise ConnectionResetError
        with served.connect() as connection:
            # A second request on a kept connection, too.
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b'{"status":"ok"}'):
                received += connection.recv(1000)
            connection.sendall(b"GET /hea")
            with pytest.raises(ConnectionResetError):
                assert connection.recv(100) == b""
                raise ConnectionResetError


def test_a_head_that_came_is_not_cut_off() -> None:
    with running(StubEngine(hold=0), limits=Limits(head_s=0.2, request_s=0.6)) as served:
        assert served.post("/v1/completions", PROMPT).status_code == 504


@pytest.mark.parametrize("kernel", [True, False], ids=["the kernel helps", "the kernel does not"])
def test_a_reader_who_takes_nothing_is_cut_off(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr("tuneship.serve.server.tire", lambda listening, stall_s: None)
    engine = StubEngine(pieces=["x" * 100_000] * 200)
    with running(engine, limits=Limits(stall_s=0.5)) as served:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(WAIT_S)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(raw_post("/v1/completions", json.dumps({**PROMPT, "stream": True}).encode()))
            engine.wait_running(1)
            engine.wait_running(0)
        assert served.lines()[-1]["code"] == "client_gone"


def test_the_kernel_is_told() -> None:
    with listen("127.0.0.1", 0) as listening:
        tire(listening, 1.5)
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


def test_a_slow_reader_is_waited_for() -> None:
    pieces = ["x" * 100_000] * 20
    with running(StubEngine(pieces=pieces), limits=Limits(stall_s=5)) as served:
        answer = served.post("/v1/completions", {**PROMPT, "stream": True})
    assert sum(len(event["choices"][0]["text"]) for event in frames(answer)[:-1]) == 2_000_000


# --- V9: the end ------------------------------------------------------------------------------


def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    engine = StubEngine(hold=1)
    with running(engine) as served:
        with served.streamed("/v1/completions", PROMPT) as lines:
            next(lines)
            served.server.stop()
            wait_for_drain(served)
            refused = served.post("/v1/completions", PROMPT)
            assert_error(refused.status_code, refused.content, "draining")
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert served.get("/health").status_code == 503
            assert served.get("/health?live").status_code == 200
            engine.release()
            assert "data: [DONE]" in list(lines)
        assert served.ended.wait(WAIT_S)
    assert served.error is None


def wait_for_drain(served: Running) -> None:
    deadline = time.monotonic() + WAIT_S
    while not served.gateway.draining:
        assert time.monotonic() < deadline


def test_draining_ends_at_its_deadline() -> None:
    engine = StubEngine(hold=1)
    with running(engine, limits=Limits(drain_s=0.2)) as served:
        streamed = in_background(lambda: frames(served.post("/v1/completions", {**PROMPT, "stream": True})))
        engine.wait_running(1)
        served.server.stop()
        assert served.ended.wait(WAIT_S)
        streamed[0].join(WAIT_S)
    assert streamed[1][0][-1]["error"]["code"] == "draining"


def test_the_engines_end_is_the_servers() -> None:
    engine = StubEngine()
    with running(engine) as served:
        assert served.get("/health").status_code == 200
        engine.failure = RuntimeError("out of memory")
        assert engine.loop is not None
        engine.loop.call_soon_threadsafe(engine.failed.set)
        assert served.ended.wait(WAIT_S)
    assert "out of memory" in str(served.error)


# --- V11: the log, and the metrics ------------------------------------------------------------


def test_the_log_knows_requests_but_no_prompts_and_no_keys(
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


def test_metrics_count_and_pass_the_engines_through() -> None:
    with running() as served:
        served.post("/v1/completions", PROMPT)
        served.post("/v1/completions", {"prompt": 3})
        served.get("/any/thing")
        answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in (
        'tuneship_requests_total{route="/v1/completions",status="200"} 1.0',
        'tuneship_requests_total{route="/v1/completions",status="400"} 1.0',
        'tuneship_requests_total{route="other",status="404"} 1.0',
        f"tuneship_prompt_tokens_total {len(PROMPT['prompt'])}.0",
        "tuneship_completion_tokens_total 2.0",
        "tuneship_first_token_seconds_count 1.0",
        "tuneship_ready 1.0",
        "vllm:num_requests_waiting 0",
    ):
        assert line in lines, line
