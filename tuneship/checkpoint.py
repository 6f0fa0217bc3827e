"""Checkpoints: whole or not at all, verified when read, mirrored to a bucket where one is named.

    checkpoints/step-50/
      adapter.safetensors      the adapter's weights
      optimizer.safetensors    AdamW's moments, by parameter
      state.json               step, and what else the run needs to go on
      MANIFEST.json            sha256 and size of each file; written last

A checkpoint is written beside its place and moved there by one rename, so a kill at any instant
leaves either all of it or nothing that counts. Reading verifies every byte; a damaged checkpoint
is named and the one before it is taken. Nothing is pickled.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuneship import storage
from tuneship.console import say
from tuneship.damage import read_json
from tuneship.errors import OutsideError, TuneshipError
from tuneship.journal import put_in_place, sha256_file, write_json

MANIFEST = "MANIFEST.json"
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
_STEP = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int, mirror: str | None = None) -> Path:
    """Writes checkpoints/step-N, keeps the newest `keep`, and copies it to the mirror.

    Raises:
        OutsideError: the disk is full; earlier checkpoints are intact.
    """
    target = folder / f"step-{checkpoint.step}"
    partial = folder / f".partial-{checkpoint.step}"
    for left_by_a_kill in folder.glob(".partial-*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(checkpoint.adapter, partial / "adapter.safetensors")
        save_file(checkpoint.optimizer, partial / "optimizer.safetensors")
        write_json(partial / "state.json", {"step": checkpoint.step, **checkpoint.state})
        files = {f.name: {"sha256": sha256_file(f), "bytes": f.stat().st_size} for f in sorted(partial.iterdir())}
        write_json(partial / MANIFEST, {"step": checkpoint.step, "files": files})
        put_in_place(partial, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(t.nbytes for t in (*checkpoint.adapter.values(), *checkpoint.optimizer.values()))
        raise OutsideError(
            f"the checkpoint of step {checkpoint.step} cannot be written: {getattr(error, 'strerror', None) or error}; "
            f"it needs {needed} bytes, {shutil.disk_usage(folder).free} are free",
            where=str(folder),
            fix="free some room and run the same command again; earlier checkpoints are intact",
        ) from error
    if mirror is not None:
        storage.upload(target, f"{mirror.rstrip('/')}/{target.name}", last=MANIFEST)
    for step in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{step}")
        if mirror is not None:
            storage.delete(f"{mirror.rstrip('/')}/step-{step}")
    return target


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    found = (match for entry in folder.glob("step-*") if (match := _STEP.match(entry.name)))
    return sorted(int(match.group(1)) for match in found)


def latest(folder: Path, *, mirror: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there never was one.

    Args:
        mirror: a URI that is looked through where the folder has none.

    Raises:
        TuneshipError: there are checkpoints, and every one is damaged.
    """
    if mirror is not None and not steps(folder):
        _fetch(mirror, folder)
    there = steps(folder)
    for step in reversed(there):
        try:
            return _load(folder / f"step-{step}", step)
        except _Damaged as damage:
            say(f"checkpoint step-{step} is damaged ({damage}); taking the one before it")
    if there:
        raise TuneshipError(
            f"all {len(there)} checkpoints are damaged",
            where=str(folder),
            fix="restore one, or start anew with --fresh (the old run is kept beside it)",
        )
    return None


def _fetch(mirror: str, folder: Path) -> None:
    names = storage.listing(mirror)
    whole = [match for name in names if name.endswith(f"/{MANIFEST}") and (match := _STEP.match(name.split("/")[0]))]
    # The newest first: where a kill leaves one of them, it is that one.
    for match in sorted(whole, key=lambda match: -int(match.group(1)))[:2]:
        target, partial = folder / match.group(0), folder / f".partial-{match.group(1)}-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        storage.download(f"{mirror.rstrip('/')}/{target.name}", partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            # Another process of this training was quicker; its copy is the same.
            shutil.rmtree(partial)


class _Damaged(Exception):
    pass


def _load(folder: Path, step: int) -> Checkpoint:
    try:
        manifest = read_json(folder / MANIFEST)
        digests = {name: manifest["files"][name]["sha256"] for name in FILES}
    except (OSError, TuneshipError, KeyError, TypeError) as error:
        raise _Damaged(f"{MANIFEST} is missing or broken") from error
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            raise _Damaged(f"{name} is missing")
        if sha256_file(file) != digest:
            raise _Damaged(f"{name} has another sha256 than {MANIFEST} says")
    return Checkpoint(
        step,
        load_file(folder / "adapter.safetensors"),
        load_file(folder / "optimizer.safetensors"),
        read_json(folder / "state.json"),
    )
