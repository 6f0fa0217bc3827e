"""The little English that the questions need: plurals, articles, lists, comparatives.

Covered: regular nouns and the irregular ones that the schemas use. Not covered: everything else;
a schema states its own plural where these rules would get it wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_IRREGULAR = {
    "child": "children", "shelf": "shelves", "midwife": "midwives", "life": "lives",
    "thesis": "theses", "volcano": "volcanoes", "series": "series", "species": "species",
}  # fmt: skip
_SINGULAR = {plural: one for one, plural in _IRREGULAR.items()}


def plural(phrase: str) -> str:
    """The plural of a noun phrase: of its head, which is the word before "of", or the last."""
    head, of, rest = phrase.partition(" of ")
    if of:
        return f"{plural(head)} of {rest}"
    words = phrase.split(" ")
    last = words[-1]
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    else:
        last += "s"
    return " ".join([*words[:-1], last])


def singular(phrase: str) -> str:
    """The singular of a plural noun phrase."""
    words = phrase.split(" ")
    last = words[-1]
    if last in _SINGULAR:
        last = _SINGULAR[last]
    elif last.endswith("ies"):
        last = last[:-3] + "y"
    elif re.search(r"(ss|x|z|ch|sh)es$", last):
        last = last[:-2]
    elif last.endswith("s"):
        last = last[:-1]
    return " ".join([*words[:-1], last])


def a(phrase: str) -> str:
    """The phrase with its indefinite article."""
    vowel = re.match(r"[aeiouAEIOU]|[AEFHILMNORSX][A-Z0-9]|(hour|honest|honou?r|heir)", phrase)
    yod = re.match(r"(?i)(uni[^nm]|us[aeu]|eu|one\b|once|ute)", phrase)
    return f"{'an' if vowel and not yod else 'a'} {phrase}"


def listed(items: Sequence[str], last: str = "and") -> str:
    """The items as in running text: "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def compound(noun: str, phrase: str) -> str:
    """The phrase with a noun before it, unless it repeats it: "hive weight", but "beer style"."""
    repeats = phrase.split(" ")[0][:4] == noun.split(" ")[-1][:4]
    return phrase if repeats else f"{noun} {phrase}"


def sentence(text: str) -> str:
    """The text with single spaces, none before punctuation, and capitals where sentences start."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r" ([,.;:?])", r"\1", text)
    text = re.sub(r"(?<=[.?] )(what|who) ", lambda m: m[0].capitalize(), text)
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Adjective:
    """How things compare by a column: "older", "oldest", "younger", "youngest".

    `high` and `low` are said of the column itself: "the longest duration", "the lowest price".
    """

    more: str
    most: str
    less: str
    least: str
    high: str = "highest"
    low: str = "lowest"


ADJECTIVES = {
    "old": Adjective("older", "oldest", "younger", "youngest"),
    "expensive": Adjective("more expensive", "most expensive", "cheaper", "cheapest"),
    "long": Adjective("longer", "longest", "shorter", "shortest", "longest", "shortest"),
    "tall": Adjective("taller", "tallest", "shorter", "shortest", "greatest", "smallest"),
    "heavy": Adjective("heavier", "heaviest", "lighter", "lightest"),
    "deep": Adjective("deeper", "deepest", "shallower", "shallowest", "greatest", "smallest"),
    "high": Adjective("higher", "highest", "lower", "lowest"),
    "fast": Adjective("faster", "fastest", "slower", "slowest"),
    "large": Adjective("larger", "largest", "smaller", "smallest", "largest", "smallest"),
    "wide": Adjective("wider", "widest", "narrower", "narrowest", "greatest", "smallest"),
    "thick": Adjective("thicker", "thickest", "thinner", "thinnest", "greatest", "smallest"),
    "hot": Adjective("hotter", "hottest", "cooler", "coolest"),
    "warm": Adjective("warmer", "warmest", "colder", "coldest"),
    "loud": Adjective("louder", "loudest", "quieter", "quietest"),
    "bright": Adjective("brighter", "brightest", "dimmer", "dimmest"),
    "strong": Adjective("stronger", "strongest", "weaker", "weakest"),
    "steep": Adjective("steeper", "steepest", "gentler", "gentlest"),
    "powerful": Adjective("more powerful", "most powerful", "less powerful", "least powerful"),
    "spicy": Adjective("spicier", "spiciest", "milder", "mildest"),
}
