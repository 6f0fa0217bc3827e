"""Generation with continuous batching: many prompts, one running batch, no padding.

Each running request has a slot of the key-value cache. A step takes waiting prompts into free
slots (their tokens packed one behind the other), then gives every running request one token. A
request that ends frees its slot at once, and the last slot moves into the gap, so the batch stays
dense. A prefix that all prompts share (few-shot examples) is computed once.

    generator = Generator(model, slots=32, length=512)
    for request in requests:
        generator.submit(request)
    while generator.busy:
        for event in generator.step():
            ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tuneship.errors import InputError
from tuneship.kernels.attention import causal, masked
from tuneship.model import LoadedModel

# Prompt tokens taken in by one step, so that those who are being answered do not wait long.
PREFILL_TOKENS = 1024

# Positions that a cache holds before it grows.
FIRST_ROOM = 256


@dataclass(eq=False)
class Request:
    """One prompt to complete."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are not part of it."""
    ignore_eos: bool = False
    adapter: str = ""
    """Which of the model's adapters answers, where it has several; see `Generator`."""


@dataclass(frozen=True)
class Event:
    """What a step did for a request."""

    request: Request
    token: int | None
    """The new token; None where the request ended without one."""
    text: str
    """The text that became certain with it; all texts together are the completion."""
    finished: Literal["stop", "length"] | None
    """`stop`: the model ended it, or a stop string did."""
    ended_itself: bool = False
    """The model wrote its end of sequence."""


class Cache:
    """Keys and values of every layer: (slots, kv_heads, room, head_dim) each; the room grows up to a length."""

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.room = min(length, FIRST_ROOM)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors of a layer, made when the layer is first seen."""
        if index not in self.keys:
            shape = (self.slots, like.shape[0], self.room, like.shape[2])
            self.keys[index] = torch.zeros(shape, dtype=like.dtype, device=like.device)
            self.values[index] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.keys[index], self.values[index]

    def reach(self, length: int) -> None:
        """Makes room for so many positions: most texts are far shorter than the longest one allowed."""
        if length <= self.room:
            return
        self.room = min(self.length, max(length, 2 * self.room))
        for tensors in (self.keys, self.values):
            for index, tensor in tensors.items():
                grown = tensor.new_zeros((*tensor.shape[:2], self.room, tensor.shape[3]))
                grown[:, :, : tensor.shape[2]] = tensor
                tensors[index] = grown

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot into another."""
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor[target, :, :length] = tensor[source, :, :length]


class _Prefill:
    """Layout of new prompts: segment i is `count` tokens of a slot, from position `start`."""

    def __init__(self, cache: Cache, segments: Sequence[tuple[int, int, int]]) -> None:
        self.cache, self.segments = cache, segments

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        keys, values = self.cache.layer(layer, key)
        rows, at = [], 0
        for slot, start, count in self.segments:
            end, here = start + count, slice(at, at + count)
            keys[slot, :, start:end], values[slot, :, start:end] = key[:, here], value[:, here]
            rows.append(causal(query[:, here], keys[slot, :, :end], values[slot, :, :end], scale, softcap, window))
            at += count
        return torch.cat(rows, dim=1).transpose(0, 1)


class _Decode:
    """Layout of one token for each of the first n slots."""

    def __init__(self, cache: Cache, positions: Tensor) -> None:
        self.cache, self.positions = cache, positions
        self.reach = int(positions.max()) + 1
        self.slots = torch.arange(len(positions), device=positions.device)
        self.past = torch.arange(self.reach, device=positions.device)[None, :]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        keys, values = self.cache.layer(layer, key)
        n, at = len(self.positions), self.positions[:, None]
        keys[self.slots, :, self.positions] = key.transpose(0, 1)
        values[self.slots, :, self.positions] = value.transpose(0, 1)
        seen = self.past <= at
        if window is not None:
            seen = seen & (self.past > at - window)
        out = masked(
            query.transpose(0, 1)[:, :, None],
            keys[:n, :, : self.reach],
            values[:n, :, : self.reach],
            seen[:, None, None],
            scale,
            softcap,
        )
        return out[:, :, 0]


@dataclass(eq=False)
class _Running:
    request: Request
    position: int
    """Where its next token goes."""
    tokens: list[int]
    text: TextStream
    random: torch.Generator | None


class TextStream:
    """Tokens in, text out, as soon as it is certain.

    Text is held back while it may still become a stop string, or while its last character is
    not whole (a token can end inside a character).
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._read = 0
        """Ids before this one have been turned into text."""
        self._window = 0
        """The ids from here to `_read` became text together: they are decoded again, to give what follows a context."""
        self._text = ""
        self._sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """One token more; returns the text that became certain."""
        self._ids.append(token)
        text = self._unread()
        if text and not text.endswith("�"):
            self._text += text
            self._window, self._read = self._read, len(self._ids)
        ends = [at for stop in self._stop if (at := self._text.find(stop, max(0, self._sent - len(stop)))) >= 0]
        if ends:
            self.stopped = True
            self._text = self._text[: min(ends)]
            return self._send(len(self._text))
        return self._send(len(self._text) - self._held())

    def flush(self) -> str:
        """The rest, when no token follows."""
        if not self.stopped:
            self._text += self._unread()
            self._read = len(self._ids)
        return self._send(len(self._text))

    def _unread(self) -> str:
        """The text of the ids that have not become text yet."""
        before = self._tokenizer.decode(self._ids[self._window : self._read], skip_special_tokens=True)
        after: str = self._tokenizer.decode(self._ids[self._window :], skip_special_tokens=True)
        return after[len(before) :]

    def _held(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        for size in range(max((len(stop) for stop in self._stop), default=1) - 1, 0, -1):
            tail = self._text[-size:]
            if len(tail) == size and any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0

    def _send(self, end: int) -> str:
        text = self._text[self._sent : end] if end > self._sent else ""
        self._sent = max(self._sent, end)
        return text


class Generator:
    """A running batch on one model.

    Args:
        slots: how many requests run at a time.
        length: longest prompt and completion together, the shared prefix included, in tokens.
        prefix: token ids before every prompt.
        route: for a model with several adapters: called before each pass with its tokens' `Request.adapter`s.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        slots: int,
        length: int,
        prefix: Sequence[int] = (),
        route: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.model, self.length, self.prefix, self._route = model, length, list(prefix), route
        # One slot more, to keep the prefix in.
        self._cache = Cache(slots + 1, length)
        self._slots = slots
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._eos = _eos_ids(model)
        if prefix:
            self._forward(self.prefix, range(len(self.prefix)), _Prefill(self._cache, [(slots, 0, len(self.prefix))]))

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """How many requests are being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            InputError: it is longer than the cache.
        """
        total = len(self.prefix) + len(request.prompt) + request.max_new_tokens
        if total > self.length:
            raise InputError(
                f"prompt and completion need {total} tokens, there is room for {self.length}",
                where="max_tokens",
                fix="shorten the prompt or ask for fewer tokens",
            )
        if not request.prompt:
            raise InputError("the prompt is empty", where="prompt")
        if request.max_new_tokens < 1:
            raise InputError("a completion has at least one token", where="max_tokens")
        self._waiting.append(request)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Forgets a request, whether it waits, runs or has ended."""
        if request in self._waiting:
            self._waiting.remove(request)
        for slot, running in enumerate(self._running):
            if running.request is request:
                self._free(slot)
                return

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Takes waiting prompts in, and gives each running request a token."""
        decoding = len(self._running)
        events: list[Event] = []
        if decoding:
            positions = [running.position for running in self._running]
            layout = _Decode(self._cache, torch.tensor(positions, device=self.model.device))
            adapters = [running.request.adapter for running in self._running]
            states = self._forward([running.tokens[-1] for running in self._running], positions, layout, adapters)
            events += self._take(list(self._running), states)
        if self._waiting and len(self._running) < self._slots:
            events += self._admit()
        return events

    def _admit(self) -> list[Event]:
        ids: list[int] = []
        positions: list[int] = []
        adapters: list[str] = []
        segments: list[tuple[int, int, int]] = []
        admitted: list[_Running] = []
        start = len(self.prefix)
        while self._waiting and len(self._running) < self._slots:
            request = self._waiting[0]
            count = len(request.prompt)
            if ids and len(ids) + count > PREFILL_TOKENS:
                break
            self._waiting.popleft()
            slot = len(self._running)
            if start:
                self._cache.copy(self._slots, slot, start)
            ids += request.prompt
            positions += range(start, start + count)
            adapters += [request.adapter] * count
            segments.append((slot, start, count))
            random = None
            if request.temperature > 0:
                random = torch.Generator(self.model.device)
                random.manual_seed(request.seed) if request.seed is not None else random.seed()
            running = _Running(request, start + count - 1, [], TextStream(self.model.tokenizer, request.stop), random)
            self._running.append(running)
            admitted.append(running)
        states = self._forward(ids, positions, _Prefill(self._cache, segments), adapters)
        ends = torch.tensor([count for _, _, count in segments]).cumsum(0) - 1
        return self._take(admitted, states[ends.to(states.device)])

    def _forward(
        self, ids: Sequence[int], positions: Sequence[int], layout: Any, adapters: Sequence[str] = ()
    ) -> Tensor:
        if self._route is not None:
            self._route(adapters)
        with torch.inference_mode():
            device = self.model.device
            self._cache.reach(max(positions) + 1)
            return self.model.states(
                torch.tensor(ids, device=device), torch.tensor(list(positions), device=device), layout
            )

    def _take(self, running: list[_Running], states: Tensor) -> list[Event]:
        """Chooses a token for each of them from its last state."""
        logits = self.model.logits(states)
        greedy = logits.argmax(-1).tolist()
        events = []
        for row, one in enumerate(running):
            request = one.request
            token = greedy[row] if one.random is None else _sample(logits[row], request, one.random)
            one.position += 1
            if token in self._eos and not request.ignore_eos:
                events.append(Event(request, token, one.text.flush(), "stop", ended_itself=True))
                self._free(self._running.index(one))
                continue
            one.tokens.append(token)
            text = one.text.push(token)
            finished: Literal["stop", "length"] | None = None
            if one.text.stopped:
                finished = "stop"
            elif len(one.tokens) == request.max_new_tokens:
                text, finished = text + one.text.flush(), "length"
            events.append(Event(request, token, text, finished))
            if finished:
                self._free(self._running.index(one))
        return events

    def _free(self, slot: int) -> None:
        last = len(self._running) - 1
        if slot != last:
            moved = self._running[last]
            # Its newest key stands at `position` while a step is half done.
            self._cache.copy(last, slot, moved.position + 1)
            self._running[slot] = moved
        self._running.pop()


def _sample(logits: Tensor, request: Request, random: torch.Generator) -> int:
    """A token by temperature and nucleus (Holtzman et al. 2020, arXiv:1904.09751)."""
    probabilities = (logits / request.temperature).softmax(-1)
    if request.top_p < 1:
        ordered, indices = probabilities.sort(descending=True)
        # The smallest set whose mass reaches top_p: a token is out once those before it reach it; the first never is.
        ordered[1:][ordered.cumsum(0)[:-1] >= request.top_p] = 0
        return int(indices[torch.multinomial(ordered, 1, generator=random)])
    return int(torch.multinomial(probabilities, 1, generator=random))


def _eos_ids(model: LoadedModel) -> set[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    more = model.causal.generation_config.eos_token_id if model.causal.generation_config else None
    ids = more if isinstance(more, list) else [more]
    return {model.tokenizer.eos_token_id, *(token for token in ids if token is not None)}


@dataclass
class Completion:
    """A finished request."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finished: Literal["stop", "length"] = "length"
    ended_itself: bool = False


def complete(generator: Generator, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
    """Runs requests to their ends; yields the index and completion of each as it ends.

    Long prompts go first, so that the batch stays full to the end.
    """
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
    index_of = {requests[index]: index for index in order}
    done = {request: Completion() for request in requests}
    for index in order:
        generator.submit(requests[index])
    while generator.busy:
        for event in generator.step():
            completion = done[event.request]
            completion.text += event.text
            if event.token is not None and not event.ended_itself:
                completion.tokens.append(event.token)
            if event.finished:
                completion.finished, completion.ended_itself = event.finished, event.ended_itself
                yield index_of[event.request], completion
