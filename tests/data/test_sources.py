"""Raw rows: JSONL, CSV and Parquet, good and bad, in bounded memory.

python -m pytest tests/data/test_sources.py -v
"""

from __future__ import annotations

import csv
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tuneship.data import sources
from tuneship.data.sources import MAX_ROW_BYTES, Broken, RawRow
from tuneship.errors import InputError
from tuneship.recipe import Data

ROWS: list[dict[str, Any]] = [
    {"question": "How many?", "context": "CREATE TABLE t (a INT)", "answer": "SELECT COUNT(*) FROM t"},
    {"question": "Übergröße, 数, 🚢?", "context": "", "answer": 'SELECT "ü"\nFROM t'},
    {"question": 'He said "three",\r\nor four', "context": "c", "answer": "SELECT 1"},
]


def written(folder: Path, content: bytes, suffix: str = ".jsonl") -> Data:
    file = folder / f"rows{suffix}"
    file.write_bytes(content)
    return Data(dataset_name=str(file))


def rows(data: Data) -> list[tuple[int, RawRow]]:
    return list(sources.read(data))


def line(**row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def jsonl(folder: Path) -> Data:
    return written(folder, b"".join(line(**row) for row in ROWS))


def as_csv(folder: Path) -> Data:
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return Data(dataset_name=str(folder / "rows.csv"))


def as_parquet(folder: Path) -> Data:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return Data(dataset_name=str(folder / "rows.parquet"))


@pytest.mark.parametrize("write", [jsonl, as_csv, as_parquet])
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, write: Callable[[Path], Data]) -> None:
    assert [row for _, row in rows(write(tmp_path))] == ROWS


def test_the_builtin_rows_are_there() -> None:
    (first, *_), count = (
        rows(Data(dataset_name="builtin:text-to-sql")),
        len(rows(Data(dataset_name="builtin:text-to-sql"))),
    )
    assert count > 1000
    assert isinstance(first[1], dict)
    assert {"question", "context", "answer", "domain"} <= set(first[1])


# --- JSONL ------------------------------------------------------------------------------------

GOOD = b'{"a": 1}'


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (GOOD + b"\n" + GOOD + b"\n", [1, 2]),
        (GOOD + b"\n" + GOOD, [1, 2]),
        (GOOD + b"\r\n" + GOOD + b"\r\n", [1, 2]),
        (b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, [1, 2]),
        (b"\n\n" + GOOD + b"\n  \n\t\r\n" + GOOD + b"\n\n", [3, 6]),
        (b"", []),
        (b"\n\n", []),
        (b"\xef\xbb\xbf", []),
        (b"\xef\xbb\xbf\n" + GOOD, [2]),
    ],
)
def test_lines_are_numbered_as_an_editor_does(tmp_path: Path, content: bytes, numbers: list[int]) -> None:
    assert rows(written(tmp_path, content)) == [(number, {"a": 1}) for number in numbers]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
        (b"{a: 1}", "not JSON: Expecting property name"),
        (b"hello", "not JSON: Expecting value at column 1"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data at column 10"),
        (b"[1, 2]", "not a JSON object but list"),
        (b'"text"', "not a JSON object but str"),
        (b"null", "not a JSON object but NoneType"),
        (b'{"a": "\xe9"}', "not UTF-8: byte 8 of the line"),
        (b'{"a": "\xff\xfe"}', "not UTF-8: byte 8 of the line"),
        (b'{"a": "\x01"}', "not JSON: Invalid control character"),
        (b'{"a": "\x00"}', "not JSON"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_broken_and_the_others_are_not(tmp_path: Path, bad: bytes, reason: str) -> None:
    found = rows(written(tmp_path, GOOD + b"\n" + bad + b"\n" + GOOD + b"\n"))
    assert [found[0], found[2]] == [(1, {"a": 1}), (3, {"a": 1})]
    number, broken = found[1]
    assert number == 2
    assert isinstance(broken, Broken)
    assert broken.reason.startswith(reason)


def peak(data: Data) -> tuple[int, list[tuple[int, RawRow]]]:
    """The most memory that reading took, and the rows."""
    tracemalloc.start()
    try:
        found = rows(data)
        return tracemalloc.get_traced_memory()[1], found
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_of_20_megabytes_takes_no_20_megabytes(tmp_path: Path, suffix: str, end: bytes) -> None:
    with (tmp_path / f"rows{suffix}").open("wb") as file:
        file.write(b"a\n1\n" if suffix == ".csv" else b'{"a": "1"}\n')
        file.write(b'{"a": "')
        for _ in range(20):
            file.write(b"x" * 2**20)
        file.write(end)
        if end:
            file.write(b"2\n" if suffix == ".csv" else b'{"a": "2"}\n')
    most, found = peak(Data(dataset_name=str(tmp_path / f"rows{suffix}")))
    assert most < 9 * 2**20
    assert found[0][1] == {"a": "1"}
    assert isinstance(found[1][1], Broken)
    assert "larger than" in found[1][1].reason or "longer than" in found[1][1].reason
    assert [row for _, row in found[2:]] == ([{"a": "2"}] if end else [])


@pytest.mark.parametrize(("size", "read"), [(MAX_ROW_BYTES, True), (MAX_ROW_BYTES + 1, False)])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_the_limit_of_a_row_is_exact(tmp_path: Path, size: int, read: bool, end: bytes) -> None:
    text = "x" * (size - len(b'{"a": ""}'))
    (first, found) = rows(written(tmp_path, GOOD + b"\n" + json.dumps({"a": text}).encode() + end))
    assert first == (1, {"a": 1})
    assert found == (2, {"a": text} if read else Broken(f"longer than {MAX_ROW_BYTES} bytes"))


# --- CSV --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1,2\n3,4\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        (b"a,b\r\n1,2\r\n3,4", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        (b"\xef\xbb\xbfa,b\n1,2\n", [{"a": "1", "b": "2"}]),
        (b'a,b\n"1,\n1","2 ""x"""\n', [{"a": "1,\n1", "b": '2 "x"'}]),
        (b"a,b\n\n1,2\n\n\n3,4\n\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        (b"a,b\n,\n", [{"a": "", "b": ""}]),
        (b"a,b\n", []),
        (b"a\n\x00\n", [{"a": "\x00"}]),
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path: Path, content: bytes, expected: list[dict[str, str]]) -> None:
    assert [row for _, row in rows(written(tmp_path, content, ".csv"))] == expected


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"1\n", "1 fields, the header has 2"),
        (b"1,2,3\n", "3 fields, the header has 2"),
        (b'"1"x,2\n', "not CSV"),
    ],
)
def test_a_bad_record_is_broken_and_the_others_are_not(tmp_path: Path, bad: bytes, reason: str) -> None:
    found = rows(written(tmp_path, b"a,b\n1,2\n" + bad + b"3,4\n", ".csv"))
    assert [found[0], found[-1]] == [(2, {"a": "1", "b": "2"}), (4, {"a": "3", "b": "4"})]
    number, broken = found[1]
    assert number == 3
    assert isinstance(broken, Broken)
    assert broken.reason.startswith(reason)


def test_an_unclosed_quote_is_broken(tmp_path: Path) -> None:
    found = rows(written(tmp_path, b'a,b\n1,2\n"3,4\n5,6\n', ".csv"))
    assert found[0] == (2, {"a": "1", "b": "2"})
    assert all(isinstance(row, Broken) for _, row in found[1:])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (b'"a\n', "not CSV"),
        (b"question,context,question\n1,2,3\n", "the header names 'question' twice"),
    ],
)
def test_a_file_without_a_header_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows(written(tmp_path, content, ".csv"))


def test_bytes_that_are_not_utf8_stay_in_their_row(tmp_path: Path) -> None:
    found = rows(written(tmp_path, b"a\ncaf\xe9\ngood\n", ".csv"))
    # A lone surrogate, which no check lets pass (test_rows.py).
    assert found == [(2, {"a": "caf\udce9"}), (3, {"a": "good"})]


# --- Parquet ----------------------------------------------------------------------------------


def table(folder: Path, columns: dict[str, Any]) -> Data:
    parquet.write_table(pyarrow.table(columns), folder / "rows.parquet", row_group_size=2)
    return Data(dataset_name=str(folder / "rows.parquet"))


def test_values_come_as_pythons(tmp_path: Path) -> None:
    found = rows(
        table(tmp_path, {"a": ["x", None, "z"], "b": [1, 2, None], "c": [0.5, float("nan"), 1.0], "d": [[1], [], None]})
    )
    assert [number for number, _ in found] == [1, 2, 3]
    assert found[0][1] == {"a": "x", "b": 1, "c": 0.5, "d": [1]}
    second = found[1][1]
    assert isinstance(second, dict)
    assert second["a"] is None
    assert second["c"] != second["c"]


def test_no_rows_are_no_rows(tmp_path: Path) -> None:
    assert rows(table(tmp_path, {"a": pyarrow.array([], pyarrow.string())})) == []


def test_a_text_that_is_not_utf8_breaks_its_row_only(tmp_path: Path) -> None:
    bad = pyarrow.StringArray.from_buffers(
        4, pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3, 4))), pyarrow.py_buffer(b"ab\xffd")
    )
    found = rows(table(tmp_path, {"a": bad}))
    assert [row for number, row in found if number != 3] == [{"a": "a"}, {"a": "b"}, {"a": "d"}]
    broken = found[2][1]
    assert isinstance(broken, Broken)
    assert "utf-8" in broken.reason


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello", b"PAR1" + b"\x00" * 100 + b"PAR1", GOOD])
def test_what_is_no_parquet_is_told(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="not Parquet"):
        rows(written(tmp_path, content, ".parquet"))


def test_damaged_parquet_never_ends_in_a_traceback(tmp_path: Path) -> None:
    good = tmp_path / "rows.parquet"
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh ", k=30)) for _ in range(400)]
    parquet.write_table(pyarrow.table({"a": words, "b": range(400)}), good, row_group_size=100)
    content = good.read_bytes()
    refused = 0
    for case in range(120):
        damaged = bytearray(content)
        if case % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            # Beyond the magic; every second time in the footer, which says what is where.
            at = rng.randrange(4, len(damaged)) if case % 3 == 1 else len(damaged) - rng.randrange(1, 500)
            damaged[at] ^= 1 << rng.randrange(8)
        try:
            found = rows(written(tmp_path, bytes(damaged), ".parquet"))
        except InputError as error:
            refused += 1
            assert error.what.startswith("not Parquet: ")
            assert "\n" not in error.what
        else:
            assert len(found) >= 0
    assert refused > 40


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("builtin:text-to-sql", "builtin"),
        ("b-mc2/sql-create-context", "hub"),
        ("squad", "hub"),
        ("gs://bucket/rows.jsonl", "file"),
    ],
)
def test_a_name_says_what_it_is(name: str, kind: str) -> None:
    assert sources.check(Data(dataset_name=name)) == kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:other", "no such built-in data"),
        ("missing.jsonl", "no such file"),
        ("../missing.csv", "no such file"),
        ("../../etc", "no such data"),
        ("a/../b", "no such data"),
        ("user/name/more", "no such data"),
        ("user/name\n", "no such data"),
        ("/absolute/name", "no such data"),
        ("https://example.org/rows.jsonl", "no such file"),
        ("", "data is read from files that end in"),
        ("/etc", "data is read from files that end in"),
        ("gs://bucket/rows.tsv", "data is read from files that end in"),
        ("rows.jsonl/", "no such data"),
    ],
)
def test_a_name_that_is_nothing_is_told(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        sources.check(Data(dataset_name=name))


@pytest.mark.parametrize("setting", ["dataset_config", "dataset_revision"])
def test_a_setting_without_effect_is_refused(tmp_path: Path, setting: str) -> None:
    data = jsonl(tmp_path).model_copy(update={setting: "x"})
    with pytest.raises(InputError, match=f"{setting} has an effect on a Hub data set only"):
        sources.check(data)


# --- any bytes --------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text('{}[]":,\\\n\r\t "ab1\x00é\ud800').map(lambda t: t.encode("utf-8", "surrogatepass")),
    ),
    suffix=st.sampled_from([".jsonl", ".csv", ".parquet"]),
)
def test_no_bytes_raise_anything_but_an_input_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    try:
        found = rows(written(tmp_path, content, suffix))
    except InputError:
        return
    assert all(isinstance(row, dict | Broken) for _, row in found)
    numbers = [number for number, _ in found]
    assert numbers == sorted(numbers)
