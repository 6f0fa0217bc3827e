"""vLLM with and without the gateway, the adapter and the merged model: what each costs.

    python bench/serve.py runs/tiny --python .cache/vllm/bin/python --engine-args "--dtype float32 --enforce-eager"

The run needs its adapter and its merged model (tuneship export). One vLLM at a time is started; the same
client then asks it directly, and through a gateway in front of it, in turns. Requests are the run's
held-out questions, greedy, streamed, so that all four give answers of the same length.

Covered: the whole way on loopback. Not covered: a network, TLS, a load that comes in bursts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tuneship import base, journal, prompt
from tuneship.cluster.serving import lora_rank
from tuneship.journal import Run
from tuneship.serve.adapter import find

START_S = 1800


@dataclass(frozen=True)
class Measured:
    """One round of one way."""

    requests_per_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tokens: int


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first token, and the tokens of the answer."""
    begin, first, tokens = time.perf_counter(), 0.0, 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if not first and event["choices"] and event["choices"][0]["text"]:
                first = time.perf_counter() - begin
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
    return first, tokens


async def load(url: str, bodies: list[dict[str, Any]], concurrency: int) -> Measured:
    """Asks all of them, so many at a time."""
    waiting = iter(bodies)
    answers: list[tuple[float, int]] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def worker() -> None:
            for body in waiting:
                answers.append(await ask(session, url, body))

        begin = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        seconds = time.perf_counter() - begin
    firsts = sorted(first for first, _ in answers)
    tokens = sum(count for _, count in answers)
    last = firsts[min(len(firsts) - 1, round(0.99 * len(firsts)))]
    return Measured(len(bodies) / seconds, tokens / seconds, statistics.median(firsts) * 1000, last * 1000, tokens)


def requests(run: Run, name: str, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Held-out questions by the run's contract, over and over."""
    contract = prompt.read(run.adapter)
    rows = journal.read_json(run.evaluation_file)["rows"]
    texts = [contract.render({field: row[field] for field in prompt.FIELDS}) for row in rows]
    common = {"model": name, "max_tokens": max_tokens, "temperature": 0, "stop": list(contract.stop)}
    common |= {"stream": True, "stream_options": {"include_usage": True}}
    return [{**common, "prompt": texts[number % len(texts)]} for number in range(count)]


@contextmanager
def process(argv: list[str], url: str, log: Path) -> Iterator[None]:
    """A process, from when it is ready to its end."""
    with log.open("w") as out:
        started = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
        try:
            late = time.monotonic() + START_S
            while not _healthy(url):
                if started.poll() is not None or time.monotonic() > late:
                    sys.exit(f"it did not start; its words are in {log}")
                time.sleep(0.5)
            yield
        finally:
            started.terminate()
            started.wait(60)


def _healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def measure(given: argparse.Namespace, run: Run, merged: bool) -> dict[str, list[Measured]]:
    """Rounds of both ways, in turns."""
    folder = run.merged if merged else run.adapter
    found = find(folder)
    files = base.resolve(run.recipe.model)
    engine, gateway = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    argv = [given.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    argv += ["--port", engine.rpartition(":")[2], "--max-num-seqs", str(given.concurrency)]
    argv += ["--max-model-len", str(run.recipe.serve.max_model_len), *shlex.split(given.engine_args)]
    if merged:
        argv += ["--model", str(folder), "--served-model-name", found.name]
    else:
        argv += ["--model", str(files.folder), "--served-model-name", "base", "--enable-lora"]
        rank = lora_rank(journal.read_json(folder / "adapter_config.json")["r"])
        argv += [f"--max-lora-rank={rank}", "--lora-modules", f"{found.name}={folder}"]
    front = [sys.executable, "-m", "tuneship.cli", "serve", str(folder), "--engine", engine]
    front += ["--port", gateway.rpartition(":")[2]]
    bodies = requests(run, found.name, given.requests, given.max_tokens)
    rounds: dict[str, list[Measured]] = {"vLLM": [], "vLLM behind the gateway": []}
    logs = given.logs / ("merged" if merged else "adapter")
    logs.mkdir(parents=True, exist_ok=True)
    with process(argv, engine, logs / "vllm.log"), process(front, gateway, logs / "gateway.log"):
        asyncio.run(load(engine, bodies[: 2 * given.concurrency], given.concurrency))
        for _ in range(given.rounds):
            for way, url in zip(rounds, (engine, gateway), strict=True):
                rounds[way].append(asyncio.run(load(url, bodies, given.concurrency)))
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, evaluated and exported")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has vLLM")
    parser.add_argument("--engine-args", default="", help="more of vLLM's arguments")
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many")
    parser.add_argument("--logs", type=Path, default=Path(".cache/bench-serve"))
    given = parser.parse_args()
    run = journal.read_run(given.run)
    result: dict[str, Any] = {"requests": given.requests, "concurrency": given.concurrency, "rows": []}
    print(f"{'':36}{'requests/s':>11}{'tokens/s':>10}{'ttft p50':>11}{'p99':>11}", file=sys.stderr)
    for merged in (False, True):
        for way, rounds in measure(given, run, merged).items():
            middle = sorted(rounds, key=lambda one: one.tokens_per_s)[len(rounds) // 2]
            name = f"{'merged' if merged else 'adapter'}, {way}"
            result["rows"].append({"name": name, **asdict(middle), "rounds": [asdict(one) for one in rounds]})
            print(
                f"{name:36}{middle.requests_per_s:11.2f}{middle.tokens_per_s:10.1f}"
                f"{middle.ttft_p50_ms:8.0f} ms{middle.ttft_p99_ms:8.0f} ms",
                file=sys.stderr,
            )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
