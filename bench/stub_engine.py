"""An engine without a time of its own: its tokens hold the moment at which they were written.

    python bench/stub_engine.py 0.1

The request says how: `max_tokens` how many, `seed` when (see below). The argument is the time of `SERVICE`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

EVERY_S = 0.02
STAGGERED, LOCKSTEP, SERVICE, AT_ONCE = range(4)
CHOICE = b'{"index":0,"text":"T%d;","logprobs":null,"finish_reason":%s}'
FRAME = b'data: {"id":"x","object":"text_completion","created":1,"model":"stub","choices":[' + CHOICE + b"]}\n\n"
COUNTS = b'"usage":{"prompt_tokens":9,"completion_tokens":64,"total_tokens":73}}'
USAGE = b'data: {"id":"x","object":"text_completion","created":1,"model":"stub","choices":[],' + COUNTS + b"\n\n"
WHOLE = b'{"id":"x","object":"text_completion","created":1,"model":"stub","choices":[' + CHOICE + b"]," + COUNTS
MODELS = b'{"object":"list","data":[{"id":"stub","object":"model","created":1,"owned_by":"x","max_model_len":2048}]}'


class Stub(asyncio.Protocol):
    """Answers GET with its models, POST with a completion of `max_tokens` tokens; `seed` says in which time."""

    beat: asyncio.Event
    service_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self.received = b""
            self.whole(MODELS)
            return
        length = re.search(rb"content-length: (\d+)", head, re.I)
        if length is not None and len(body) >= int(length[1]):
            self.received = b""
            asked = json.loads(body)
            if not asked.get("stream"):
                self.whole(WHOLE % (time.monotonic_ns(), b'"stop"'))
            elif asked["seed"] == AT_ONCE:
                last = asked["max_tokens"] - 1
                self.begin()
                self.transport.write(b"".join(chunk(token(number == last)) for number in range(last + 1)) + END)
            else:
                self.task = asyncio.ensure_future(self.answer(asked["max_tokens"], asked["seed"]))

    def whole(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)

    def begin(self) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    async def answer(self, count: int, mode: int) -> None:
        if mode == SERVICE:
            await asyncio.sleep(self.service_s)
        self.begin()
        for number in range(count):
            if number:
                await (self.beat.wait() if mode == LOCKSTEP else asyncio.sleep(EVERY_S))
            self.transport.write(chunk(token(number == count - 1)))
        self.transport.write(END)


def token(last: bool) -> bytes:
    return FRAME % (time.monotonic_ns(), b'"stop"' if last else b"null")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


END = chunk(USAGE + b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def stub(service_s: float) -> None:
    Stub.service_s, Stub.beat = service_s, asyncio.Event()
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]} (", file=sys.stderr, flush=True)
    while True:
        await asyncio.sleep(EVERY_S)
        Stub.beat.set()
        Stub.beat.clear()


def loop(main: Any) -> None:
    """On uvloop where it is installed, as uvicorn."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


if __name__ == "__main__":
    loop(stub(float(sys.argv[1])))
