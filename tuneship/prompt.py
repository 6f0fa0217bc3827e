"""The prompt contract: how a row becomes text, where the answer ends, and how both are proven.

It is written once, by the recipe's template, and travels with the adapter as prompt.json: the
server renders `/ask` with it, stops where it says, and shows with the golden prompts that its
tokenizer makes the token ids that training saw.

Rendering replaces the template's fields in one pass. What a row says is never looked at again:
text in the data can neither open a field nor become a special token (`encode` turns special
tokens in text into plain ones).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from tuneship.errors import InputError

FIELDS = ("question", "context", "answer")
FILE = "prompt.json"
_FIELD = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")

# Texts that a tokenizer or a template could trip over; the goldens are made of them.
_GOLDEN_ROWS = (
    {
        "question": 'What is the total number of attendees with age over 30 at kubecon "EU"?',
        "context": "CREATE TABLE attendees (name VARCHAR, age INTEGER, kubecon VARCHAR)",
    },
    {"question": "How many {answer} are there?\n", "context": "CREATE TABLE t (id INTEGER)"},
    {"question": "Übergröße, 数, 🚢 — naïve?", "context": ""},
)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the contract needs."""

    eos_token_id: int | None

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        """Texts in, a mapping with `input_ids` out."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A template and its stops."""

    template: str
    stop: tuple[str, ...]

    def render(self, row: Mapping[str, str]) -> str:
        """The text before the answer. It ends without a blank: the blank is the answer's first character."""
        head = self.template[: self.template.rindex("{answer}")].rstrip(" ")
        return _FIELD.sub(lambda field: row[field.group(1)], head)

    def completion(self, answer: str) -> str:
        """The text of the answer, with the blank that the template puts before it."""
        head = self.template[: self.template.rindex("{answer}")]
        return head[len(head.rstrip(" ")) :] + answer

    def answer(self, completion: str) -> str:
        """The answer in what a model wrote: up to the first stop, without blanks around it."""
        ends = [at for stop in self.stop if (at := completion.find(stop)) >= 0]
        return completion[: min(ends)].strip() if ends else completion.strip()


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, start: bool) -> list[list[int]]:
    """Token ids of each text, special tokens in it taken as plain text.

    Args:
        start: begin with the tokens that the tokenizer puts before a text (Gemma: <bos>; SmolLM2: none).
    """
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if start:
        before = start_ids(tokenizer)
        ids = [before + row for row in ids]
    return ids


def encode_rows(
    tokenizer: Tokenizer, contract: Prompt, rows: Sequence[Mapping[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Of each row the ids of its prompt, and those of its answer with the end of sequence."""
    assert tokenizer.eos_token_id is not None
    prompts = encode(tokenizer, [contract.render(row) for row in rows], start=True)
    answers = encode(tokenizer, [contract.completion(row["answer"]) for row in rows], start=False)
    return [(before, [*after, tokenizer.eos_token_id]) for before, after in zip(prompts, answers, strict=True)]


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """The token ids that the tokenizer puts before a text; never the end of sequence."""
    ids: list[int] = tokenizer([""], add_special_tokens=True)["input_ids"][0]
    return [token for token in ids if token != tokenizer.eos_token_id]


def write(folder: Path, prompt: Prompt, tokenizer: Tokenizer) -> None:
    """Writes prompt.json beside an adapter."""
    texts = [prompt.render(row) for row in _GOLDEN_ROWS]
    goldens = [
        {"prompt": text, "token_ids": ids}
        for text, ids in zip(texts, encode(tokenizer, texts, start=True), strict=True)
    ]
    contract = {
        **asdict(prompt),
        "fields": list(FIELDS),
        "tokenizer_sha256": tokenizer_sha256(folder),
        "goldens": goldens,
    }
    (folder / FILE).write_text(json.dumps(contract, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Prompt:
    """The contract beside an adapter.

    Raises:
        InputError: there is none, or it is damaged.
    """
    contract = _contract(folder)
    return Prompt(template=contract.template, stop=contract.stop)


def goldens(folder: Path) -> list[tuple[str, list[int]]]:
    """The golden prompts beside an adapter, each with the token ids that training saw.

    Raises:
        InputError: there is no contract, or it is damaged.
    """
    return [(golden.prompt, golden.token_ids) for golden in _contract(folder).goldens]


def verify(folder: Path, tokenizer: Tokenizer) -> None:
    """Holds a tokenizer against the contract's golden prompts.

    Raises:
        InputError: it makes other token ids than training saw; or the contract is missing or damaged.
    """
    contract = _contract(folder)
    if contract.tokenizer_sha256 != tokenizer_sha256(folder):
        raise InputError(
            "the tokenizer is not the one that the adapter was trained with",
            where=str(folder / "tokenizer.json"),
            fix="restore the adapter's folder as it was published",
        )
    texts = [golden.prompt for golden in contract.goldens]
    for golden, ids in zip(contract.goldens, encode(tokenizer, texts, start=True), strict=True):
        if golden.token_ids != ids:
            raise InputError(
                f"the tokenizer makes other tokens than training saw, for the golden prompt {golden.prompt!r:.60}",
                where=str(folder / FILE),
                fix="load the tokenizer from the adapter's folder",
            )


def tokenizer_sha256(folder: Path) -> str:
    """sha256 of the folder's tokenizer.json, or of nothing where there is none."""
    file = folder / "tokenizer.json"
    return hashlib.sha256(file.read_bytes() if file.exists() else b"").hexdigest()


class _Golden(BaseModel):
    prompt: str
    token_ids: list[int]


class _Contract(BaseModel):
    """What prompt.json must hold."""

    template: Annotated[str, StringConstraints(pattern=r"^[\s\S]*\{answer\}$")]
    stop: tuple[Annotated[str, Field(min_length=1)], ...]
    tokenizer_sha256: str
    goldens: Annotated[list[_Golden], Field(min_length=1)]


def _contract(folder: Path) -> _Contract:
    file = folder / FILE
    fix = "use an adapter folder made by tuneship train"
    try:
        return _Contract.model_validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        raise InputError("no prompt contract beside the adapter", where=str(file), fix=fix) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the prompt contract is damaged: {place + ': ' if place else ''}{first['msg']}", where=str(file), fix=fix
        ) from None
