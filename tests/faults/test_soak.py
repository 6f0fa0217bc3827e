"""The gateway under a long mixed load: answers, streams, refusals, broken requests, clients that leave (V10).

    TUNESHIP_SOAK_SECONDS=600 pytest tests/faults/test_soak.py -s

Five seconds by default. It is a process of its own, in front of an engine on another socket; its memory
and open files are read from /proc while clients ask, and when they have gone.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
from gateway_kit import PROMPT, WAIT_S, StubEngine, process, raw_post, running, until

SECONDS = float(os.environ.get("TUNESHIP_SOAK_SECONDS", "5"))
CLIENTS = 8
# What Python's allocator moves by itself: a leak of 100 bytes a request is 10 MB in a minute here.
GROWS_AT_MOST_MB = 8.0


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, url: str) -> None:
        self.url, self.port = url, int(url.rpartition(":")[2])
        self.done: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(CLIENTS)]

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = (self._whole, self._stream, self._refused, self._broken, self._leaves)
        try:
            with httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False) as client:
                while not self.stop.is_set():
                    kind: Callable[[httpx.Client, random.Random], None] = rng.choice(kinds)
                    kind(client, rng)
                    self.done[kind.__name__] += 1
        except BaseException as error:
            self.failures.append(error)

    def _whole(self, client: httpx.Client, rng: random.Random) -> None:
        answer = client.post("/v1/completions", json=PROMPT)
        assert answer.status_code == 200, answer.text

    def _stream(self, client: httpx.Client, rng: random.Random) -> None:
        answer = client.post("/v1/completions", json={**PROMPT, "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n"), answer.text

    def _refused(self, client: httpx.Client, rng: random.Random) -> None:
        path = f"/{rng.random()}"
        assert client.get(path).status_code == 404
        assert client.post("/v1/completions", json={"prompt": "x", "model": path}).status_code == 404

    def _broken(self, client: httpx.Client, rng: random.Random) -> None:
        assert client.post("/ask", content=b"{", headers={"content-type": "application/json"}).status_code == 400

    def _leaves(self, client: httpx.Client, rng: random.Random) -> None:
        request = raw_post("/v1/completions", json.dumps({**PROMPT, "stream": True}).encode())
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as connection:
            connection.sendall(request[: rng.randrange(1, len(request) + 1)])


def test_v10_memory_and_files_stay_flat() -> None:
    engine = StubEngine([" x"] * 20)
    serve = "serve([], settings=Serve(port=0, max_num_seqs=4), engine={!r})"
    with running(engine, contracts={}) as inner, process(serve.format(inner.url)) as (child, url):
        assert child.stderr is not None
        reading = threading.Thread(target=child.stderr.read)
        reading.start()
        until(lambda: httpx.get(url + "/health", trust_env=False).status_code == 200)
        files = open_files(child.pid)
        load = Load(url)
        for thread in load.threads:
            thread.start()
        memory = []
        began = time.monotonic()
        while (passed := time.monotonic() - began) < SECONDS and not load.failures:
            time.sleep(SECONDS / 40)
            # The stub in this process remembers what it was asked.
            inner.log.clear()
            engine.wanted.clear()
            memory.append((passed, megabytes(child.pid)))
        load.stop.set()
        for thread in load.threads:
            thread.join(WAIT_S)
        assert not load.failures, load.failures[0]
        early, late = (
            median(used for at, used in memory if low <= at / SECONDS < high) for low, high in ((0.25, 0.5), (0.75, 1))
        )
        requests = sum(load.done.values())
        print(f"{requests} requests in {SECONDS:g} s, {dict(load.done)}; memory {early:.1f} MB, then {late:.1f} MB")
        assert late - early < GROWS_AT_MOST_MB
        metrics = httpx.get(url + "/metrics", trust_env=False).text
        assert "tuneship_requests_running 0.0" in metrics
        # Connections to the engine are kept a while.
        until(lambda: open_files(child.pid) <= files)
        child.terminate()
        assert child.wait(WAIT_S) == 0
        reading.join(WAIT_S)


def megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
