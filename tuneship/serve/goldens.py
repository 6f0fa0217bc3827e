"""Whether an engine elsewhere is the one that an adapter was trained for: the contract's golden prompts, asked there.

    python -m tuneship.serve.goldens http://127.0.0.1:8001 /models/sql-1f2e /models/sql-9c3b

Each golden prompt is sent as text, under the adapter's name. The engine must make the token ids of it
that training saw (so it has the tokenizer, and with it the base, of training), and answer. Standing
beside an engine, this prints one JSON object: for each adapter its greedy answers.

Needs an engine that shows a prompt's token ids (`return_token_ids`, vLLM 0.10.2 or later); where it
shows none, their number is compared.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tuneship import prompt
from tuneship.errors import InputError, OutsideError, TuneshipError

_ANSWERS_WITHIN_S = 60.0


async def check(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    folder: Path,
    *,
    headers: Mapping[str, str] | None = None,
    max_tokens: int = 1,
) -> list[str]:
    """Asks every golden prompt; returns the greedy answers.

    Args:
        url: the engine's, up to, and without, /v1.
        model: the adapter's name there.
        folder: where its prompt.json is.

    Raises:
        InputError: the engine makes other token ids than training saw.
        OutsideError: the engine does not answer.
    """
    answers = []
    for text, ids in prompt.goldens(folder):
        asked = {"model": model, "prompt": text, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        answer = await _post(session, url, asked, headers)
        choice = answer["choices"][0]
        made = choice.get("prompt_token_ids")
        if made != ids if made is not None else answer["usage"]["prompt_tokens"] != len(ids):
            raise InputError(
                f"the engine makes other tokens than training saw, for the golden prompt {text!r:.60}",
                where=f"model {model} at {url}",
                fix="start the engine with the base that the adapter was trained on",
            )
        answers.append(str(choice["text"]))
    return answers


async def _post(
    session: aiohttp.ClientSession, url: str, asked: Mapping[str, Any], headers: Mapping[str, str] | None
) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=_ANSWERS_WITHIN_S)
    try:
        async with session.post(f"{url}/v1/completions", json=asked, headers=headers, timeout=timeout) as response:
            if response.status != 200:
                said = (await response.content.read(500)).decode(errors="replace")
                raise OutsideError(f"the engine answered {response.status} to a golden prompt: {said}", where=url)
            answer: dict[str, Any] = await response.json(content_type=None)
            return answer
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise OutsideError(f"the engine does not answer: {type(error).__name__}", where=url) from error


async def main(arguments: list[str]) -> None:
    """See above."""
    url, *folders = arguments
    answers = {}
    async with aiohttp.ClientSession() as session:
        for folder in map(Path, folders):
            answers[folder.name] = await check(session, url.rstrip("/"), folder.name, _contract(folder), max_tokens=32)
    print(json.dumps(answers))


def _contract(folder: Path) -> Path:
    """The part of a run's folder that holds the contract."""
    return next(path for path in (folder / "adapter", folder / "merged", folder) if (path / prompt.FILE).is_file())


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1:]))
    except TuneshipError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
