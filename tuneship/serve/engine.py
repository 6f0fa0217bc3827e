"""What the gateway asks of an engine. `local.LocalEngine` and `upstream.Upstream` are the two."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


def settle() -> None:
    """Keeps the garbage collector off what has been loaded: looking through it stops every stream for 30 ms."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A generation, checked: nothing in it can be out of bounds."""

    id: str
    """The request's id, handed on to an engine elsewhere."""
    model: str
    prompts: tuple[Sequence[int] | str, ...]
    """Token ids; text only where no contract (and so no tokenizer) is known."""
    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    n: int = 1
    """Completions of each prompt."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    messages: Sequence[dict[str, Any]] = ()
    """Instead of prompts: a chat for an engine that has a template of its own."""


@dataclass(slots=True)
class Piece:
    """What one choice grew by."""

    index: int
    """prompt × n + completion."""
    text: str
    finish: str | None = None
    """`stop` or `length` with the last piece."""


@dataclass(slots=True)
class Usage:
    """Filled while a generation goes on."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(Protocol):
    """An engine. All of it is called on the event loop."""

    failed: asyncio.Event
    """Set when it is gone for good."""

    @property
    def failure(self) -> BaseException | None:
        """Why."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it can answer now."""
        ...

    @property
    def hung(self) -> bool:
        """Whether it has stopped for good without saying so."""
        ...

    def length(self, model: str) -> int | None:
        """Longest prompt and completion together, in tokens, where it is known."""
        ...

    def models(self) -> Sequence[str]:
        """The names that it answers to."""
        ...

    async def start(self) -> None:
        """Begins to get ready; returns at once."""
        ...

    async def close(self) -> None:
        """Gives everything back."""
        ...

    def generate(self, wanted: Wanted, usage: Usage) -> AsyncGenerator[list[Piece], None]:
        """Pieces as they come, all that are there at a time. Closing it cancels the generation.

        Raises:
            ApiError: the engine refuses, is gone, or broke off.
        """
        ...

    async def metrics(self) -> bytes:
        """Its own metrics in Prometheus' text format."""
        ...
