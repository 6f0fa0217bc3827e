"""The schemas: `domains/*.yaml` read into dataclasses, and checked.

A domain is a few tables of one subject. A column is one line, `KIND VALUES; OPTION; OPTION`:

    apiaries:
      apiary_id: id
      apiary_name: name Old|Sunny|Upper + Orchard|Meadow|Ridge   # 3 x 3 names
      county: text Kent, Devon, Dorset; is in {}                 # "apiaries in Kent"
      height: int 20 900; adj tall; unit m                       # "taller than 300 m"
      delay: int 1 90; adj ~long; unit minutes                   # "the longest delay", no more
    hives:
      hive_id: id
      apiary_id: to apiaries; by kept in                         # "hives kept in an apiary"
      frames: count 6 20                                         # "with more than 9 frames"
      setup_year: year 2005 2023; done set up                    # "set up before 2015"
      last_treated: date 2019 2024; done treated; null           # may be missing

Kinds: id, name (says which row it is), text (a category), int, real, count, year, date, to.
Options: as PHRASE, also PHRASE (a synonym), plural PHRASE, is TEMPLATE, adj ADJECTIVE, unit UNIT,
done PARTICIPLE, null, sum (adding it up makes sense), quote (its values are
phrases), by RELATION, role NOUN.
A table's own: `_one: NOUN` (its singular), `_many: NOUNS`, `_who: true` (its rows are people).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from text_to_sql.english import ADJECTIVES, Adjective, plural, singular

HERE = Path(__file__).parent
NUMBERS = ("int", "real", "count")
TIMES = ("year", "date")
_TYPES = {"name": "VARCHAR", "text": "VARCHAR", "real": "REAL", "date": "DATE"}
_UNIT_SUFFIX = re.compile(r"_(kg|km|m|cm|mm|g|ml|l|kw|kwh|mb|gb|hz|min|mins|kmh|m2|km2|m3|ha)$")
_OPTIONS = (
    "as",
    "also",
    "plural",
    "is",
    "adj",
    "unit",
    "done",
    "null",
    "sum",
    "by",
    "role",
    "quote",
)


class SchemaError(ValueError):
    """A schema file says something that the generator cannot use."""


@dataclass(frozen=True)
class Column:
    """One column, and how people speak of it."""

    name: str
    kind: str
    phrase: str
    phrases: str
    values: tuple[str, ...] = ()
    people: bool = False
    quoted: bool = False
    low: float = 0
    high: float = 0
    step: float = 0
    also: str = ""
    custom: str = ""
    adjective: Adjective | None = None
    of_row: bool = True
    unit: str = ""
    done: str = ""
    counted: str = ""
    nullable: bool = False
    additive: bool = False
    target: str = ""
    by: str = ""
    role: str = ""

    @property
    def type(self) -> str:
        """Its SQL type."""
        return _TYPES.get(self.kind, "INTEGER")

    @property
    def asked(self) -> bool:
        """Whether questions speak of it: keys are silent."""
        return self.kind not in ("id", "to")


@dataclass(frozen=True)
class Table:
    """One table, and what its rows are called."""

    name: str
    one: str
    many: str
    who: bool
    columns: tuple[Column, ...]

    def ddl(self, shown: Collection[str]) -> str:
        """Its CREATE TABLE statement, with the columns of these names only."""
        columns = ", ".join(f"{c.name} {c.type}" for c in self.columns if c.name in shown)
        return f"CREATE TABLE {self.name} ({columns})"

    @property
    def label(self) -> Column | None:
        """The column that says which row it is."""
        return next((c for c in self.columns if c.kind == "name"), None)

    @property
    def key(self) -> Column:
        """Its primary key."""
        return next(c for c in self.columns if c.kind == "id")

    @property
    def links(self) -> tuple[Column, ...]:
        """Its foreign keys."""
        return tuple(c for c in self.columns if c.kind == "to")

    def of(self, *kinds: str) -> list[Column]:
        """Its columns of some kinds."""
        return [c for c in self.columns if c.kind in kinds]


@dataclass(frozen=True)
class Domain:
    """A few tables of one subject."""

    id: str
    tables: tuple[Table, ...]
    by_name: dict[str, Table] = field(default_factory=dict, compare=False)

    def target(self, link: Column) -> Table:
        """The table that a foreign key points to."""
        return self.by_name[link.target]

    def role(self, link: Column) -> str:
        """What the row that a foreign key points to is called."""
        return link.role or self.target(link).one


def load_domains() -> list[Domain]:
    """All domains, by id.

    Raises:
        SchemaError: a schema is wrong, or a table's name occurs twice.
    """
    pools = {k: tuple(v) for k, v in _load(HERE / "values.yaml").items()}
    pools["person"] = tuple(f"{a} {b}" for a, b in product(pools["first_name"], pools["last_name"]))
    domains: dict[str, Domain] = {}
    seen: dict[str, str] = {}
    for path in sorted((HERE / "domains").glob("*.yaml")):
        for name, tables in _load(path).items():
            if name in domains:
                raise SchemaError(f"{path.name}: domain {name} stands in two files")
            read = tuple(_table(f"{name}.{t}", t, spec, pools) for t, spec in tables.items())
            domains[name] = Domain(name, read, {t.name: t for t in read})
            for table in read:
                if table.name in seen:
                    raise SchemaError(f"table {table.name} is in {seen[table.name]} and {name}")
                seen[table.name] = name
            _check(domains[name])
    return [domains[name] for name in sorted(domains)]


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def _table(where: str, name: str, spec: dict[str, Any], pools: dict[str, tuple[str, ...]]) -> Table:
    one = str(spec.get("_one", singular(name.replace("_", " "))))
    many = str(spec.get("_many", plural(one)))
    columns = tuple(
        _column(f"{where}.{column}", column, line, name, one, pools)
        for column, line in spec.items()
        if not column.startswith("_")
    )
    return Table(name, one, many, bool(spec.get("_who", False)), columns)


def _column(where: str, name: str, line: str, table: str, one: str, pools: dict[str, tuple[str, ...]]) -> Column:
    head, *rest = [part.strip() for part in line.split(";")]
    kind, _, given = head.partition(" ")
    options: dict[str, str] = {}
    for part in rest:
        option, _, value = part.partition(" ")
        options[option] = value
    if unknown := set(options) - set(_OPTIONS):
        raise SchemaError(f"{where}: no option {', '.join(sorted(unknown))}")
    words = _UNIT_SUFFIX.sub("", name)
    if kind == "name":
        # "the name of the hive", not "the hive name of the hive".
        for stem in (one.replace(" ", "_"), singular(table), one.split(" ")[-1]):
            words = words.removeprefix(f"{stem}_")
    phrase = options.get("as") or words.replace("_", " ")
    phrases = options.get("plural") or plural(phrase)
    counted, numbers = "", [0.0, 0.0, 0.0]
    values: tuple[str, ...] = ()
    if kind == "count":
        counted, phrase, phrases = phrase, f"number of {phrase}", f"numbers of {phrase}"
    if kind in (*NUMBERS, *TIMES):
        numbers = [*map(float, given.split()), 0.0][:3]
        if len(numbers) != 3 or numbers[0] >= numbers[1]:
            raise SchemaError(f"{where}: say {kind} LOW HIGH")
    elif kind in ("name", "text"):
        values = _values(where, given, pools)
    elif kind == "to":
        if not given or "by" not in options:
            raise SchemaError(f"{where}: say to TABLE; by RELATION")
    elif kind != "id":
        raise SchemaError(f"{where}: no kind {kind}")
    adjective = options.get("adj", "")
    if adjective and adjective.removeprefix("~") not in ADJECTIVES:
        raise SchemaError(f"{where}: no adjective {adjective}")
    return Column(
        name=name,
        kind=kind,
        phrase=phrase,
        phrases=phrases,
        values=values,
        quoted="quote" in options,
        people=kind == "text" and given == "@person",
        low=numbers[0],
        high=numbers[1],
        step=numbers[2],
        also=options.get("also", ""),
        custom=options.get("is", ""),
        adjective=ADJECTIVES.get(adjective.removeprefix("~")),
        of_row=not adjective.startswith("~"),
        unit=options.get("unit", ""),
        done=options.get("done", ""),
        counted=counted,
        nullable="null" in options,
        additive="sum" in options or kind == "count",
        target=given if kind == "to" else "",
        by=options.get("by", ""),
        role=options.get("role", ""),
    )


def _values(where: str, given: str, pools: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """A pool (@city), a list (a, b, c), or a product of parts (Old|New + Mill|Bridge)."""
    if given.startswith("@"):
        return pools[given[1:]]
    if " + " in given:
        parts = [part.split("|") for part in given.split(" + ")]
        return tuple(re.sub(r"([-#/]) ", r"\1", " ".join(choice)) for choice in product(*parts))
    values = tuple(value.strip() for value in given.split(","))
    if len(values) < 3 or len(set(values)) < len(values) or "" in values:
        raise SchemaError(f"{where}: say at least three different values")
    return values


def _check(domain: Domain) -> None:
    if not 2 <= len(domain.tables) <= 3:
        raise SchemaError(f"{domain.id}: two or three tables")
    columns = [c for t in domain.tables for c in t.columns]
    wanted: dict[str, Iterable[object]] = {
        "a nullable column": (c for c in columns if c.nullable),
        "a foreign key": (c for c in columns if c.kind == "to"),
        "a name": (c for c in columns if c.kind == "name"),
        "two numbers": [c for c in columns if c.kind in NUMBERS][1:],
    }
    for what, found in wanted.items():
        if not any(True for _ in found):
            raise SchemaError(f"{domain.id}: needs {what}")
    for table in domain.tables:
        where = f"{domain.id}.{table.name}"
        if not 3 <= len(table.columns) <= 6:
            raise SchemaError(f"{where}: three to six columns, not {len(table.columns)}")
        if sum(c.kind == "id" for c in table.columns) != 1:
            raise SchemaError(f"{where}: one id")
        adjectives = [c.adjective for c in table.columns if c.adjective and c.of_row]
        if len(set(adjectives)) < len(adjectives):
            raise SchemaError(f"{where}: two columns share an adjective")
        phrases = [c.phrase for c in table.columns if c.asked]
        if len(set(phrases)) < len(phrases):
            raise SchemaError(f"{where}: two columns share a phrase: {phrases}")
        for link in table.links:
            if link.target not in domain.by_name or link.target == table.name:
                raise SchemaError(f"{where}.{link.name}: no table {link.target}")
