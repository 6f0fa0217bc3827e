"""How filters are said: a condition's SQL, and a phrase for it that agrees with its noun.

A phrase keeps "[are|is]" where the plural and the singular part ways; `agree` picks one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

import yaml

from text_to_sql.english import a, listed, plural
from text_to_sql.schema import HERE, Column, Table

_VERBS = {"are": "[are|is]", "have": "[have|has]", "were": "[were|was]", "do": "[do|does]"}
Banks = Mapping[str, Mapping[str, Sequence[str]]]


class NoWay(Exception):
    """This draw leads nowhere (no fitting column, no fitting wording): draw again."""


def load_bank(name: str) -> Banks:
    """The wordings of one file: bank → seen or unseen → templates."""
    banks: Banks = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    return banks


CONDITIONS = load_bank("conditions.yaml")
DIRECTIONS = load_bank("directions.yaml")


def slots_of(template: str) -> set[str]:
    """The names of a template's slots."""
    return {field for _, field, _, _ in Formatter().parse(template) if field}


def choose(rng: random.Random, bank: Mapping[str, Sequence[str]], slots: Mapping[str, str], unseen: bool) -> str:
    """A template whose slots all have a text.

    Raises:
        NoWay: there is none.
    """
    # Where unseen wordings may be used, they are as likely as seen ones.
    kinds = ["seen", *(["unseen"] if unseen else [])]
    rng.shuffle(kinds)
    for kind in kinds:
        fitting = [t for t in bank[kind] if all(slots.get(s) for s in slots_of(t))]
        if fitting:
            return rng.choice(fitting)
    raise NoWay


@dataclass(frozen=True)
class Phrase:
    """A filter behind a noun (`mod`), as a predicate (`vp`, maybe none), and as keywords."""

    mod: str
    vp: str
    kw: str
    style: str  # with | whose | that | bare


@dataclass(frozen=True)
class Condition:
    """One filter: `column test` in SQL, and its phrase."""

    column: str
    test: str
    phrase: Phrase

    def sql(self, prefix: str = "") -> str:
        """The SQL of the filter."""
        return f"{prefix}{self.column} {self.test}"

    @property
    def fixed(self) -> set[str]:
        """The column whose value the filter leaves no doubt of; to ask for it would be odd."""
        return {self.column} if self.test.startswith(("= ", "IS NULL")) else set()


def agree(text: str, table: Table, *, many: bool) -> str:
    """The text with every [plural|singular] decided for a noun."""
    text = text.replace("{who}", "who" if table.who else "that")
    text = text.replace("{their}", "their" if many or table.who else "its")
    if table.who:
        text = text.replace("for which", "for whom")
    return re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda m: m[1] if many else m[2], text)


def _conjugated(predicate: str) -> str:
    verb, _, rest = predicate.partition(" ")
    ending = "es" if re.search(r"(s|x|z|ch|sh|o)$", verb) else "s"
    return f"{_VERBS.get(verb, f'[{verb}|{verb}{ending}]')} {rest}"


def spoken(template: str, slots: Mapping[str, str], kw: str) -> Phrase:
    """The phrase of one template of conditions.yaml, or of a schema's own."""
    keep = {"who": "{who}", "their": "{their}"}
    given, _, predicate = template.partition(" | ")
    past = given.startswith(("{done}", "were ", "were not "))
    given = re.sub(r"^were (not )?", r"\1", given)
    text = given.format_map({**slots, **keep})
    vp = _conjugated(predicate.format_map({**slots, **keep})) if predicate else ""
    first, _, rest = text.partition(" ")
    if first == "that" and rest.split(" ")[0] not in ("no", "some"):
        return Phrase(f"{{who}} {_conjugated(rest)}", _conjugated(rest), kw, "that")
    if first == "with":
        return Phrase(text, vp or f"[have|has] {rest}", kw, "with")
    if first in ("whose", "without", "lacking") or text.startswith(("for which", "that ", "still")):
        return Phrase(text, vp, kw, "whose" if first == "whose" else "")
    be = "[were|was]" if past else "[are|is]"
    return Phrase(text, vp or f"{be} {text}", kw, "bare")


def negated(custom: str) -> str:
    """A schema's own template, denied: "in {}" → "not in {}"."""
    first, _, rest = custom.partition(" ")
    if first == "with":
        return f"without {rest} | do not have {rest}"
    if first == "that":
        verb, _, what = rest.partition(" ")
        return f"that are not {what}" if verb == "are" else f"that do not {rest}"
    if first == "were":
        return f"were not {rest}"
    return f"not {custom}"


def combined(rng: random.Random, parts: Sequence[Phrase], word: str) -> Phrase:
    """The phrase of several filters joined by "and" or "or".

    Raises:
        NoWay: these phrases do not go together.
    """
    kw = f" {word} ".join(p.kw for p in parts) if all(p.kw for p in parts) else ""
    vp = ""
    if all(p.vp for p in parts):
        vps = [p.vp for p in parts]
        if all(v.startswith("[have|has] ") for v in vps):
            vps[1:] = [v.removeprefix("[have|has] ") for v in vps[1:]]
        elif all(v.startswith("[are|is] ") for v in vps) and rng.random() < 0.5:
            vps[1:] = [v.removeprefix("[are|is] ") for v in vps[1:]]
        vp = listed(vps, word)
    mods = [f"{{who}} {vp}"] if vp else []
    styles = [p.style for p in parts]
    if set(styles) == {"whose"}:
        mods.append(listed([p.mod for p in parts], word))
    if set(styles) == {"with"}:
        mods.append("with " + listed([p.mod.removeprefix("with ") for p in parts], word))
    # Not "of a ship whose age is 5 whose terminal is in Malta".
    short = styles[0] == "bare" and not re.search(r"\b(whose|who|that|with)\b", parts[0].mod)
    if word == "and" and short and styles[1:] in (["with"], ["whose"]):
        mods.append(f"{parts[0].mod} {parts[1].mod}")
    if not mods or (word == "or" and any(" or " in p.mod for p in parts)):
        raise NoWay
    return Phrase(rng.choice(mods), vp, kw, "that")


@dataclass
class Speaker:
    """Draws conditions and their phrases for one question, always naming a column the same way."""

    rng: random.Random
    unseen: bool

    def __post_init__(self) -> None:
        self._said: dict[tuple[str, str], tuple[str, str]] = {}

    def name(self, table: Table, column: Column) -> tuple[str, str]:
        """How this question calls a column: singular, plural."""
        key = (table.name, column.name)
        if key not in self._said:
            pair = (column.phrase, column.phrases)
            if column.also and self.rng.random() < 0.3:
                pair = (column.also, plural(column.also))
            self._said[key] = pair
        return self._said[key]

    def slots(self, table: Table, column: Column) -> dict[str, str]:
        """The slots that a column fills."""
        p, ps = self.name(table, column)
        slots = {"p": p, "ps": ps, "a_p": a(p), "n": column.counted, "done": column.done}
        slots |= {"noun": table.one, "nouns": table.many, "high": "highest", "low": "lowest"}
        if adjective := column.adjective:
            slots |= {"high": adjective.high, "low": adjective.low}
            if column.of_row:
                slots |= {"more": adjective.more, "less": adjective.less}
                slots |= {"most": adjective.most, "least": adjective.least}
        return slots

    def say(self, kind: str, table: Table, column: Column, kw: str = "", **values: str) -> Phrase:
        """A phrase of one bank of conditions.yaml."""
        slots = self.slots(table, column) | values
        if column.people and "t" in values:
            slots |= {"p": f"{slots['p']}'s name", "a_p": f"{slots['a_p']}'s name"}
        free = {"who", "their"}
        template = choose(self.rng, CONDITIONS[kind], {**slots, **dict.fromkeys(free, "x")}, self.unseen)
        return spoken(template, slots, kw.format_map(slots) if kw else "")

    def own(self, template: str, value: str, kw: str) -> Phrase:
        """A phrase of a schema's own template."""
        return spoken(template.replace("a {}", a(value)).replace("{}", value), {}, kw)

    def direction(self, table: Table, column: Column, *, descending: bool) -> str:
        """What follows "sorted"."""
        kind = {"year": "time", "date": "time", "count": "count"}.get(column.kind, "num")
        kind = "text" if column.type == "VARCHAR" else kind
        bank = DIRECTIONS[f"{kind}_{'desc' if descending else 'asc'}"]
        slots = self.slots(table, column)
        return choose(self.rng, bank, slots, self.unseen).format_map(slots)
