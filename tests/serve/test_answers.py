"""What the gateway answers, over real sockets, in front of an engine that does what the test says."""

from __future__ import annotations

import json

from gateway_kit import (
    PROMPT,
    Running,
    StubEngine,
    frames,
    running,
)


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
