"""The shapes of one table without groups or order: each draws a question and its answer."""

from __future__ import annotations

from text_to_sql.asking import Asking, Draft, listing, where
from text_to_sql.phrases import Condition, Phrase
from text_to_sql.schema import NUMBERS, Table


def _rows(asking: Asking, table: Table, test: str, phrase: Phrase, without: set[str]) -> Draft:
    """Columns of the rows that a filter keeps."""
    columns = asking.columns(table, without=without)
    question = asking.ask("rows", asking.slots(table, columns, phrase), filtered=True)
    answer = f"SELECT {listing(columns)} FROM {table.name} WHERE {test}"
    return Draft(question, answer, (table.name,))


def _count(asking: Asking, table: Table, test: str, phrase: Phrase) -> Draft:
    """The number of rows that a filter keeps."""
    question = asking.ask("count", asking.slots(table, (), phrase), filtered=True)
    return Draft(question, f"SELECT COUNT(*) FROM {table.name} WHERE {test}", (table.name,))


def _filtered(asking: Asking, table: Table, condition: Condition, counts: float) -> Draft:
    """Rows, or with some chance their number."""
    if asking.rng.random() < counts:
        return _count(asking, table, condition.sql(), condition.phrase)
    return _rows(asking, table, condition.sql(), condition.phrase, {condition.column})


def columns(asking: Asking) -> Draft:
    """Columns of every row."""
    table = asking.table()
    chosen = asking.columns(table, asking.rng.choice((1, 2, 2, 3)))
    question = asking.ask("columns", asking.slots(table, chosen, None), filtered=False)
    return Draft(question, f"SELECT {listing(chosen)} FROM {table.name}", (table.name,))


def filter_one(asking: Asking) -> Draft:
    """One filter; or the row that is named."""
    table = asking.table()
    if asking.rng.random() < 0.7:
        return _filtered(asking, table, asking.filters.plain(table), 0)
    named = asking.filters.named(table)
    chosen = asking.columns(table, asking.rng.choice((1, 1, 2)), {named.column})
    slots = asking.slots(table, chosen, None)
    slots["named"] = asking.filter_slots(table, named)["mod"]
    question = asking.ask("lookup", slots, filtered=False)
    answer = f"SELECT {listing(chosen)} FROM {table.name} WHERE {named.sql()}"
    return Draft(question, answer, (table.name,))


def filter_and(asking: Asking) -> Draft:
    """Two or three filters that all hold."""
    table = asking.table()
    test, phrase, used = asking.joined(table, "and")
    return _rows(asking, table, test, phrase, used)


def filter_or(asking: Asking) -> Draft:
    """Two filters of which one holds."""
    table = asking.table()
    test, phrase, used = asking.joined(table, "or")
    return _rows(asking, table, test, phrase, used)


def between(asking: Asking) -> Draft:
    """A range."""
    table = asking.table()
    return _filtered(asking, table, asking.filters.between(table), 0.2)


def like(asking: Asking) -> Draft:
    """A part of a text."""
    table = asking.table()
    return _filtered(asking, table, asking.filters.like(table), 0.2)


def in_list(asking: Asking) -> Draft:
    """One of several values."""
    table = asking.table()
    return _filtered(asking, table, asking.filters.among(table), 0.2)


def null(asking: Asking) -> Draft:
    """A missing value."""
    table = asking.table()
    return _filtered(asking, table, asking.filters.null(table), 0.25)


def negation(asking: Asking) -> Draft:
    """Not this value, none of these, not like this, outside this range."""
    table, filters = asking.table(), asking.filters
    draw = asking.rng.random()
    if draw < 0.5:
        condition = filters.differs(table)
    elif draw < 0.65:
        condition = filters.among(table, negative=True)
    elif draw < 0.8:
        condition = filters.like(table, negative=True)
    else:
        condition = filters.between(table, negative=True)
    return _filtered(asking, table, condition, 0.2)


def all_columns(asking: Asking) -> Draft:
    """Every column."""
    table = asking.table()
    condition = asking.filters.plain(table)
    question = asking.ask("all_columns", asking.slots(table, (), condition), filtered=True)
    return Draft(question, f"SELECT * FROM {table.name}{where(condition)}", (table.name,))


def count(asking: Asking) -> Draft:
    """How many."""
    table = asking.table()
    draw = asking.rng.random()
    if draw < 0.06:
        question = asking.ask("count_all", asking.nouns(table), filtered=False)
        return Draft(question, f"SELECT COUNT(*) FROM {table.name}", (table.name,))
    if draw < 0.35:
        test, phrase, _ = asking.joined(table, "and")
        return _count(asking, table, test, phrase)
    return _filtered(asking, table, asking.filters.plain(table), 1)


def aggregate(asking: Asking) -> Draft:
    """The lowest, highest, average, total; or two of them."""
    table, rng = asking.table(), asking.rng
    sql, words, column = asking.aggregate(table)
    two = column.kind in NUMBERS and rng.random() < 0.15
    if two:
        said = asking.speaker.slots(table, column)
        terms = {"MIN": (said["low"], "minimum"), "MAX": (said["high"], "maximum")}
        pair = rng.choice((("MIN", "MAX"), ("MAX", "MIN"), ("AVG", "MAX"), ("AVG", "MIN")))
        plain = 0 if said["p"].startswith(("minimum", "maximum")) else rng.randrange(2)
        heads = [terms[f][plain] if f in terms else "average" for f in pair]
        words = f"{heads[0]} and {heads[1]} {said['p']}"
        sql = ", ".join(f"{f}({column.name})" for f in pair)
    condition = asking.maybe(table, 0.45, {column.name})
    slots = asking.slots(table, (), condition) | {"agg": words, "is_agg": "are" if two else "is"}
    question = asking.ask("aggregate", slots, filtered=condition is not None)
    return Draft(question, f"SELECT {sql} FROM {table.name}{where(condition)}", (table.name,))


def subquery(asking: Asking) -> Draft:
    """A filter that looks at other rows."""
    table, filters = asking.table(), asking.filters
    draw = asking.rng.random()
    if draw < 0.3:
        condition = filters.against_average(table)
    elif draw < 0.42:
        condition = filters.at_extreme(table)
    elif draw < 0.6:
        condition = filters.against_named(table)
    else:
        condition = filters.has_children(table)
    draft = _filtered(asking, table, condition, 0.2)
    others = [t.name for t in asking.domain.tables if f"FROM {t.name}" in condition.test]
    return Draft(draft.question, draft.answer, tuple(dict.fromkeys((table.name, *others))))
