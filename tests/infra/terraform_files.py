"""infra/terraform, parsed: what the tests look at.

python-hcl2 leaves quotes around literals and wraps expressions into `${…}`. Here a literal is a plain value, an
expression is an `Expression` with its text, and a `dynamic` block stands among the others of its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hcl2

TERRAFORM = Path(__file__).parents[2] / "infra" / "terraform"

# Arguments of Terraform itself, which no provider's schema has.
META_ARGUMENTS = frozenset({"count", "for_each", "provider", "depends_on"})
META_BLOCKS = frozenset({"lifecycle", "provisioner"})


class Expression(str):
    """An expression or a template, as it is written."""


@dataclass(frozen=True)
class Block:
    """The inside of a block: its arguments, and the blocks in it."""

    arguments: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    dynamic: bool = False

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a path such as `settings.ip_configuration.ssl_mode`, through single blocks."""
        *outer, name = path.split(".")
        block = self
        for step in outer:
            inner = block.blocks.get(step, [])
            if not inner:
                return default
            assert len(inner) == 1, f"{path}: {len(inner)} blocks {step}"
            (block,) = inner
        return block.arguments.get(name, default)

    def values(self) -> Iterator[Any]:
        """Every value below, however deep."""
        for value in self.arguments.values():
            yield from _leaves(value)
        for blocks in self.blocks.values():
            for block in blocks:
                yield from block.values()

    def references(self) -> set[tuple[str, ...]]:
        """What the expressions below refer to: ("local", NAME), ("var", NAME), (TYPE, NAME), ("data", TYPE, NAME)."""
        found: set[tuple[str, ...]] = set()
        for value in self.values():
            if isinstance(value, Expression):
                found |= references(value)
        return found


@dataclass(frozen=True)
class Configuration:
    """All files together."""

    resources: dict[tuple[str, str], Block]
    data: dict[tuple[str, str], Block]
    ephemerals: dict[tuple[str, str], Block]
    providers: dict[str, Block]
    variables: dict[str, Block]
    outputs: dict[str, Block]
    locals: dict[str, Any]
    terraform: Block

    def of(self, kind: str) -> dict[str, Block]:
        """The resources of a type, by name."""
        return {name: block for (one, name), block in self.resources.items() if one == kind}

    def everything(self) -> Iterator[tuple[str, tuple[str, ...], Block]]:
        """(kind, address, block) of each resource, data source, ephemeral resource and provider."""
        for address, block in self.resources.items():
            yield "resource", address, block
        for address, block in self.data.items():
            yield "data", address, block
        for address, block in self.ephemerals.items():
            yield "ephemeral", address, block
        for name, block in self.providers.items():
            yield "provider", (name,), block

    def needed(self, block: Block) -> set[tuple[str, ...]]:
        """All that a block refers to, directly or by way of what it refers to."""
        seen: set[tuple[str, ...]] = set()
        waiting = block.references()
        while waiting:
            reference = waiting.pop()
            if reference in seen:
                continue
            seen.add(reference)
            target = self._target(reference)
            if target is not None:
                waiting |= target.references() - seen
        return seen

    def _target(self, reference: tuple[str, ...]) -> Block | None:
        if reference[0] == "local":
            return Block({"value": self.locals[reference[1]]})
        if reference[0] == "var":
            return None
        if reference[0] == "data":
            return self.data[reference[1], reference[2]]
        if reference[0] == "ephemeral":
            return self.ephemerals[reference[1], reference[2]]
        return self.resources.get((reference[0], reference[1]))


@cache
def texts(folder: Path = TERRAFORM) -> tuple[str, ...]:
    """A folder's .tf files."""
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.tf")))


def load() -> Configuration:
    """Reads infra/terraform."""
    return parse(texts())


@cache
def parse(files: tuple[str, ...]) -> Configuration:
    """Reads HCL files."""
    tree: dict[str, list[Any]] = {}
    for text in files:
        for kind, blocks in _tree(text).items():
            if not kind.startswith("__"):
                tree.setdefault(kind, []).extend(blocks)
    return Configuration(
        resources=_typed(tree, "resource"),
        data=_typed(tree, "data"),
        ephemerals=_typed(tree, "ephemeral"),
        providers=_named(tree, "provider"),
        variables=_named(tree, "variable"),
        outputs=_named(tree, "output"),
        locals={
            name: _value(value)
            for group in tree.get("locals", ())
            for name, value in group.items()
            if not name.startswith("__")
        },
        terraform=_block(tree["terraform"][0]),
    )


@cache
def _tree(text: str) -> dict[str, Any]:
    tree: dict[str, Any] = hcl2.loads(text)
    return tree


@cache
def tfvars(path: Path = TERRAFORM / "default_env.tfvars") -> dict[str, Any]:
    """The values of a .tfvars file."""
    tree = hcl2.loads(path.read_text(encoding="utf-8"))
    return {name: _value(value) for name, value in tree.items() if not name.startswith("__")}


def references(text: str) -> set[tuple[str, ...]]:
    """What an expression refers to."""
    found: set[tuple[str, ...]] = set()
    # Words inside literal strings are not references; those inside ${…} of a template are.
    for match in re.finditer(r"(?<![\w.\"-])(?:(data|ephemeral)\.)?([a-z][a-z0-9]*(?:_[a-z0-9]+)*)\.([a-z]\w*)", text):
        scope, first, second = match.groups()
        if scope:
            found.add((scope, first, second))
        elif first in ("local", "var") or first.split("_")[0] in ("google", "helm", "random", "terraform"):
            found.add((first, second))
    return found


def used(configuration: Configuration) -> dict[str, dict[str, Any]]:
    """Kind to type to the tree of blocks that are opened in it."""
    opened: dict[str, dict[str, Any]] = {}
    for kind, address, block in configuration.everything():
        if kind != "ephemeral" and address[0] != "terraform_data":
            _merge(opened.setdefault(kind, {}).setdefault(address[0], {}), block)
    return opened


def _merge(tree: dict[str, Any], block: Block) -> None:
    for name, blocks in block.blocks.items():
        if name not in META_BLOCKS:
            for one in blocks:
                _merge(tree.setdefault(name, {}), one)


def _typed(tree: dict[str, Any], kind: str) -> dict[tuple[str, str], Block]:
    return {
        (_bare(type_), _bare(name)): _block(body)
        for entry in tree.get(kind, ())
        for type_, names in entry.items()
        for name, body in names.items()
        if not name.startswith("__")
    }


def _named(tree: dict[str, Any], kind: str) -> dict[str, Block]:
    return {_bare(name): _block(body) for entry in tree.get(kind, ()) for name, body in entry.items()}


def _block(body: dict[str, Any], *, dynamic: bool = False) -> Block:
    arguments: dict[str, Any] = {}
    blocks: dict[str, list[Block]] = {}
    for name, value in body.items():
        if name.startswith("__"):
            continue
        if name == "dynamic":
            for label, inner in ((label, inner) for one in value for label, inner in one.items()):
                if not label.startswith("__"):
                    content = _block(inner["content"][0], dynamic=True)
                    content.arguments["__for_each__"] = _value(inner["for_each"])
                    blocks.setdefault(_bare(label), []).append(content)
        elif (
            isinstance(value, list) and value and all(isinstance(one, dict) and "__is_block__" in one for one in value)
        ):
            blocks.setdefault(name, []).extend(_block(one) for one in value)
        else:
            arguments[name] = _value(value)
    return Block(arguments, blocks, dynamic)


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return {_bare(key): _value(one) for key, one in value.items() if not str(key).startswith("__")}
    if isinstance(value, list):
        return [_value(one) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith("${") and value.endswith("}"):
        return Expression(value[2:-1])
    bare = _bare(value)
    return Expression(bare) if "${" in bare else bare


def _bare(text: Any) -> str:
    text = str(text)
    if len(text) >= 2 and text.startswith('"') and text.endswith('"'):
        text = text[1:-1]
    return text


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for one in value.values():
            yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    else:
        yield value
