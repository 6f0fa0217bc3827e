"""An engine that is not there, hangs or dies (V5, V8), and how the gateway ends (V9)."""

from __future__ import annotations

import time

from gateway_kit import (
    PROMPT,
    WAIT_S,
    Running,
    StubEngine,
    assert_error,
    frames,
    in_background,
    running,
)

from tuneship.serve.limits import Limits
from tuneship.serve.shapes import ApiError


def test_v5_not_ready_is_told_and_not_fatal() -> None:
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


def test_v8_an_answer_that_takes_too_long_is_given_up() -> None:
    engine = StubEngine(hold=0)
    with running(engine, limits=Limits(request_s=0.2)) as served:
        answer = served.post("/v1/completions", PROMPT)
        assert answer.status_code == 504
        assert_error(504, answer.content, "deadline_exceeded")
        engine.wait_running(0)


def test_v8_the_deadline_counts_from_arrival() -> None:
    """Also for one who waited first: else it would get as long again."""
    engine = StubEngine(hold=0)
    with running(engine, limits=Limits(running=1, request_s=1.0)) as served:
        first = in_background(lambda: served.post("/v1/completions", PROMPT).status_code)
        engine.wait_running(1)
        began = time.monotonic()
        assert served.post("/v1/completions", PROMPT).status_code == 504
        assert time.monotonic() - began < 1.5
        first[0].join(WAIT_S)


def test_v8_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    engine = StubEngine(hold=1)
    with running(engine, limits=Limits(request_s=0.3)) as served:
        first, error = frames(served.post("/v1/completions", {**PROMPT, "stream": True}))
    assert first["choices"][0]["text"] == " SELECT"
    assert error["error"]["code"] == "deadline_exceeded"


def test_v5_an_engines_refusal_keeps_its_status() -> None:
    engine = StubEngine(refusal=ApiError(503, "gone", code="engine_gone", retry_after=5))
    with running(engine) as served:
        for stream in (False, True):
            answer = served.post("/v1/completions", {**PROMPT, "stream": stream})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert_error(503, answer.content, "engine_gone")


def test_v9_draining_finishes_what_runs_and_refuses_the_rest() -> None:
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


def test_v9_draining_ends_at_its_deadline() -> None:
    engine = StubEngine(hold=1)
    with running(engine, limits=Limits(drain_s=0.2)) as served:
        streamed = in_background(lambda: frames(served.post("/v1/completions", {**PROMPT, "stream": True})))
        engine.wait_running(1)
        served.server.stop()
        assert served.ended.wait(WAIT_S)
        streamed[0].join(WAIT_S)
    assert streamed[1][0][-1]["error"]["code"] == "draining"


def test_v5_the_engines_end_is_the_servers() -> None:
    engine = StubEngine()
    with running(engine) as served:
        assert served.get("/health").status_code == 200
        engine.failure = RuntimeError("out of memory")
        assert engine.loop is not None
        engine.loop.call_soon_threadsafe(engine.failed.set)
        assert served.ended.wait(WAIT_S)
    assert "out of memory" in str(served.error)
