"""The rows: how many of each shape a domain gets, and each drawn until it is a new one.

A domain's rows depend on its own schema, the wordings and its id only, so that another domain
may come or go without touching them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from text_to_sql import groups, joins, ranking, shapes
from text_to_sql.asking import Asking, Draft
from text_to_sql.phrases import NoWay
from text_to_sql.schema import Domain, Table, load_domains

SEED = 23
ROWS_PER_DOMAIN = 28
UNSEEN_SHARE = 0.2
# Columns that a table shows beside those that the answer uses.
MORE_COLUMNS = (0, 1, 1, 2)
_TRIES = 400
# A row stays below 256 tokens of a small model's tokenizer.
MAX_CHARACTERS = 700

# Shape → how to draw it, and its weight. Joins of three tables fall on domains that have a way
# through three tables, so their weight is higher than their share.
SHAPES: dict[str, tuple[Callable[[Asking], Draft], float]] = {
    "columns": (shapes.columns, 1.6),
    "filter": (shapes.filter_one, 9.5),
    "filter_and": (shapes.filter_and, 6.5),
    "filter_or": (shapes.filter_or, 4.2),
    "between": (shapes.between, 4.4),
    "like": (shapes.like, 4.4),
    "in": (shapes.in_list, 3.8),
    "null": (shapes.null, 3.6),
    "not": (shapes.negation, 4.4),
    "all_columns": (shapes.all_columns, 2.6),
    "count": (shapes.count, 6.5),
    "aggregate": (shapes.aggregate, 7.5),
    "group": (groups.group, 8.8),
    "having": (groups.having, 6.2),
    "distinct": (groups.distinct, 4),
    "order": (ranking.order, 5),
    "limit": (ranking.limit, 7),
    "subquery": (shapes.subquery, 6.5),
    "join2": (joins.join2, 9),
    "join3": (joins.join3, 3.5),
}

# Training rows have more of what is hard; held-out rows keep the weights above.
TRAINING: dict[str, float] = {
    "columns": 0.6,
    "all_columns": 0.7,
    "distinct": 1.1,
    "order": 1.1,
    "limit": 1.2,
    "subquery": 1.1,
    "join2": 1.5,
    "join3": 1.3,
}


@dataclass(frozen=True)
class Row:
    """One row of the data set."""

    question: str
    context: str
    answer: str
    domain: str
    shape: str
    wording: str


def split_of(domain: str) -> str:
    """The split that a domain falls in: by its id alone."""
    digest = hashlib.blake2b(domain.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "test" if place < 0.15 else "validation" if place < 0.25 else "train"


def make_rows() -> list[Row]:
    """All rows, in the order of the file."""
    rows = [row for domain in load_domains() for row in _domain_rows(domain)]
    place = {shape: at for at, shape in enumerate(SHAPES)}
    return sorted(rows, key=lambda r: (r.domain, place[r.shape], r.question, r.context))


def _domain_rows(domain: Domain) -> list[Row]:
    rng = random.Random(f"{domain.id} {SEED}")
    rows: list[Row] = []
    asked: set[tuple[str, str]] = set()
    answered: set[str] = set()
    for shape, count in _quota(domain, rng).items():
        for _ in range(count):
            unseen = split_of(domain.id) == "test" and rng.random() < UNSEEN_SHARE
            row = _draw(domain, shape, rng, unseen=unseen, asked=asked, answered=answered)
            if row is not None:
                rows.append(row)
    return rows


def _quota(domain: Domain, rng: random.Random) -> dict[str, int]:
    """How many rows of each shape: their weights, rounded so that many domains average out."""
    weights = {s: w for s, (_, w) in SHAPES.items() if s != "join3" or joins.paths(domain)}
    if split_of(domain.id) == "train":
        weights = {shape: weight * TRAINING.get(shape, 1.0) for shape, weight in weights.items()}
    total = sum(weights.values())
    # Systematic sampling: each shape gets its share, rounded up or down by where the comb falls.
    names = list(weights)
    rng.shuffle(names)
    at, quota, offset = 0.0, dict.fromkeys(weights, 0), rng.random()
    for name in names:
        end = at + weights[name] / total * ROWS_PER_DOMAIN
        quota[name] = int(end - offset + 1) - int(at - offset + 1)
        at = end
    return quota


def _draw(
    domain: Domain,
    shape: str,
    rng: random.Random,
    *,
    unseen: bool,
    asked: set[tuple[str, str]],
    answered: set[str],
) -> Row | None:
    """A new row of a shape; none where the schema has no room for another."""
    draw, _ = SHAPES[shape]
    for _ in range(_TRIES):
        try:
            draft = draw(Asking(rng, domain, unseen=unseen))
        except NoWay:
            continue
        context = _context(domain, draft, rng)
        if draft.answer in answered or (draft.question, context) in asked:
            continue
        if len(draft.question) + len(context) + len(draft.answer) > MAX_CHARACTERS:
            continue
        asked.add((draft.question, context))
        answered.add(draft.answer)
        wording = "unseen" if unseen else "seen"
        return Row(draft.question, context, draft.answer, domain.id, shape, wording)
    return None


def _context(domain: Domain, draft: Draft, rng: random.Random) -> str:
    """The tables of a question, and no others.

    As in sql-create-context. A table shows the columns that the answer uses and a few others. One
    whose rows are wanted whole shows all.
    """
    words = set(re.findall(r"\w+", re.sub(r"'[^']*'", "", draft.answer)))
    whole = "SELECT *" in draft.answer
    tables = [domain.by_name[name] for name in draft.tables]
    rng.shuffle(tables)
    return "; ".join(t.ddl(_shown(t, words, whole and t.name in words, rng)) for t in tables)


def _shown(table: Table, words: set[str], whole: bool, rng: random.Random) -> set[str]:
    names = [c.name for c in table.columns]
    needed = [name for name in names if name in words and table.name in words]
    rest = [name for name in names if name not in needed]
    more = len(rest) if whole else min(len(rest), rng.choice(MORE_COLUMNS))
    return {*needed, *rng.sample(rest, max(more, 2 - len(needed)))}
