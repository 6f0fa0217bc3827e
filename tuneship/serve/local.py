"""The engine in this process: a base with its adapters, and continuous batching on a thread of its own.

The event loop hands requests over through a queue and gets the tokens of each step with one call;
it never waits for the model. Several adapters share one base (lora.py), each under its own name.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from tuneship import model as models
from tuneship import prompt
from tuneship.base import BaseFiles
from tuneship.console import say
from tuneship.generation import Event, Generator, Request
from tuneship.kernels import cpu
from tuneship.serve.adapter import Adapter
from tuneship.serve.engine import Piece, Usage, Wanted, settle
from tuneship.serve.lora import Adapters
from tuneship.serve.shapes import ApiError

# Far more than a step takes: 1,024 tokens of prompt on a slow CPU are seconds.
HANGS_AFTER_S = 120.0


@dataclass(eq=False)
class _Stream:
    """The way of one generation's pieces from the thread to the loop."""

    requests: list[Request]
    usage: Usage
    open: int
    """Requests that have not ended."""
    pieces: list[Piece]
    arrived: asyncio.Event
    failure: ApiError | None = None


class LocalEngine:
    """See `engine.Engine`.

    Args:
        adapters: what answers, by name; one merged model, or adapters of one base.
        files: that base.
        slots: requests generated together.
        length: longest prompt and completion together.
    """

    def __init__(self, adapters: Sequence[Adapter], files: BaseFiles, *, slots: int, length: int) -> None:
        self._adapters, self._files, self._slots = adapters, files, slots
        self._length = min(length, files.length)
        self._inbox: queue.SimpleQueue[_Stream | None] = queue.SimpleQueue()
        self._cancelled: queue.SimpleQueue[_Stream] = queue.SimpleQueue()
        self._streams: dict[Request, tuple[_Stream, int]] = {}
        """Of the thread: where a request's events go."""
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loaded = False
        self._step_since: float | None = None
        self.failure: BaseException | None = None
        """Why it is gone."""
        self.failed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """See `Engine`."""
        return self._loaded and self.failure is None

    @property
    def hung(self) -> bool:
        """See `Engine`."""
        since = self._step_since
        return since is not None and time.monotonic() - since > HANGS_AFTER_S

    def length(self, model: str) -> int | None:
        """See `Engine`."""
        return self._length

    def models(self) -> Sequence[str]:
        """See `Engine`."""
        return [adapter.name for adapter in self._adapters]

    async def start(self) -> None:
        """See `Engine`. Whether loading fails is told by `failed`."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """See `Engine`."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 10.0)

    async def metrics(self) -> bytes:
        """See `Engine`."""
        return b""

    async def generate(self, wanted: Wanted, usage: Usage) -> AsyncGenerator[list[Piece], None]:
        """See `Engine`."""
        requests = [
            Request(
                prompt=list(ids),  # type: ignore[arg-type]  # this engine's models all have a contract
                max_new_tokens=wanted.max_tokens,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                seed=None if wanted.seed is None else (wanted.seed + number) % 2**63,
                stop=wanted.stop,
                adapter=wanted.model,
            )
            for ids in wanted.prompts
            for number in range(wanted.n)
        ]
        stream = _Stream(requests, usage, len(requests), [], asyncio.Event())
        if self.failure is not None:
            raise _gone()
        self._inbox.put(stream)
        try:
            while stream.open:
                await stream.arrived.wait()
                stream.arrived.clear()
                if stream.failure is not None:
                    raise stream.failure
                pieces, stream.pieces = stream.pieces, []
                if pieces:
                    yield pieces
        finally:
            if stream.open:
                self._cancelled.put(stream)

    # --- on the thread ------------------------------------------------------------------------

    def _main(self) -> None:
        assert self._loop is not None
        try:
            generator = load(self._adapters, self._files, slots=self._slots, length=self._length)
            _warm(generator, self._adapters[0].name)
            settle()
            self._loaded = True
            say(f"{', '.join(self.models())} loaded")
            self._run(generator)
        except BaseException as error:
            self.failure = error
            # A loop that has ended needs no word.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._fail)

    def _run(self, generator: Generator) -> None:
        while True:
            while not generator.busy or not self._inbox.empty():
                stream = self._inbox.get()
                if stream is None:
                    return
                for index, request in enumerate(stream.requests):
                    self._streams[request] = (stream, index)
                    generator.submit(request)
            while not self._cancelled.empty():
                for request in self._cancelled.get().requests:
                    generator.cancel(request)
                    self._streams.pop(request, None)
            self._step_since = time.monotonic()
            events = generator.step()
            self._step_since = None
            self._hand_over(events)

    def _hand_over(self, events: Sequence[Event]) -> None:
        batch: list[tuple[_Stream, Piece]] = []
        for event in events:
            stream, index = self._streams[event.request]
            if event.finished:
                del self._streams[event.request]
            batch.append((stream, Piece(index, event.text, event.finished)))
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_deliver, batch)

    def _fail(self) -> None:
        """On the loop: nobody waits for a thread that has ended."""
        for stream in {stream for stream, _ in self._streams.values()}:
            stream.failure = _gone()
            stream.arrived.set()
        while not self._inbox.empty():
            if (waiting := self._inbox.get()) is not None:
                waiting.failure = _gone()
                waiting.arrived.set()
        self.failed.set()


def _deliver(batch: Sequence[tuple[_Stream, Piece]]) -> None:
    for stream, piece in batch:
        stream.usage.completion_tokens += 1
        stream.open -= piece.finish is not None
        if piece.text or piece.finish:
            stream.pieces.append(piece)
        stream.arrived.set()


def _warm(generator: Generator, name: str) -> None:
    """The first step reads the weights and takes seconds; nobody should wait for it."""
    eos = generator.model.tokenizer.eos_token_id
    generator.submit(Request([eos] * 8, 2, ignore_eos=True, adapter=name))
    while generator.busy:
        generator.step()


def _gone() -> ApiError:
    return ApiError(503, "the engine is gone", code="engine_gone", retry_after=5)


def load(adapters: Sequence[Adapter], files: BaseFiles, *, slots: int, length: int) -> Generator:
    """A running batch on the base with its adapters.

    Raises:
        InputError: base, adapters and tokenizer do not belong together.
    """
    cpu.keep_memory()
    first = adapters[0]
    model = models.load(files, first.base.precision if first.base is not None else "auto")
    for adapter in adapters:
        prompt.verify(adapter.folder, model.tokenizer)
    if first.merged:
        return Generator(model, slots=slots, length=length)
    beside = Adapters(model)
    for adapter in adapters:
        beside.add(adapter.name, adapter.folder)
    return Generator(model, slots=slots, length=length, route=beside.route)


def answer(
    adapter: Adapter, files: BaseFiles, ids: Sequence[int], *, stop: Sequence[str], max_tokens: int
) -> Iterator[str]:
    """The greedy completion of one prompt, as it comes, without a server."""
    generator = load([adapter], files, slots=1, length=len(ids) + max_tokens)
    generator.submit(Request(list(ids), max_tokens, stop=tuple(stop), adapter=adapter.name))
    while generator.busy:
        for event in generator.step():
            yield event.text
