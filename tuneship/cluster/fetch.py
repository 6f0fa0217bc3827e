"""The init container of the model server: adapters with their contracts onto the pod's disk, checked by digest.

    python -m tuneship.cluster.fetch sql-1f2e3d4c5b6a=gs://BUCKET/runs/sql/17 /models

lays out /models/sql-1f2e3d4c5b6a as a run's folder: recipe.json, and below adapter/ (or merged/) what
serving reads. A name ends with the first twelve digits of its content's digest, so a pod can only
serve what `tuneship deploy` has looked at. From gs:// by Workload Identity; from the Hub (hf://USER/NAME@COMMIT)
with the read token that HF_TOKEN_FILE names.

Not covered: weights of a base or a merged model. vLLM streams those from the bucket itself.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

from tuneship import hub, storage
from tuneship.damage import guarded, read_json
from tuneship.errors import InputError, TuneshipError
from tuneship.journal import PROVENANCE, sha256_file, write_json

DIGITS = 12
HUB = "hf://"
PARTS = ("adapter", "merged")
# Of a merged model, what its contract needs; the weights stay where they are.
_CONTRACT = ("config.json", "prompt.json", "tokenizer.json", "tokenizer_config.json", PROVENANCE)


def take(uri: str, folder: Path, *, merged: bool = False) -> None:
    """Brings what serving needs of a run into an empty folder.

    Args:
        uri: of a run's folder (gs:// or a path), or of an adapter on the Hub.
        merged: of its merged model, not of its adapter.

    Raises:
        InputError: there is no such run, or it has no such part.
        OutsideError: the storage or the Hub refuses.
    """
    part = PARTS[merged]
    if uri.startswith(HUB):
        _from_hub(uri, folder)
        return
    root = uri.rstrip("/")
    names = [name for name in storage.listing(f"{root}/{part}") if not merged or name in _CONTRACT]
    if not names:
        raise InputError(f"the run has no {part} model" if merged else "the run has no adapter", where=root)
    storage.get(f"{root}/recipe.json", folder / "recipe.json")
    for name in names:
        storage.get(f"{root}/{part}/{name}", folder / part / name)


def _from_hub(uri: str, folder: Path) -> None:
    repository, _, commit = uri.removeprefix(HUB).partition("@")
    if not hub.is_id(repository) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise InputError("an adapter on the Hub is named as hf://USER/NAME@COMMIT", where=uri)
    found = Path(hub.download(repository, commit, patterns=["*.json", "*.safetensors"]))
    # Where it was downloaded to, not in a copy that is gone when it is told.
    with guarded(found / PROVENANCE):
        recipe = read_json(found / PROVENANCE)["recipe"]
    shutil.copytree(found, folder / "adapter")
    write_json(folder / "recipe.json", recipe)


def digest(part: Path) -> str:
    """Of a part's files as `take` brings them: another one, and something else is served."""
    total = hashlib.sha256()
    for file in sorted(part.iterdir()):
        if file.name in _CONTRACT if part.name == "merged" else file.suffix in (".json", ".safetensors"):
            total.update(f"{file.name} {sha256_file(file)}\n".encode())
    return total.hexdigest()


def check(folder: Path) -> None:
    """Holds a folder that `take` has filled against the digest in its name.

    Raises:
        InputError: its content is another.
    """
    part = next(folder / name for name in PARTS if (folder / name).is_dir())
    if not digest(part).startswith(folder.name[-DIGITS:]):
        raise InputError(
            "this is not what was deployed: its digest is another",
            where=str(part),
            fix="tuneship deploy the run again",
        )


def main(arguments: list[str]) -> None:
    """See above."""
    *named, target = arguments
    for argument in named:
        name, _, uri = argument.partition("=")
        folder = Path(target) / name
        merged = uri.endswith("/merged")
        take(uri.removesuffix("/merged"), folder, merged=merged)
        check(folder)
        print(f"{name}: {uri}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TuneshipError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
