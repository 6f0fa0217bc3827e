"""Request bodies, checked field by field before anything is done for them.

Every field is known, or the request is refused with its name: a parameter that would have no
effect is an error here as in a recipe. Those of OpenAI's that this gateway does not act on are
taken where their value asks for nothing (`"logprobs": null`, `"presence_penalty": 0`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tuneship.serve.limits import Limits
from tuneship.serve.shapes import ApiError

# Below it a distribution is its maximum, and dividing by it is no longer exact.
_COLDEST = 0.01

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "presence_penalty": (0,),
    "store": (False,),
    "suffix": ("",),
    "tools": ([],),
    "top_logprobs": (0,),
}
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Body:
    """What a request asks for."""

    model: str | None = None
    prompts: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    row: Mapping[str, str] | None = None
    """The fields of the prompt contract."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read(raw: bytes) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_not_a_number)
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8: {error.reason} at byte {error.start}", None) from None
    except RecursionError:
        raise _bad("the body is nested too deeply", None) from None
    except ValueError as error:
        # json's message holds a position, not the text; that of a huge integer names its length.
        raise _bad(f"the body is not JSON: {error}", None) from None
    if not isinstance(value, dict):
        raise _bad(f"the body must be a JSON object, not {_kind(value)}", None)
    return value


def completion(value: Mapping[str, Any], limits: Limits) -> Body:
    """POST /v1/completions."""
    fields = _Fields(value, limits)
    return fields.body(prompts=fields.prompts(), **fields.sampling(), **fields.streaming())


def chat(value: Mapping[str, Any], limits: Limits) -> Body:
    """POST /v1/chat/completions."""
    fields = _Fields(value, limits)
    return fields.body(messages=fields.messages(), **fields.sampling(), **fields.streaming())


def ask(value: Mapping[str, Any], limits: Limits) -> Body:
    """POST /ask: greedy, one answer."""
    fields = _Fields(value, limits)
    row = {"question": fields.text("question"), "context": fields.text("context", ""), "answer": ""}
    return fields.body(
        row=row,
        temperature=0.0,
        max_tokens=fields.whole("max_tokens", 1, limits.max_tokens),
        stream=fields.flag("stream"),
    )


def generate(value: Mapping[str, Any], limits: Limits) -> Body:
    """POST /generate, the tutorial's."""
    fields = _Fields(value, limits)
    return fields.body(prompts=(fields.text("prompt"),), **fields.sampling())


class _Fields:
    """Takes fields out of an object; what is left at the end is refused."""

    def __init__(self, value: Mapping[str, Any], limits: Limits) -> None:
        self._limits = limits
        self._left = {key: inner for key, inner in value.items() if inner is not None}

    def body(self, **taken: Any) -> Body:
        """The body, when everything else has been taken.

        Raises:
            ApiError: a field is left.
        """
        model = self.text("model", "") or None
        self.text("user", "")
        for key, inner in self._left.items():
            if key not in _WITHOUT_EFFECT:
                raise _bad(f"unknown parameter {key[:64]!r}", key[:64], code="unknown_parameter")
            if inner not in _WITHOUT_EFFECT[key]:
                raise _bad(f"{key} is not supported", key, code="unsupported_parameter")
        return Body(model=model, **taken)

    def sampling(self) -> dict[str, Any]:
        """How tokens are chosen, and how many."""
        limits = self._limits
        many = [
            value
            for name in ("max_tokens", "max_completion_tokens")
            if (value := self.whole(name, 1, limits.max_tokens)) is not None
        ]
        temperature = self.number("temperature", 0.0, 2.0, 1.0)
        return {
            "max_tokens": min(many, default=None),
            "temperature": 0.0 if temperature < _COLDEST else temperature,
            "top_p": self.number("top_p", 0.0, 1.0, 1.0),
            "n": self.whole("n", 1, limits.choices) or 1,
            "seed": self.whole("seed", 0, 2**63 - 1),
            "stop": self.stop(),
        }

    def streaming(self) -> dict[str, bool]:
        """Whether to stream, and whether usage comes last."""
        options = self._left.pop("stream_options", {})
        if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
            raise _bad("stream_options must be an object with include_usage", "stream_options")
        return {"stream": self.flag("stream"), "include_usage": bool(options.get("include_usage"))}

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required where there is no default."""
        value = self._left.pop(name, default)
        if value is None:
            raise _bad(f"{name} is missing", name, code="missing_parameter")
        return _text(value, name)

    def flag(self, name: str) -> bool:
        """true or false; false where it is not set."""
        value = self._left.pop(name, False)
        if not isinstance(value, bool):
            raise _bad(f"{name} must be true or false, not {_kind(value)}", name)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            # JSON knows no integers: 32.0 is 32.
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _bad(f"{name} must be a whole number, not {_kind(value)}", name)
        if not low <= value <= high:
            raise _bad(f"{name} must be from {low} to {high}", name)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number within bounds."""
        value = self._left.pop(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _bad(f"{name} must be a number, not {_kind(value)}", name)
        if not low <= value <= high or (isinstance(value, float) and math.isnan(value)):
            raise _bad(f"{name} must be from {low:g} to {high:g}", name)
        return float(value)

    def stop(self) -> tuple[str, ...]:
        """A string or a few."""
        value = self._left.pop("stop", ())
        stops: Sequence[Any] = (value,) if isinstance(value, str) else value
        if not isinstance(stops, list | tuple) or len(stops) > self._limits.stops:
            raise _bad(f"stop must be a string or a list of at most {self._limits.stops}", "stop")
        texts = tuple(_text(stop, "stop") for stop in stops)
        if any(not 0 < len(text) <= self._limits.stop_chars for text in texts):
            raise _bad(f"a stop has 1 to {self._limits.stop_chars} characters", "stop")
        return texts

    def prompts(self) -> tuple[str, ...]:
        """A text or several."""
        value = self._left.pop("prompt", None)
        if value is None:
            raise _bad("prompt is missing", "prompt", code="missing_parameter")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise _bad("prompt must be a string or a list of strings; token ids are not taken", "prompt")
        if len(texts) > self._limits.choices:
            raise _bad(f"at most {self._limits.choices} prompts at a time", "prompt")
        return tuple(_text(text, "prompt") for text in texts)

    def messages(self) -> tuple[Message, ...]:
        """A chat."""
        value = self._left.pop("messages", None)
        if value is None:
            raise _bad("messages is missing", "messages", code="missing_parameter")
        if not isinstance(value, list) or not 0 < len(value) <= self._limits.messages:
            raise _bad(f"messages must be a list of 1 to {self._limits.messages}", "messages")
        return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise _bad(f"{where} must be an object with a role: {', '.join(_ROLES)}", where)
    content = value.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise _bad(f"{where}.content has a part that is not text", f"{where}.content")
        content = "\n".join(_text(part.get("text"), f"{where}.content") for part in content)
    if unknown := set(value) - {"role", "content", "name"}:
        raise _bad(f"{where} has an unknown field {min(unknown)[:64]!r}", where, code="unknown_parameter")
    _text(value.get("name", ""), f"{where}.name")
    return Message(value["role"], _text(content, f"{where}.content"))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _bad(f"{name} must be a string, not {_kind(value)}", name)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _bad(f"{name} holds half of a surrogate pair", name) from None
    return value


def _kind(value: object) -> str:
    """A value's type by JSON's names; never the value, which may be a megabyte or a secret."""
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _bad(message: str, param: str | None, *, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)
