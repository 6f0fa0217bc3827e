"""Held-out rows as prepare wrote them, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tuneship import prompt
from tuneship.damage import guarded
from tuneship.data.packing import Tokens
from tuneship.prompt import Prompt, Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """A row that was not trained on."""

    number: int
    question: str
    context: str
    answer: str
    columns: dict[str, Any]

    @property
    def fields(self) -> dict[str, str]:
        """The template's fields."""
        return {"question": self.question, "context": self.context, "answer": self.answer}


def read(file: Path, limit: int) -> list[HeldOut]:
    """The first rows of validation.jsonl, test.jsonl or examples.jsonl.

    Raises:
        InputError: naming the first that is damaged.
    """
    rows = []
    with guarded(file), file.open("rb") as lines:
        for number, line in enumerate(islice(lines, limit), 1):
            with guarded(file, f":{number}"):
                rows.append(HeldOut(**json.loads(line)))
    return rows


def tokenise(rows: Sequence[HeldOut], contract: Prompt, tokenizer: Tokenizer) -> Tokens:
    """Their tokens, as training's are made."""
    return Tokens.build(prompt.encode_rows(tokenizer, contract, [row.fields for row in rows]))
