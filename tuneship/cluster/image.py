"""image: built by Cloud Build from image/, and its digest written where the flow reads it.

The tag is the commit, or a digest of the code where the checkout has changes: the registry's tags are
immutable, so one tag is one image, and an image that is there is not built again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import tuneship
from tuneship import recipe
from tuneship.cluster.commands import change, need, read
from tuneship.cluster.outputs import Outputs
from tuneship.console import say
from tuneship.damage import read_json
from tuneship.errors import InputError, OutsideError
from tuneship.journal import code_facts, write_json

NAME = "tuneship"

# Of a checkout; the folder of the installed packages otherwise.
_ROOT = Path(tuneship.__file__).parent.parent
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "_share")


def image(built: Outputs, config: Path, *, dry_run: bool = False) -> str:
    """Builds the image of this code unless it is there, records it in the flow's config, returns its name.

    Args:
        config: the JSON file of `--config config FILE`; its other keys stay.

    Raises:
        OutsideError: gcloud is missing, not logged in, or the build failed.
    """
    record = recorded(config)
    named = f"{built.image_registry_url}/{NAME}:{tag()}"
    if not dry_run:
        need("gcloud")
    digest = None if dry_run else _digest(named, built)
    if digest is None:
        _build(built, named, dry_run=dry_run)
        digest = "sha256:DIGEST" if dry_run else _digest(named, built)
        if digest is None:
            raise OutsideError("the build ended, and its image is not there", where=named, fix="gcloud builds list")
    else:
        say(f"the image of this code is there: {named}")
    pinned = f"{named.rpartition(':')[0]}@{digest}"
    say(f"image_name {pinned} into {config}")
    if not dry_run:
        write_json(config, {**record, "image_name": pinned})
    return pinned


def recorded(config: Path) -> dict[str, Any]:
    """The flow's config; empty where there is none yet.

    Raises:
        InputError: it is no JSON object.
    """
    record = read_json(config) if config.exists() else {}
    if not isinstance(record, dict):
        raise InputError(
            "the flow's config is no JSON object",
            where=str(config),
            fix='it is {"image_name": IMAGE}; tuneship image writes it where there is none',
        )
    return record


def tag() -> str:
    """The commit of a clean checkout; otherwise a digest of the code."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    parts = ("tuneship", "recipes", "image")
    if (_ROOT / "image" / "Dockerfile").is_file() and git("status", "--porcelain", "--", *parts) == "":
        commit = git("rev-parse", "--short=12", "HEAD")
        if commit:
            return commit
    return f"code-{code_facts()['code_sha256'][:12]}"


def _digest(named: str, built: Outputs) -> str | None:
    """The image's digest, or None where there is no such tag."""
    # The whole repository: of an image that nobody has pushed yet, gcloud says that it is not found.
    argv = ["gcloud", "artifacts", "docker", "images", "list", built.image_registry_url]
    package, _, wanted = named.rpartition(":")
    for entry in json.loads(read(*argv, f"--project={built.project_id}", "--include-tags", "--format=json") or "[]"):
        if entry["package"] == package and wanted in entry["tags"]:
            return str(entry["version"])
    return None


def _build(built: Outputs, named: str, *, dry_run: bool) -> None:
    account = f"projects/{built.project_id}/serviceAccounts/{built.build_service_account_email}"
    options = [
        *["--project", built.project_id, "--region", built.region],
        *["--service-account", account, "--gcs-source-staging-dir", built.build_source_uri],
        *["--substitutions", f"_REGISTRY={built.image_registry_url},_TAG={named.rpartition(':')[2]}"],
    ]
    if (_ROOT / "image").is_dir():
        ignored = ["--ignore-file", str(_ROOT / "image" / ".gcloudignore")]
        _submit(_ROOT, [*ignored, *options], dry_run=dry_run)
        return
    with tempfile.TemporaryDirectory() as scratch:
        lay_out(Path(scratch))
        _submit(Path(scratch), options, dry_run=dry_run)


def _submit(context: Path, options: list[str], *, dry_run: bool) -> None:
    config = context / "image" / "cloudbuild.yaml"
    change("gcloud", "builds", "submit", str(context), "--config", str(config), *options, dry_run=dry_run)


def lay_out(context: Path) -> None:
    """The build's context out of an installed package, as a checkout has it: image/, recipes/, tuneship/."""
    for part in ("image", "recipes"):
        shutil.copytree(recipe.share() / part, context / part, ignore=_IGNORED)
    shutil.copytree(_ROOT / "tuneship", context / "tuneship", ignore=_IGNORED)
