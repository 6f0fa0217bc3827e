"""The engine in this process: how much faster sixteen requests are answered together than one after the other.

    python bench/local_engine.py runs/tiny
    python bench/local_engine.py runs/one runs/two      requests for two adapters, in one batch

`tuneship serve` on loopback, asked for completions of 48 tokens that end at nothing earlier than the model's
own end. Set OMP_NUM_THREADS where others use the machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

PROMPT = "Question: how many?\nContext: CREATE TABLE t (a INT)\nAnswer:"
TOGETHER = 16


@contextmanager
def serving(folders: Sequence[Path]) -> Iterator[str]:
    argv = [sys.executable, "-m", "tuneship", "serve", *map(str, folders), "--port", "0"]
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        url = re.search(r"http://127\.0\.0\.1:\d+", child.stderr.readline())
        assert url is not None, child.stderr.read()
        # The log goes on being written; somebody must read it.
        threading.Thread(target=child.stderr.read, daemon=True).start()
        yield url[0]
    finally:
        child.terminate()
        child.wait()


async def speed(url: str, models: Sequence[str], count: int) -> float:
    """Tokens/s of so many requests at a time, the models in turns."""

    async def one(session: aiohttp.ClientSession, number: int) -> int:
        body: dict[str, Any] = {"model": models[number % len(models)], "prompt": PROMPT, "max_tokens": 48}
        body |= {"temperature": 2.0, "seed": number, "stop": ["\x00"]}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            tokens: int = json.loads(await response.read())["usage"]["completion_tokens"]
            return tokens

    async with aiohttp.ClientSession() as session:
        began = time.monotonic()
        tokens = sum(await asyncio.gather(*(one(session, number) for number in range(count))))
        return tokens / (time.monotonic() - began)


async def measure(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.2)
        async with session.get(f"{url}/v1/models") as response:
            models = [model["id"] for model in json.loads(await response.read())["data"]]
    await speed(url, models, TOGETHER)  # warm
    rounds = [(await speed(url, models, 1), await speed(url, models, TOGETHER)) for _ in range(3)]
    alone, together = (sorted(one)[1] for one in zip(*rounds, strict=True))
    return {
        "adapters": len(models),
        "one at a time, tokens/s": round(alone, 1),
        f"{TOGETHER} together": round(together, 1),
        "ratio": round(together / alone, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs or adapters of one base")
    with serving(parser.parse_args().folders) as url:
        print(json.dumps(asyncio.run(measure(url)), indent=2))


if __name__ == "__main__":
    main()
