"""The shapes with an order: ORDER BY, and LIMIT for the first, the first few, the most frequent."""

from __future__ import annotations

from dataclasses import dataclass

from text_to_sql.asking import Asking, Draft, listing, where
from text_to_sql.groups import group_slots
from text_to_sql.phrases import Condition, NoWay
from text_to_sql.schema import NUMBERS, TIMES, Column, Table

_NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def order(asking: Asking) -> Draft:
    """Sorted rows."""
    table, rng = asking.table(), asking.rng
    kinds = ("name", "text", *NUMBERS, *NUMBERS, *TIMES)
    key = asking.filters.column(table, *kinds, whole=True)
    condition = asking.maybe(table, 0.25, {key.name})
    descending = rng.random() < (0.25 if key.type == "VARCHAR" else 0.6)
    chosen = asking.columns(table, without=condition.fixed if condition else set())
    slots = asking.slots(table, chosen, condition)
    slots["by"] = asking.speaker.direction(table, key, descending=descending)
    slots["by_by"] = slots["by"] if slots["by"].startswith("by ") else ""
    question = asking.ask("order", slots, filtered=condition is not None)
    answer = (
        f"SELECT {listing(chosen)} FROM {table.name}{where(condition)}"
        f" ORDER BY {key.name} {'DESC' if descending else 'ASC'}"
    )
    return Draft(question, answer, (table.name,))


@dataclass(frozen=True)
class Top:
    """The one, or the few, with the most or least of a column."""

    key: Column
    direction: str
    number: int
    slots: dict[str, str]

    def sql(self, prefix: str = "") -> str:
        """The end of the query."""
        return f" ORDER BY {prefix}{self.key.name} {self.direction} LIMIT {self.number}"


def top(asking: Asking, table: Table, number: int, condition: Condition | None) -> Top:
    """Draws a column to rank by, and the words for it."""
    rng = asking.rng
    without = {condition.column} if condition else set()
    key = asking.filters.column(table, *NUMBERS, *NUMBERS, *TIMES, without=without, whole=True)
    most = rng.random() < 0.65
    before, behind, is_top = rng.choice(_superlatives(asking, table, key, most, number > 1))
    slots = {"is_top": is_top}
    phrase = condition.phrase if condition else None
    if phrase is None or not behind or phrase.style == "bare":
        # "the heaviest hive in Kent", "the hive in Kent with the most frames"; other filters
        # between the noun and the superlative would be hard to read.
        said = asking.filter_slots(table, condition)
        mod = said.get("mods" if number > 1 else "mod", "")
        noun = table.many if number > 1 else table.one
        shown = rng.choice((str(number), _NUMBER_WORDS[number])) if number > 1 else ""
        words = " ".join(filter(None, (shown, before, noun, mod, behind)))
        if number > 1 and most and key.kind in NUMBERS and rng.random() < 0.3:
            words = f"top {number} {noun} {mod} by {asking.speaker.name(table, key)[0]}"
        slots |= {"sups" if number > 1 else "sup": words, "sup_says_filter": "yes"}
    return Top(key, "DESC" if most else "ASC", number, slots)


def _superlatives(asking: Asking, table: Table, key: Column, most: bool, many: bool) -> list[tuple[str, str, str]]:
    """Ways to say it: before the noun, behind it, and as a predicate."""
    said = asking.speaker.slots(table, key)
    p = said["ps" if many else "p"]
    if key.kind == "count":
        what = f"the {'most' if most else 'fewest'} {key.counted}"
        return [("", f"with {what}", f"has {what}")]
    if key.kind in TIMES:
        what = f"the {'latest' if most else 'earliest'} {p}"
        ways = [("", f"with {what}", f"has {what}")]
        if key.done:
            when = f"{key.done} {'most recently' if most else 'earliest'}"
            who = "who" if table.who else "that"
            ways.append(("", f"{who} {'were' if many else 'was'} {when}", f"was {when}"))
        return ways
    what = f"the {said['high'] if most else said['low']} {p}"
    ways = [("", f"with {what}", f"has {what}")]
    if key.adjective and key.of_row:
        word = key.adjective.most if most else key.adjective.least
        ways.append((word, "", f"is the {word}"))
    return ways


def limit(asking: Asking) -> Draft:
    """The first, or the first few."""
    table, rng = asking.table(), asking.rng
    if rng.random() < 0.2:
        return _most_frequent(asking, table)
    number = rng.choice((1, 1, 2, 3, 3, 4, 5))
    condition = asking.maybe(table, 0.2)
    ranked = top(asking, table, number, condition)
    chosen = asking.columns(table, without=condition.fixed if condition else set())
    slots = asking.slots(table, chosen, condition) | ranked.slots
    bank = "limit_n" if number > 1 else "limit_one"
    question = asking.ask(bank, slots, filtered=condition is not None)
    source = f"{table.name}{where(condition)}"
    return Draft(question, f"SELECT {listing(chosen)} FROM {source}{ranked.sql()}", (table.name,))


def _most_frequent(asking: Asking, table: Table) -> Draft:
    """The value that most, or fewest, rows have."""
    g = asking.groupable(table)
    condition = asking.maybe(table, 0.15, {g.name})
    if condition and condition.fixed:
        raise NoWay  # too few rows would be left to tell groups apart
    slots = group_slots(asking, table, g, condition)
    most = asking.rng.random() < 0.75
    bank = "limit_group_most" if most else "limit_group_least"
    question = asking.ask(bank, slots, filtered=condition is not None)
    answer = (
        f"SELECT {g.name} FROM {table.name}{where(condition)} GROUP BY {g.name}"
        f" ORDER BY COUNT(*) {'DESC' if most else 'ASC'} LIMIT 1"
    )
    return Draft(question, answer, (table.name,))
