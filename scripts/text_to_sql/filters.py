"""Draws filters on a table's columns: SQL, phrase, and literals that suit the column."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection
from datetime import date, timedelta

from text_to_sql.english import a, listed, plural
from text_to_sql.phrases import Condition, NoWay, Phrase, Speaker, agree, negated
from text_to_sql.schema import NUMBERS, TIMES, Column, Domain, Table

_OPERATORS = {
    "gt": (">", "{p} over {v}", "{p} after {v}"),
    "lt": ("<", "{p} under {v}", "{p} before {v}"),
    "ge": (">=", "{p} at least {v}", "{p} {v} or later"),
    "le": ("<=", "{p} at most {v}", "{p} {v} or earlier"),
    "eq": ("=", "{p} {v}", "{p} {v}"),
}
_STEPS = ((60, 1), (300, 5), (1_500, 10), (6_000, 50), (30_000, 500), (300_000, 1_000))
_REAL_STEPS = ((1, 0.05), (5, 0.1), (30, 0.5), (120, 1), (600, 5), (3_000, 10))


def text_literal(value: str) -> str:
    """The SQL literal of a text."""
    return f"'{value}'"


def shown(column: Column, value: str) -> str:
    """A text as a question shows it: in quotes where it is a phrase of its own."""
    return f'"{value}"' if column.quoted else value


def number_text(value: float) -> str:
    """A number as people and SQL both write it."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def with_unit(column: Column, value: float) -> str:
    """A number with its column's unit."""
    text, unit = number_text(value), column.unit
    if not unit:
        return text
    if unit == "%":
        return f"{text}%"
    return f"{text} {unit.removesuffix('s') if value == 1 else unit}"


def draw_number(rng: random.Random, column: Column, low: float = 0.15, high: float = 0.85) -> float:
    """A round number from the inner part of a column's range."""
    width = column.high - column.low
    steps = _REAL_STEPS if column.kind == "real" else _STEPS
    step = column.step or next((s for w, s in steps if width <= w), 5_000)
    value = column.low + rng.uniform(low, high) * width
    return round(max(round(value / step) * step, step), 4)


def draw_day(rng: random.Random, column: Column) -> str:
    """A day from a column's years."""
    first = date(int(column.low), 1, 15)
    days = (date(int(column.high), 12, 15) - first).days
    day = first + timedelta(days=rng.randrange(days))
    return (day.replace(day=1) if rng.random() < 0.35 else day).isoformat()


class Filters:
    """Draws filters for one question."""

    def __init__(self, rng: random.Random, speaker: Speaker, domain: Domain) -> None:
        self.rng, self.speaker, self.domain = rng, speaker, domain

    # --- which column ---

    def column(self, table: Table, *kinds: str, without: Collection[str] = (), whole: bool = False) -> Column:
        """A column of some kinds; `whole` ones have no missing values.

        Raises:
            NoWay: there is none.
        """
        fitting = [c for c in table.of(*kinds) if c.name not in without]
        fitting = [c for c in fitting if not (whole and c.nullable)]
        if not fitting:
            raise NoWay
        return self.rng.choice(fitting)

    # --- filters on texts ---

    def equals(self, table: Table, without: Collection[str] = ()) -> Condition:
        """A category is ..."""
        column = self.column(table, "text", without=without)
        value = self.rng.choice(column.values)
        said = shown(column, value)
        if column.custom and self.rng.random() < 0.5:
            phrase = self.speaker.own(column.custom, said, f"{column.phrase} {said}")
        else:
            phrase = self.speaker.say("text_eq", table, column, "{p} {v}", v=said)
        return Condition(column.name, f"= {text_literal(value)}", phrase)

    def named(self, table: Table) -> Condition:
        """The row's name is ..."""
        column = self.column(table, "name")
        value = self.rng.choice(column.values)
        kind = {"name": "name_eq", "nickname": "name_eq", "title": "title_eq"}
        bank = kind.get(column.phrase, "code_eq")
        phrase = self.speaker.say(bank, table, column, "{p} {v}", v=value)
        return Condition(column.name, f"= {text_literal(value)}", phrase)

    def differs(self, table: Table, without: Collection[str] = ()) -> Condition:
        """A category is not ..."""
        column = self.column(table, "text", without=without, whole=True)
        value = self.rng.choice(column.values)
        plain = column.custom and (column.custom[:5] != "with " or column.custom[:7] == "with a ")
        if plain and self.rng.random() < 0.6:
            phrase = self.speaker.own(negated(column.custom), value, f"{column.phrase} other than {value}")
        else:
            phrase = self.speaker.say("text_ne", table, column, "{p} other than {v}", v=shown(column, value))
        return Condition(column.name, f"!= {text_literal(value)}", phrase)

    def among(self, table: Table, *, negative: bool = False) -> Condition:
        """A category is one of, or none of, ..."""
        column = self.column(table, "text", whole=negative)
        if len(column.values) < 4:
            raise NoWay
        values = self.rng.sample(column.values, self.rng.choice((2, 2, 3)))
        texts = [shown(column, value) for value in values]
        either, both = listed(texts, "or"), listed(texts)
        pair = len(values) == 2
        if column.custom and not negative and self.rng.random() < 0.6:
            phrase = self.speaker.own(column.custom, either, f"{column.phrase} {either}")
        else:
            kind = "text_not_in" if negative else "text_in"
            kw = "{p} not {list}" if negative else "{p} {list}"
            said = {"list": either, "list_and": both}
            said["choice"] = f"either {either}" if pair else f"one of {both}"
            said["denial"] = f"neither {' nor '.join(texts)}" if pair else f"none of {both}"
            phrase = self.speaker.say(kind, table, column, kw, **said)
        test = f"IN ({', '.join(map(text_literal, values))})"
        return Condition(column.name, f"NOT {test}" if negative else test, phrase)

    def like(self, table: Table, *, negative: bool = False) -> Condition:
        """A text contains, starts with or ends with ..."""
        column = self.column(table, "name", "name", "text", whole=negative)
        value = self.rng.choice(column.values)
        words = [w for w in re.split(r"[ -]", value) if len(w) > 2]
        if not words:
            raise NoWay
        kind = "not_contains" if negative else self.rng.choice(("contains", "starts", "ends"))
        if kind == "starts":
            text = self.rng.choice((value[0], value[:2], words[0]))
            pattern = f"{text}%"
        elif kind == "ends":
            text = self.rng.choice((value[-1], value[-2:], words[-1]))
            pattern = f"%{text}"
        else:
            text = self.rng.choice(words)
            pattern = f"%{text}%"
        if not re.fullmatch(r"[\w ]+", text) or (kind == "starts") != value.startswith(text):
            raise NoWay
        kw = {"starts": "starting with", "ends": "ending in", "contains": "containing"}
        says = f'{{p}} {kw.get(kind, "without")} "{{t}}"'
        phrase = self.speaker.say(kind, table, column, says, t=text)
        test = f"LIKE {text_literal(pattern)}"
        return Condition(column.name, f"NOT {test}" if negative else test, phrase)

    def null(self, table: Table) -> Condition:
        """A value is missing, or is not."""
        columns = [c for c in table.columns if c.nullable]
        if not columns:
            raise NoWay
        column = self.rng.choice(columns)
        if self.rng.random() < 0.65:
            phrase = self.speaker.say("missing", table, column, "no {p}")
            return Condition(column.name, "IS NULL", phrase)
        phrase = self.speaker.say("present", table, column, "{p} known")
        return Condition(column.name, "IS NOT NULL", phrase)

    # --- filters on numbers and times ---

    def _kind(self, column: Column) -> str:
        return column.kind if column.kind in ("count", *TIMES) else "num"

    def compares(self, table: Table, without: Collection[str] = ()) -> Condition:
        """A number or time is above, below, at least, at most, exactly ..."""
        column = self.column(table, *NUMBERS, *NUMBERS, *TIMES, without=without)
        kind = self._kind(column)
        exact = 1 if column.kind in ("count", "year", "date") else 0
        weights = (4, 4, 2, 2, exact)
        operator = self.rng.choices(("gt", "lt", "ge", "le", "eq"), weights)[0]
        sign, kw, kw_time = _OPERATORS[operator]
        if column.kind == "date":
            words = draw_day(self.rng, column)
            value = text_literal(words)
        else:
            number = draw_number(self.rng, column)
            value, words = number_text(number), with_unit(column, number)
            if column.kind == "count" and number < 2:
                raise NoWay
        kw = kw_time if column.kind in TIMES else kw
        phrase = self.speaker.say(f"{kind}_{operator}", table, column, kw, v=words)
        return Condition(column.name, f"{sign} {value}", phrase)

    def between(self, table: Table, *, negative: bool = False) -> Condition:
        """A number or time lies between, or outside, ..."""
        column = self.column(table, *NUMBERS, *TIMES, whole=negative)
        if column.kind == "date":
            low, high = sorted((draw_day(self.rng, column), draw_day(self.rng, column)))
            said = {"lo": low, "hi": high}
            low, high = text_literal(low), text_literal(high)
        else:
            first = draw_number(self.rng, column, 0.05, 0.5)
            last = draw_number(self.rng, column, 0.5, 0.95)
            low, high = number_text(first), number_text(last)
            said = {"lo": low, "hi": with_unit(column, last)}
            if last - first < (column.high - column.low) * 0.1:
                raise NoWay
        if low == high:
            raise NoWay
        kind = f"{self._kind(column)}_{'outside' if negative else 'between'}"
        kw = "{p} outside {lo} to {hi}" if negative else "{p} {lo} to {hi}"
        phrase = self.speaker.say(kind, table, column, kw, **said)
        test = f"BETWEEN {low} AND {high}"
        return Condition(column.name, f"NOT {test}" if negative else test, phrase)

    def plain(self, table: Table, without: Collection[str] = ()) -> Condition:
        """A filter of the most usual kinds."""
        draws: list[Callable[[Table, Collection[str]], Condition]] = [self.equals, self.compares]
        self.rng.shuffle(draws)
        try:
            return draws[0](table, without)
        except NoWay:
            return draws[1](table, without)

    # --- filters that look at other rows ---

    def against_average(self, table: Table) -> Condition:
        """A number is above or below the average."""
        column = self.column(table, *NUMBERS, whole=True)
        above = self.rng.random() < 0.65
        kind = "above_average" if above else "below_average"
        phrase = self.speaker.say(kind, table, column)
        sign = ">" if above else "<"
        return Condition(column.name, f"{sign} (SELECT AVG({column.name}) FROM {table.name})", phrase)

    def at_extreme(self, table: Table) -> Condition:
        """A number equals the highest or lowest."""
        column = self.column(table, "int", "real", whole=True)
        top = self.rng.random() < 0.6
        phrase = self.speaker.say("at_highest" if top else "at_lowest", table, column)
        function = "MAX" if top else "MIN"
        test = f"= (SELECT {function}({column.name}) FROM {table.name})"
        return Condition(column.name, test, phrase)

    def against_named(self, table: Table) -> Condition:
        """A number is above or below that of a named row."""
        column = self.column(table, *NUMBERS, whole=True)
        named = self.named(table)
        above = self.rng.random() < 0.6
        kind = "above_named" if above else "below_named"
        kind += "_count" if column.kind == "count" else ""
        words = agree(named.phrase.mod, table, many=False)
        phrase = self.speaker.say(kind, table, column, named=words)
        inner = f"SELECT {column.name} FROM {table.name} WHERE {named.sql()}"
        return Condition(column.name, f"{'>' if above else '<'} ({inner})", phrase)

    def has_children(self, table: Table) -> Condition:
        """Some row, or none, of another table refers to this one."""
        pairs = [
            (child, link)
            for child in self.domain.tables
            for link in child.links
            if link.target == table.name and table.one.endswith(link.role)
        ]
        if not pairs:
            raise NoWay
        child, link = self.rng.choice(pairs)
        inner = f"SELECT {link.name} FROM {child.name}"
        # tuneship.database tells a table's own key from a foreign one by the table's name: where
        # that goes wrong, every row has a child.
        own = table.key.name == "id" or table.name.startswith(table.key.name[:4])
        apart = own and not child.name.startswith(link.name[:4])
        if apart and self.rng.random() < 0.45:
            phrase = self.speaker.say("has_none", table, table.key, child=child.one, children=child.many)
            return Condition(table.key.name, f"NOT IN ({inner})", phrase)
        if self.rng.random() < 0.6:
            such = Filters(self.rng, self.speaker, self.domain).plain(child)
            one = f"{child.one} {agree(such.phrase.mod, child, many=False)}"
            many = f"{child.many} {agree(such.phrase.mod, child, many=True)}"
            phrase = self.speaker.say("has_such", table, table.key, child=one, children=many)
            return Condition(table.key.name, f"IN ({inner} WHERE {such.sql()})", phrase)
        phrase = self.speaker.say("has", table, table.key, child=child.one, children=child.many)
        return Condition(table.key.name, f"IN ({inner})", phrase)

    # --- filters on a parent ---

    def related(self, link: Column, inner: Condition) -> Condition:
        """The row that a foreign key points to passes a filter; the SQL needs a join."""
        parent, phrase = self.domain.target(link), inner.phrase
        role = self.domain.role(link)
        mods: list[tuple[str, str]] = []
        many_mod, one_mod = (agree(phrase.mod, parent, many=m) for m in (True, False))
        label = parent.label
        named = label is not None and label.name == inner.column and inner.test.startswith("= ")
        article = f"the {role}" if named else a(role)
        roles = plural(role) if link.role else parent.many
        first = link.by.split(" ")[0]
        one, many = f"{article} {one_mod}", f"{article if named else roles} {many_mod}"
        relation = f"{link.by} [{many}|{one}]"
        mods.append(self._relation(first, relation))
        vp = agree(phrase.vp, parent, many=False) if phrase.vp else ""
        if vp:
            mods.append((f"whose {role} {vp}", ""))
        mod, predicate = self.rng.choice(mods)
        style = "whose" if mod.startswith("whose") else "bare"
        kw = f"{role} {phrase.kw}" if phrase.kw else ""
        return Condition(inner.column, inner.test, Phrase(mod, predicate, kw, style))

    @staticmethod
    def _relation(first: str, relation: str) -> tuple[str, str]:
        if first == "were":
            return relation.removeprefix("were "), f"[were|was] {relation.removeprefix('were ')}"
        if first == "that":
            verb, _, tail = relation.removeprefix("that ").partition(" ")
            predicate = f"[{verb}|{verb}s] {tail}"
            return f"{{who}} {predicate}", predicate
        return relation, "" if first in ("of", "for", "about") else f"[are|is] {relation}"
