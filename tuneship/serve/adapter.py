"""What is served: an adapter's folder with its name, its prompt contract and its tokenizer.

The gateway makes the token ids itself, with the tokenizer beside the adapter (the `tokenizers`
library alone: no torch, no transformers), whatever engine answers. So the ids are those of
training, proven by the contract's golden prompts; text in a request never becomes a special token;
and a prompt that is too long is refused before an engine sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneship import base, prompt
from tuneship.base import BaseFiles
from tuneship.damage import guarded, read_json, remake, text_of
from tuneship.errors import InputError
from tuneship.journal import PROVENANCE, is_run, read_run
from tuneship.prompt import Prompt
from tuneship.recipe import Model, Serve

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"

# A shorter text is tokenised in less time than another thread takes to wake.
_AT_ONCE = 4096
_tokenising = ThreadPoolExecutor(1, thread_name_prefix="tokenise")


class Tokens:
    """The tokenizer of a folder, as the contract uses it."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError("no tokenizer beside the adapter", where=str(file), fix="restore the adapter's folder")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers knows no other
            raise InputError(
                f"the tokenizer cannot be read: {error}", where=str(file), fix="restore the adapter's folder"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        beside = folder / "tokenizer_config.json"
        with guarded(beside):
            end = read_json(beside).get("eos_token")
            text = end.get("content") if isinstance(end, dict) else end
            self.eos_token_id: int | None = self._tokenizer.token_to_id(text) if text else None

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        """See `prompt.Tokenizer`."""
        self._tokenizer.encode_special_tokens = kwargs.get("split_special_tokens", False)
        encoded = [self._tokenizer.encode(one, add_special_tokens=kwargs["add_special_tokens"]) for one in text]
        return {"input_ids": [one.ids for one in encoded]}

    def stay_plain(self) -> None:
        """From now on special tokens in a text are plain text; no further `__call__`, for threads share this."""
        self._tokenizer.encode_special_tokens = True

    def plain(self, text: str) -> list[int]:
        """The ids of a text, after `stay_plain`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class Contract:
    """The prompt contract beside an adapter, held against the tokenizer beside it.

    Raises:
        InputError: there is none, or the tokenizer makes other ids than training saw.
    """

    def __init__(self, folder: Path) -> None:
        self.prompt: Prompt = prompt.read(folder)
        self._tokens = Tokens(folder)
        self._start = prompt.start_ids(self._tokens)
        prompt.verify(folder, self._tokens)
        self._tokens.stay_plain()

    def ids(self, text: str) -> list[int]:
        """A prompt's token ids."""
        return self._start + self._tokens.plain(text)

    async def encode(self, text: str) -> list[int]:
        """The same; a long text does not hold up other requests."""
        if len(text) <= _AT_ONCE:
            return self.ids(text)
        return await asyncio.get_running_loop().run_in_executor(_tokenising, self.ids, text)


@dataclass(frozen=True)
class Adapter:
    """A folder that can be served."""

    name: str
    """Of the model, for clients."""
    folder: Path
    merged: bool
    """The folder is a whole model."""
    base: Model | None
    """What the adapter sits on."""
    fingerprint: str | None
    """Of that base."""
    settings: Serve
    """The recipe's, where the folder is a run's."""


def find(path: Path, *, weights: bool = True) -> Adapter:
    """Looks at a run's folder, an adapter's, or a merged model's.

    Args:
        weights: a merged model's must be there; an engine elsewhere has its own.

    Raises:
        InputError: it is none of them, or its parts contradict each other.
    """
    settings = Serve()
    folder = path
    if is_run(path):
        run = read_run(path)
        settings, folder = run.recipe.serve, run.adapter
        if not (folder / _CONFIG).is_file():
            raise InputError("the run has no adapter yet", where=str(path), fix="tuneship train RECIPE")
    if not folder.is_dir():
        raise InputError("no such folder", where=str(path), fix="name a run (runs/tiny), an adapter or a merged model")
    facts = _facts(folder)
    with guarded(folder / PROVENANCE):
        recipe = facts.get("recipe", {})
        name = str(recipe.get("name") or folder.resolve().name)
    if (folder / _CONFIG).is_file():
        if not (folder / _WEIGHTS).is_file():
            raise InputError(
                "the adapter has no weights", where=str(folder / _WEIGHTS), fix="restore the adapter's folder"
            )
        base.check_weights(folder, fix=remake(folder / _WEIGHTS))
        with guarded(folder / _CONFIG):
            named = read_json(folder / _CONFIG).get("base_model_name_or_path")
        if not recipe or not facts.get("base"):
            raise InputError(
                "the adapter does not say which base it was trained on",
                where=str(folder / PROVENANCE),
                fix="serve an adapter folder made by tuneship train",
            )
        with guarded(folder / PROVENANCE):
            trained_on, fingerprint = text_of(facts["base"], "name"), text_of(facts["base"], "fingerprint")
            model = Model.model_validate(recipe["model"])
        if named != trained_on:
            raise InputError(
                f"the adapter's files name two bases, {named} and {trained_on}",
                where=f"{folder / _CONFIG} and {PROVENANCE}",
                fix="restore the adapter's folder as it was published",
            )
        return Adapter(name, folder, False, model, fingerprint, settings)
    if (folder / "config.json").is_file() and (any(folder.glob("*.safetensors")) or not weights):
        if weights:
            base.check_weights(folder, fix=remake(folder / PROVENANCE))
        return Adapter(name, folder, True, None, None, settings)
    raise InputError(
        "no adapter and no model here", where=str(path), fix="name a run (runs/tiny), an adapter or a merged model"
    )


def _facts(folder: Path) -> Mapping[str, Any]:
    file = folder / PROVENANCE
    facts: Mapping[str, Any] = read_json(file) if file.is_file() else {}
    return facts


def base_of(adapter: Adapter, name: str | None = None) -> BaseFiles:
    """The base that an adapter sits on, brought here and compared with the one of training.

    Args:
        name: where the base is now, if elsewhere than when the adapter was trained.

    Raises:
        InputError: the base here is another.
        OutsideError: it cannot be brought here.
    """
    if adapter.merged:
        return BaseFiles(adapter.name, adapter.folder.resolve(), "local")
    assert adapter.base is not None
    model = adapter.base
    if name is not None:
        model = model.model_copy(update={"model_name_or_path": name, "model_revision": None})
    files = base.resolve(model)
    if (found := files.fingerprint()) != adapter.fingerprint:
        raise InputError(
            f"the base here is not the one that {adapter.name} was trained on "
            f"(fingerprint {found[:12]}, trained on {str(adapter.fingerprint)[:12]})",
            where=f"{files.name} in {files.folder}",
            fix="restore that base, or name its folder with --base",
        )
    return files


def shared_base(adapters: Sequence[Adapter], name: str | None = None) -> BaseFiles:
    """The one base under several adapters; see `base_of`.

    Raises:
        InputError: they sit on different ones, or one of several is a whole model.
    """
    first, *others = adapters
    for other in others:
        if first.merged or other.merged:
            raise InputError(
                "a merged model is served alone",
                where=str((first if first.merged else other).folder),
                fix="serve it by itself",
            )
        assert first.base is not None and other.base is not None
        if (other.fingerprint, other.base.precision) != (first.fingerprint, first.base.precision):
            raise InputError(
                f"{other.name} was trained on another base than {first.name}, or in another precision",
                where=f"{other.folder / PROVENANCE} and {first.folder / PROVENANCE}",
                fix="serve it by itself",
            )
    return base_of(first, name)
