"""One request on its way through the gateway: its id, what was answered, what the log will say."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from tuneship.serve.engine import Usage
from tuneship.serve.shapes import ApiError, dumps

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_JSON = (b"content-type", b"application/json")
_STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Call:
    """A request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self._send = scope, receive, send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if _ID.fullmatch(given) else secrets.token_hex(12)
        self.route = "other"
        self.began = time.monotonic()
        self.status: int | None = None
        """None until the answer has begun."""
        self.closing = False
        """Ask the client to use another connection for its next request."""
        self.streaming = False
        self.code: str | None = None
        """Of an error: ApiError.code."""
        self.model: str | None = None
        self.usage = Usage()
        self.waited: float | None = None
        """Seconds until its turn with the engine came."""
        self.first: float | None = None
        """Seconds until the first piece was there."""

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.monotonic() - self.began

    async def reply(
        self,
        status: int,
        body: bytes,
        headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        kind: tuple[bytes, bytes] = _JSON,
    ) -> None:
        """The whole answer."""
        await self._begin(status, [kind, (b"content-length", str(len(body)).encode()), *headers])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def stream(self) -> None:
        """Begins an answer of frames."""
        self.streaming = True
        await self._begin(200, [*_STREAM])

    async def frame(self, data: bytes) -> None:
        """More of a streamed answer."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        """The last of a streamed answer."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """The error instead of an answer, or as the last frame of one."""
        self.code = error.code
        if self.status is None:
            await self.reply(error.status, error.body(), error.headers())
        elif self.streaming:
            await self.end(b"data: " + error.body() + b"\n\n")

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers.append((b"x-request-id", self.id.encode()))
        if self.closing:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    @asynccontextmanager
    async def watched(self, seconds: float) -> AsyncIterator[None]:
        """Ends what is inside when the client goes or the time is over.

        Raises:
            ClientGone: the connection is closed.
            ApiError: 504.
        """
        task, gone = asyncio.current_task(), False
        assert task is not None

        async def watch() -> None:
            nonlocal gone
            while (await self.receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            async with asyncio.timeout(seconds - self.seconds):
                yield
        except TimeoutError:
            raise ApiError(504, f"no complete answer within {seconds:g} s", code="deadline_exceeded") from None
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            watcher.cancel()

    def line(self, *, gone: bool) -> dict[str, Any]:
        """What the log says: no prompt, no answer, no key."""
        facts = {
            "id": self.id,
            "route": self.route,
            "status": self.status,
            "ms": _ms(self.seconds),
            "code": "client_gone" if gone else self.code,
            "model": self.model,
            "waited_ms": _ms(self.waited),
            "first_ms": _ms(self.first),
            "prompt_tokens": self.usage.prompt_tokens or None,
            "completion_tokens": self.usage.completion_tokens or None,
        }
        return {key: value for key, value in facts.items() if value is not None}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def log_line(event: str, level: str = "info", **facts: Any) -> bytes:
    """One line of a structured log, with the names that Cloud Logging knows."""
    return dumps({"time": _now(), "severity": level.upper(), "message": event, **facts}) + b"\n"


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
