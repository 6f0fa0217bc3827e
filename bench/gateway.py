"""What the gateway adds: latency of a token and of a request, and its behaviour under overload.

    python bench/gateway.py                     the gateway in front of a stub engine
    python bench/gateway.py --local runs/tiny   the engine in this process: 16 at a time against one

Three processes on loopback: a stub engine that answers at once, the gateway, and a client. Every
token holds the moment at which the stub wrote it, so each arrival is a latency; the same client
then asks the stub directly, and what the gateway adds is the difference. Streams are 64 tokens, one
each 20 ms. `staggered`: each stream in its own time. `lockstep`: all streams' tokens at one moment,
as an engine with a running batch makes them; the last of a hundred then waits for the others.

Covered: the whole way, HTTP included, at 100 streams. Not covered: a network, TLS, an engine's own time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STREAMS, TOKENS, EVERY_S = 100, 64, 0.02
STAMP = re.compile(rb"T(\d+);")
CHOICE = b'{"index":0,"text":"T%d;","logprobs":null,"finish_reason":%s}'
FRAME = b'data: {"id":"x","object":"text_completion","created":1,"model":"stub","choices":[' + CHOICE + b"]}\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":64,"total_tokens":73}}\n\ndata: [DONE]\n\n'
MODELS = b'{"data":[{"id":"stub","max_model_len":2048}]}'


# --- the stub engine --------------------------------------------------------------------------


class Stub(asyncio.Protocol):
    """Answers GET with its models, POST with a stream; `max_tokens` says how: 1 is a single token at once."""

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
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(MODELS), MODELS)
            self.transport.write(answer)
            return
        length = re.search(rb"content-length: (\d+)", head, re.I)
        if length is not None and len(body) >= int(length[1]):
            self.received = b""
            asked = json.loads(body)
            self.task = asyncio.ensure_future(self.answer(asked["max_tokens"], asked["seed"]))

    async def answer(self, count: int, mode: int) -> None:
        if mode == 2:
            await asyncio.sleep(self.service_s)
        write = self.transport.write
        write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(count):
            if number:
                await (self.beat.wait() if mode == 1 else asyncio.sleep(EVERY_S))
            frame = FRAME % (time.monotonic_ns(), b'"stop"' if number == count - 1 else b"null")
            write(b"%x\r\n%s\r\n" % (len(frame), frame))
        write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(USAGE), USAGE))


async def stub(service_s: float) -> None:
    Stub.service_s, Stub.beat = service_s, asyncio.Event()
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]} (", file=sys.stderr, flush=True)
    while True:
        await asyncio.sleep(EVERY_S)
        Stub.beat.set()
        Stub.beat.clear()


# --- the client -------------------------------------------------------------------------------


class Asking(asyncio.Protocol):
    """One request; `latencies` are those of its tokens."""

    def __init__(self, request: bytes, ended: asyncio.Future[int]) -> None:
        self.request, self.ended = request, ended
        self.latencies: list[float] = []
        self.rest = b""
        self.status = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        data = self.rest + data
        if not self.status:
            self.status = int(data[9:12])
        at = 0
        for stamp in STAMP.finditer(data):
            self.latencies.append((now - int(stamp[1])) / 1e6)
            at = stamp.end()
        self.rest = data[at:][-4096:]
        if b"[DONE]" in self.rest or self.status != 200 or b'"usage"' in self.rest:
            self.end()

    def connection_lost(self, error: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(self.status)
            self.transport.close()


async def ask(port: int, *, tokens: int, mode: int, stream: bool = True) -> tuple[int, float, list[float]]:
    """(status, milliseconds, latencies of tokens)"""
    body = {"model": "stub", "prompt": "Question: how many?", "max_tokens": tokens, "seed": mode, "stream": stream}
    raw = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    began = time.monotonic()
    _, asking = await loop.create_connection(lambda: Asking(request, ended), "127.0.0.1", port)
    status = await asyncio.wait_for(ended, 60)
    return status, (time.monotonic() - began) * 1000, asking.latencies


async def streams(port: int, mode: int, rounds: int) -> list[float]:
    """Latencies of all tokens but each stream's first, whose way includes the connection."""
    rng = random.Random(0)

    async def one() -> list[float]:
        await asyncio.sleep(rng.random() * EVERY_S * 5)
        status, _, latencies = await ask(port, tokens=TOKENS, mode=mode)
        assert (status, len(latencies)) == (200, TOKENS), (status, len(latencies))
        return latencies[1:]

    found = []
    for _ in range(rounds):
        for latencies in await asyncio.gather(*(one() for _ in range(STREAMS))):
            found += latencies
    return found


async def singles(port: int, rate: float, seconds: float) -> list[float]:
    """Milliseconds of requests that are answered at once, sent at a fixed rate."""
    found: list[float] = []

    async def one() -> None:
        status, milliseconds, _ = await ask(port, tokens=1, mode=0)
        assert status == 200, status
        found.append(milliseconds)

    await at_rate(one, rate, seconds)
    return found


async def at_rate(one: Callable[[], Any], rate: float, seconds: float) -> None:
    began, tasks = time.monotonic(), []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)


async def overload(port: int, rate: float, seconds: float) -> dict[str, Any]:
    """Ten times what the engine takes: what becomes of everyone."""
    refused: list[float] = []
    answered: list[float] = []
    others: list[int] = []

    async def one() -> None:
        status, milliseconds, latencies = await ask(port, tokens=1, mode=2)
        if status == 200 and len(latencies) == 1:
            answered.append(milliseconds)
        elif status == 429:
            refused.append(milliseconds)
        else:
            others.append(status)

    await at_rate(one, rate, seconds)
    return {
        "sent": int(rate * seconds),
        "answered": len(answered),
        "refused": len(refused),
        "lost": len(others),
        "lost_statuses": sorted(set(others)),
        "refused_ms": quantiles(refused),
        "answered_ms": quantiles(answered),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    values = sorted(values) or [float("nan")]
    return {f"p{q}": round(values[min(len(values) - 1, len(values) * q // 100)], 3) for q in (50, 99)} | {
        "max": round(values[-1], 3)
    }


# --- the processes ----------------------------------------------------------------------------


@contextmanager
def process(*arguments: str) -> Iterator[tuple[str, int]]:
    child = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE)
    try:
        assert child.stderr is not None
        line = child.stderr.readline().decode()
        found = re.search(r"http://127\.0\.0\.1:(\d+)(?= \()", line)
        assert found is not None, line + child.stderr.read().decode()
        # The log goes on being written; somebody must read it.
        drain = subprocess.Popen(["cat"], stdin=child.stderr, stdout=subprocess.DEVNULL)
        yield found[0], int(found[1])
        drain.terminate()
        drain.wait()
    finally:
        child.terminate()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()


def gateway(running: int, waiting: int, url: str) -> Any:
    settings = f"Serve(port=0, max_num_seqs={running}, max_waiting={waiting}, timeout_s=60)"
    code = f"from tuneship.serve.server import serve, Serve; serve([], settings={settings}, engine={url!r})"
    return process("-c", code)


async def ready(port: int) -> None:
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        status = await reader.readline()
        writer.close()
        if b"200" in status:
            return
        await asyncio.sleep(0.1)


def measure_stub(rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with process(__file__, "--stub", "0.1") as (url, direct):
        with gateway(2 * STREAMS, STREAMS, url) as (_, through):
            asyncio.run(ready(through))
            for name, call in (
                ("token, staggered", lambda port: streams(port, 0, rounds)),
                ("token, lockstep", lambda port: streams(port, 1, rounds)),
                ("request at once, 200/s", lambda port: singles(port, 200, 2.5 * rounds)),
            ):
                asyncio.run(call(through))  # warm
                without, with_it = quantiles(asyncio.run(call(direct))), quantiles(asyncio.run(call(through)))
                added = {key: round(with_it[key] - without[key], 3) for key in ("p50", "p99")}
                result[name] = {"direct": without, "through": with_it, "added": added}
        # 8 at a time, 0.1 s each: 80 a second. Ten times that is sent.
        with gateway(8, 8, url) as (_, through):
            asyncio.run(ready(through))
            result["overload, 10 times"] = asyncio.run(overload(through, 800, 2.0 * rounds))
    return result


def measure_local(folder: Path) -> dict[str, Any]:
    code = (
        "from pathlib import Path; from tuneship.serve.server import serve, Serve; "
        f"serve([Path({str(folder)!r})], settings=Serve(port=0))"
    )

    async def speed(port: int, count: int) -> float:
        async def one(seed: int) -> int:
            body = {"prompt": "Question: how many?\nContext: CREATE TABLE t (a INT)\nAnswer:", "max_tokens": 48}
            raw = json.dumps({**body, "temperature": 2.0, "seed": seed, "stop": ["\x00"]}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            writer.write(head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(raw), raw))
            answer = (await reader.read()).partition(b"\r\n\r\n")[2]
            writer.close()
            tokens: int = json.loads(answer)["usage"]["completion_tokens"]
            return tokens

        began = time.monotonic()
        tokens = sum(await asyncio.gather(*(one(seed) for seed in range(count))))
        return tokens / (time.monotonic() - began)

    with process("-c", code) as (_, port):
        asyncio.run(ready(port))
        asyncio.run(speed(port, 16))  # warm
        alone, together = asyncio.run(speed(port, 1)), asyncio.run(speed(port, 16))
    return {"alone, tokens/s": round(alone, 1), "16 at a time": round(together, 1), "ratio": round(together / alone, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="how long to measure; 4 is about a minute")
    parser.add_argument("--local", type=Path, metavar="FOLDER", help="measure the engine in this process on a run")
    parser.add_argument("--stub", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stub is not None:
        loop(stub(given.stub))
        return
    result = measure_local(given.local) if given.local else measure_stub(given.rounds)
    print(json.dumps(result, indent=2))


def loop(main: Any) -> None:
    """On uvloop where it is installed, as uvicorn."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


if __name__ == "__main__":
    main()
