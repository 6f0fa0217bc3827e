"""SQL that a model wrote: when two queries are equal, and what no query may do.

python -m pytest tests/test_database.py -v
"""

from __future__ import annotations

import resource
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship import database
from tuneship.database import Result, SqlError, execution_match, fill, open_file, orders, run, same_rows, tables
from tuneship.errors import InputError

PEOPLE = "CREATE TABLE people (name VARCHAR, age INTEGER, city VARCHAR, born DATE, height REAL)"
SHOP = (
    "CREATE TABLE customers (customer_id INTEGER, name VARCHAR, city VARCHAR);"
    "CREATE TABLE orders (order_id INTEGER, customer_id INTEGER, price INTEGER)"
)


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    with fill(PEOPLE, "SELECT name FROM people WHERE age > 30", seed=0) as filled:
        yield filled


# --- when two queries are equal -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ("SELECT COUNT(*) FROM people WHERE age > 30", "select count(*) from people where age > 30"),
        ("SELECT COUNT(*) FROM people WHERE age > 30", "SELECT COUNT(1) FROM people WHERE NOT age <= 30"),
        ("SELECT COUNT(*) FROM people WHERE age > 30", "SELECT COUNT(*) FROM people WHERE age >= 31;"),
        ("SELECT name FROM people WHERE city = 'Oslo'", 'SELECT name FROM people WHERE city = "Oslo"'),
        ("SELECT name, age FROM people", "SELECT name AS n, age AS a FROM people ORDER BY age"),
        ("SELECT AVG(age) FROM people", "SELECT SUM(age) * 1.0 / COUNT(age) FROM people"),
        ("SELECT DISTINCT city FROM people", "SELECT city FROM people GROUP BY city"),
        ("SELECT name FROM people ORDER BY age DESC LIMIT 3", "SELECT name FROM people ORDER BY -age LIMIT 3"),
        ("SELECT name FROM people WHERE born > '2015-03-01'", "SELECT name FROM people WHERE born >= '2015-03-02'"),
        ("SELECT name FROM people WHERE name LIKE '%son%'", "SELECT name FROM people WHERE INSTR(LOWER(name), 'son')"),
        ("SELECT name FROM people WHERE age IN (30, 40)", "SELECT name FROM people WHERE age = 40 OR age = 30"),
        ("SELECT name FROM people WHERE age BETWEEN 3 AND 9", "SELECT name FROM people WHERE age >= 3 AND age <= 9"),
        ("SELECT MAX(height) FROM people", "SELECT height FROM people ORDER BY height DESC LIMIT 1"),
        ("SELECT COUNT(*) FROM people WHERE age IS NULL", "SELECT COUNT(*) - COUNT(age) FROM people"),
        # Nobody matches on any database: only the same text is the same query.
        ("SELECT name FROM people WHERE 1 = 0", "select name from people where 1 = 0;"),
    ],
)
def test_queries_that_do_the_same_are_equal(gold: str, predicted: str) -> None:
    assert execution_match(PEOPLE, gold, predicted).kind == "equal"


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        # The boundary is among the rows.
        ("SELECT COUNT(*) FROM people WHERE age > 30", "SELECT COUNT(*) FROM people WHERE age >= 30"),
        ("SELECT COUNT(*) FROM people WHERE age > 30", "SELECT COUNT(*) FROM people WHERE age > 31"),
        ("SELECT COUNT(*) FROM people WHERE height < 1.5", "SELECT COUNT(*) FROM people WHERE height <= 1.5"),
        ("SELECT name FROM people WHERE born > '2015-03-01'", "SELECT name FROM people WHERE born >= '2015-03-01'"),
        ("SELECT name FROM people WHERE age BETWEEN 3 AND 9", "SELECT name FROM people WHERE age > 3 AND age < 9"),
        ("SELECT COUNT(*) FROM people WHERE age > 30", "SELECT COUNT(*) FROM people WHERE age < 30"),
        ("SELECT COUNT(*) FROM people WHERE age > 30", "SELECT COUNT(*) FROM people"),
        ("SELECT COUNT(*) FROM people WHERE age > 30", "SELECT COUNT(*) + 0.5 FROM people WHERE age > 30"),
        ("SELECT name FROM people WHERE city = 'Oslo'", "SELECT name FROM people WHERE city = 'oslo'"),
        ("SELECT name FROM people WHERE city = 'Oslo'", "SELECT name FROM people WHERE city <> 'Oslo'"),
        ("SELECT name FROM people WHERE name LIKE 'An%'", "SELECT name FROM people WHERE name LIKE '%An%'"),
        ("SELECT name, age FROM people", "SELECT age, name FROM people"),
        ("SELECT name, age FROM people", "SELECT name FROM people"),
        ("SELECT city FROM people", "SELECT DISTINCT city FROM people"),
        ("SELECT name FROM people ORDER BY age", "SELECT name FROM people ORDER BY age DESC"),
        ("SELECT name FROM people ORDER BY age", "SELECT name FROM people"),
        ("SELECT name FROM people ORDER BY age LIMIT 3", "SELECT name FROM people ORDER BY age LIMIT 4"),
        ("SELECT COUNT(age) FROM people WHERE age IS NULL OR 1", "SELECT COUNT(*) FROM people"),
        ("SELECT city FROM people GROUP BY city HAVING COUNT(*) > 9", "SELECT city FROM people GROUP BY city"),
        ("SELECT AVG(age) FROM people", "SELECT MAX(age) FROM people"),
        ("SELECT MAX(age) FROM people", "SELECT age FROM people"),
        ("SELECT name FROM people WHERE age = 5 AND city = 'X'", "SELECT name FROM people WHERE age = 5 OR city = 'X'"),
        ("SELECT name FROM people WHERE 1 = 0", "SELECT name FROM people WHERE 2 = 0"),
        ("SELECT name FROM people WHERE name = 'A' AND 1 = 0", "SELECT name FROM people WHERE name = 'a' AND 1 = 0"),
    ],
)
def test_queries_that_do_something_else_are_different(gold: str, predicted: str) -> None:
    assert execution_match(PEOPLE, gold, predicted).kind == "different"


@pytest.mark.parametrize(
    ("predicted", "kind"),
    [
        (
            "SELECT SUM(o.price) FROM orders o JOIN customers c ON o.customer_id = c.customer_id WHERE c.city = 'Oslo'",
            "equal",
        ),
        (
            "SELECT SUM(price) FROM orders WHERE customer_id IN "
            "(SELECT customer_id FROM customers WHERE city = 'Oslo')",
            "equal",
        ),
        (
            "SELECT SUM(o.price) FROM orders o JOIN customers c ON o.order_id = c.customer_id WHERE c.city = 'Oslo'",
            "different",
        ),
        ("SELECT SUM(o.price) FROM orders o, customers c WHERE c.city = 'Oslo'", "different"),
        ("SELECT SUM(o.price) FROM orders o LEFT JOIN customers c ON o.customer_id = c.customer_id", "different"),
        (
            "SELECT COUNT(price) FROM orders o JOIN customers c ON o.customer_id = c.customer_id WHERE city = 'Oslo'",
            "different",
        ),
    ],
)
def test_joins_are_told_apart(predicted: str, kind: str) -> None:
    gold = (
        "SELECT SUM(T1.price) FROM orders AS T1 JOIN customers AS T2 ON T1.customer_id = T2.customer_id "
        "WHERE T2.city = 'Oslo'"
    )
    assert execution_match(SHOP, gold, predicted).kind == kind


@pytest.mark.parametrize(
    ("predicted", "kind"),
    [
        ("SELECT nme FROM people", "error"),
        ("SELECT name FROM person", "error"),
        ("SELEC name", "error"),
        ("", "refused"),
        ("Question: what?", "error"),
        ("SELECT interrupted FROM people", "error"),
        ("SELECT not_authorized FROM people", "error"),
        ("SELECT name FROM people; SELECT 1", "refused"),
        ("DROP TABLE people", "refused"),
        ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c", "timeout"),
    ],
)
def test_an_answer_that_does_not_run_says_how(predicted: str, kind: str) -> None:
    verdict = execution_match(PEOPLE, "SELECT name FROM people", predicted)
    assert verdict.kind == kind
    assert verdict.detail
    assert not verdict.equal


@pytest.mark.parametrize(
    ("context", "gold"),
    [
        (PEOPLE, "SELECT nme FROM people"),
        (PEOPLE, "DELETE FROM people"),
        ("no tables here", "SELECT 1"),
        ("CREATE TABLE t (a INT); INSERT INTO t VALUES (1)", "SELECT a FROM t"),
    ],
)
def test_a_row_whose_own_answer_does_not_run_is_told(context: str, gold: str) -> None:
    with pytest.raises(InputError):
        execution_match(context, gold, "SELECT 1")


def result(*rows: tuple[database.Value, ...]) -> Result:
    return Result(tuple("ab"[: len(rows[0])]) if rows else ("a",), list(rows))


@pytest.mark.parametrize(
    ("left", "right", "ordered", "same"),
    [
        (result((1,), (2,)), result((2,), (1,)), False, True),
        (result((1,), (2,)), result((2,), (1,)), True, False),
        (result((1,), (1,), (2,)), result((1,), (2,), (2,)), False, False),
        (result((1, "x")), result((1.0, "x")), False, True),
        (result((1 / 3,)), result((0.33333333333,)), False, True),
        (result((1 / 3,)), result((0.333333,)), False, False),
        (result((None,)), result((0,)), False, False),
        (result((None,)), result(("",)), False, False),
        (result((1,)), result(("1",)), False, False),
        (result((b"x",)), result(("x",)), False, False),
        (result(("a",)), result(("A",)), False, False),
        (result(), result(), True, True),
        (result((1,)), result((1,), (1,)), False, False),
        (result((1,)), result((1, 1)), False, False),
    ],
)
def test_rows_are_compared_as_a_multiset_or_in_order(left: Result, right: Result, ordered: bool, same: bool) -> None:
    assert same_rows(left, right, ordered=ordered) is same
    assert same_rows(right, left, ordered=ordered) is same


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order  by a limit 3", True),
        ("SELECT a FROM t\nORDER\nBY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b = (SELECT MAX(b) FROM (SELECT b FROM t ORDER BY b))", False),
        ("SELECT a FROM (SELECT a FROM t) ORDER BY a", True),
        ("SELECT RANK() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t WHERE b = 'order by'", False),
        ("SELECT a FROM t WHERE b = 'it''s (' ORDER BY a", True),
        ("SELECT reorder FROM t", False),
    ],
)
def test_only_an_order_at_the_top_orders(sql: str, ordered: bool) -> None:
    assert orders(sql) is ordered


# --- the rows that a database is filled with -------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "where", "literal"),
    [
        ("INTEGER", "c = 30", 30),
        ("REAL", "c > 1.5", 1.5),
        ("VARCHAR", "c = 'Oslo'", "Oslo"),
        ("VARCHAR", "c = '007'", "007"),
        ("VARCHAR", "c = '20151016'", "20151016"),
        ("VARCHAR", "c = '1.50'", "1.50"),
        ("VARCHAR", "c = 'it''s'", "it's"),
        ("VARCHAR", "c = 'Nan'", "Nan"),
        ("VARCHAR", "c = 'Infinity'", "Infinity"),
        ("VARCHAR", "c = '2015-02-31'", "2015-02-31"),
        ("VARCHAR", "c = '0001-01-01'", "0001-01-01"),
        ("VARCHAR", "c = '9999-12-31'", "9999-12-31"),
        ("INTEGER", "c = 9007199254740993", 9007199254740993),
        ("INTEGER", "c = 1e400 OR c = 5", 5),
    ],
)
def test_a_filter_matches_some_rows_and_misses_others(kind: str, where: str, literal: database.Value) -> None:
    sql = f"SELECT c FROM t WHERE {where}"
    for seed in database.SEEDS:
        with fill(f"CREATE TABLE t (c {kind}, d INTEGER)", sql, seed=seed) as db:
            rows = [row[0] for row in run(db, "SELECT c FROM t").rows]
            assert literal in rows
            assert any(row != literal for row in rows)


def test_a_null_that_is_asked_for_is_there() -> None:
    with fill("CREATE TABLE t (c INTEGER)", "SELECT COUNT(*) FROM t WHERE c IS NULL", seed=0) as db:
        ((nulls, others),) = run(db, "SELECT COUNT(*) - COUNT(c), COUNT(c) FROM t").rows
        assert nulls
        assert others


def test_filling_is_a_function_of_its_seed() -> None:
    def rows(seed: int) -> list[tuple[database.Value, ...]]:
        with fill(SHOP, "SELECT * FROM orders WHERE price > 5", seed=seed) as db:
            return run(db, "SELECT * FROM orders").rows

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


@pytest.mark.parametrize(
    "context",
    [
        "CREATE TABLE t (a INT UNIQUE, b TEXT NOT NULL CHECK (b <> ''))",
        "CREATE TABLE t (a INT, b AS (a + 1))",
        'CREATE TABLE "odd name" ("a b" INT, "select" TEXT)',
        "CREATE TABLE t (a)",
        "CREATE TABLE t (a INT PRIMARY KEY, b INT REFERENCES t(a)) WITHOUT ROWID",
        "CREATE TABLE t (a INTEGER PRIMARY KEY AUTOINCREMENT, b TEXT)",
        "CREATE TABLE t (a INT); CREATE INDEX i ON t (a);",
        "CREATE TABLE t (a INT); -- a comment\n/* and another */",
        "CREATE TABLE IF NOT EXISTS t (a DECIMAL(10, 2))",
    ],
)
def test_tables_as_people_write_them_are_filled(context: str) -> None:
    with fill(context, "", seed=0) as db:
        (name,) = tables(db)
        assert run(db, f'SELECT COUNT(*) FROM "{name}"').rows[0][0]


@pytest.mark.parametrize(
    "context",
    [
        "SELECT 1",
        "PRAGMA user_version = 3",
        "ATTACH 'x.db' AS y",
        "CREATE TABLE t (a); DROP TABLE t",
        "CREATE TABLE t AS SELECT 1 AS a",
        "CREATE TEMP TABLE t (a)",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE t (a); CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t; END",
        "CREATE VIRTUAL TABLE t USING fts5(a)",
        "CREATE TABLE t (a",
        "CREATE TABLE t (a)\x00",
        "CREATE TABLE t (\ud800)",
        "VACUUM INTO 'copy.db'",
        # Work without end, in statements that make no table.
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c",
        # Rows that cannot be: too large, or an error in each.
        "CREATE TABLE t (a INT, b AS (hex(zeroblob(400000000))) STORED)",
        "CREATE TABLE t (a INT CHECK (abs(-9223372036854775808)))",
    ],
)
def test_a_context_is_create_table_statements_and_nothing_else(
    context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(InputError, match="not CREATE TABLE"), fill(context, "", seed=0):
        pass
    assert time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []


# --- what no query may do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO people VALUES ('x', 1, 'y', 'z', 1.0)",
        "UPDATE people SET age = 1",
        "DELETE FROM people",
        "DROP TABLE people",
        "CREATE TABLE other (a)",
        "CREATE TEMP TABLE other (a)",
        "ALTER TABLE people RENAME TO others",
        "REPLACE INTO people (name) VALUES ('x')",
        "WITH a AS (SELECT 1) DELETE FROM people",
        "ATTACH DATABASE 'stolen.db' AS s",
        "DETACH DATABASE main",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(people)",
        "SELECT * FROM pragma_table_info('people')",
        "SELECT * FROM pragma_database_list",
        "VACUUM INTO 'stolen.db'",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "COMMIT",
        "SAVEPOINT a",
        "SELECT load_extension('x.so')",
        "SELECT Load_Extension('x.so', 'y')",
        "SELECT printf('%.900000000c', 'x')",
        "SELECT format('%.900000000c', 'x')",
        "SELECT 1; DELETE FROM people",
        "SELECT 1; SELECT 2",
        "SELECT ?",
        "SELECT :name",
        "SELECT 1\x00; DELETE FROM people",
        "SELECT '\ud800'",
        "-- nothing",
        "   ",
    ],
)
def test_what_is_not_one_select_is_refused(
    db: sqlite3.Connection, sql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = run(db, "SELECT * FROM people").rows
    with pytest.raises(SqlError) as caught:
        run(db, sql)
    assert caught.value.kind == "refused"
    assert run(db, "SELECT * FROM people").rows == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sql", ["SELECT writefile('x', 'y')", "SELECT readfile('/etc/passwd')", "SELECT edit('x')"])
def test_functions_that_reach_files_do_not_exist(db: sqlite3.Connection, sql: str) -> None:
    with pytest.raises(SqlError, match="no such function"):
        run(db, sql)


def test_a_database_file_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "shop?#%20.db"
    made = sqlite3.connect(file)
    made.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    made.close()
    before = file.read_bytes()
    with open_file(file) as opened:
        assert run(opened, "SELECT a FROM t").rows == [(1,)]
        assert tables(opened) == {"t": [("a", "")]}
        for sql in ("DELETE FROM t", "PRAGMA journal_mode = WAL"):
            with pytest.raises(SqlError):
                run(opened, sql)
            # The second wall: the file itself was opened to read.
            if sql.startswith("DELETE"):
                with pytest.raises(sqlite3.OperationalError, match="readonly"):
                    opened.execute(sql)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be read as one" * 50, b"SQLite format 3\x00" + b"\xff" * 200]
)
def test_a_file_that_is_no_database_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.db").write_bytes(content)
    with pytest.raises(InputError, match="database"), open_file(tmp_path / "x.db"):
        pass
    with pytest.raises(InputError, match="no such database"), open_file(tmp_path):
        pass


# --- how much a query may take --------------------------------------------------------------------------

CROSS = "people a, people b, people c, people d, people e"


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c",
        f"SELECT COUNT(*) FROM {CROSS}",
        f"SELECT a.name || b.name || c.name FROM {CROSS} ORDER BY 1",
        f"SELECT COUNT(DISTINCT hex(zeroblob(9000)) || a.name || b.name || c.name) FROM {CROSS}",
    ],
)
def test_time_is_bounded(db: sqlite3.Connection, sql: str) -> None:
    began = time.monotonic()
    with pytest.raises(SqlError) as caught:
        run(db, sql, timeout_s=0.2)
    assert caught.value.kind == "timeout"
    # Much more than the bound, for a busy machine; the queries would run for hours.
    assert time.monotonic() - began < 5
    # And the connection lives on.
    assert run(db, "SELECT 1").rows == [(1,)]


def zeros(count: int) -> str:
    return f"hex(zeroblob({count // 2}))"


@pytest.mark.parametrize(
    "expression",
    [
        f"{zeros(90_000)} LIKE '{'%0' * 49}%1'",
        f"{zeros(90_000)} LIKE '{'%0_' * 33}1'",
        f"{zeros(90_000)} GLOB '*{'[^1]*' * 19}1'",
        f"instr({zeros(90_000)}, {zeros(44_000)} || '1')",
        f"length(replace({zeros(90_000)}, {zeros(44_000)} || '1', ''))",
        f"length(trim(replace({zeros(90_000)}, '0', 'b'), {zeros(8_000)} || 'b'))",
    ],
)
def test_a_single_function_takes_no_minutes(db: sqlite3.Connection, expression: str) -> None:
    # Nothing interrupts a function: its texts are kept short instead.
    began = time.monotonic()
    assert len(run(db, f"SELECT {expression}", timeout_s=30).rows) == 1
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT zeroblob(1000000)", "too big"),
        ("SELECT randomblob(999999999)", "too big"),
        (f"SELECT 1 LIKE '{'%' * 101}'", "pattern too complex"),
        ("SELECT " + "(" * 200 + "1" + ")" * 200, "."),
        ("SELECT " + "1+" * 200 + "1", "too large"),
        ("SELECT " + ",".join("1" * 201), "too many columns"),
        (" UNION ALL ".join(["SELECT 1"] * 30), "too many terms"),
        ("SELECT 1 -- " + "x" * 10_000, "too large"),
        (f"SELECT 1 FROM {CROSS}", "more than 10000 rows"),
        (f"SELECT zeroblob(90000) FROM {CROSS}", "bytes of rows"),
        (f"SELECT hex(zeroblob(40000)) FROM {CROSS}", "bytes of rows"),
    ],
)
def test_size_is_bounded(db: sqlite3.Connection, sql: str, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SqlError, match=message):
        run(db, sql, timeout_s=20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_memory_is_bounded(db: sqlite3.Connection) -> None:
    with pytest.raises(SqlError, match=r"out of memory|too big") as caught:
        run(db, f"SELECT json_group_array(hex(zeroblob(4000))) FROM {CROSS}", timeout_s=60)
    assert caught.value.kind == "refused"


def test_as_many_rows_as_are_allowed_come_back(db: sqlite3.Connection) -> None:
    count = run(db, "SELECT COUNT(*) FROM people").rows[0][0]
    assert isinstance(count, int)
    assert len(run(db, "SELECT * FROM people", max_rows=count).rows) == count
    with pytest.raises(SqlError, match="more than"):
        run(db, "SELECT * FROM people", max_rows=count - 1)


# --- whatever a model may say ------------------------------------------------------------------------------

WORDS = (
    "SELECT FROM WHERE people age name city 'Oslo' \"x\" ' \" 30 -1 1e999 0x10 NULL ( ) , ; * = < > LIKE '%a_' IN "
    "BETWEEN AND OR NOT ORDER BY GROUP HAVING LIMIT OFFSET JOIN ON AS COUNT(*) MAX( CAST( COLLATE UNION VALUES WITH "
    "RECURSIVE CASE WHEN END ?1 :a @b $c -- /* */ \x00 \ud800 \U0001f6a2 [ ] ` || -> ->> EXPLAIN OVER '2015-02-31' "
    "'9999-12-31' 99999999999999999999 'nan' 'inf' born = date( printf('%s') group_concat( zeroblob(99999999)"
).split(" ")
queries = st.one_of(
    st.text(st.characters(), max_size=60),
    st.lists(st.sampled_from(WORDS), max_size=14).map(lambda words: "SELECT " + " ".join(words)),
    st.lists(st.sampled_from(WORDS), max_size=10).map(lambda words: "SELECT name FROM people WHERE " + " ".join(words)),
)


@settings(max_examples=400, deadline=None)
@given(sql=queries)
def test_no_text_raises_anything_but_an_sql_error(sql: str) -> None:
    with fill(PEOPLE, "", seed=0) as db:
        try:
            found = run(db, sql, timeout_s=0.1)
        except SqlError as error:
            assert error.what
        else:
            assert isinstance(found, Result)


@settings(max_examples=300, deadline=None)
@given(gold=queries, predicted=queries)
def test_no_pair_of_texts_breaks_the_comparison(gold: str, predicted: str) -> None:
    try:
        verdict = execution_match(PEOPLE, gold, predicted)
    except InputError:
        return
    assert verdict.kind in ("equal", "different", "error", "timeout", "refused")
    if gold == predicted:
        assert verdict.kind in ("equal", "different")


SCHEMA_WORDS = (
    "CREATE TABLE t u ( ) , ; a b INTEGER REAL TEXT DATE DECIMAL(3,1) PRIMARY KEY UNIQUE CHECK (a>0) DEFAULT 1 NOT "
    "NULL AS (a+1) STRICT WITHOUT ROWID REFERENCES 'x' \"y z\" INDEX ON SELECT id name_id year date \x00 \ud800 -- \n"
).split(" ")
contexts = st.lists(st.sampled_from(SCHEMA_WORDS), max_size=16)


@settings(max_examples=400, deadline=None)
@given(words=contexts, answer=queries, whole=st.booleans())
def test_no_context_breaks_the_filling(words: list[str], answer: str, whole: bool) -> None:
    context = f"CREATE TABLE t (a INTEGER, {' '.join(words)})" if whole else " ".join(words)
    try:
        with fill(context, answer, seed=0) as db:
            tables(db)
    except InputError:
        pass
