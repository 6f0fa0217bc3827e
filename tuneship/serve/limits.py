"""The bounds of the gateway, the places in it, and reading a body within them.

A request takes a place before its body is read and keeps it until its answer is sent; the places
are as many as may run and wait together, so memory is bounded by the first check. Who finds none
is told so at once. Among those inside, `running` at a time are with the engine, in the order in
which they came.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from tuneship.serve.call import Receive
from tuneship.serve.shapes import ApiError


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may ask."""

    running: int = 16
    """Requests with the engine at a time."""
    waiting: int = 64
    """Requests that may wait for it; one more is answered 429."""
    body_bytes: int = 2**20
    """Largest body."""
    max_tokens: int = 4096
    """Largest max_tokens, where the model's length does not say less."""
    choices: int = 8
    """Prompts × n of one request."""
    messages: int = 64
    """Messages of a chat."""
    stops: int = 8
    """Stop strings."""
    stop_chars: int = 64
    """Characters of a stop string."""
    body_s: float = 10.0
    """Seconds in which a body must have arrived: 408."""
    request_s: float = 120.0
    """Seconds in which an answer must be complete: 504."""
    head_s: float = 10.0
    """Seconds in which a request's head must have arrived, or the connection is cut."""
    stall_s: float = 30.0
    """Seconds for which a reader may take nothing of what is ready, or the connection is cut."""
    drain_s: float = 30.0
    """Seconds that running requests have after SIGTERM."""


class Gate:
    """Counts those inside."""

    def __init__(self, running: int, waiting: int) -> None:
        self._places = running + waiting
        self._slots = asyncio.Semaphore(running)
        self.inside = 0
        """Requests that have a place."""
        self.running = 0
        """Of them, those with the engine."""
        self.empty = asyncio.Event()
        """Set while nobody is inside."""
        self.empty.set()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place, from reading the body to the last byte of the answer.

        Raises:
            ApiError: 429, there is none.
        """
        if self.inside >= self._places:
            raise ApiError(429, "too many requests are waiting; ask again", code="overloaded", retry_after=1)
        self.inside += 1
        self.empty.clear()
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self.empty.set()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A turn with the engine, first come, first served."""
        async with self._slots:
            self.running += 1
            try:
                yield
            finally:
                self.running -= 1


async def read_body(receive: Receive, declared: bytes | None, limits: Limits) -> bytes:
    """A request's body.

    Args:
        declared: the Content-Length header. It is believed only where it says too much.

    Raises:
        ApiError: 413 or 408.
        ConnectionError: the client is gone.
    """
    too_large = ApiError(413, f"the body is larger than {limits.body_bytes} bytes", code="body_too_large")
    if declared is not None and declared.isdigit() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limits.body_bytes:
                    raise too_large
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {limits.body_s:g} s", code="body_timeout") from None
