"""An engine by URL: a gateway of ours stands in for a good one, canned bytes for a bad one."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gateway_kit import WAIT_S, Running, StubEngine, canned, frames, running, sse

from tuneship.serve.keys import KeyFile
from tuneship.serve.limits import Limits
from tuneship.serve.upstream import Upstream

PROMPT = {"prompt": "one?"}


@contextmanager
def through(engine: StubEngine, **settings: object) -> Iterator[Running]:
    """A gateway in front of a gateway in front of a stub, ready."""
    # The inner one takes text, and counts no tokens of the prompt.
    with running(engine, contracts={}) as inner, running(Upstream(inner.url), contracts={}, **settings) as outer:  # type: ignore[arg-type]
        wait_ready(outer)
        yield outer


def wait_ready(served: Running) -> None:
    for _ in range(2000):
        if served.get("/health").status_code == 200:
            return
    raise AssertionError("it did not get ready")


def test_answers_come_through() -> None:
    engine = StubEngine()
    with through(engine) as served:
        assert served.get("/v1/models").json()["data"][0]["max_model_len"] == 200
        body = {**PROMPT, "n": 2, "seed": 3, "temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "stop": ["x"]}
        answer = served.post("/v1/completions", body, headers={"x-request-id": "mine"}).json()
        assert [choice["text"] for choice in answer["choices"]] == [" SELECT 1", " SELECT 1"]
        assert answer["usage"]["completion_tokens"] == 4
        chat = served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}).json()
        assert chat["choices"][0]["message"]["content"] == "SELECT 1"
    wanted = engine.wanted[0]
    assert (wanted.id, wanted.n, wanted.seed, wanted.temperature) == ("mine", 2, 3, 0.5)
    assert (wanted.top_p, wanted.max_tokens, wanted.stop, wanted.model) == (0.9, 5, ("x",), "stub")
    assert engine.wanted[1].messages == [{"role": "user", "content": "hello"}]


def test_a_contracts_prompts_go_as_token_ids() -> None:
    asked: list[bytes] = []
    answer = sse({"index": 0, "text": " 1", "finish_reason": "stop"})
    with canned(answer, asked) as url, running(Upstream(url, ["stub"])) as served:
        wait_ready(served)
        assert served.post("/ask", {"question": "a"}).json() == {"answer": "1"}
    body = json.loads(next(request for request in asked if request.startswith(b"POST")).partition(b"\r\n\r\n")[2])
    assert "".join(map(chr, body["prompt"])) == "Question: a\nContext: \nAnswer:"
    assert body["stop"] == ["\nQuestion:", "\nContext:"]
    assert body["stream_options"] == {"include_usage": True}


def test_tokens_come_as_they_are_made() -> None:
    engine = StubEngine(hold=1)
    with through(engine) as served, served.streamed("/v1/completions", PROMPT) as lines:
        assert "SELECT" in next(lines)
        engine.release()
        assert "data: [DONE]" in list(lines)


def test_v6_who_leaves_ends_the_generation_there_too() -> None:
    engine = StubEngine(hold=1)
    with through(engine) as served:
        with served.streamed("/v1/completions", PROMPT):
            engine.wait_running(1)
        engine.wait_running(0)


def test_v8_a_deadline_ends_the_generation_there_too() -> None:
    engine = StubEngine(hold=0)
    with through(engine, limits=Limits(request_s=0.3)) as served:
        assert served.post("/v1/completions", PROMPT).status_code == 504
        engine.wait_running(0)


def test_the_engines_key_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("0123456789abcdef\n")
    keys = KeyFile(file)
    with (
        running(contracts={}, keys=keys) as inner,
        running(Upstream(inner.url + "/v1/", key=keys.first), contracts={}) as served,
    ):
        wait_ready(served)
        assert served.post("/v1/completions", PROMPT).status_code == 200


def test_metrics_of_the_engine_come_behind_ours() -> None:
    with through(StubEngine()) as served:
        lines = served.get("/metrics").text.splitlines()
    assert "vllm:num_requests_waiting 0" in lines
    assert lines.count("tuneship_ready 1.0") == 1


def test_ready_only_with_every_model() -> None:
    with running(StubEngine(names=("one", "two")), contracts={}) as inner:
        with running(Upstream(inner.url, ["one", "three"]), contracts={}) as served:
            answer = served.get("/health")
            assert answer.status_code == 503
        with running(Upstream(inner.url, ["two"]), contracts={}) as served:
            wait_ready(served)
            assert [model["id"] for model in served.get("/v1/models").json()["data"]] == ["two"]


def test_an_engine_that_goes_is_told() -> None:
    with running(contracts={}) as inner, running(Upstream(inner.url), contracts={}) as served:
        wait_ready(served)
        inner.server.stop()
        assert inner.ended.wait(WAIT_S)
        answer = served.post("/v1/completions", PROMPT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_gone")
        assert served.get("/health").status_code == 503


def test_no_engine_at_all_is_not_fatal() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with running(Upstream(url), contracts={}) as served:
        assert served.get("/health").status_code == 503
        assert served.get("/health?live").status_code == 200
        assert "vllm:" not in served.get("/metrics").text


# --- engines that misbehave -------------------------------------------------------------------


def refusal(status: str, body: str = "", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n{headers}Content-Length: {len(body)}\r\n\r\n{body}".encode()


PIECE = {"index": 0, "text": " 1", "finish_reason": None}


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (refusal("500 Oops", "private"), 502, "engine_refuses"),
        (refusal("401 No", "private"), 502, "engine_refuses"),
        (refusal("404 No", "private"), 502, "engine_refuses"),
        (refusal("400 Bad", '{"error": {"message": "too long"}}'), 400, "refused_by_engine"),
        (refusal("400 Bad", '{"message": "too long"}'), 400, "refused_by_engine"),
        (refusal("400 Bad", "not JSON"), 400, "refused_by_engine"),
        (refusal("400 Bad", "[]"), 400, "refused_by_engine"),
        (refusal("429 Busy", "", "Retry-After: 7\r\n"), 429, "overloaded"),
        (refusal("503 Busy", "", "Retry-After: soon\r\n"), 503, "overloaded"),
        (b"", 502, "engine_broke_off"),
        (b"not HTTP at all\r\n\r\n", 502, "engine_broke_off"),
        (sse(), 502, "engine_broke_off"),
        (sse(end=b"data: {\n\n"), 502, "engine_broke_off"),
        (sse(end=b'data: {"error": {"message": "out of memory"}}\n\n'), 502, "engine_broke_off"),
        (sse({"index": 5, "text": "x", "finish_reason": "stop"}), 502, "engine_broke_off"),
        (sse({"index": -1, "text": "x", "finish_reason": "stop"}), 502, "engine_broke_off"),
        (sse(PIECE), 502, "engine_broke_off"),
    ],
)
def test_a_bad_engine_is_a_bad_gateway(answer: bytes, status: int, code: str) -> None:
    with canned(answer) as url, running(Upstream(url), contracts={}) as served:
        wait_ready(served)
        got = served.post("/v1/completions", PROMPT)
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)
        assert "private" not in got.text
        if status in (429, 503):
            assert got.headers["retry-after"] == ("7" if status == 429 else "1")


def test_a_frame_without_an_end_is_not_kept() -> None:
    with canned(sse(end=b"x" * 8 * 2**20)) as url, running(Upstream(url), contracts={}) as served:
        wait_ready(served)
        got = served.post("/v1/completions", PROMPT)
    assert (got.status_code, got.json()["error"]["message"]) == (502, "the engine sends frames without an end")


def test_an_engine_that_breaks_off_ends_the_stream_with_an_error() -> None:
    with canned(sse(PIECE, end=b"")) as url, running(Upstream(url), contracts={}) as served:
        wait_ready(served)
        first, error = frames(served.post("/v1/completions", {**PROMPT, "stream": True}))
    assert first["choices"][0]["text"] == " 1"
    assert error["error"]["code"] == "engine_broke_off"


def test_events_may_be_split_anywhere_and_end_as_the_engine_likes() -> None:
    whole = sse(PIECE, {"index": 0, "text": "2", "finish_reason": "length"})
    head, _, events = whole.partition(b"\r\n\r\n")
    comments = b": a comment\r\n\r\n" + events.replace(b"\n", b"\r\n")
    chunks = b"".join(b"1\r\n" + comments[at : at + 1] + b"\r\n" for at in range(len(comments)))
    answer = head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    with canned(answer) as url, running(Upstream(url), contracts={}) as served:
        wait_ready(served)
        choice = served.post("/v1/completions", PROMPT).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" 12", "length")
