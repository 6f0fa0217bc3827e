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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Files = dict[str, str]
"""Rendered YAML by path, relative to the folder that it is written to."""


def templates() -> Path:
    """infra/kubernetes, in a checkout or in an installed package."""
    raise NotImplementedError


def lock_file() -> Path:
    """infra/images.lock, in a checkout or in an installed package."""
    raise NotImplementedError


def read_lock(path: Path) -> dict[str, str | None]:
    """The digest of each `image:tag`, None where nobody has resolved it yet."""
    raise NotImplementedError


def fill(document: Any, values: Mapping[str, Any], *, where: str) -> Any:
    """A parsed document with every `${name}` replaced.

    Raises:
        InputError: a name that `values` does not have.
    """
    raise NotImplementedError


def render(folder: Path, values: Mapping[str, Any], *, images: Mapping[str, str | None]) -> Files:
    """Every .yaml file below a folder of templates, rendered.

    Raises:
        InputError: a name that `values` does not have, an image without exact tag, or one not in the lock.
    """
    raise NotImplementedError


def diff(files: Files, out: Path) -> str:
    """What `write` would change in a folder, as a unified diff; empty if nothing."""
    raise NotImplementedError


def write(files: Files, out: Path) -> None:
    """Writes the files below a folder and removes YAML that is no longer made."""
    raise NotImplementedError
