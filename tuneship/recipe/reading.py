"""A recipe from a file, as a file, and what is said about a wrong one: the key, its line, the nearest key."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tuneship.credentials import refuse_secrets
from tuneship.errors import InputError
from tuneship.recipe.schema import Recipe

MAX_RECIPE_BYTES = 256 * 1024

# The tutorial's environment names, and the keys that they set.
ENVIRONMENT = {
    "MODEL_NAME": "model.model_name_or_path",
    "LORA_R": "lora.r",
    "LORA_ALPHA": "lora.lora_alpha",
    "TRAIN_BATCH_SIZE": "train.per_device_train_batch_size",
    "EVAL_BATCH_SIZE": "evaluate.per_device_eval_batch_size",
    "GRADIENT_ACCUMULATION_STEPS": "train.gradient_accumulation_steps",
    "DATASET_LIMIT": "data.dataset_limit",
    "MAX_SEQ_LENGTH": "train.max_length",
    "LOGGING_STEPS": "train.logging_steps",
}


def share() -> Path:
    """The folder that holds recipes/: inside an installed package, or the root of a checkout."""
    package = Path(__file__).parent.parent
    return package / "_share" if (package / "_share").is_dir() else package.parent


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted((share() / "recipes").glob("*.yaml"))}


def find(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        InputError: there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped()
    if str(recipe) in known:
        return known[str(recipe)]
    near = difflib.get_close_matches(str(recipe), known, n=1)
    raise InputError(
        "no such recipe" + (f"; did you mean {near[0]}?" if near else ""),
        where=str(recipe),
        fix=f"name a file, or one of: {', '.join(known)}",
    )


def load(
    recipe: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Recipe:
    """Reads a recipe file (or a shipped recipe's name) and resolves it.

    Args:
        recipe: a path, or the name of a shipped recipe.
        overrides: `section.key=value`, the value in YAML.
        environ: where the tutorial's names are looked up; nowhere by default.

    Raises:
        InputError: with the file, the line, the key and the nearest key.
    """
    path = find(recipe)
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise InputError(f"a recipe is at most {MAX_RECIPE_BYTES} bytes", where=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason} at byte {error.start}", where=str(path)) from error
    # A run's recipe.json is read as JSON: YAML would fold its line separators and refuse some characters.
    tree, lines = _parse_json(text, str(path)) if path.suffix == ".json" else _parse(text, str(path))
    tree.setdefault("name", re.sub(r"[^a-z0-9.-]+", "-", path.stem.lower())[:63].strip("-.") or "run")
    origins: dict[str, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    for name, key in ENVIRONMENT.items():
        if environ is not None and name in environ:
            _put(tree, key, _scalar(environ[name], key), name)
            origins[key] = f"environment variable {name}"
    for override in overrides:
        key, separator, value = override.partition("=")
        # The value is never part of a message: it may be a secret in the wrong place.
        if not separator:
            raise InputError("an override is section.key=value", where="--set", fix="as --set train.seed=1")
        _put(tree, key, _scalar(value, f"--set {key}"), f"--set {key}")
        origins[key] = f"--set {key}"
    return validate(tree, where=str(path), origins=origins)


def validate(tree: Mapping[str, Any], *, where: str, origins: Mapping[str, str] | None = None) -> Recipe:
    """A tree of plain values as a Recipe.

    Args:
        where: what the tree was read from, for messages.
        origins: for a dotted key, the file and line (or option) that set it.

    Raises:
        InputError: for the first wrong key; further ones are counted.
    """
    refuse_secrets(tree, "")
    try:
        # Through JSON, so that lists may fill tuples although the models are strict.
        return Recipe.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _readable(error, where, origins or {}) from None
    except (TypeError, ValueError) as error:
        raise InputError(f"a value that is not plain: {error}", where=where) from None


# YAML 1.1 wants a dot in a number with an exponent; people write 2e-4.
_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` gives the same recipe back."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that keeps a text of several lines readable on one, with \\n in it."""


# A text like "2e-4" must be quoted, since _Loader takes it for a number.
_Dumper.add_implicit_resolver(*_EXPONENT)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if len(text.splitlines()) > 1 or text[-1:].isspace() else None
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, without duplicate keys, without dates, and with 2e-4 as a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed in a recipe", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(*_EXPONENT)
# No setting is a date; a run may be named after one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _parse(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree of a YAML text, and the line of each dotted key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"not a YAML recipe: {_problem(error)}", where=f"{where}:{mark.line + 1}" if mark else where
        ) from None
    if node is None or not isinstance(tree, dict):
        raise InputError(
            "a recipe is a mapping with the sections model and data", where=where, fix="tuneship init lists examples"
        )
    # A section whose every key is commented out is null.
    return {key: value for key, value in tree.items() if value is not None}, dict(_lines(node, ""))


# JSON is what a run keeps its recipe in.
_RESTORE = "mend it; a run starts anew from its recipe's file with --fresh"


def _parse_json(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a JSON recipe: {_problem(error)}", where=where, fix=_RESTORE) from None
    if not isinstance(tree, dict):
        raise InputError("a recipe is an object with the sections model and data", where=where, fix=_RESTORE)
    return tree, {}


def _lines(node: yaml.Node, prefix: str) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}.{key.value}" if prefix else str(key.value)
            found.append((path, key.start_mark.line + 1))
            found += _lines(value, path)
    return found


def _scalar(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"not a YAML value: {_problem(error)}", where=where) from None


def _problem(error: Exception) -> str:
    """What YAML found, without the lines that it quotes."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)


def _put(tree: dict[str, Any], key: str, value: Any, origin: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"{section} is not a section", where=origin)
        tree = inner
    tree[leaf] = value


def _readable(error: ValidationError, where: str, origins: Mapping[str, str]) -> InputError:
    """The first of pydantic's errors in our form."""
    errors = error.errors()
    first, key = errors[0], _key(errors[0])
    path = key.split(".")
    while path and ".".join(path) not in origins:
        path.pop()
    origin = origins.get(".".join(path), where)
    # A union has an error for each of its branches; together they are one.
    same = [other for other in errors if _key(other) == key]
    more = f" ({len(errors) - len(same)} more)" if len(errors) > len(same) else ""
    if first["type"] == "extra_forbidden":
        siblings = _fields_at([str(part) for part in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), siblings, n=1, cutoff=0.5) or _elsewhere(key)
        return InputError(
            f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "") + more,
            where=origin,
            fix="the keys here are: " + ", ".join(siblings),
        )
    if first["type"] == "missing":
        return InputError(f"{key} is missing{more}", where=origin, fix="tuneship init lists complete recipes")
    message = _PATTERNS.get(key) if first["type"] == "string_pattern_mismatch" else None
    message = message or " or ".join(dict.fromkeys(other["msg"] for other in same))
    message = message.removeprefix("Value error, ").replace(" or Input should be ", " or ")
    value = f", got {first['input']!r:.80}" if not isinstance(first["input"], dict) else ""
    # A rule between sections has no key.
    prefix = f"{key}: " if key else ""
    return InputError(f"{prefix}{message[0].lower()}{message[1:]}{value}{more}", where=origin)


# What a pattern means, for people.
_PATTERNS = {
    "name": "must be lower-case letters, digits, dots and dashes, at most 63",
    "publish.hub_model_id": "must be user/name",
}


def _key(error: ErrorDetails) -> str:
    """The key as the user wrote it: a union adds its branch, as `tuple[str, ...]`, to pydantic's path."""
    place = error["loc"]
    if error["type"] != "extra_forbidden":
        place = tuple(part for part in place if isinstance(part, int) or part.isidentifier())
    return ".".join(map(str, place))


def _elsewhere(key: str) -> list[str]:
    """The key with this name in another section."""
    name = key.rpartition(".")[2]
    sections = {section: _fields_at([section]) for section in Recipe.model_fields if section != "name"}
    return [f"{section}.{name}" for section, fields in sections.items() if name in fields]


def _fields_at(path: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
