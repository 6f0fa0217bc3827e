"""What the gateway adds, beside other proxies in front of the same engine, and what it does under overload.

    python bench/gateway.py
    python bench/gateway.py --litellm .venv-litellm/bin/litellm --router .venv-router/bin/vllm-router

Processes on loopback: a stub engine, one proxy, and a client, which also asks the stub directly.

token      100 streams of 64 tokens, one each 20 ms. Each token holds the moment at which the stub wrote
           it, so each arrival is a latency; what a proxy adds is the difference to asking directly.
           `staggered`: each stream in its own time. `lockstep`: all tokens at one moment, as an engine
           with a running batch makes them; the last of a hundred then waits for the others.
requests   100 connections that ask again as soon as they are answered, a whole answer or a stream of 64
           tokens that the stub writes at once: requests/s, and the proxy's CPU time for each.
overload   ten times what the engine takes: what becomes of everyone. For the gateway alone.

Client, stub and proxy share the machine's cores, so requests/s are bounded by all three; CPU time per
request tells the proxies apart also on a busy machine. Not covered: a network, TLS, an engine's own time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stub_engine import AT_ONCE, EVERY_S, LOCKSTEP, SERVICE, STAGGERED

STREAMS, TOKENS = 100, 64
STAMP = re.compile(rb"T(\d+);")


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
        if b"[DONE]" in self.rest or self.status != 200:
            self.end()

    def connection_lost(self, error: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(self.status)
            self.transport.close()


def message(*, tokens: int, mode: int, stream: bool) -> bytes:
    body = {"model": "stub", "prompt": "Question: how many?", "max_tokens": tokens, "seed": mode, "stream": stream}
    raw = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)


async def ask(port: int, *, tokens: int, mode: int) -> tuple[int, float, list[float]]:
    """(status, milliseconds, latencies of tokens)"""
    request = message(tokens=tokens, mode=mode, stream=True)
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


class Again(asyncio.Protocol):
    """Asks again on the same connection as soon as it is answered."""

    def __init__(self, request: bytes, answered: list[int]) -> None:
        self.request, self.answered, self.received = request, answered, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        received = self.received + data
        head = received.find(b"\r\n\r\n") + 4
        if head > 3:
            length = re.search(rb"content-length: (\d+)", received[:head], re.I)
            ended = len(received) >= head + int(length[1]) if length else received.endswith(b"0\r\n\r\n")
            if ended:
                self.answered.append(int(received[9:12]))
                received = b""
                self.transport.write(self.request)
        self.received = received


async def requests(port: int, pid: int, *, stream: bool, seconds: float) -> dict[str, float]:
    """Requests/s of many connections, and the CPU time that a process took for each."""
    request = message(tokens=TOKENS, mode=AT_ONCE, stream=stream)
    loop, answered = asyncio.get_running_loop(), list[int]()
    made = [await loop.create_connection(lambda: Again(request, answered), "127.0.0.1", port) for _ in range(STREAMS)]
    await until(answered, STREAMS, seconds / 4)  # warm
    began, cpu, before = time.monotonic(), cpu_seconds(pid), len(answered)
    await until(answered, before + 2 * STREAMS, seconds)
    took, cpu, count = time.monotonic() - began, cpu_seconds(pid) - cpu, len(answered) - before
    for transport, _ in made:
        transport.abort()
    assert set(answered) == {200}, Counter(answered)
    return {"requests/s": round(count / took, 1), "CPU ms/request": round(cpu / count * 1000, 3)}


async def until(answered: list[int], count: int, seconds: float) -> None:
    """For a time, and longer where fewer have been answered by then."""
    await asyncio.sleep(seconds)
    while len(answered) < count:
        await asyncio.sleep(0.05)


def cpu_seconds(pid: int) -> float:
    """Of a process and those that it started and that still run."""
    pids, total = [pid], 0
    for one in pids:
        for task in Path(f"/proc/{one}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


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
        status, milliseconds, latencies = await ask(port, tokens=1, mode=SERVICE)
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
def process(*argv: str, port: int = 0) -> Iterator[tuple[int, int]]:
    """A process and its port: as it says on stderr, or as it was told. Yields (pid, port)."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if port else subprocess.PIPE)
    try:
        if child.stderr is not None:
            line = child.stderr.readline().decode()
            found = re.search(r"http://127\.0\.0\.1:(\d+)(?= \()", line)
            assert found is not None, line + child.stderr.read().decode()
            port = int(found[1])
            # The log goes on being written; somebody must read it.
            threading.Thread(target=child.stderr.read, daemon=True).start()
        yield child.pid, port
    finally:
        child.terminate()
        child.wait()


def gateway(running: int, waiting: int, engine: int) -> Any:
    settings = f"Serve(port=0, max_num_seqs={running}, max_waiting={waiting}, timeout_s=60)"
    code = "from tuneship.serve.server import serve, Serve; "
    return process(sys.executable, "-c", f"{code}serve([], settings={settings}, engine='http://127.0.0.1:{engine}')")


def litellm(program: str, engine: int) -> Any:
    config = Path(tempfile.mkdtemp()) / "litellm.json"
    parameters = {"model": "text-completion-openai/stub", "api_base": f"http://127.0.0.1:{engine}/v1", "api_key": "x"}
    config.write_text(json.dumps({"model_list": [{"model_name": "stub", "litellm_params": parameters}]}))
    # Like the others here without keys, and without a look at the network.
    os.environ |= {
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    port = free_port()
    return process(program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), port=port)


def router(program: str, engine: int) -> Any:
    port = free_port()
    backend = ("--static-backends", f"http://127.0.0.1:{engine}", "--static-models", "stub")
    where = ("--host", "127.0.0.1", "--port", str(port), "--service-discovery", "static")
    return process(program, *where, *backend, "--routing-logic", "roundrobin", port=port)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


async def ready(port: int) -> None:
    """Waits until a completion is answered."""
    for _ in range(600):
        try:
            if (await ask(port, tokens=1, mode=STAGGERED))[0] == 200:
                return
        except (OSError, ValueError):
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError(port)


def measure(port: int, pid: int, seconds: float) -> dict[str, Any]:
    asyncio.run(ready(port))
    rounds = max(1, round(seconds / (TOKENS * EVERY_S)))
    found: dict[str, Any] = {}
    for name, mode in (("staggered", STAGGERED), ("lockstep", LOCKSTEP)):
        asyncio.run(streams(port, mode, 1))  # warm
        found[f"token ms, {name}"] = quantiles(asyncio.run(streams(port, mode, rounds)))
    found["whole answers"] = asyncio.run(requests(port, pid, stream=False, seconds=seconds))
    found["streams of 64"] = asyncio.run(requests(port, pid, stream=True, seconds=seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each measurement")
    parser.add_argument("--litellm", metavar="PROGRAM", help="LiteLLM's proxy: pip install 'litellm[proxy]'")
    parser.add_argument("--router", metavar="PROGRAM", help="vLLM production-stack's router")
    given = parser.parse_args()
    with process(sys.executable, str(Path(__file__).with_name("stub_engine.py")), "0.1") as (stub_pid, engine):
        show("direct", measure(engine, stub_pid, given.seconds))
        with gateway(2 * STREAMS, STREAMS, engine) as (pid, port):
            show("gateway", measure(port, pid, given.seconds))
        if given.litellm:
            with litellm(given.litellm, engine) as (pid, port):
                show("LiteLLM", measure(port, pid, given.seconds))
        if given.router:
            with router(given.router, engine) as (pid, port):
                show("production-stack router", measure(port, pid, given.seconds))
        # 8 at a time, 0.1 s each: 80 a second. Ten times that is sent.
        with gateway(8, 8, engine) as (_, port):
            asyncio.run(ready(port))
            show("gateway, overload", asyncio.run(overload(port, 800, given.seconds)))


def show(name: str, found: dict[str, Any]) -> None:
    print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
