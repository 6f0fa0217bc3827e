"""One question in the making: the drawn columns, the frame's slots, and the finished text."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from text_to_sql.english import a, listed, sentence
from text_to_sql.filters import Filters
from text_to_sql.phrases import (
    Condition,
    NoWay,
    Phrase,
    Speaker,
    agree,
    combined,
    load_bank,
    slots_of,
)
from text_to_sql.schema import NUMBERS, TIMES, Column, Domain, Table

FRAMES = load_bank("frames.yaml")

# A question with a filter must say it: its frame has one of these slots.
_SAY_FILTER = {"mod", "mods", "vp", "vps", "kw", "set", "the_set", "all_set", "aggn"}
_SAY_TOP = {"sup", "sups"}
# "Return the return dates", "the device whose device type".
_ECHO = re.compile(r"\b(\w{5,})\w* (the |on |whose |in )?\1")


def where(condition: Condition | None) -> str:
    """The WHERE clause of a filter, or nothing."""
    return f" WHERE {condition.sql()}" if condition else ""


def listing(columns: Sequence[Column]) -> str:
    """The columns as SELECT names them."""
    return ", ".join(c.name for c in columns)


@dataclass(frozen=True)
class Draft:
    """A question, its answer, and the tables that it is about."""

    question: str
    answer: str
    tables: tuple[str, ...]


class Asking:
    """Draws the parts of one question."""

    def __init__(self, rng: random.Random, domain: Domain, *, unseen: bool) -> None:
        self.rng, self.domain, self.unseen = rng, domain, unseen
        # A fifth of these rows also say their filters in ways that training never sees.
        self.speaker = Speaker(rng, unseen and rng.random() < 0.2)
        self.filters = Filters(rng, self.speaker, domain)

    # --- drawing ---

    def table(self) -> Table:
        """Any table, more often one with many columns."""
        tables = self.domain.tables
        return self.rng.choices(tables, [len([c for c in t.columns if c.asked]) for t in tables])[0]

    def columns(self, table: Table, count: int = 0, without: Collection[str] = ()) -> list[Column]:
        """The columns that a question asks for: usually the name first.

        Raises:
            NoWay: there are not that many.
        """
        count = count or self.rng.choices((1, 2, 3), (60, 36, 4))[0]
        fitting = [c for c in table.columns if c.asked and c.name not in without]
        self.rng.shuffle(fitting)
        if self.rng.random() < 0.75:
            fitting.sort(key=lambda c: c.kind != "name")
        if len(fitting) < count:
            raise NoWay
        # Last what has an "of": "numbers of players and companies" could be read in two ways.
        return sorted(fitting[:count], key=lambda c: " of " in c.phrase)

    def groupable(self, table: Table, without: Collection[str] = ()) -> Column:
        """A column whose values repeat.

        Raises:
            NoWay: there is none.
        """
        texts = [c for c in table.of("text") if not c.nullable and c.name not in without]
        years = [c for c in table.of("year") if not c.nullable and c.name not in without]
        if texts and (not years or self.rng.random() < 0.9):
            return self.rng.choice(texts)
        if not years:
            raise NoWay
        return self.rng.choice(years)

    def aggregate(self, table: Table, without: Collection[str] = ()) -> tuple[str, str, Column]:
        """An aggregate of one column: SQL, words, column."""
        column = self.filters.column(table, *NUMBERS, *NUMBERS, *TIMES, without=without)
        functions = ["MAX", "MIN"]
        if column.kind in NUMBERS:
            functions += ["AVG", "AVG"] + (["SUM", "SUM"] if column.additive else [])
        function = self.rng.choice(functions)
        words = self.function_words(table, column, function)
        return f"{function}({column.name})", words, column

    def function_words(self, table: Table, column: Column, function: str) -> str:
        """The words of an aggregate: "average weight"."""
        p, _ = self.speaker.name(table, column)
        slots = self.speaker.slots(table, column)
        words = {
            "AVG": ["average", "average", "mean"] if self.unseen else ["average"],
            "SUM": ["total", "total", "combined"] if self.unseen else ["total"],
            "MAX": [slots["high"], "maximum"],
            "MIN": [slots["low"], "minimum"],
        }
        if column.kind in TIMES:
            words |= {"MAX": ["latest", "most recent"], "MIN": ["earliest"]}
        # Not "the maximum maximum load".
        word = self.rng.choice([w for w in words[function] if not p.startswith(w)])
        return f"{word} {p}"

    # --- wording ---

    def names(self, table: Table, columns: Sequence[Column]) -> dict[str, str]:
        """The slots that the asked columns fill."""
        if not columns:
            return {}
        said = [self.speaker.name(table, c) for c in columns]
        who = "who" if len(columns) == 1 and columns[0].people else "what"
        return {
            "cols": listed([one for one, _ in said]),
            "colss": listed([many for _, many in said]),
            "wis": f"{who} {'is' if len(columns) == 1 else 'are'}",
            "ware": f"{who} are",
        }

    def nouns(self, table: Table) -> dict[str, str]:
        """The slots that a table fills."""
        return {
            "noun": table.one,
            "nouns": table.many,
            "a_noun": a(table.one),
            "who": "who" if table.who else "that",
            "its": "their" if table.who else "its",
        }

    def filter_slots(self, table: Table, said: Phrase | Condition | None) -> dict[str, str]:
        """The slots that a filter fills."""
        phrase = said.phrase if isinstance(said, Condition) else said
        if phrase is None:
            many = table.many
            return {"set": f"all {many}", "the_set": f"the {many}", "all_set": f"all {many}"}
        mod, mods = agree(phrase.mod, table, many=False), agree(phrase.mod, table, many=True)
        slots = {"mod": mod, "mods": mods, "kw": phrase.kw}
        if phrase.vp:
            slots["vp"] = agree(phrase.vp, table, many=False)
            slots["vps"] = agree(phrase.vp, table, many=True)
        some = f"{table.many} {mods}"
        return slots | {"set": some, "the_set": f"the {some}", "all_set": f"all {some}"}

    def slots(self, table: Table, columns: Sequence[Column], said: Phrase | Condition | None) -> dict[str, str]:
        """The slots that a table, its asked columns and a filter fill."""
        return self.nouns(table) | self.names(table, columns) | self.filter_slots(table, said)

    def ask(self, banks: str, slots: Mapping[str, str], *, filtered: bool) -> str:
        """The finished question, in a frame of one of the banks ("count count_all").

        Raises:
            NoWay: no frame fits.
        """
        kind = "unseen" if self.unseen else "seen"
        fitting = []
        for bank in banks.split():
            for frame in FRAMES[bank][kind]:
                used = slots_of(frame)
                says = bool(used & _SAY_FILTER) or ("sup_says_filter" in slots and used & _SAY_TOP)
                if all(slots.get(s) for s in used) and (says or not filtered):
                    fitting.append(frame)
        if not fitting:
            raise NoWay
        question = sentence(self.rng.choice(fitting).format_map(slots))
        if _ECHO.search(question.lower()):
            raise NoWay
        return question

    def maybe(self, table: Table, chance: float, without: Collection[str] = ()) -> Condition | None:
        """A filter with some chance, else none."""
        return self.filters.plain(table, without) if self.rng.random() < chance else None

    def joined(self, table: Table, word: str) -> tuple[str, Phrase, set[str]]:
        """Two or three filters on different columns, joined by "and" or "or".

        Raises:
            NoWay: the table has too few columns, or the phrases do not go together.
        """
        count = 3 if word == "and" and self.rng.random() < 0.12 else 2
        used: set[str] = set()
        conditions = []
        for _ in range(count):
            conditions.append(self.filters.plain(table, used))
            used.add(conditions[-1].column)
        if count == 3 and sum(bool(c.fixed) for c in conditions) > 1:
            raise NoWay  # hardly a row would pass
        phrase = combined(self.rng, [c.phrase for c in conditions], word)
        return f" {word.upper()} ".join(c.sql() for c in conditions), phrase, used
