"""Writes docs/recipe.md: every key of a recipe, from the docstrings of tuneship.recipe.

python scripts/make_recipe_reference.py            writes it
python scripts/make_recipe_reference.py --check    exit 1 if it would change
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tuneship.recipe import ENVIRONMENT, Recipe

FILE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"
HEAD = """\
# Recipe reference

Made by `make docs` from `tuneship/recipe`; do not edit by hand.

A recipe is one YAML file. Precedence: defaults < file < environment < `--set section.key=value`.
An unknown key, a value of the wrong type and a setting that would have no effect are errors.
"""


def reference() -> str:
    """The page as text."""
    environment = {key: name for name, key in ENVIRONMENT.items()}
    parts = [HEAD, _table("", {"name": Recipe.model_fields["name"]}, environment)]
    for section, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts += _section(section, field.annotation, environment)
    return "\n".join(parts)


def _section(path: str, model: type[BaseModel], environment: dict[str, str]) -> list[str]:
    plain, nested = {}, []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            nested.append((f"{path}.{name}", field.annotation))
        else:
            plain[name] = field
    about = (model.__doc__ or "").strip().splitlines()[0]
    parts = [f"## {path}\n\n{about}\n", _table(f"{path}.", plain, environment)]
    for inner, annotation in nested:
        parts += _section(inner, annotation, environment)
    return parts


def _table(prefix: str, fields: dict[str, Any], environment: dict[str, str]) -> str:
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.default is PydanticUndefined else f"`{_shown(field.default)}`"
        note = f" Environment: `{environment[prefix + name]}`." if prefix + name in environment else ""
        text = (field.description or "").replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {text}{note} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value)) if isinstance(value, tuple) else repr(value).strip("'").replace("|", "\\|")


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin in (Union, UnionType):
        return " or ".join(_type(branch) for branch in inner)
    return "null" if annotation is NoneType else str(annotation.__name__)


def main() -> int:
    """Writes or checks; returns the exit code."""
    text = reference()
    if "--check" in sys.argv:
        if not FILE.exists() or FILE.read_text(encoding="utf-8") != text:
            print(f"{FILE} is not what tuneship/recipe makes: run make docs", file=sys.stderr)
            return 1
        return 0
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
