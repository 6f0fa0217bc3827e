"""Deadlines on the connection itself, where an ASGI program cannot reach.

uvicorn waits for a request's head for as long as the client likes and whatever its size, and for a
reader who takes nothing as well. Here a connection is cut when a head does not arrive in time or does
not end, when nothing that is ready to be read is taken for some time, and when there are too many of them.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

# A key, a request id and what a proxy adds are a few hundred.
_HEAD_BYTES = 2**16
# Of a body that nobody reads any more.
_REST_BYTES = 2**28


def protocol(*, head_s: float, stall_s: float, most: int) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these deadlines.

    Args:
        head_s: for a request's head, from the connection or from its first byte.
        stall_s: for a reader to take something.
        most: connections at a time.
    """

    class Guarded(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
        _head: asyncio.TimerHandle | None = None
        _head_bytes = 0
        _stall: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._head = self.loop.call_later(head_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                _off(self._head)
                self._head, self._head_bytes = None, 0
                return
            self._head_bytes += len(data)
            # Who is refused for the size of a body is sending it still, and reads the answer afterwards.
            most = _REST_BYTES if self.cycle is not None and self.cycle.more_body else _HEAD_BYTES
            if self._head_bytes > most:
                self.transport.abort()
            elif self._head is None:
                self._head = self.loop.call_later(head_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall = self.loop.call_later(stall_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _off(self._stall)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            _off(self._head)
            _off(self._stall)

    return Guarded


def _off(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def tire(listening: socket.socket, stall_s: float) -> None:
    """Has the kernel give up on peers that acknowledge nothing, also after our last byte."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
