"""The built-in text-to-SQL rows: what the data card promises.

python -m pytest tests/test_text_to_sql.py -v
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tuneship.database import SEEDS, fill, is_telling, run

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tuneship" / "data" / "text_to_sql"
Row = dict[str, str]
ROWS: list[Row] = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
SHAPES = set(
    re.findall(
        r"\w+",
        "columns filter filter_and filter_or between like in null not all_columns count aggregate "
        "group having distinct order limit subquery join2 join3",
    )
)
KEYWORDS = set(
    re.findall(
        r"\w+",
        "SELECT FROM WHERE AND OR NOT IN BETWEEN LIKE IS NULL COUNT MIN MAX AVG SUM DISTINCT JOIN "
        "ON GROUP BY HAVING ORDER ASC DESC LIMIT",
    )
)


def split_of(row: Row) -> str:
    """The split that a consumer puts the row in."""
    digest = hashlib.blake2b(row["domain"].encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "test" if place < 0.15 else "validation" if place < 0.25 else "train"


def tables_of(row: Row) -> dict[str, list[str]]:
    """The tables of a row's context, with their columns."""
    found = re.findall(r"CREATE TABLE (\w+) \(([^)]*)\)", row["context"])
    return {name: [c.split()[0] for c in columns.split(", ")] for name, columns in found}


def test_the_file_is_what_its_sources_make() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "make_text_to_sql.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_row_has_the_six_columns_and_fits() -> None:
    names = ["question", "context", "answer", "domain", "shape", "wording"]
    for row in ROWS:
        assert list(row) == names
        assert all(isinstance(v, str) and v and v == v.strip() for v in row.values())
        assert row["shape"] in SHAPES and row["wording"] in ("seen", "unseen")
        assert len(row["question"]) + len(row["context"]) + len(row["answer"]) <= 700


def test_there_are_enough_rows_and_domains() -> None:
    assert len(ROWS) >= 3_000
    domains = {row["domain"]: split_of(row) for row in ROWS}
    count = Counter(domains.values())
    assert len(domains) >= 120 and count["test"] >= 18 and count["validation"] >= 10


def test_no_question_is_asked_twice_on_one_context() -> None:
    assert max(Counter((row["question"], row["context"]) for row in ROWS).values()) == 1


def test_no_table_is_in_two_domains() -> None:
    owner: dict[str, str] = {}
    for row in ROWS:
        for table in tables_of(row):
            assert owner.setdefault(table, row["domain"]) == row["domain"], table


def test_every_split_has_every_shape() -> None:
    for split in ("train", "validation", "test"):
        assert {row["shape"] for row in ROWS if split_of(row) == split} == SHAPES


def test_shapes_are_mixed_as_intended() -> None:
    share = {shape: n / len(ROWS) for shape, n in Counter(r["shape"] for r in ROWS).items()}
    assert 0.10 < share["join2"] + share["join3"] < 0.19
    assert 0.12 < share["group"] + share["having"] < 0.16
    assert 0.05 < share["subquery"] < 0.07
    assert max(share.values()) < 0.12 and min(share.values()) > 0.01


def test_unseen_wordings_are_in_the_test_split_only() -> None:
    assert {split_of(row) for row in ROWS if row["wording"] == "unseen"} == {"test"}
    wordings = Counter(row["wording"] for row in ROWS if split_of(row) == "test")
    assert 0.15 < wordings["unseen"] / wordings.total() < 0.5


def test_every_context_is_valid_sql() -> None:
    for row in ROWS:
        with sqlite3.connect(":memory:") as db:
            db.executescript(row["context"])


def test_an_answer_names_only_what_its_context_has() -> None:
    for row in ROWS:
        tables = tables_of(row)
        known = set(tables) | {c for columns in tables.values() for c in columns}
        bare = re.sub(r"'[^']*'", "", row["answer"])
        words = set(re.findall(r"[A-Za-z_]\w*", bare)) - KEYWORDS
        assert words <= known, (words - known, row["answer"])
        for table, column in re.findall(r"([A-Za-z_]\w*)\.(\w+)", bare):
            assert column in tables[table]


def test_a_question_says_every_text_of_its_answer() -> None:
    for row in ROWS:
        for literal in re.findall(r"'([^']*)'", row["answer"]):
            assert literal.strip("%") in row["question"], row


def test_a_question_says_every_number_of_its_answer() -> None:
    words = {"1": "the", "2": "two", "3": "three", "4": "four", "5": "five"}
    for row in ROWS:
        for number in re.findall(r"(?<![\w'-])\d+(?:\.\d+)?(?![\w'-])", row["answer"]):
            said = number in row["question"] or words.get(number, "?") in row["question"]
            # The one with the most: LIMIT 1.
            assert said or row["answer"].endswith("LIMIT 1"), row


def test_questions_read_as_sentences() -> None:
    for row in ROWS:
        question = row["question"]
        assert question[0].isupper() and question[-1] in ".?", question
        assert not re.search(r"  |[{}\[\]|]| [,.;:?]", question), question
        assert not re.search(r"\b(\w{3,}) \1\b", question), question
        assert not re.search(r"\ba [aeio]\w", question), question


def test_answers_return_something() -> None:
    # A fifth of the rows; the script runs them all before it writes.
    for row in random.Random(0).sample(ROWS, len(ROWS) // 5):
        telling = 0
        for seed in range(4 * len(SEEDS)):
            with fill(row["context"], row["answer"], seed=seed) as db:
                telling += is_telling(run(db, row["answer"]))
            if telling == len(SEEDS):
                break
        assert telling == len(SEEDS), row


def test_the_data_card_states_licence_counts_and_a_real_row() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in card
    assert json.loads(card.split("```json")[1].split("```")[0]) in ROWS
    for shape, count in Counter(row["shape"] for row in ROWS).items():
        assert re.search(rf"\| `{shape}` \|.*\| {count} \|", card), (shape, count)
