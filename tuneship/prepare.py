"""prepare: rows in, checked, split, tokenised, and written into the run's folder.

    data/train.safetensors     token ids of the training rows
    data/validation.jsonl      held-out rows, in hash order
    data/test.jsonl
    data/examples.jsonl        training rows that few-shot prompts show, never held out
    data/rejects.jsonl         bad rows, with `on_bad_row: skip`
    data/prepared.json         counts and digests; written last, so its presence means that all is there

Refuses bad rows before any weight is read. Running it again on a prepared run does nothing.
"""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import IO, Any

from tuneship import base, prompt
from tuneship.console import Progress, progress, say
from tuneship.data import rows, sources
from tuneship.data.packing import Tokens
from tuneship.data.rows import Row, Tally
from tuneship.data.sources import Broken, RawRow
from tuneship.errors import InputError
from tuneship.journal import PREPARED, Run, code_facts, read_json, sha256_file, write_json, write_text
from tuneship.prompt import Prompt
from tuneship.recipe import Data, Recipe

EXAMPLES = 16
BATCH = 1000


def validate(recipe: Recipe) -> dict[str, Any]:
    """Checks every row without a tokenizer or a model; returns counts.

    Raises:
        InputError: naming the first bad rows.
        OutsideError: the source cannot be reached.
    """
    tally = Tally()
    with progress("rows") as shown:
        for _ in rows.read(recipe.data, tally):
            if tally.seen % BATCH == 0:
                shown.advance(BATCH)
    return _counts(tally)


def prepare(run: Run) -> dict[str, Any]:
    """Fills the run's data folder; returns what prepared.json holds.

    Raises:
        InputError: naming the first bad or too long rows; or the source changed since the run was prepared.
        OutsideError: the source or the tokenizer cannot be reached.
    """
    recipe, folder = run.recipe, run.data
    source = _source(recipe.data)
    if (folder / PREPARED).exists():
        prepared: dict[str, Any] = read_json(folder / PREPARED)
        if prepared["source"] != source:
            raise InputError(
                "the data changed since this run was prepared",
                where=recipe.data.dataset_name,
                fix="start anew with --fresh (the old run is kept beside it), or bring the old data back",
            )
        return prepared
    files = base.resolve(recipe.model)
    tokenizer = _tokenizer(files)
    writer = _Writer(recipe, folder, tokenizer)
    with progress("rows prepared") as shown:
        counts = writer.write_all(shown)
    prepared = {
        "source": source,
        **counts,
        "train_sha256": sha256_file(folder / "train.safetensors"),
        "test_sha256": sha256_file(folder / "test.jsonl"),
        "validation_sha256": sha256_file(folder / "validation.jsonl"),
        "base": {"name": files.name, "revision": files.revision, "fingerprint": files.fingerprint()},
    }
    run.record(
        code=code_facts(), data={key: prepared[key] for key in ("source", "train_sha256")}, base=prepared["base"]
    )
    write_json(folder / PREPARED, prepared)
    for line in summary(prepared):
        say(line)
    return prepared


def summary(prepared: dict[str, Any]) -> list[str]:
    """The counts as lines for a person."""
    splits = prepared["splits"]
    lines = [
        f"rows: {splits['train']} to train on, {splits['validation']} for validation, {splits['test']} for the test"
    ]
    if prepared["duplicates"]:
        lines.append(f"left out {prepared['duplicates']} duplicates, as row {prepared['duplicate_examples'][0]}")
    if prepared["bad"]:
        lines.append(f"left out {prepared['bad']} bad rows: data/rejects.jsonl says why")
    if prepared.get("long"):
        lines.append(f"left out {prepared['long']} rows that are longer than train.max_length")
    if "tokens" in prepared:
        lines.append(
            f"tokens: {prepared['tokens']}, {prepared['labels']} of them learned; longest row {prepared['longest']}"
        )
    return lines


def _tokenizer(files: base.BaseFiles) -> Any:
    # transformers' own import is slow; `validate` needs none of it.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.folder)


def _source(data: Data) -> dict[str, Any]:
    """What tells one state of the source from another, without reading it twice where that is dear."""
    kind = sources.check(data)
    if kind == "file" and not data.dataset_name.startswith("gs://"):
        return {"name": data.dataset_name, "sha256": sha256_file(Path(data.dataset_name))}
    if kind == "builtin":
        return {"name": data.dataset_name, "sha256": sha256_file(sources.BUILTIN[data.dataset_name])}
    return {"name": data.dataset_name, "revision": sources.revision(data)}


def _counts(tally: Tally) -> dict[str, Any]:
    return {
        "rows": tally.seen,
        "splits": {split: tally.splits[split] for split in ("train", "validation", "test")},
        "duplicates": tally.duplicates,
        "duplicate_examples": tally.duplicate_examples,
        "bad": len(tally.bad),
    }


class _Writer:
    """Streams good rows into the data folder."""

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: Any) -> None:
        self.recipe, self.folder, self.tokenizer = recipe, folder, tokenizer
        self.prompt = Prompt(recipe.data.template, recipe.data.stop)
        self.parts: list[Tokens] = []
        self.batch: list[Row] = []
        self.long: list[tuple[int, int]] = []
        self.examples: list[tuple[int, int, Row]] = []

    def write_all(self, shown: Progress) -> dict[str, Any]:
        tally = Tally()
        held: dict[str, list[Row]] = {"validation": [], "test": []}
        with (self.folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects:

            def reject(number: int, reason: str, raw: RawRow) -> None:
                self._reject(rejects, number, reason, raw)

            for row in rows.read(self.recipe.data, tally, reject):
                if row.split == "train":
                    self.batch.append(row)
                    if len(self.batch) == BATCH:
                        self._tokenise(shown)
                    self._offer(row)
                else:
                    held[row.split].append(row)
        self._tokenise(shown)
        if not tally.bad:
            (self.folder / "rejects.jsonl").unlink()
        tokens = Tokens.join(self.parts)
        if self.long and (self.recipe.train.on_long_row == "error" or not len(tokens)):
            self._refuse_long()
        tokens.save(self.folder / "train.safetensors")
        for split, kept in held.items():
            self._write(f"{split}.jsonl", sorted(kept, key=lambda row: row.key))
        self._write("examples.jsonl", [row for _, _, row in sorted(self.examples, reverse=True)])
        return {
            **_counts(tally),
            "long": len(self.long),
            "tokens": len(tokens.ids),
            "labels": int(tokens.lengths.sum() - tokens.prompts.sum()),
            "longest": int(tokens.lengths.max()),
        }

    def _offer(self, row: Row) -> None:
        """Keeps the training rows with the lowest hashes as examples."""
        item = (-row.key, -row.number, row)
        if len(self.examples) < EXAMPLES:
            heapq.heappush(self.examples, item)
        elif item > self.examples[0]:
            heapq.heapreplace(self.examples, item)

    def _tokenise(self, shown: Progress) -> None:
        batch, self.batch = self.batch, []
        encoded = prompt.encode_rows(self.tokenizer, self.prompt, [row.fields for row in batch])
        kept = []
        for row, (before, after) in zip(batch, encoded, strict=True):
            length = len(before) + len(after)
            if length <= self.recipe.train.max_length:
                kept.append((before, after))
                continue
            self.long.append((row.number, length))
            if self.recipe.train.on_long_row == "error" and len(self.long) == rows.SHOWN:
                self._refuse_long()
        self.parts.append(Tokens.build(kept))
        shown.advance(len(batch))

    def _refuse_long(self) -> None:
        shown = ", ".join(f"row {number}: {length} tokens" for number, length in self.long[: rows.SHOWN])
        raise InputError(
            f"rows are longer than train.max_length {self.recipe.train.max_length} ({shown})",
            where=self.recipe.data.dataset_name,
            fix="raise train.max_length, or set train.on_long_row: skip to leave them out",
        )

    def _reject(self, rejects: IO[str], number: int, reason: str, raw: RawRow) -> None:
        row = None if isinstance(raw, Broken) else raw
        rejects.write(json.dumps({"row": number, "reason": reason, "raw": row}, default=repr) + "\n")

    def _write(self, name: str, kept: list[Row]) -> None:
        lines = [{"number": row.number, **row.fields, "columns": _plain(row.columns)} for row in kept]
        write_text(self.folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _plain(columns: dict[str, Any]) -> dict[str, Any]:
    """The short columns of a row: those that scores can be broken down by."""
    return {k: v for k, v in columns.items() if isinstance(v, str | int | float | bool) and len(str(v)) <= 100}
