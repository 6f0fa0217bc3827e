"""What the gateway answers, in OpenAI's shapes (platform.openai.com/docs/api-reference).

Frames of a stream are made by joining bytes: a token costs a few microseconds here, and hundreds
of streams share one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Protocol

from tuneship.serve.engine import Piece, Usage

DONE = b"data: [DONE]\n\n"

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is not the one asked for.

    Args:
        code: what a program may branch on.
        param: the field of the request that is wrong.
        retry_after: seconds after which to ask again.
        allow: of a 405, the methods that would do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.allow = retry_after, allow

    def body(self) -> bytes:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return dumps({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those that belong to it."""
        headers = []
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.allow is not None:
            headers.append((b"allow", self.allow.encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


def dumps(value: Any) -> bytes:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":")).encode()


def models(names: Sequence[str], lengths: Sequence[int | None], created: int) -> bytes:
    """The list of models; `max_model_len` is vLLM's name for the longest prompt and completion together."""
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "tuneship", "max_model_len": length}
        for name, length in zip(names, lengths, strict=True)
    ]
    return dumps({"object": "list", "data": data})


class Shape(Protocol):
    """How one kind of request is answered."""

    def whole(self, texts: Sequence[str], finishes: Sequence[str], usage: Usage) -> bytes:
        """The answer that is not streamed."""
        ...


class Streamed(Shape, Protocol):
    """How one kind of request is answered piece by piece, too."""

    def opening(self, choices: int) -> bytes:
        """Frames before the first piece."""
        ...

    def frame(self, piece: Piece) -> bytes:
        """One piece of a stream."""
        ...

    def closing(self, usage: Usage | None) -> bytes:
        """Frames after the last piece."""
        ...


class Completion:
    """POST /v1/completions."""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._before = _before(self._head) + '{"index":'

    def opening(self, choices: int) -> bytes:
        """See `Streamed`."""
        return b""

    def frame(self, piece: Piece) -> bytes:
        """See `Streamed`."""
        finish = "null" if piece.finish is None else quoted(piece.finish)
        return (
            f'{self._before}{piece.index},"text":{quoted(piece.text)},"logprobs":null,"finish_reason":{finish}}}]}}\n\n'
        ).encode()

    def closing(self, usage: Usage | None) -> bytes:
        """See `Streamed`."""
        return _usage_frame(self._head, usage) + DONE

    def whole(self, texts: Sequence[str], finishes: Sequence[str], usage: Usage) -> bytes:
        """See `Shape`."""
        choices = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return dumps({**self._head, "choices": choices, "usage": _usage(usage)})


class Chat:
    """POST /v1/chat/completions. The blank that the contract puts before an answer is not part of a message."""

    def __init__(self, request_id: str, model: str) -> None:
        created = int(time.time())
        self._head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion", "created": created, "model": model}
        self._chunk = {**self._head, "object": "chat.completion.chunk"}
        self._before = _before(self._chunk) + '{"index":'
        self._begun: set[int] = set()

    def opening(self, choices: int) -> bytes:
        """See `Streamed`."""
        return "".join(
            f'{self._before}{index},"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]}}\n\n'
            for index in range(choices)
        ).encode()

    def frame(self, piece: Piece) -> bytes:
        """See `Streamed`."""
        text = _after_blanks(piece, self._begun)
        finish = "null" if piece.finish is None else quoted(piece.finish)
        delta = f'{{"content":{quoted(text)}}}' if text else "{}"
        if not text and piece.finish is None:
            return b""
        return f'{self._before}{piece.index},"delta":{delta},"logprobs":null,"finish_reason":{finish}}}]}}\n\n'.encode()

    def closing(self, usage: Usage | None) -> bytes:
        """See `Streamed`."""
        return _usage_frame(self._chunk, usage) + DONE

    def whole(self, texts: Sequence[str], finishes: Sequence[str], usage: Usage) -> bytes:
        """See `Shape`."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text.lstrip()},
                "logprobs": None,
                "finish_reason": finish,
            }
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return dumps({**self._head, "choices": choices, "usage": _usage(usage)})


class Ask:
    """POST /ask: the answer alone."""

    def __init__(self) -> None:
        self._begun: set[int] = set()

    def opening(self, choices: int) -> bytes:
        """See `Streamed`."""
        return b""

    def frame(self, piece: Piece) -> bytes:
        """See `Streamed`."""
        text = _after_blanks(piece, self._begun)
        return f'data: {{"text":{quoted(text)}}}\n\n'.encode() if text else b""

    def closing(self, usage: Usage | None) -> bytes:
        """See `Streamed`."""
        return DONE

    def whole(self, texts: Sequence[str], finishes: Sequence[str], usage: Usage) -> bytes:
        """See `Shape`."""
        return dumps({"answer": texts[0].strip()})


class Generate:
    """POST /generate, as the tutorial's curl expects it; never streamed.

    Args:
        prompt: the text that was sent; it is part of the answer.
    """

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def whole(self, texts: Sequence[str], finishes: Sequence[str], usage: Usage) -> bytes:
        """See `Shape`."""
        return dumps({"predictions": [f"Prompt:\n{self._prompt}\nOutput:\n{text}" for text in texts]})


def _before(head: dict[str, Any]) -> str:
    return "data: " + dumps(head).decode()[:-1] + ',"choices":['


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _usage_frame(head: dict[str, Any], usage: Usage | None) -> bytes:
    return b"" if usage is None else b"data: " + dumps({**head, "choices": [], "usage": _usage(usage)}) + b"\n\n"


def _after_blanks(piece: Piece, begun: set[int]) -> str:
    """The piece's text, without the blanks before the first character of its choice."""
    if piece.index in begun:
        return piece.text
    text = piece.text.lstrip()
    if text:
        begun.add(piece.index)
    return text
