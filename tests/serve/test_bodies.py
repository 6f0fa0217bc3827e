"""Bodies: what is taken, what is refused, and that nothing else can happen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.serve import bodies
from tuneship.serve.bodies import Body, Message
from tuneship.serve.limits import Limits
from tuneship.serve.shapes import ApiError

LIMITS = Limits()
READERS = (bodies.completion, bodies.chat, bodies.ask, bodies.generate)
Reader = Callable[[Mapping[str, Any], Limits], Body]


def refusal(reader: Reader, value: Mapping[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        reader(value, LIMITS)
    return caught.value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b'{"prompt": "x"', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
        (b"[]", "object, not a list"),
        (b"3", "object, not a number"),
        (b"null", "object, not null"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b'{"temperature": -Infinity}', "-Infinity is not JSON"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        bodies.read(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("prompt", []),
        ("prompt", [1, 2]),
        ("prompt", [["a"]]),
        ("prompt", ["x"] * 9),
        ("prompt", "\ud800"),
        ("max_tokens", 0),
        ("max_tokens", 10**9),
        ("max_tokens", 10**4000),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "7"),
        ("n", 0),
        ("n", 10**6),
        ("temperature", -1),
        ("temperature", 2.1),
        ("temperature", 1e400),
        ("temperature", float("nan")),
        ("temperature", 10**4000),
        ("temperature", "hot"),
        ("temperature", False),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", 3),
        ("stop", [""]),
        ("stop", ["x"] * 9),
        ("stop", ["x" * 65]),
        ("stop", [3]),
        ("stop", {"a": 1}),
        ("stream", 1),
        ("stream_options", []),
        ("stream_options", {"include_usage": 1}),
        ("model", 3),
        ("logprobs", 3),
        ("echo", True),
        ("best_of", 2),
        ("presence_penalty", 1),
        ("prompt_embeds", "x"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(field: str, value: object) -> None:
    error = refusal(bodies.completion, {"prompt": "x", field: value})
    assert (error.status, error.param) == (400, field)


def test_a_refusal_does_not_repeat_the_value() -> None:
    error = refusal(bodies.completion, {"prompt": "x", "max_tokens": "private"})
    assert "private" not in error.message


@pytest.mark.parametrize(
    "messages",
    [
        "x",
        [],
        [3],
        [{}],
        [{"role": "robot", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 3}]}],
        [{"role": "user", "content": "x", "tool_calls": []}],
        [{"role": "user", "content": "\udfff"}],
        [{"role": "user", "content": "x"}] * 65,
    ],
)
def test_a_wrong_chat_is_refused(messages: object) -> None:
    assert refusal(bodies.chat, {"messages": messages}).status == 400


@pytest.mark.parametrize(
    ("reader", "missing"),
    list(zip(READERS, ("prompt", "messages", "question", "prompt"), strict=True)),
)
def test_what_is_needed_is_named(reader: Reader, missing: str) -> None:
    error = refusal(reader, {"model": "x"})
    assert (error.code, error.param) == ("missing_parameter", missing)


def test_a_completion_is_read_whole() -> None:
    body = bodies.completion(
        {
            "model": "m",
            "prompt": ["a", "b"],
            "max_tokens": 7,
            "temperature": 1,
            "top_p": 0.5,
            "n": 2,
            "seed": 3,
            "stop": "\n",
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "me",
            "logprobs": None,
            "presence_penalty": 0.0,
            "logit_bias": {},
            "suffix": "",
        },
        LIMITS,
    )
    assert body == Body("m", ("a", "b"), (), None, 7, 1.0, 0.5, 2, 3, ("\n",), True, True)


def test_a_chat_is_read_whole() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = bodies.chat(
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
            "max_completion_tokens": 9,
        },
        LIMITS,
    )
    assert body.messages == (Message("system", "s"), Message("user", "a\nb"))
    assert body.max_tokens == 9


def test_a_question_is_greedy() -> None:
    body = bodies.ask({"question": "q"}, LIMITS)
    assert (body.temperature, body.row) == (0.0, {"question": "q", "context": "", "answer": ""})


def test_the_coldest_temperatures_are_greedy() -> None:
    """Dividing by 1e-300 makes infinities, and no distribution."""
    assert bodies.completion({"prompt": "x", "temperature": 1e-300}, LIMITS).temperature == 0.0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
field_names = st.sampled_from(
    "prompt messages question context model max_tokens max_completion_tokens temperature top_p n seed stop stream "
    "stream_options user logprobs echo best_of tools role content".split()
) | st.text(max_size=8)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(field_names, json_values, max_size=8), st.sampled_from(READERS))
def test_any_object_is_taken_or_refused(value: dict[str, Any], reader: Reader) -> None:
    try:
        body = reader(value, LIMITS)
    except ApiError as error:
        assert error.status == 400
        json.loads(error.body())
    else:
        assert 1 <= body.n <= LIMITS.choices


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(bodies.read(raw), dict)
    except ApiError as error:
        assert error.status == 400
