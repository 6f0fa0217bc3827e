"""Manifests from infra/kubernetes, with what Terraform built filled in.

A template is a plain Kubernetes manifest. `${name}` in a value stands for an entry of `values`; a value
that is nothing but `${name}` takes the entry with its type, so a number stays a number and a list a list.
The file is parsed first and filled afterwards: no value can change the shape of a manifest.

    values = outputs.model_dump() | {"replicas": 2}
    files = render(templates() / "serving", values, images=read_lock(lock_file()))
    print(diff(files, Path("rendered/serving")))
    write(files, Path("rendered/serving"))

Images stand in the templates by exact tag. Where images.lock has that tag's digest, it is appended.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tuneship import recipe
from tuneship.cluster.outputs import Outputs
from tuneship.errors import InputError, OutsideError
from tuneship.journal import write_text

Files = dict[str, str]
"""Rendered YAML by path, relative to the folder that it is written to."""

# What the first line of a rendered file begins with. Only files that begin so are ever removed.
MARK = "# Made by `tuneship render`"

LOCK_HEADER = """\
# Digests of the images that infra/kubernetes and image/ name, as their registries gave them; null: not asked yet.
# Written by `tuneship render --lock`.
"""

_NAME = re.compile(r"\$\{([^}]*)\}")


def templates() -> Path:
    """infra/kubernetes, in a checkout or in an installed package."""
    return recipe.share() / "infra" / "kubernetes"


def lock_file() -> Path:
    """infra/images.lock, in a checkout or in an installed package."""
    return recipe.share() / "infra" / "images.lock"


def read_lock(path: Path) -> dict[str, str | None]:
    """The digest of each `image:tag`, None where nobody has resolved it yet.

    Raises:
        InputError: no such file, or not a mapping of images to digests.
    """
    fix = "tuneship render --lock writes it"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), fix=fix) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"not a lock file: {error}", where=str(path), fix=fix) from None
    if not isinstance(tree, dict):
        raise InputError("not a lock file: no mapping of images to digests", where=str(path), fix=fix)
    for image, digest in tree.items():
        if digest is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", str(digest)):
            raise InputError(f"not a digest: {digest}", where=f"{path}: {image}", fix=fix)
    return tree


def write_lock(path: Path, digests: Mapping[str, str | None]) -> None:
    """Writes images.lock whole."""
    text = LOCK_HEADER + yaml.dump(dict(digests), sort_keys=True, width=200)
    try:
        write_text(path, text)
    except OSError as error:
        raise OutsideError(f"cannot be written: {error.strerror}", where=str(path)) from None


def pinned(image: str, images: Mapping[str, str | None]) -> str:
    """An image's tag with its digest behind it, where the lock has one."""
    digest = images.get(image)
    return f"{image}@{digest}" if digest else image


def platform(outputs: Outputs, images: Mapping[str, str | None]) -> Files:
    """What stands before any run: namespaces, policies, accounts, the metadata service and the UI."""
    return render(templates() / "platform", outputs.model_dump(), images=images)


def fill(document: Any, values: Mapping[str, Any], *, where: str) -> Any:
    """A parsed document with every `${name}` replaced.

    Raises:
        InputError: a name that `values` does not have.
    """
    if isinstance(document, dict):
        return {fill(key, values, where=where): fill(value, values, where=where) for key, value in document.items()}
    if isinstance(document, list):
        return [fill(value, values, where=where) for value in document]
    if not isinstance(document, str):
        return document
    if whole := _NAME.fullmatch(document):
        return _value(whole[1], values, where)
    return _NAME.sub(lambda found: _text(found[1], values, where), document)


def render(folder: Path, values: Mapping[str, Any], *, images: Mapping[str, str | None]) -> Files:
    """Every .yaml file below a folder of templates, rendered.

    Raises:
        InputError: a name that `values` does not have.
    """
    files: Files = {}
    for path in _yaml_files(folder):
        name = path.relative_to(folder).as_posix()
        documents = [_pinned(fill(parsed, values, where=name), images) for parsed in _parse(path)]
        files[name] = f"{MARK} from {folder.name}/{name}: change that, not this.\n" + yaml.dump_all(
            documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=120, allow_unicode=True
        )
    return files


def image_names() -> list[str]:
    """The images of others that templates and Dockerfiles name: what images.lock is about."""
    documents = [document for path in _yaml_files(templates()) for document in _parse(path)]
    named = {container["image"] for container in _containers(documents) if "${" not in container["image"]}
    for path in (recipe.share() / "image").rglob("Dockerfile"):
        named |= set(re.findall(r"^ARG BASE=(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    return sorted(named)


def diff(files: Files, out: Path) -> str:
    """What `write` would change in a folder, as a unified diff; empty if nothing."""
    before = _rendered(out)
    lines: list[str] = []
    for name in sorted({*before, *files}):
        old, new = before.get(name, ""), files.get(name, "")
        lines += difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}"
        )
    return "".join(lines)


def write(files: Files, out: Path) -> None:
    """Writes the files below a folder, and removes rendered ones that are no longer made.

    Raises:
        InputError: a file of somebody else's is in the way.
        OutsideError: the folder cannot be written.
    """
    before = _rendered(out)
    for name in files:
        if (out / name).exists() and name not in before:
            raise InputError("a file that was not rendered is in the way", where=str(out / name), fix="move it away")
    try:
        for name in before.keys() - files.keys():
            (out / name).unlink()
        for name, text in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            # Replaced whole: kubectl may be reading the folder.
            write_text(out / name, text)
    except OSError as error:
        raise OutsideError(f"cannot be written: {error.strerror}", where=str(error.filename or out)) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper without aliases, with lists indented and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.yaml"))


def _parse(path: Path) -> list[Any]:
    try:
        return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document is not None]
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", where=str(path)) from None


def _rendered(out: Path) -> Files:
    # A stranger's file may be in any encoding; it only has to be told from ours.
    texts = {path.relative_to(out).as_posix(): path.read_text("utf-8", errors="replace") for path in _yaml_files(out)}
    return {name: text for name, text in texts.items() if text.startswith(MARK)}


def _value(name: str, values: Mapping[str, Any], where: str) -> Any:
    if name not in values:
        near = difflib.get_close_matches(name, values, n=1)
        raise InputError(
            f"nothing is called {name}" + (f"; did you mean {near[0]}?" if near else ""),
            where=f"{where}: ${{{name}}}",
            fix="name an output of infra/terraform/outputs.tf, or a value that the verb gives",
        )
    return values[name]


def _text(name: str, values: Mapping[str, Any], where: str) -> str:
    value = _value(name, values, where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{name} is no text, and stands inside one", where=f"{where}: ${{{name}}}")
    return str(value)


def _containers(tree: Any) -> Iterable[dict[str, Any]]:
    """Every container below a tree: a mapping with a name and an image."""
    if isinstance(tree, dict):
        if isinstance(tree.get("image"), str) and "name" in tree:
            yield tree
        for value in tree.values():
            yield from _containers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _containers(value)


def _pinned(document: Any, images: Mapping[str, str | None]) -> Any:
    """The document with the digest behind every tag that the lock has one for."""
    for container in _containers(document):
        container["image"] = pinned(container["image"], images)
    return document
