"""vLLM as a child of this process: started with the adapters, alone behind the gateway, gone when it is.

    tuneship serve runs/tiny --engine vllm --engine-args "--gpu-memory-utilization 0.8"

It listens on a free port of loopback and asks for a key that is made anew each time, so nobody gets
past the gateway. What it says goes to stderr as it is. A signal reaches the gateway alone, which
drains first; a gateway that is killed takes its child along (Linux).

`vllm` must be on the PATH. Its dtype is the precision of training where that was float32, else bfloat16.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tuneship.base import BaseFiles
from tuneship.console import say
from tuneship.damage import guarded, read_json
from tuneship.errors import InputError, OutsideError
from tuneship.recipe import Serve
from tuneship.serve.adapter import Adapter
from tuneship.serve.upstream import Upstream

# vllm/config/lora.py, MaxLoRARanks.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# A 9B base from a slow disk, and its kernels compiled, take minutes.
COMES_UP_WITHIN_S = 1800.0
_ENDS_WITHIN_S = 20.0
_LOOKS_EVERY_S = 0.2
_PR_SET_PDEATHSIG = 1


class Vllm(Upstream):
    """See `engine.Engine`.

    Args:
        found: one merged model, or adapters of one base.
        files: that base.
        arguments: more of vLLM's own; they win over ours.

    Raises:
        OutsideError: there is no vLLM here.
        InputError: an adapter's rank is larger than any that vLLM takes.
    """

    def __init__(
        self, found: Sequence[Adapter], files: BaseFiles, settings: Serve, arguments: Sequence[str] = ()
    ) -> None:
        program = shutil.which("vllm")
        if program is None:
            raise OutsideError("vLLM is not installed", where="vllm on the PATH", fix="pip install vllm")
        port = _free_port()
        self._argv = [program, "serve", *command(found, files, settings), "--port", str(port), *arguments]
        key = secrets.token_urlsafe(24)
        self._environment = {**os.environ, "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"}
        self._child: subprocess.Popen[bytes] | None = None
        self._watching: asyncio.Task[None] | None = None
        super().__init__(
            f"http://127.0.0.1:{port}",
            [one.name for one in found],
            lambda: key,
            {one.name: one.folder for one in found},
        )

    async def start(self) -> None:
        """See `Engine`."""
        say(f"starting vLLM: {' '.join(self._argv)}")
        # A session of its own: a terminal's ctrl-C is for the gateway.
        self._child = subprocess.Popen(
            self._argv, env=self._environment, stdout=2, start_new_session=True, preexec_fn=_end_with_parent
        )
        await super().start()
        self._watching = asyncio.create_task(self._watch(self._child))

    async def close(self) -> None:
        """See `Engine`."""
        if self._watching is not None:
            self._watching.cancel()
        await super().close()
        if self._child is not None:
            await asyncio.to_thread(_end, self._child)

    async def _watch(self, child: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        late = loop.time() + COMES_UP_WITHIN_S
        while (code := child.poll()) is None:
            if self.ready:
                late = math.inf
            if loop.time() > late:
                return self._fail(f"vLLM did not come up within {COMES_UP_WITHIN_S:g} s")
            await asyncio.sleep(_LOOKS_EVERY_S)
        self._fail(f"vLLM ended with exit code {code}")

    def _fail(self, what: str) -> None:
        fix = "its own words stand above; --engine-args passes arguments on to it"
        self.failure = OutsideError(what, where=self._argv[0], fix=fix)
        self.failed.set()


def command(found: Sequence[Adapter], files: BaseFiles, settings: Serve) -> list[str]:
    """What vLLM is started with, but for its port."""
    first = found[0]
    length = min(settings.max_model_len, files.length)
    dtype = "float32" if first.base is not None and first.base.precision == "float32" else "bfloat16"
    name = first.name if first.merged else "base"
    arguments: list[Any] = [files.folder, "--served-model-name", name, "--host", "127.0.0.1", "--dtype", dtype]
    arguments += ["--max-model-len", length, "--max-num-seqs", settings.max_num_seqs, "--disable-uvicorn-access-log"]
    if not first.merged:
        arguments += ["--enable-lora", "--max-loras", len(found), "--max-lora-rank", max(map(_rank, found))]
        arguments += ["--lora-modules", *(f"{one.name}={one.folder.resolve()}" for one in found)]
    return [str(argument) for argument in arguments]


def _rank(adapter: Adapter) -> int:
    """The least rank that vLLM can be told and that holds this adapter's."""
    file = adapter.folder / "adapter_config.json"
    with guarded(file):
        rank = int(read_json(file)["r"])
    if rank > _RANKS[-1]:
        raise InputError(
            f"vLLM serves adapters of rank {_RANKS[-1]} at most, and this one has {rank}",
            where=str(file),
            fix="tuneship export merges it into the base; serve that",
        )
    return min(known for known in _RANKS if known >= rank)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def _end_with_parent() -> None:
    """In the child: the kernel ends it when this process is gone, however that came about."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Asks the child and all that it started to end, and makes sure."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # The second time also for what the child left behind: its group lives on while anything in it does.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_ENDS_WITHIN_S)
