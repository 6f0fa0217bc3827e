"""A gateway on a real socket in front of an engine that does what the test says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from tuneship.prompt import Prompt
from tuneship.serve.engine import Engine, Piece, Usage, Wanted
from tuneship.serve.gateway import Gateway
from tuneship.serve.limits import Limits
from tuneship.serve.server import Server, address, listen
from tuneship.serve.shapes import ApiError

WAIT_S = 20.0
PROMPT = {"prompt": "Question: one?\nContext: \nAnswer:"}
KEY, OTHER_KEY = "k" * 16 + "-one", "k" * 16 + "-two"
CONTRACT = Prompt("Question: {question}\nContext: {context}\nAnswer: {answer}", ("\nQuestion:", "\nContext:"))


class StubContract:
    """A token a character."""

    prompt = CONTRACT

    async def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


class StubEngine:
    """Answers with `pieces`; before piece `hold` it waits for `release`."""

    def __init__(
        self,
        pieces: Sequence[str] = (" SELECT", " 1"),
        *,
        hold: int | None = None,
        length: int | None = 200,
        refusal: ApiError | Exception | None = None,
        names: Sequence[str] = ("stub",),
    ) -> None:
        self.pieces, self.hold, self._length, self.refusal, self.names = pieces, hold, length, refusal, names
        self.ready, self.hung = True, False
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self.wanted: list[Wanted] = []
        self.running = self.most = 0
        self.changed = threading.Condition()
        self._released: asyncio.Event | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def length(self, model: str) -> int | None:
        return self._length

    def models(self) -> Sequence[str]:
        return self.names

    async def start(self) -> None:
        self.loop, self._released = asyncio.get_running_loop(), asyncio.Event()

    async def close(self) -> None: ...

    async def metrics(self) -> bytes:
        return b"vllm:num_requests_waiting 0\n"

    async def generate(self, wanted: Wanted, usage: Usage) -> AsyncGenerator[list[Piece], None]:
        self._count(1, wanted)
        try:
            if self.refusal is not None:
                raise self.refusal
            choices = max(1, len(wanted.prompts)) * wanted.n
            for number, text in enumerate(self.pieces):
                if number == self.hold:
                    assert self._released is not None
                    await self._released.wait()
                usage.completion_tokens += choices
                finish = "stop" if number == len(self.pieces) - 1 else None
                yield [Piece(index, text, finish) for index in range(choices)]
        finally:
            self._count(-1)

    def _count(self, by: int, wanted: Wanted | None = None) -> None:
        with self.changed:
            self.running += by
            self.most = max(self.most, self.running)
            if wanted is not None:
                self.wanted.append(wanted)
            self.changed.notify_all()

    def release(self) -> None:
        assert self.loop is not None and self._released is not None
        self.loop.call_soon_threadsafe(self._released.set)

    def wait_running(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.running == count, WAIT_S), f"{self.running} run, not {count}"


class Running:
    """A server that answers."""

    def __init__(self, server: Server, gateway: Gateway, url: str, port: int, log: list[bytes]) -> None:
        self.server, self.gateway, self.url, self.port, self.log = server, gateway, url, port, log
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False, **settings)

    def post(self, path: str, body: Any = None, **settings: Any) -> httpx.Response:
        with self.client() as client:
            if body is not None:
                settings["json"] = body
            return client.post(path, **settings)

    def get(self, path: str, **settings: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **settings)

    @contextmanager
    def streamed(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        """The lines of a stream as they come."""
        with self.client() as client, client.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            yield answer.iter_lines()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)


@contextmanager
def running(
    engine: Engine | None = None,
    *,
    contracts: dict[str, Any] | None = None,
    limits: Limits | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serves until the block ends; what the server raised is in `error`."""
    engine = engine or StubEngine()
    limits = limits or Limits()
    log: list[bytes] = []
    gateway = Gateway(
        engine,
        {name: StubContract() for name in ("stub",)} if contracts is None else contracts,  # type: ignore[dict-item]
        limits=limits,
        max_new_tokens=settings.pop("max_new_tokens", 16),
        log=log.append,
        **settings,
    )
    listening = listen("127.0.0.1", 0)
    url, port = address(listening), listening.getsockname()[1]
    with listening:
        server = Server(gateway, engine, listening, limits)
        found = Running(server, gateway, url, port, log)

        def run() -> None:
            try:
                server.run()
            except BaseException as error:
                found.error = error
            finally:
                found.ended.set()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield found
        finally:
            if not found.ended.is_set():
                server.stop()
                if isinstance(engine, StubEngine) and engine.running:
                    engine.release()
            thread.join(WAIT_S)
            assert not thread.is_alive()


def frames(response: httpx.Response) -> list[Any]:
    """The events of a stream; [DONE] as a string."""
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Runs a call on a thread; its result comes into the list."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def sse(*choices: dict[str, object], end: bytes = b"data: [DONE]\n\n") -> bytes:
    events = b"".join(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n" for choice in choices)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + events + end


def whole_request(connection: socket.socket) -> bytes:
    """A request with its body: who closes with a part of it unread resets the connection, and the answer is lost."""
    request = b""
    while data := connection.recv(65536):
        request += data
        head, end, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            break
    return request


@contextmanager
def canned(answer: bytes, asked: list[bytes] | None = None) -> Iterator[str]:
    """A server that lists the model `stub` and answers every POST with the same bytes."""
    listed = b'{"data": [{"id": "stub", "max_model_len": 200}]}'
    models = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(listed), listed)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                request = whole_request(connection)
                if asked is not None:
                    asked.append(request)
                # Who is answered may be gone before the end.
                with suppress(ConnectionError):
                    connection.sendall(answer if request.startswith(b"POST") else models)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        # Wakes accept.
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(WAIT_S)


def exchange(served: Running, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Bytes in, (status, headers, body) out; the connection is closed after the answer."""
    with served.connect() as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def get(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()


def raw_post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def assert_error(status: int, body: bytes, code: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert 400 <= status < 600
    return error


def wait_for_waiting(served: Running, count: int) -> None:
    """Until so many wait for the engine, by the gateway's own word."""
    deadline = time.monotonic() + WAIT_S
    while f"tuneship_requests_waiting {count}.0" not in served.get("/metrics").text:
        assert time.monotonic() < deadline


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def until(true: Callable[[], bool]) -> None:
    """Waits, and fails if it takes too long."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve` as the command line calls it; yields the process and its URL."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tuneship.recipe import Serve\n"
        "from tuneship.errors import TuneshipError\nfrom tuneship.serve.server import serve\n"
        "try:\n    " + "; ".join(arguments) + "\n"
        "except TuneshipError as error:\n    print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        url = re.search(r"http://127\.0\.0\.1:\d+(?= \()", child.stderr.readline())
        assert url is not None
        yield child, url[0]
    finally:
        child.kill()
        child.wait(WAIT_S)
        child.stderr.close()
