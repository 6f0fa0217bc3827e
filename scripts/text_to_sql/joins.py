"""The shapes of two and three tables. A join goes from a row to what it refers to.

So a joined row is one row of the first table, nothing is counted twice, and "customers with at
least one order" is a subquery (shapes.py), not a join with DISTINCT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from text_to_sql.asking import Asking, Draft
from text_to_sql.english import a, compound, listed
from text_to_sql.phrases import NoWay, Phrase, combined
from text_to_sql.ranking import top
from text_to_sql.schema import Column, Domain, Table


@dataclass(frozen=True)
class Path:
    """A table and two that it leads to: both its own parents, or parent and grandparent."""

    child: Table
    first: Table
    second: Table
    link: Column
    onward: Column
    chain: bool

    @property
    def tables(self) -> tuple[str, str, str]:
        """The names, in join order."""
        return (self.child.name, self.first.name, self.second.name)

    @property
    def source(self) -> str:
        """The FROM clause."""
        middle = self.first if self.chain else self.child
        return f"{_join(self.child, self.link, self.first)}{_on(middle, self.onward, self.second)}"


def paths(domain: Domain) -> list[Path]:
    """All ways through three tables of a domain."""
    found = []
    for child in domain.tables:
        for link in child.links:
            first = domain.target(link)
            found += [
                Path(child, first, domain.target(onward), link, onward, True)
                for onward in first.links
                if domain.target(onward) not in (child, first)
            ]
            found += [
                Path(child, first, domain.target(other), link, other, False)
                for other in child.links
                if other is not link and domain.target(other) is not first
            ]
    return found


def _on(child: Table, link: Column, parent: Table) -> str:
    return f" JOIN {parent.name} ON {child.name}.{link.name} = {parent.name}.{parent.key.name}"


def _join(child: Table, link: Column, parent: Table) -> str:
    return f"{child.name}{_on(child, link, parent)}"


def _draft(asking: Asking, question: str, answer: str, tables: tuple[str, ...]) -> Draft:
    """A join names a column's table where two of its tables have such a column, and in ON."""
    several = Counter(c.name for name in tables for c in asking.domain.by_name[name].columns)

    def bare(match: re.Match[str]) -> str:
        on, table, column = match[1], match[2], match[3]
        return match[0] if on or table not in tables or several[column] > 1 else column

    return Draft(question, re.sub(r"( ON \w+\.\w+ = )?\b(\w+)\.(\w+)", bare, answer), tables)


def _select(*columns: tuple[Table, Sequence[Column]]) -> str:
    return ", ".join(f"{table.name}.{c.name}" for table, some in columns for c in some)


def _link(asking: Asking) -> tuple[Table, Column, Table]:
    links = [(t, c, asking.domain.target(c)) for t in asking.domain.tables for c in t.links]
    return asking.rng.choice(links)


def _parent_names(asking: Asking, parent: Table, role: str, columns: Sequence[Column]) -> dict[str, str]:
    """The slots that a parent's asked columns fill."""
    names = asking.names(parent, columns)
    slots = {"pcols": names["cols"], "wis_p": names["wis"], "r": role, "a_r": a(role)}
    slots["rpcols"] = _compound(asking, parent, role, columns)
    return slots


def _compound(asking: Asking, parent: Table, role: str, columns: Sequence[Column]) -> str:
    """The columns as compounds: "patient name and patient age"; empty where that sounds wrong."""
    if any(" of " in c.phrase for c in columns):
        return ""
    return listed([compound(role, asking.speaker.name(parent, c)[0]) for c in columns])


def join2(asking: Asking) -> Draft:
    """A table and the one that it refers to."""
    draw = asking.rng.random()
    if draw < 0.5:
        return _by_parent(asking)
    if draw < 0.82:
        return _pair(asking)
    return _owner(asking) if draw < 0.9 else _by_parent_group(asking)


def _by_parent(asking: Asking) -> Draft:
    """Rows, their number or an aggregate, where the parent passes a filter."""
    child, link, parent = _link(asking)
    rng, filters = asking.rng, asking.filters
    named = rng.random() < 0.2 and parent.label is not None
    inner = filters.named(parent) if named else filters.plain(parent)
    condition = filters.related(link, inner)
    where, phrase = condition.sql(f"{parent.name}."), condition.phrase
    fixed: set[str] = set()
    used: set[str] = set()
    if rng.random() < 0.12:
        own = filters.plain(child)
        fixed, used = own.fixed, {own.column}
        phrase = combined(rng, [own.phrase, phrase], "and")
        where = f"{own.sql(f'{child.name}.')} AND {where}"
    slots = asking.nouns(child) | asking.filter_slots(child, phrase)
    what = rng.choices(("rows", "count", "aggregate"), (55, 25, 20))[0]
    if what == "count":
        select = "COUNT(*)"
    elif what == "aggregate":
        sql, slots["agg"], column = asking.aggregate(child, used)
        slots["is_agg"] = "is"
        select = sql.replace(f"({column.name})", f"({child.name}.{column.name})")
    else:
        chosen = asking.columns(child, rng.choice((1, 1, 2)), fixed)
        slots |= asking.names(child, chosen)
        select = _select((child, chosen))
    question = asking.ask(what, slots, filtered=True)
    answer = f"SELECT {select} FROM {_join(child, link, parent)} WHERE {where}"
    return _draft(asking, question, answer, (child.name, parent.name))


def _pair(asking: Asking) -> Draft:
    """Each row with columns of its parent."""
    child, link, parent = _link(asking)
    rng = asking.rng
    chosen = asking.columns(child, rng.choice((1, 1, 2)))
    others = asking.columns(parent, rng.choice((1, 1, 1, 2)))
    where, phrase = "", None
    if rng.random() < 0.25:
        condition = asking.filters.plain(child, {c.name for c in chosen})
        where, phrase = f" WHERE {condition.sql(f'{child.name}.')}", condition.phrase
    names = asking.names(child, chosen)
    slots = asking.nouns(child) | asking.filter_slots(child, phrase)
    slots |= {"ccols": names["cols"], "wis_c": names["wis"]}
    role = asking.domain.role(link)
    slots |= _parent_names(asking, parent, role, others)
    if slots["rpcols"] and not any(" of " in c.phrase for c in chosen):
        said = [asking.speaker.name(child, c)[0] for c in chosen]
        slots["both"] = listed([*said, *(_compound(asking, parent, role, [c]) for c in others)])
    if phrase is None:
        slots |= {"mod": " ", "mods": " "}
    question = asking.ask("pair", slots, filtered=phrase is not None)
    select = _select((child, chosen), (parent, others))
    answer = f"SELECT {select} FROM {_join(child, link, parent)}{where}"
    return _draft(asking, question, answer, (child.name, parent.name))


def _owner(asking: Asking) -> Draft:
    """The parent of the row that is named, or on top."""
    child, link, parent = _link(asking)
    chosen = asking.columns(parent, asking.rng.choice((1, 1, 2)))
    slots = asking.nouns(child) | _parent_names(asking, parent, asking.domain.role(link), chosen)
    if child.label is not None and asking.rng.random() < 0.5:
        named = asking.filters.named(child)
        slots["named"] = asking.filter_slots(child, named.phrase)["mod"]
        tail = f" WHERE {named.sql(f'{child.name}.')}"
        bank = "owner"
    else:
        ranked = top(asking, child, 1, None)
        slots |= ranked.slots
        tail, bank = ranked.sql(f"{child.name}."), "owner_top"
    question = asking.ask(bank, slots, filtered=False)
    answer = f"SELECT {_select((parent, chosen))} FROM {_join(child, link, parent)}{tail}"
    return _draft(asking, question, answer, (child.name, parent.name))


def _by_parent_group(asking: Asking) -> Draft:
    """An aggregate of the rows for each value of a parent's column."""
    child, link, parent = _link(asking)
    g = asking.groupable(parent)
    one, many = asking.speaker.name(parent, g)
    role = asking.domain.role(link)
    slots = asking.nouns(child) | asking.filter_slots(child, None)
    slots |= {"g": compound(role, one), "gs": compound(role, many)}
    if asking.rng.random() < 0.6:
        sql, banks = "COUNT(*)", "group group_count"
        slots["aggn"] = slots["aggb"] = f"number of {child.many}"
    else:
        sql, words, column = asking.aggregate(child)
        sql = sql.replace(f"({column.name})", f"({child.name}.{column.name})")
        slots |= {"aggn": f"{words} of {child.many}", "aggb": words}
        banks = "group"
    slots["agg0"] = slots["aggn"]
    question = asking.ask(banks, slots, filtered=False)
    key = f"{parent.name}.{g.name}"
    answer = f"SELECT {key}, {sql} FROM {_join(child, link, parent)} GROUP BY {key}"
    return _draft(asking, question, answer, (child.name, parent.name))


# --- three tables ---


def join3(asking: Asking) -> Draft:
    """A table and two that it leads to."""
    ways = paths(asking.domain)
    if not ways:
        raise NoWay
    path = asking.rng.choice(ways)
    draw = asking.rng.random()
    if draw < 0.4:
        return _triple(asking, path)
    return _far(asking, path) if path.chain or draw < 0.8 else _cross(asking, path)


def _triple(asking: Asking, path: Path) -> Draft:
    """Each row with columns of both others."""
    rng, domain = asking.rng, asking.domain
    role, far = domain.role(path.link), domain.role(path.onward)
    one, other = asking.columns(path.first, 1), asking.columns(path.second, 1)
    own = asking.columns(path.child, 1) if rng.random() < 0.35 else []
    where, phrase = _own_filter(asking, path, {c.name for c in own})
    slots = asking.nouns(path.child) | asking.filter_slots(path.child, phrase)
    p1 = asking.speaker.name(path.first, one[0])[0]
    p2 = asking.speaker.name(path.second, other[0])[0]
    slots |= {"p1": p1, "p2": p2, "r1": role}
    slots["rp1"] = _compound(asking, path.first, role, one)
    slots["rp2"] = _compound(asking, path.second, far, other)
    slots["r2"] = f"{role}'s {far}" if path.chain else far
    if phrase is None:
        slots |= {"mod": " ", "mods": " "}
    if own:
        slots["ccols"] = asking.names(path.child, own)["cols"]
    question = asking.ask("triple_own" if own else "triple", slots, filtered=phrase is not None)
    select = _select((path.child, own), (path.first, one), (path.second, other))
    return _draft(asking, question, f"SELECT {select} FROM {path.source}{where}", path.tables)


def _own_filter(asking: Asking, path: Path, without: set[str]) -> tuple[str, Phrase | None]:
    if asking.rng.random() < 0.6:
        return "", None
    condition = asking.filters.plain(path.child, without)
    return f" WHERE {condition.sql(f'{path.child.name}.')}", condition.phrase


def _far(asking: Asking, path: Path) -> Draft:
    """Rows, or their number, where the grandparent, or both parents, pass a filter."""
    rng, filters = asking.rng, asking.filters
    named = rng.random() < 0.25 and path.second.label is not None
    inner = filters.named(path.second) if named else filters.plain(path.second)
    if path.chain:
        condition = filters.related(path.link, filters.related(path.onward, inner))
        where, phrase = condition.sql(f"{path.second.name}."), condition.phrase
    else:
        near = filters.related(path.link, filters.plain(path.first))
        far = filters.related(path.onward, inner)
        phrase = combined(rng, [near.phrase, far.phrase], "and")
        where = f"{near.sql(f'{path.first.name}.')} AND {far.sql(f'{path.second.name}.')}"
    slots = asking.nouns(path.child) | asking.filter_slots(path.child, phrase)
    if rng.random() < 0.3:
        select, bank = "COUNT(*)", "count"
    else:
        chosen = asking.columns(path.child, rng.choice((1, 1, 2)))
        slots |= asking.names(path.child, chosen)
        select, bank = _select((path.child, chosen)), "rows"
    question = asking.ask(bank, slots, filtered=True)
    return _draft(asking, question, f"SELECT {select} FROM {path.source} WHERE {where}", path.tables)


def _cross(asking: Asking, path: Path) -> Draft:
    """A column of one parent, where the other passes a filter."""
    chosen = asking.columns(path.first, 1)
    condition = asking.filters.related(path.onward, asking.filters.plain(path.second))
    role = asking.domain.role(path.link)
    slots = asking.nouns(path.child) | asking.filter_slots(path.child, condition.phrase)
    p1 = asking.speaker.name(path.first, chosen[0])[0]
    slots |= {"p1": p1, "r1": role, "rp1": _compound(asking, path.first, role, chosen)}
    slots["wis_p"] = asking.names(path.first, chosen)["wis"]
    question = asking.ask("cross", slots, filtered=True)
    where = condition.sql(f"{path.second.name}.")
    answer = f"SELECT {_select((path.first, chosen))} FROM {path.source} WHERE {where}"
    return _draft(asking, question, answer, path.tables)
