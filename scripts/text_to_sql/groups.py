"""The shapes that sort rows into groups: GROUP BY, HAVING, DISTINCT."""

from __future__ import annotations

from text_to_sql.asking import Asking, Draft, where
from text_to_sql.english import a, compound
from text_to_sql.filters import draw_number, number_text, with_unit
from text_to_sql.phrases import Condition, NoWay
from text_to_sql.schema import NUMBERS, Column, Table


def group_slots(asking: Asking, table: Table, g: Column, condition: Condition | None) -> dict[str, str]:
    """The slots that a table, the column that groups it and a filter fill."""
    one, many = asking.speaker.name(table, g)
    return asking.slots(table, (), condition) | {
        "g": one,
        "a_g": a(one),
        "gs": many,
        # "The most common inspector" could be meant in two ways.
        "gc": "" if g.people else one,
        "gwho": "who" if g.people else "that",
    }


def group(asking: Asking) -> Draft:
    """An aggregate for each value."""
    table = asking.table()
    g = asking.groupable(table)
    condition = asking.maybe(table, 0.15, {g.name})
    slots = group_slots(asking, table, g, condition)
    some = f"{table.many} {slots.get('mods', '')}".strip()
    counts = asking.rng.random() < 0.5
    if counts:
        sql, banks = "COUNT(*)", "group group_count group_count"
        slots |= {"aggn": f"number of {some}", "aggb": f"number of {table.many}"}
    else:
        used = {g.name, *([condition.column] if condition else [])}
        sql, words, _ = asking.aggregate(table, used)
        banks = "group"
        slots |= {"aggn": f"{words} of {some}", "aggb": words}
    slots["agg0"] = "" if condition else slots["aggn"]
    question = asking.ask(banks, slots, filtered=condition is not None)
    answer = f"SELECT {g.name}, {sql} FROM {table.name}{where(condition)} GROUP BY {g.name}"
    if counts and not asking.unseen and asking.rng.random() < 0.12:
        question += f" Sort by the number of {table.many}, highest first."
        answer += " ORDER BY COUNT(*) DESC"
    return Draft(question, answer, (table.name,))


def having(asking: Asking) -> Draft:
    """Groups that pass a threshold."""
    table, rng = asking.table(), asking.rng
    g = asking.groupable(table)
    condition = asking.maybe(table, 0.1, {g.name})
    if condition and condition.fixed:
        raise NoWay  # such groups would be too small for any threshold
    if condition is None and rng.random() < 0.35:
        test, words = _value_threshold(asking, table, g)
    else:
        test, words = _count_threshold(asking, table, 5 if condition else 9)
    slots = group_slots(asking, table, g, condition)
    words = f"{words} {slots.get('mods', '')}".strip()
    slots |= {"hv": f"has {words}", "hvs": f"have {words}", "hw": f"with {words}"}
    slots["hinf"] = f"have {words}"
    select, bank = g.name, "having"
    if test.startswith("COUNT") and condition is None and rng.random() < 0.3:
        select, bank = f"{g.name}, COUNT(*)", "having_both"
        slots["aggn"] = f"number of {table.many}"
    question = asking.ask(bank, slots, filtered=False)
    source = f"{table.name}{where(condition)}"
    answer = f"SELECT {select} FROM {source} GROUP BY {g.name} HAVING {test}"
    return Draft(question, answer, (table.name,))


def _count_threshold(asking: Asking, table: Table, most: int) -> tuple[str, str]:
    """How many rows a group must have: SQL and words ("more than 3 hives")."""
    number = asking.rng.randrange(3, most)
    sign, words = asking.rng.choice(
        (
            (">", f"more than {number}"),
            (">", f"more than {number}"),
            (">=", f"at least {number}"),
            (">=", f"{number} or more"),
            ("<", f"fewer than {number}"),
            ("<=", f"at most {number}"),
        )
    )
    return f"COUNT(*) {sign} {number}", f"{words} {table.many}"


def _value_threshold(asking: Asking, table: Table, g: Column) -> tuple[str, str]:
    """What a group's average or total must be: SQL and words ("an average age above 40")."""
    rng = asking.rng
    column = asking.filters.column(table, *NUMBERS, without={g.name}, whole=True)
    value = draw_number(rng, column, 0.3, 0.7)
    name, _ = asking.speaker.name(table, column)
    if not column.counted and " " not in table.one:
        name = compound(table.one, name)
    if column.additive and rng.random() < 0.3:
        value *= rng.choice((4, 5, 8, 10))
        test = f"SUM({column.name}) > {number_text(value)}"
        if column.counted:
            return test, f"more than {number_text(value)} {column.counted} in total"
        word = rng.choice(("above", "over", "of more than"))
        return test, f"a total {name} {word} {with_unit(column, value)}"
    # Small averages are not undercut: tables of whole numbers near zero have none below.
    less = [("<", "below"), ("<", "under")] if value >= 60 else []
    sign, word = rng.choice([(">", "above"), (">", "over"), (">", "of more than"), *less])
    test = f"AVG({column.name}) {sign} {number_text(value)}"
    return test, f"an average {name} {word} {with_unit(column, value)}"


def distinct(asking: Asking) -> Draft:
    """Each value once, or the number of values."""
    table = asking.table()
    g = asking.groupable(table)
    condition = asking.maybe(table, 0.3, {g.name})
    slots = group_slots(asking, table, g, condition)
    counts = asking.rng.random() < 0.3
    bank = "distinct_count" if counts else "distinct"
    question = asking.ask(bank, slots, filtered=condition is not None)
    what = f"COUNT(DISTINCT {g.name})" if counts else f"DISTINCT {g.name}"
    return Draft(question, f"SELECT {what} FROM {table.name}{where(condition)}", (table.name,))
