"""Makes the built-in text-to-SQL data set: tuneship/data/text_to_sql/rows.jsonl, and the counts in
the data card beside it.

The rows come from schemas (text_to_sql/domains/*.yaml) and wordings (text_to_sql/*.yaml) by a
seeded draw: the same sources give the same bytes. No row is written before every answer has been
run on filled tables and has returned something.

    python scripts/make_text_to_sql.py            # write the rows
    python scripts/make_text_to_sql.py --check    # exit 1 where the file differs from its sources

Both print the counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from text_to_sql.rows import Row, make_rows, split_of  # noqa: E402  # the path is set above
from tuneship.database import SEEDS, SqlError, fill, is_telling, run  # noqa: E402  # as above

FOLDER = ROOT / "tuneship" / "data" / "text_to_sql"
START = "<!-- counts: written by scripts/make_text_to_sql.py -->"
END = "<!-- end of counts -->"
SPLITS = ("train", "validation", "test")
MEANINGS = {
    "columns": "columns of every row",
    "filter": "rows that pass one filter, or the row of a name",
    "filter_and": "rows that pass two or three filters",
    "filter_or": "rows that pass one of two filters",
    "between": "rows in a range",
    "like": "rows whose text contains, starts or ends with something",
    "in": "rows with one of several values",
    "null": "rows where a value is missing, or is not",
    "not": "`!=`, `NOT IN`, `NOT LIKE`, `NOT BETWEEN`",
    "all_columns": "every column of the rows that pass a filter",
    "count": "how many rows pass filters",
    "aggregate": "the lowest, highest, average or total",
    "group": "an aggregate for each value of a column",
    "having": "the values whose group passes a threshold",
    "distinct": "each value once, or how many different ones",
    "order": "rows in an order",
    "limit": "the one or the few with the most or least",
    "subquery": "against the average, a maximum or another row; rows with or without children",
    "join2": "two tables",
    "join3": "three tables",
}


def as_text(rows: Sequence[Row]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def failure(row: Row) -> str:
    """Why an answer cannot be judged by running it: an error, or too few results; else empty.

    As `tuneship.database.execution_match` does, it looks for three databases out of twelve on
    which the answer returns something.
    """
    telling = 0
    for seed in range(4 * len(SEEDS)):
        with fill(row.context, row.answer, seed=seed) as db:
            try:
                telling += is_telling(run(db, row.answer))
            except SqlError as error:
                return f"seed {seed}: {error.what}"
        if telling == len(SEEDS):
            return ""
    return f"returns something on {telling} databases only"


def counts(rows: Sequence[Row]) -> str:
    """The data card's tables: rows by shape and split, domains, unseen wordings, lengths."""
    by_shape = Counter((row.shape, split_of(row.domain)) for row in rows)
    domains = Counter(map(split_of, {row.domain for row in rows}))
    unseen = Counter(split_of(row.domain) for row in rows if row.wording == "unseen")
    lines = ["| shape | asks for | train | validation | test | all | share |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    for shape, meaning in MEANINGS.items():
        numbers = [by_shape[shape, split] for split in SPLITS]
        share = f"{sum(numbers) / len(rows):.1%}"
        cells = [f"`{shape}`", meaning, *numbers, sum(numbers), share]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for name, count in (
        ("all rows", Counter(split_of(row.domain) for row in rows)),
        ("of these with unseen wording", unseen),
        ("domains", domains),
    ):
        cells = ["", name, *(count[split] for split in SPLITS), count.total(), ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    means = {
        field: sum(len(getattr(row, field)) for row in rows) / len(rows) for field in ("question", "context", "answer")
    }
    lengths = ", ".join(f"{field} {mean:.0f}" for field, mean in means.items())
    return "\n".join([*lines, "", f"Characters on average: {lengths}."])


def with_counts(card: str, text: str) -> str:
    """The data card with its counts."""
    before, rest = card.split(START)
    return f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Writes or checks the rows and the card's counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    check: bool = parser.parse_args().check
    rows = make_rows()
    text = counts(rows)
    print(text)
    made = {
        FOLDER / "rows.jsonl": as_text(rows),
        FOLDER / "README.md": with_counts((FOLDER / "README.md").read_text("utf-8"), text),
    }
    if check:
        differs = [p for p, t in made.items() if not p.is_file() or p.read_bytes() != t.encode()]
        for path in differs:
            print(f"{path.relative_to(ROOT)} is not what its sources make", file=sys.stderr)
        return 1 if differs else 0
    bad = [(row, why) for row in rows if (why := failure(row))]
    for row, why in bad:
        print(f"{row.domain}, {row.shape}: {why}", file=sys.stderr)
        print(f"  {row.question}\n  {row.answer}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} answers return nothing; no rows written", file=sys.stderr)
        return 1
    for path, content in made.items():
        path.write_bytes(content.encode())
    print(f"wrote {len(rows)} rows to {FOLDER.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
