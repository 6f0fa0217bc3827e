"""serve: what is started, in which order, and how it ends.

Everything that can be wrong is looked at first (folder, contract, tokenizer, base, keys, port), so
that it is told in one line. Then the port answers: 503 until the model is loaded. SIGTERM or ctrl-C
drains: /health and new requests get 503, running ones have `drain_s` to end, then the process
ends with 0; a second signal ends it at once. If the engine dies, the process ends with its error.

On Kubernetes: startup and readiness probe `/health`, liveness probe `/health?live`, and a
terminationGracePeriodSeconds of more than preStop + drain_s.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import resource
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from tuneship import prompt
from tuneship.console import say
from tuneship.errors import InputError, OutsideError, TuneshipError
from tuneship.recipe import Serve
from tuneship.serve import adapter as adapters
from tuneship.serve.adapter import Adapter, Contract
from tuneship.serve.engine import Engine, settle
from tuneship.serve.gateway import Gateway
from tuneship.serve.keys import KeyFile
from tuneship.serve.limits import Limits
from tuneship.serve.wire import protocol, tire

# Longer than Google's load balancers keep an idle connection (600 s), so that it is they who close it.
_KEEP_ALIVE_S = 620
_BACKLOG = 2048


def serve(
    folders: Sequence[Path],
    *,
    settings: Serve | None = None,
    base: str | None = None,
    engine: str = "local",
    engine_args: str = "",
    engine_key_file: Path | None = None,
    api_key_file: Path | None = None,
    no_auth: bool = False,
    shares: Path | None = None,
    drain_s: float = 30.0,
) -> None:
    """Answers until a signal comes.

    Args:
        folders: runs or adapters of one base, or one merged model; with an engine elsewhere those that it
            has, by name; none there means all that it has, without their contracts.
        settings: the recipe's serve section; the run's own by default.
        base: where the base is now, if elsewhere than when the adapter was trained.
        engine: `local` for the one in this process, `vllm` for a vLLM of our own, or the URL of an
            OpenAI-compatible one.
        engine_args: more arguments for vLLM, as on a command line.
        engine_key_file: a file with the key that an engine elsewhere asks for.
        api_key_file: the keys that clients may show.
        no_auth: answer without keys on an address that others can reach.
        shares: a file that puts the folders behind one model name, each with a share of its requests
            (`shares`); their own names are then those of the folders.
        drain_s: seconds that running requests have after a signal.

    Raises:
        InputError: folder, settings or keys are wrong, or base, adapter and tokenizer do not belong together.
        OutsideError: the port is taken, a key file or the base is missing.
        TuneshipError: the engine died.
    """
    found = [adapters.find(folder, weights=not _is_url(engine)) for folder in folders]
    if shares is not None:
        found = [replace(one, name=folder.resolve().name) for one, folder in zip(found, folders, strict=True)]
    settings = settings or (found[0].settings if found else Serve())
    keys = _keys(api_key_file, no_auth, settings.host)
    contracts = {one.name: Contract(one.folder) for one in found}
    if len(contracts) < len(found):
        raise InputError("two of the folders have one name", where=", ".join(map(str, folders)))
    listening = listen(settings.host, settings.port)
    with listening:
        limits = Limits(
            running=settings.max_num_seqs, waiting=settings.max_waiting, request_s=settings.timeout_s, drain_s=drain_s
        )
        behind = _engine(engine, found, settings, base, engine_args, engine_key_file)
        if shares is not None:
            behind = _shared(behind, found, contracts, shares)
        gateway = Gateway(
            behind,
            contracts,
            limits=limits,
            max_new_tokens=settings.max_new_tokens,
            keys=keys,
            local_only=keys is None and not no_auth,
        )
        server = Server(gateway, behind, listening, limits)
        say(f"serving {', '.join(contracts) or 'every model'} at {address(listening)} (ctrl-C ends it)")
        server.run()


def _engine(
    engine: str, found: Sequence[Adapter], settings: Serve, base: str | None, arguments: str, key_file: Path | None
) -> Engine:
    if engine not in ("local", "vllm") and not _is_url(engine):
        raise InputError("an engine is local, vllm or a URL", where=f"--engine {engine}", fix="http://host:port")
    if arguments and engine != "vllm":
        raise InputError("arguments for vLLM have no effect without it", where=f"--engine-args {arguments!r}")
    if _is_url(engine):
        if base is not None:
            raise InputError("--base has no effect with an engine elsewhere", where=f"--base {base}", fix="remove it")
        from tuneship.serve.upstream import Upstream

        key = KeyFile(key_file).first if key_file is not None else None
        return Upstream(engine, [one.name for one in found], key, {one.name: one.folder for one in found})
    if key_file is not None:
        raise InputError("an engine's key has no effect without its URL", where=str(key_file), fix="remove it")
    if not found:
        raise InputError(
            "the engine here has nothing to serve", fix="name a run, an adapter or a merged model; or an engine by URL"
        )
    files = adapters.shared_base(found, base)
    if engine == "vllm":
        from tuneship.serve.vllm import Vllm

        try:
            more = shlex.split(arguments)
        except ValueError as error:
            raise InputError(f"this is no list of arguments: {error}", where=f"--engine-args {arguments}") from None
        return Vllm(found, files, settings, more)
    from tuneship.serve.local import LocalEngine

    return LocalEngine(found, files, slots=settings.max_num_seqs, length=settings.max_model_len)


def _is_url(engine: str) -> bool:
    return engine.startswith(("http://", "https://"))


def _shared(engine: Engine, found: Sequence[Adapter], contracts: dict[str, Contract], file: Path) -> Engine:
    """The engine with one name for all adapters, and the contract that they have in common for it."""
    from tuneship.serve.shares import Shares

    first, *others = found
    for other in others:
        if (other.folder / prompt.FILE).read_bytes() != (first.folder / prompt.FILE).read_bytes():
            raise InputError(
                "adapters that share a name need the same prompt contract",
                where=f"{first.folder / prompt.FILE} and {other.folder / prompt.FILE}",
                fix="serve them without --shares, each under its own name",
            )
    shared = Shares(engine, file, [one.name for one in found])
    contracts[shared.model] = contracts[first.name]
    return shared


def _keys(file: Path | None, no_auth: bool, host: str) -> KeyFile | None:
    if file is not None:
        if no_auth:
            raise InputError("--no-auth and a file of API keys exclude each other", where=str(file), fix="remove one")
        return KeyFile(file)
    if not no_auth and not _is_loopback(host):
        raise InputError(
            "without API keys only this machine may ask",
            where=f"serve.host: {host}",
            fix="name a file of keys with --api-key-file, serve on 127.0.0.1, or say --no-auth",
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; nobody is answered yet.

    Raises:
        OutsideError: the port is taken or not ours to take.
        InputError: no such address here.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"no such address: {error.strerror}", where=f"serve.host: {host}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError("this machine has no such address", where=f"serve.host: {host}") from error
        raise _taken(error, host, port) from error
    return listening


def _taken(error: OSError, host: str, port: int) -> OutsideError:
    what = "the port is taken" if error.errno == errno.EADDRINUSE else f"the port cannot be used: {error.strerror}"
    return OutsideError(what, where=f"{host}:{port}", fix="choose another with --port; 0 takes a free one")


def address(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """A gateway on a socket. From now on connections are taken; they are answered once it runs."""

    def __init__(self, gateway: Gateway, engine: Engine, listening: socket.socket, limits: Limits) -> None:
        self._gateway, self._engine, self._listening, self._limits = gateway, engine, listening, limits
        tire(listening, limits.stall_s)
        try:
            listening.listen(_BACKLOG)
        except OSError as error:
            # Another process bound it too, and was the first to listen.
            raise _taken(error, *listening.getsockname()[:2]) from error
        config = uvicorn.Config(
            gateway,
            http=protocol(head_s=limits.head_s, stall_s=limits.stall_s, most=_most_connections()),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self._uvicorn = _Uvicorn(config, self.stop)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Answers until `stop`, a signal, or the engine's end.

        Raises:
            TuneshipError: the engine could not be loaded, or died.
        """
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._engine.start()
        settle()
        watching = [asyncio.create_task(self._watch()), asyncio.create_task(self._tell())]
        try:
            await self._uvicorn.serve(sockets=[self._listening])
        finally:
            for task in watching:
                task.cancel()
            await self._engine.close()
        failure = self._engine.failure
        if isinstance(failure, TuneshipError):
            raise failure
        if failure is not None:
            raise TuneshipError(f"the engine died: {type(failure).__name__}: {failure}") from failure

    async def _watch(self) -> None:
        await self._engine.failed.wait()
        self._drain(0.0)

    async def _tell(self) -> None:
        """Says when the engine has come up: until then, requests are answered 503."""
        began = time.monotonic()
        while not self._engine.ready:
            await asyncio.sleep(0.1)
        say(f"ready after {time.monotonic() - began:.1f} s")

    def stop(self) -> None:
        """Begins to drain; from any thread or signal handler. The second time it does not wait."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._drain, self._limits.drain_s)

    def _drain(self, seconds: float) -> None:
        if self._draining is None:
            say("stopping: running requests are finished (once more to stop at once)")
            self._draining = asyncio.create_task(self._drained(seconds))
        else:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True

    async def _drained(self, seconds: float) -> None:
        await self._gateway.drain(seconds)
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn, whose way to end we choose: it would stop listening first, and so refuse instead of say 503."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `uvicorn.Server`."""
        self._stop()


def _most_connections() -> int:
    """What the limit of open files leaves room for, raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    # A request by URL takes a second one, to the engine.
    return (max(soft, wanted) - 128) // 2
