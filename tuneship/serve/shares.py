"""Several adapters behind one model name, each with a share of the requests.

    {"model": "sql", "shares": {"sql-1f2e3d4c5b6a": 90, "sql-9c3b2a190817": 10}}

Who asks for `sql` is answered by one of them, drawn by its share; each can be asked by its own name
too. The file is looked at again with each request, as the keys are: on Kubernetes a share moves
without a restart, and a canary is taken back while the adapter it stood in for is still loaded. While
the file cannot be read, the last shares stay.

An adapter is megabytes beside a base of gigabytes, so both are in one engine: a canary needs no second
GPU, its share is exact whatever the number of pods, and both are measured under the same load.

Not covered: a user who stays with one adapter; each request is drawn for itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneship.errors import InputError, OutsideError
from tuneship.serve.engine import Engine, Piece, Usage, Wanted
from tuneship.serve.files import stamp
from tuneship.serve.shapes import ApiError

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Split(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1)]
    """The name that clients ask for."""
    shares: Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Adapter → its share. They need not sum to 100; 0 is loaded and never drawn."""


class Shares:
    """See `engine.Engine`: an engine, with a name more.

    Args:
        adapters: those that the engine has.

    Raises:
        InputError, OutsideError: the file is missing or wrong.
    """

    def __init__(
        self, engine: Engine, file: Path, adapters: Collection[str], draw: random.Random | None = None
    ) -> None:
        self._engine, self._file, self._adapters = engine, file, adapters
        self._draw = draw or random.Random()  # noqa: S311 - a share, not a secret
        self._seen = stamp(self._file)
        self._split = self._read()
        self.failed: asyncio.Event = engine.failed
        self._registry = registry = CollectorRegistry()
        labels = ["adapter"]
        self._share = Gauge("tuneship_adapter_share", "Of the requests for the shared name.", labels, registry=registry)
        self._requests = Counter("tuneship_adapter_requests", "Ended.", ["adapter", "outcome"], registry=registry)
        self._first = Histogram(
            "tuneship_adapter_first_token_seconds", "In the engine.", labels, buckets=_SECONDS, registry=registry
        )
        self._tokens = Counter("tuneship_adapter_completion_tokens", "Written.", labels, registry=registry)
        self._seconds = Counter("tuneship_adapter_seconds", "In the engine.", labels, registry=registry)

    @property
    def model(self) -> str:
        """The shared name."""
        return self._split.model

    @property
    def failure(self) -> BaseException | None:
        """See `Engine`."""
        return self._engine.failure

    @property
    def ready(self) -> bool:
        """See `Engine`."""
        return self._engine.ready

    @property
    def hung(self) -> bool:
        """See `Engine`."""
        return self._engine.hung

    def length(self, model: str) -> int | None:
        """See `Engine`."""
        if model != self.model:
            return self._engine.length(model)
        return min((known for name in self._adapters if (known := self._engine.length(name)) is not None), default=None)

    def models(self) -> Sequence[str]:
        """See `Engine`: the shared name first, so that it is meant where a request names none."""
        return [self.model, *self._engine.models()]

    async def start(self) -> None:
        """See `Engine`."""
        await self._engine.start()

    async def close(self) -> None:
        """See `Engine`."""
        await self._engine.close()

    async def metrics(self) -> bytes:
        """See `Engine`."""
        self._renew()
        total = sum(self._split.shares.values())
        for name, share in self._split.shares.items():
            self._share.labels(name).set(share / total)
        return generate_latest(self._registry) + await self._engine.metrics()

    async def generate(self, wanted: Wanted, usage: Usage) -> AsyncGenerator[list[Piece], None]:
        """See `Engine`."""
        self._renew()
        if wanted.model == self.model:
            shares = self._split.shares
            wanted = replace(wanted, model=self._draw.choices(list(shares), weights=list(shares.values()))[0])
        name, begin, outcome = wanted.model, time.monotonic(), "gone"
        first = True
        try:
            async with aclosing(self._engine.generate(wanted, usage)) as pieces:
                async for batch in pieces:
                    if first:
                        self._first.labels(name).observe(time.monotonic() - begin)
                        first = False
                    yield batch
            outcome = "ok"
        except ApiError as error:
            # What the client did wrong, and what anyone would be told who asks a busy engine, is not the adapter's.
            outcome = "refused" if error.status < 500 or error.status == 503 else "error"
            raise
        except Exception:
            outcome = "error"
            raise
        finally:
            self._requests.labels(name, outcome).inc()
            self._tokens.labels(name).inc(usage.completion_tokens)
            self._seconds.labels(name).inc(time.monotonic() - begin)

    def _renew(self) -> None:
        now = stamp(self._file)
        if now is not None and now != self._seen:
            try:
                split = self._read()
            except (InputError, OutsideError):
                # Half-written or half-mounted: looked at again with the next request.
                return
            # The shared name stays: clients, contracts and metrics know it.
            self._split, self._seen = split.model_copy(update={"model": self.model}), now

    def _read(self) -> Split:
        where = str(self._file)
        try:
            split = Split.model_validate_json(self._file.read_bytes())
        except OSError as error:
            raise OutsideError(f"the file of shares cannot be read: {error.strerror}", where=where) from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"the file of shares is wrong: {place}: {first['msg']}", where=where) from None
        if unknown := sorted(split.shares.keys() - set(self._adapters)):
            raise InputError(f"a share for {unknown[0]}, which is not served here", where=where)
        if not any(split.shares.values()) or split.model in self._adapters:
            raise InputError("the shares name nobody, or the shared name is an adapter's", where=where)
        return split
