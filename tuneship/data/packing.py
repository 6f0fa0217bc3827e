"""How rows become tokens, and how tokens fill a forward pass.

`Tokens` holds every row's token ids in one flat array. `plan` says which rows each update sees:
it is a pure function of the rows' lengths and the recipe, so a resumed run needs no more than
the number of its last update to go on with the same rows.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tuneship.damage import guarded
from tuneship.recipe import Train

# Rows among which packing looks for a fit: large enough for full packs, small against an epoch.
WINDOW_PACKS = 64


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows, one behind the other."""

    ids: NDArray[np.int32]
    """All rows' token ids: start tokens, prompt, answer, end of sequence."""
    bounds: NDArray[np.int64]
    """Row i is ids[bounds[i] : bounds[i + 1]]."""
    prompts: NDArray[np.int32]
    """How many tokens of each row come before its answer. They carry no label."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.bounds)

    @staticmethod
    def build(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tokens:
        """From each row's prompt ids and answer ids, as `prompt.encode_rows` gives them."""
        lengths = [len(before) + len(after) for before, after in rows]
        flat = [token for row in rows for part in row for token in part]
        return Tokens(
            np.array(flat, dtype=np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.array([len(before) for before, _ in rows], dtype=np.int32),
        )

    @staticmethod
    def join(parts: Sequence[Tokens]) -> Tokens:
        """Several in one, in order."""
        starts = np.cumsum([0] + [len(part.ids) for part in parts])
        bounds = [part.bounds[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return Tokens(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([np.zeros(1, np.int64), *bounds]),
            np.concatenate([part.prompts for part in parts]),
        )

    def save(self, file: Path) -> None:
        """Writes the arrays as safetensors."""
        save_file({"ids": self.ids, "bounds": self.bounds, "prompts": self.prompts}, file)

    @staticmethod
    def load(file: Path) -> Tokens:
        """Reads what `save` wrote.

        Raises:
            InputError: it is damaged.
        """
        with guarded(file):
            return Tokens(**load_file(file))


@dataclass(frozen=True)
class Pack:
    """What one forward pass holds."""

    rows: tuple[int, ...]
    ids: NDArray[np.int64]
    """(tokens,)"""
    positions: NDArray[np.int64]
    """(tokens,), from 0 in each row."""
    bounds: tuple[int, ...]
    """Row i of the pack is tokens bounds[i] to bounds[i + 1]."""
    labelled: NDArray[np.int64]
    """(labels,): the positions whose next token is part of an answer."""
    labels: NDArray[np.int64]
    """(labels,): those next tokens."""


def pack(tokens: Tokens, rows: Sequence[int]) -> Pack:
    """Lays rows one behind the other. A label is every token of an answer, its end of sequence included."""
    ids, positions, labelled, bounds = [], [], [], [0]
    for row in rows:
        start, end = int(tokens.bounds[row]), int(tokens.bounds[row + 1])
        ids.append(tokens.ids[start:end])
        positions.append(np.arange(end - start))
        # The position before a token predicts it.
        labelled.append(np.arange(int(tokens.prompts[row]) - 1, end - start - 1) + bounds[-1])
        bounds.append(bounds[-1] + end - start)
    flat = np.concatenate(ids).astype(np.int64)
    places = np.concatenate(labelled)
    return Pack(tuple(rows), flat, np.concatenate(positions), tuple(bounds), places, flat[places + 1])


@dataclass(frozen=True)
class Plan:
    """Which rows each update sees, as forward passes."""

    updates: list[list[tuple[int, ...]]]
    """updates[u] is the update's forward passes, each the indices of its rows."""

    def __len__(self) -> int:
        return len(self.updates)

    def longest(self, lengths: NDArray[np.int64]) -> int:
        """Tokens of the longest forward pass."""
        return max(int(lengths[list(rows)].sum()) for update in self.updates for rows in update)

    def rows(self) -> Iterator[int]:
        """All rows in the order in which they are seen."""
        return (row for update in self.updates for rows in update for row in rows)


def plan(lengths: Sequence[int] | NDArray[np.int64], train: Train) -> Plan:
    """The updates of a run.

    Without packing an update is `per_device_train_batch_size × gradient_accumulation_steps` rows in
    shuffled order, the last of an epoch fewer, as in TRL; they stand in as few forward passes of
    `tokens_per_batch` as hold them. With packing it is `gradient_accumulation_steps` forward passes,
    each filled with whole rows up to `tokens_per_batch`.
    """
    lengths = [int(length) for length in lengths]
    updates: list[list[tuple[int, ...]]] = []
    if train.max_steps is not None:
        for epoch in itertools.count():
            if len(updates) >= train.max_steps:
                break
            updates += _epoch(lengths, train, epoch)
        return Plan(updates[: train.max_steps])
    assert train.num_train_epochs is not None
    whole, part = divmod(train.num_train_epochs, 1)
    for epoch in range(int(whole)):
        updates += _epoch(lengths, train, epoch)
    if part:
        last = _epoch(lengths, train, int(whole))
        updates += last[: max(1, round(len(last) * part))]
    return Plan(updates)


def cut(rows: Sequence[int], lengths: Sequence[int] | NDArray[np.int64], budget: int) -> list[tuple[int, ...]]:
    """Rows in order, cut into forward passes that hold `budget` tokens."""
    passes: list[list[int]] = [[]]
    room = budget
    for row in rows:
        if lengths[row] > room:
            passes.append([])
            room = budget
        passes[-1].append(row)
        room -= int(lengths[row])
    return [tuple(rows) for rows in passes if rows]


def _epoch(lengths: list[int], train: Train, epoch: int) -> list[list[tuple[int, ...]]]:
    order = np.random.default_rng([train.seed, epoch]).permutation(len(lengths)).tolist()
    if train.packing:
        packs = _best_fit(lengths, order, train.tokens_per_batch)
        order = np.random.default_rng([train.seed, epoch, 1]).permutation(len(packs)).tolist()
        packs = [packs[index] for index in order]
        size = train.gradient_accumulation_steps
        return [packs[at : at + size] for at in range(0, len(packs), size)]
    assert train.per_device_train_batch_size is not None
    size = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return [cut(order[at : at + size], lengths, train.tokens_per_batch) for at in range(0, len(order), size)]


def _best_fit(lengths: list[int], order: list[int], budget: int) -> list[tuple[int, ...]]:
    """Best-fit decreasing within windows of the shuffled order.

    A window holds about WINDOW_PACKS packs' worth of rows; its longest row is placed first, each
    into the fullest pack that still has room.
    """
    packs: list[tuple[int, ...]] = []
    at = 0
    while at < len(order):
        window, total = [], 0
        while at < len(order) and total < WINDOW_PACKS * budget:
            window.append(order[at])
            total += lengths[order[at]]
            at += 1
        window.sort(key=lambda row: -lengths[row])
        # Open packs by their free room, sorted; the first with enough is the best fit.
        rooms: list[tuple[int, int]] = []
        made: list[list[int]] = []
        for row in window:
            place = bisect.bisect_left(rooms, (lengths[row], -1))
            if place == len(rooms):
                made.append([row])
                bisect.insort(rooms, (budget - lengths[row], len(made) - 1))
            else:
                room, index = rooms.pop(place)
                made[index].append(row)
                bisect.insort(rooms, (room - lengths[row], index))
        packs += [tuple(rows) for rows in made]
    return packs
