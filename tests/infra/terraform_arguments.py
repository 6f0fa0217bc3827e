"""Whether the files say only what the providers understand: the rule that stands in for `terraform validate`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from terraform_files import META_ARGUMENTS, META_BLOCKS, Block, Configuration, Expression

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parent / "provider_schema.json").read_text(encoding="utf-8"))


def arguments_are_the_providers(configuration: Configuration) -> None:
    """Every argument, block and exported attribute exists in the pinned version; what is required is given."""
    wrong = []
    for kind, address, block in configuration.everything():
        if address[0] != "terraform_data":  # Terraform's own
            schema = SCHEMA[kind].get(address[0])
            if schema is None:
                wrong.append(
                    f"{kind} {address[0]}: not in provider_schema.json: write it again, see provider_schema.py"
                )
            else:
                wrong += [f"{kind} {'.'.join(address)}: {one}" for one in _misfits(schema, block, "")]
    wrong += _unknown_attributes(configuration)
    assert not wrong, "\n".join(wrong)


def _misfits(schema: dict[str, Any], block: Block, path: str) -> Iterator[str]:
    for name, value in block.arguments.items():
        if name not in META_ARGUMENTS and name != "__for_each__":
            if name not in schema["arguments"]:
                yield f"no argument {path}{name}"
            else:
                kind = schema["arguments"][name]["type"]
                if _literal(value) and not _fits(kind, value):
                    yield f"{path}{name} = {value!r} is no {kind}"
    for name, inner in block.blocks.items():
        if name in META_BLOCKS:
            continue
        if name not in schema["blocks"]:
            yield f"no block {path}{name}"
        elif "unopened" in schema["blocks"][name]:
            yield f"{path}{name} is not in provider_schema.json: write it again, see provider_schema.py"
        else:
            if len(inner) > 1 and not schema["blocks"][name].get("repeated"):
                yield f"{len(inner)} blocks {path}{name}, one is allowed"
            for one in inner:
                yield from _misfits(schema["blocks"][name], one, f"{path}{name}.")
    given = set(block.arguments) | set(block.blocks)
    for name, declared in (*schema["arguments"].items(), *schema["blocks"].items()):
        if declared.get("required") and name not in given:
            yield f"{path}{name} is required"


def _literal(value: Any) -> bool:
    return not isinstance(value, Expression)


def _fits(kind: Any, value: Any) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind[0] in ("list", "set"):
        return isinstance(value, list) and all(not _literal(one) or _fits(kind[1], one) for one in value)
    if kind[0] == "map":
        return isinstance(value, dict) and all(not _literal(one) or _fits(kind[1], one) for one in value.values())
    optional = kind[2] if len(kind) > 2 else []
    return (
        isinstance(value, dict)
        and set(value) <= set(kind[1])
        and set(kind[1]) - set(optional) <= set(value)
        and all(not _literal(one) or _fits(kind[1][name], one) for name, one in value.items())
    )


def _unknown_attributes(configuration: Configuration) -> Iterator[str]:
    pattern = re.compile(r"\b(google_\w+|helm_\w+|random_\w+)\.(\w+)(?:\[[^\]]*\])?(?:\.(\w+))?")
    blocks = [block for _, _, block in configuration.everything()]
    blocks += [*configuration.outputs.values(), *configuration.variables.values(), Block(configuration.locals)]
    for text in {value for block in blocks for value in block.values() if isinstance(value, Expression)}:
        for kind, name, attribute in pattern.findall(text):
            scope = next(
                (
                    scope
                    for scope in ("resource", "data", "ephemeral")
                    if (kind, name) in _addresses(configuration, scope)
                ),
                None,
            )
            if scope is None:
                yield f"{kind}.{name} does not exist"
            elif attribute:
                schema = SCHEMA[scope].get(kind)
                if schema and attribute not in schema["arguments"] | schema["blocks"] | schema["exports"]:
                    yield f"{kind}.{name} has no attribute {attribute}"


def _addresses(configuration: Configuration, scope: str) -> dict[tuple[str, str], Block]:
    return {
        "resource": configuration.resources,
        "data": configuration.data,
        "ephemeral": configuration.ephemerals,
    }[scope]
