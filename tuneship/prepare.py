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
import math
import tempfile
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tuneship import base, prompt
from tuneship.console import Progress, progress, say
from tuneship.data import rows, sources
from tuneship.data.packing import Tokens
from tuneship.data.rows import Row, Tally
from tuneship.data.sources import Broken, RawRow
from tuneship.errors import InputError
from tuneship.journal import PREPARED, Run, code_facts, sha256_file, write_json, write_text
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


def prepare(run: Run, *, weights: bool = True) -> dict[str, Any]:
    """Fills the run's data folder; returns what prepared.json holds.

    Args:
        weights: False fetches a Hub model's tokenizer only, where another machine will train.

    Raises:
        InputError: naming the first bad or too long rows; or the source changed since the run was prepared.
        OutsideError: the source or the tokenizer cannot be reached.
    """
    recipe, folder = run.recipe, run.data
    source = _source(recipe.data)
    if (folder / PREPARED).exists():
        prepared = run.prepared()
        if prepared["source"] != source:
            raise InputError(
                "the data changed since this run was prepared",
                where=recipe.data.dataset_name,
                fix="start anew with --fresh (the old run is kept beside it), or bring the old data back",
            )
        return prepared
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as spool:
        with progress("rows read") as shown:
            tally = _read(recipe, folder, spool, shown)
        # Only now: a bad row is found before gigabytes are fetched.
        files = base.resolve(recipe.model, weights=weights)
        spool.seek(0)
        with progress("rows tokenised", tally.splits["train"]) as shown:
            lengths = _tokenise(recipe, folder, spool, base.load_tokenizer(files), shown)
    prepared = {
        "source": source,
        **_counts(tally),
        **lengths,
        "train_sha256": sha256_file(folder / "train.safetensors"),
        "test_sha256": sha256_file(folder / "test.jsonl"),
        "validation_sha256": sha256_file(folder / "validation.jsonl"),
        "base": {
            "name": files.name,
            "revision": files.revision,
            # Unknown without its weights: train notes it.
            "fingerprint": files.fingerprint() if weights else None,
        },
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


def _read(recipe: Recipe, folder: Path, spool: IO[str], shown: Progress) -> Tally:
    """Writes the held-out rows, examples and rejects, and the training rows' fields to the spool, a line each."""
    tally = Tally()
    held: dict[str, list[Row]] = {"validation": [], "test": []}
    # The training rows with the lowest hashes: a heap of the highest among them.
    examples: list[tuple[int, int, Row]] = []
    rejected = folder / "rejects.jsonl"
    with rejected.open("w", encoding="utf-8") as rejects:

        def reject(number: int, reason: str, raw: RawRow) -> None:
            row = None if isinstance(raw, Broken) else raw
            rejects.write(json.dumps({"row": number, "reason": reason, "raw": row}, default=repr) + "\n")

        for row in rows.read(recipe.data, tally, reject):
            if row.split == "train":
                spool.write(json.dumps([row.number, row.fields]) + "\n")
                item = (-row.key, -row.number, row)
                if len(examples) < EXAMPLES:
                    heapq.heappush(examples, item)
                else:
                    heapq.heappushpop(examples, item)
            else:
                held[row.split].append(row)
            shown.advance()
    if not tally.bad:
        rejected.unlink()
    for split, kept in held.items():
        _write(folder / f"{split}.jsonl", sorted(kept, key=lambda row: row.key))
    _write(folder / "examples.jsonl", [row for _, _, row in sorted(examples, reverse=True)])
    return tally


def _tokenise(recipe: Recipe, folder: Path, spool: IO[str], tokenizer: Any, shown: Progress) -> dict[str, int]:
    """Writes train.safetensors; returns counts of its tokens."""
    contract = Prompt(recipe.data.template, recipe.data.stop)
    parts: list[Tokens] = []
    long: list[tuple[int, int]] = []
    while lines := list(islice(spool, BATCH)):
        numbers, fields = zip(*map(json.loads, lines), strict=True)
        kept = []
        for number, (before, after) in zip(numbers, prompt.encode_rows(tokenizer, contract, fields), strict=True):
            length = len(before) + len(after)
            if length <= recipe.train.max_length:
                kept.append((before, after))
                continue
            long.append((number, length))
            if recipe.train.on_long_row == "error" and len(long) == rows.SHOWN:
                raise _too_long(recipe, long)
        parts.append(Tokens.build(kept))
        shown.advance(len(lines))
    tokens = Tokens.join(parts)
    if long and (recipe.train.on_long_row == "error" or not len(tokens)):
        raise _too_long(recipe, long)
    tokens.save(folder / "train.safetensors")
    return {
        "long": len(long),
        "tokens": len(tokens.ids),
        "labels": int(tokens.lengths.sum() - tokens.prompts.sum()),
        "longest": int(tokens.lengths.max()),
    }


def _too_long(recipe: Recipe, long: list[tuple[int, int]]) -> InputError:
    shown = ", ".join(f"row {number}: {length} tokens" for number, length in long[: rows.SHOWN])
    return InputError(
        f"rows are longer than train.max_length {recipe.train.max_length} ({shown})",
        where=recipe.data.dataset_name,
        fix="raise train.max_length, or set train.on_long_row: skip to leave them out",
    )


def _write(file: Path, kept: list[Row]) -> None:
    lines = [{"number": row.number, **row.fields, "columns": _plain(row.columns)} for row in kept]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _plain(columns: dict[str, Any]) -> dict[str, Any]:
    """The short columns of a row: those that scores can be broken down by."""
    return {name: value for name, value in columns.items() if _is_plain(name) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether a value is short, and JSON and UTF-8 can hold it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, str | int):
        return False
    text = str(value)
    return len(text) <= 100 and text.encode("utf-8", "ignore").decode() == text
