"""The gateway: one ASGI program in front of an engine, here or elsewhere.

    GET  /health               200 when requests are answered; 503 while loading and draining
    GET  /health?live          200 unless the engine hangs: what a liveness probe asks, so that loading
                               and draining never get the process killed
    GET  /v1/models            OpenAI's list
    POST /v1/completions       OpenAI's, streamed or not
    POST /v1/chat/completions  the same for a chat; see `chat_row`
    POST /ask                  {question, context} → {"answer": …}, by the prompt contract, greedy
    POST /generate             {prompt, …} → {"predictions": […]}, the tutorial's
    GET  /metrics              Prometheus

Nothing else is answered: a path is looked up as the client wrote it, byte for byte, so there is no
second spelling of one. Where keys are set, they guard all but /health and /metrics, which tell
numbers only. Where a request sets no stop, the contract's stop applies.

Written on ASGI itself: what a framework would add to each token costs more than all of this.
Covered: malformed and oversized input, slow, leaving and too many clients, a slow or dead engine.
Not covered: fairness between keys; TLS, which belongs to what stands in front.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from tuneship.serve import bodies, shapes
from tuneship.serve.adapter import Contract
from tuneship.serve.bodies import Body, Message
from tuneship.serve.call import Call, ClientGone, Receive, Scope, Send, log_line
from tuneship.serve.engine import Engine, Wanted
from tuneship.serve.keys import KeyFile
from tuneship.serve.limits import Gate, Limits, read_body
from tuneship.serve.metrics import CONTENT_TYPE, Metrics
from tuneship.serve.shapes import ApiError, Shape, Streamed

# For telling those who are cut off.
_LAST_WORD_S = 1.0
_LOCAL_NAME = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE | re.ASCII)


def _to_stderr(line: bytes) -> None:
    # A log whose reader is gone, or whose disk is full, costs nobody an answer.
    with suppress(OSError):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


class Gateway:
    """The program.

    Args:
        contracts: model name → its prompt contract; a model without one gets text and chats as they are.
        max_new_tokens: of a request that does not say.
        keys: who may ask; None for everyone.
        local_only: answer only where the Host header names this machine, so that a web page cannot
            reach an unguarded gateway under a name of its own (DNS rebinding).
        log: takes a line.
    """

    def __init__(
        self,
        engine: Engine,
        contracts: Mapping[str, Contract],
        *,
        limits: Limits,
        max_new_tokens: int,
        keys: KeyFile | None = None,
        local_only: bool = False,
        log: Callable[[bytes], None] = _to_stderr,
    ) -> None:
        self._engine, self._contracts, self._limits, self._keys = engine, contracts, limits, keys
        self._max_new_tokens, self._local_only, self._log = max_new_tokens, local_only, log
        self._created = int(time.time())
        self._gate = Gate(limits.running, limits.waiting)
        self._metrics = Metrics(self._gate)
        self._inside: set[asyncio.Task[Any]] = set()
        self.draining = False
        self._cut = False
        self._routes: dict[str, tuple[str, Callable[[Call], Awaitable[None]]]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._show_metrics),
            "/v1/models": ("GET", self._models),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/ask": ("POST", self._ask),
            "/generate": ("POST", self._generate),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Whatever happens, the client gets an answer with a request id, and the log a line."""
        if scope["type"] != "http":
            return
        call = Call(scope, receive, send)
        call.closing = self.draining
        gone = False
        try:
            await self._route(call)
        except ApiError as error:
            await call.fail(error)
        except (ClientGone, ConnectionError):
            gone = True
        except asyncio.CancelledError:
            if not self._cut:
                raise
            await call.fail(ApiError(503, "the server stopped", code="draining", retry_after=5))
        except Exception as error:
            # The message may hold a prompt; the place does not.
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
            self._log(log_line("error", "error", id=call.id, error=type(error).__name__, place=place))
            await call.fail(ApiError(500, "internal error; the log knows it by this request id", code="internal_error"))
        finally:
            self._metrics.note(call, gone=gone)
            if call.route not in ("/health", "/metrics"):
                self._log(log_line("request", **call.line(gone=gone)))

    async def drain(self, seconds: float) -> None:
        """Refuses new requests and returns when the running ones have ended, or were cut off after a time."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._gate.empty.wait()
        self._cut = True
        for task in self._inside:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await self._gate.empty.wait()

    # --- routes -------------------------------------------------------------------------------

    async def _route(self, call: Call) -> None:
        path, raw = call.scope["path"], call.scope.get("raw_path")
        route = self._routes.get(path)
        if route is None or (raw is not None and raw != path.encode()):
            raise ApiError(404, "no such route", code="not_found")
        call.route = path
        method, handler = route
        allow = "GET, HEAD" if method == "GET" else method
        if call.scope["method"] not in allow.split(", "):
            raise ApiError(405, f"{path} is asked with {allow}", code="method_not_allowed", allow=allow)
        if self._local_only and not _names_this_machine(call.headers.get(b"host", b"")):
            raise ApiError(403, "without API keys, only this machine's own names are answered", code="foreign_host")
        if path not in ("/health", "/metrics"):
            if self._keys is not None and not self._keys.accepts(call.headers.get(b"authorization")):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer …", code="invalid_api_key")
            self._check_ready()
        await handler(call)

    def _check_ready(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is stopping", code="draining", retry_after=5)
        if not self._engine.ready:
            raise ApiError(503, "the model is not ready", code="not_ready", retry_after=5)

    async def _health(self, call: Call) -> None:
        if call.scope["query_string"] == b"live":
            if self._engine.hung:
                raise ApiError(503, "the engine hangs", code="hung")
        else:
            self._check_ready()
        await call.reply(200, b'{"status":"ok"}')

    async def _models(self, call: Call) -> None:
        names = self._engine.models()
        await call.reply(200, shapes.models(names, [self._engine.length(name) for name in names], self._created))

    async def _show_metrics(self, call: Call) -> None:
        ready = self._engine.ready and not self.draining
        text = self._metrics.text(ready=ready) + await self._engine.metrics()
        await call.reply(200, text, kind=CONTENT_TYPE)

    async def _completions(self, call: Call) -> None:
        await self._answer(call, bodies.completion, lambda wanted, body: shapes.Completion(call.id, wanted.model))

    async def _chat(self, call: Call) -> None:
        await self._answer(call, bodies.chat, lambda wanted, body: shapes.Chat(call.id, wanted.model))

    async def _ask(self, call: Call) -> None:
        await self._answer(call, bodies.ask, lambda wanted, body: shapes.Ask())

    async def _generate(self, call: Call) -> None:
        await self._answer(call, bodies.generate, lambda wanted, body: shapes.Generate(body.prompts[0]))

    # --- one generation -----------------------------------------------------------------------

    async def _answer(
        self,
        call: Call,
        read: Callable[[Mapping[str, Any], Limits], Body],
        shape: Callable[[Wanted, Body], Any],
    ) -> None:
        kind = call.headers.get(b"content-type", b"")
        if kind.split(b";")[0].strip().lower() != b"application/json":
            # Also what keeps a web page's form from asking.
            raise ApiError(415, "the body must be sent as application/json", code="unsupported_media_type")
        task = asyncio.current_task()
        assert task is not None
        with self._gate.place():
            self._inside.add(task)
            try:
                raw = await read_body(call.receive, call.headers.get(b"content-length"), self._limits)
                body = read(bodies.read(raw), self._limits)
                async with call.watched(self._limits.request_s):
                    wanted = await self._wanted(call, body)
                    async with self._gate.slot():
                        call.waited = call.seconds
                        await (self._stream if body.stream else self._whole)(call, wanted, body, shape(wanted, body))
            finally:
                self._inside.discard(task)

    async def _whole(self, call: Call, wanted: Wanted, body: Body, shape: Shape) -> None:
        count = len(wanted.prompts or wanted.messages[:1]) * wanted.n
        texts, finishes = [""] * count, ["stop"] * count
        async with aclosing(self._engine.generate(wanted, call.usage)) as pieces:
            async for batch in pieces:
                if call.first is None:
                    call.first = call.seconds
                for piece in batch:
                    texts[piece.index] += piece.text
                    finishes[piece.index] = piece.finish or finishes[piece.index]
        await call.reply(200, shape.whole(texts, finishes, call.usage))

    async def _stream(self, call: Call, wanted: Wanted, body: Body, shape: Streamed) -> None:
        count = len(wanted.prompts or wanted.messages[:1]) * wanted.n
        ahead = shape.opening(count)
        async with aclosing(self._engine.generate(wanted, call.usage)) as pieces:
            async for batch in pieces:
                if call.first is None:
                    # Not before: an engine's refusal still has a status of its own.
                    call.first = call.seconds
                    await call.stream()
                data = b"".join([shape.frame(piece) for piece in batch])
                if ahead:
                    data, ahead = ahead + data, b""
                if data:
                    await call.frame(data)
        if call.first is None:
            await call.stream()
        await call.end(ahead + shape.closing(call.usage if body.include_usage else None))

    async def _wanted(self, call: Call, body: Body) -> Wanted:
        """What the engine is asked for.

        Raises:
            ApiError: 404 for an unknown model, 400 for what it cannot answer.
        """
        names = self._engine.models()
        name = body.model or names[0]
        if name not in names:
            raise ApiError(
                404, f"no model {name[:64]!r} here; there is {', '.join(names)}", code="model_not_found", param="model"
            )
        call.model = name
        contract = self._contracts.get(name)
        texts, messages = body.prompts, body.messages
        prompts: list[list[int] | str] = [*texts]
        if contract is None:
            if body.row is not None:
                raise ApiError(404, "this model has no prompt contract; ask /v1/completions", code="no_contract")
        else:
            if messages:
                texts, messages = (contract.prompt.render(chat_row(messages)),), ()
            elif body.row is not None:
                texts = (contract.prompt.render(body.row),)
            prompts = [await contract.encode(text) for text in texts]
        if len(prompts) * body.n > self._limits.choices:
            raise ApiError(400, f"prompts × n must be at most {self._limits.choices}", code="invalid_value", param="n")
        stop = body.stop or (contract.prompt.stop if contract is not None else ())
        call.usage.prompt_tokens = sum(len(ids) for ids in prompts) if contract is not None else 0
        return Wanted(
            id=call.id,
            model=name,
            prompts=tuple(prompts),
            max_tokens=self._tokens(body, prompts, self._engine.length(name)),
            temperature=body.temperature,
            top_p=body.top_p,
            n=body.n,
            seed=body.seed,
            stop=stop,
            messages=[{"role": message.role, "content": message.text} for message in messages],
        )

    def _tokens(self, body: Body, prompts: list[list[int] | str], length: int | None) -> int:
        """How many tokens a completion may have.

        Raises:
            ApiError: 400, an empty prompt, or one that leaves no room.
        """
        if any(not prompt for prompt in prompts):
            raise ApiError(400, "the prompt is empty", code="invalid_value", param="prompt")
        room = self._limits.max_tokens
        if length is not None:
            longest = max((len(prompt) for prompt in prompts if isinstance(prompt, list)), default=0)
            room = min(room, length - longest)
            if room < (body.max_tokens or 1):
                raise ApiError(
                    400,
                    f"the prompt has {longest} tokens and {body.max_tokens or 1} are asked for; prompt and completion "
                    f"together have at most {length}",
                    code="context_length_exceeded",
                    param="prompt" if room < 1 else "max_tokens",
                )
        return body.max_tokens or min(self._max_new_tokens, room)


def chat_row(messages: tuple[Message, ...]) -> dict[str, str]:
    """A chat as a row of the prompt contract: the last user message asks, the system's messages are the context.

    An adapter is tuned on the contract's one turn, so that is what it gets, and not the chat template
    of the base that it sits on; earlier turns of the chat are not shown to it.

    Raises:
        ApiError: 400, nobody asks anything.
    """
    asked = [message.text for message in messages if message.role == "user"]
    if not asked:
        raise ApiError(400, "messages has no user message", code="invalid_value", param="messages")
    context = "\n".join(message.text for message in messages if message.role in ("system", "developer"))
    return {"question": asked[-1], "context": context, "answer": ""}


def _names_this_machine(host: bytes) -> bool:
    return _LOCAL_NAME.fullmatch(host.decode("latin-1")) is not None
