"""An engine elsewhere, by URL: vLLM, or anything else that speaks OpenAI's completions.

It is always asked to stream, so that a client who leaves ends the generation there too. Prompts go
as token ids where a contract is known. Ready means that the engine lists every model that we serve,
and has made of each contract's golden prompts the token ids of training (`goldens`).

aiohttp, not httpx: at a hundred streams, a token costs it 25 µs where httpx took 105 (bench/gateway.py).

Not covered: an engine that does not know `stream_options`; its completion tokens are then counted by frames.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from tuneship.errors import InputError, OutsideError
from tuneship.serve import goldens
from tuneship.serve.engine import Piece, Usage, Wanted
from tuneship.serve.shapes import ApiError, dumps

_LOOKS_EVERY_S = 2.0
_ANSWERS_WITHIN_S = 5.0
# vLLM closes an idle connection after 5 s; a request must not meet that moment.
_IDLE_S = 3.0
_FRAME_BYTES = 2**20
_ENGINE_METRICS = (b"vllm:", b"# HELP vllm:", b"# TYPE vllm:")


class Upstream:
    """See `engine.Engine`.

    Args:
        url: up to, and without, /v1.
        names: the models to serve; all that the engine lists where none is named.
        key: gives the engine's own API key.
        contracts: model → the folder of its prompt contract, to hold the engine against.
    """

    def __init__(
        self,
        url: str,
        names: Sequence[str] = (),
        key: Callable[[], str] | None = None,
        contracts: Mapping[str, Path] | None = None,
    ) -> None:
        self._url, self._names, self._key = url.rstrip("/").removesuffix("/v1"), list(names), key
        self._contracts, self._proven = contracts or {}, False
        # Not where it is gone: an engine elsewhere may come back. Only where it is the wrong one.
        self.failed = asyncio.Event()
        self.failure: BaseException | None = None
        self._lengths: dict[str, int | None] = {}
        self._ready = False
        self._session: aiohttp.ClientSession | None = None
        self._looking: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """See `Engine`."""
        return self._ready

    @property
    def hung(self) -> bool:
        """See `Engine`. What hangs there is not mended by ending this process."""
        return False

    def length(self, model: str) -> int | None:
        """See `Engine`."""
        return self._lengths.get(model)

    def models(self) -> Sequence[str]:
        """See `Engine`."""
        return self._names or list(self._lengths)

    async def start(self) -> None:
        """See `Engine`."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_ANSWERS_WITHIN_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
        self._looking = asyncio.create_task(self._look())

    async def close(self) -> None:
        """See `Engine`."""
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        if self._session is not None:
            await self._session.close()

    async def metrics(self) -> bytes:
        """See `Engine`: those that vLLM names as its own."""
        try:
            text = await self._get("/metrics")
        except (aiohttp.ClientError, TimeoutError):
            return b""
        return b"".join(line for line in text.splitlines(keepends=True) if line.startswith(_ENGINE_METRICS))

    async def generate(self, wanted: Wanted, usage: Usage) -> AsyncGenerator[list[Piece], None]:
        """See `Engine`."""
        assert self._session is not None
        chat = bool(wanted.messages)
        path = "/v1/chat/completions" if chat else "/v1/completions"
        choices = open_choices = max(1, len(wanted.prompts)) * wanted.n
        counted = 0
        headers = {**self._headers(), "content-type": "application/json", "x-request-id": wanted.id}
        try:
            async with self._session.post(self._url + path, data=_body(wanted), headers=headers) as response:
                if response.status != 200:
                    raise _refusal(response.status, response.headers, await response.content.read(4096))
                rest = b""
                async for data in response.content.iter_any():
                    if b"\r" in data:
                        data = data.replace(b"\r", b"")
                    *events, rest = (rest + data).split(b"\n\n")
                    if len(rest) > _FRAME_BYTES:
                        raise ApiError(502, "the engine sends frames without an end", code="engine_broke_off")
                    pieces: list[Piece] = []
                    for event in events:
                        _read(event, chat, choices, pieces, usage)
                    counted += len(pieces)
                    open_choices -= sum(piece.finish is not None for piece in pieces)
                    if pieces:
                        yield pieces
        except aiohttp.ClientConnectorError:
            self._ready = False
            raise ApiError(503, "the engine cannot be reached", code="engine_gone", retry_after=5) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(502, f"the engine broke off ({type(error).__name__})", code="engine_broke_off") from None
        if open_choices > 0:
            raise ApiError(502, "the engine ended before its answer did", code="engine_broke_off")
        if not usage.completion_tokens:
            usage.completion_tokens = counted

    async def _look(self) -> None:
        while True:
            try:
                listed = json.loads(await self._get("/v1/models"))["data"]
                lengths = {model["id"]: model.get("max_model_len") for model in listed}
                # vLLM tells an adapter's length at its base.
                self._lengths = {m["id"]: lengths[m["id"]] or lengths.get(m.get("parent")) for m in listed}
                there = bool(self._lengths) and all(name in self._lengths for name in self._names)
                if there:
                    await self._prove()
                self._ready = there
            except InputError as error:
                self.failure = error
                self.failed.set()
                return
            except (
                OutsideError,
                aiohttp.ClientError,
                TimeoutError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
            ):
                # It may be another one that comes back.
                self._ready = self._proven = False
            await asyncio.sleep(_LOOKS_EVERY_S)

    async def _prove(self) -> None:
        """Asks for the golden prompts of every contract, once each time that the engine has come up."""
        assert self._session is not None
        if not self._proven:
            for name, folder in self._contracts.items():
                await goldens.check(self._session, self._url, name, folder, headers=self._headers())
            self._proven = True

    async def _get(self, path: str) -> bytes:
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=_ANSWERS_WITHIN_S)
        async with self._session.get(self._url + path, headers=self._headers(), timeout=timeout) as response:
            response.raise_for_status()
            return await response.read()

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._key()}"} if self._key is not None else {}


def _body(wanted: Wanted) -> bytes:
    asked: dict[str, Any] = {"messages": list(wanted.messages)} if wanted.messages else {"prompt": _prompt(wanted)}
    asked |= {
        "model": wanted.model,
        "max_tokens": wanted.max_tokens,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "n": wanted.n,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if wanted.seed is not None:
        asked["seed"] = wanted.seed
    if wanted.stop:
        asked["stop"] = list(wanted.stop)
    return dumps(asked)


def _prompt(wanted: Wanted) -> Any:
    return wanted.prompts[0] if len(wanted.prompts) == 1 else list(wanted.prompts)


def _read(event: bytes, chat: bool, choices: int, pieces: list[Piece], usage: Usage) -> None:
    """One event of the stream.

    Raises:
        ApiError: it is an error, or none that we know.
    """
    data = event.strip().removeprefix(b"data:").lstrip()
    if not data or data == b"[DONE]" or data.startswith(b":"):
        return
    try:
        value = json.loads(data)
        for choice in value["choices"]:
            text = choice["delta"].get("content") if chat else choice["text"]
            finish = choice.get("finish_reason")
            if not 0 <= choice["index"] < choices:
                raise LookupError
            if text or finish is not None:
                pieces.append(Piece(choice["index"], text or "", finish))
        if (counts := value.get("usage")) is not None:
            usage.prompt_tokens, usage.completion_tokens = counts["prompt_tokens"], counts["completion_tokens"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ApiError(502, "the engine broke off with an error", code="engine_broke_off") from None


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The engine's refusal as ours: what is the client's to mend is told, the rest is a bad gateway."""
    if status == 429 or status == 503:
        after = headers.get("retry-after", "")
        return ApiError(
            status, "the engine is busy", code="overloaded", retry_after=int(after) if after.isdecimal() else 1
        )
    if status in (400, 413, 422):
        try:
            value = json.loads(body)
            message = str((value.get("error") or value)["message"])[:500]
        except (ValueError, LookupError, TypeError, AttributeError):
            message = "the engine refuses the request"
        return ApiError(400, message, code="refused_by_engine")
    return ApiError(502, f"the engine answered {status}", code="engine_refuses")
