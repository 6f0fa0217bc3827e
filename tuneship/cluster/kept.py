"""Where a run on the cluster is kept between its pods: the bucket of Metaflow's datastore.

    gs://BUCKET/runs/NAME/RUN_ID             the run's folder
    gs://BUCKET/checkpoints/NAME/RUN_ID      checkpoints and log while it trains

A pod has an empty disk: `take` fills the run's folder, `bring_back` returns it. What a kill leaves
half sent is never taken for whole: each part has a file that goes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuneship import storage
from tuneship.journal import PREPARED, PROVENANCE

# Part of the run's folder → the file that says that all of it is there.
_MARKS = {"data": PREPARED, "adapter": PROVENANCE}
_RUN_MARK = "recipe.json"

# Copies of what is there already, what has a place of its own, and what belongs to one process.
_STAYS = {"checkpoints", "publish", "merged", ".lock"}


@dataclass(frozen=True)
class Kept:
    """The two places of a run."""

    run: str
    checkpoints: str
    """What lies there is deleted by the bucket after some weeks (infra/terraform/storage.tf)."""


def place(sysroot: str, name: str, run_id: str) -> Kept:
    """The places of a run, in the bucket of a datastore's root as gs://BUCKET/metaflow."""
    bucket = sysroot.removeprefix("gs://").partition("/")[0]
    return Kept(f"gs://{bucket}/runs/{name}/{run_id}", f"gs://{bucket}/checkpoints/{name}/{run_id}")


def take(kept: Kept, folder: Path) -> None:
    """Fills an empty folder with the run, if a step has brought one back."""
    if _RUN_MARK in storage.listing(kept.run):
        storage.download(kept.run, folder)


def bring_back(folder: Path, kept: Kept) -> None:
    """Sends what a step has made."""
    for part, mark in _MARKS.items():
        storage.upload(folder / part, f"{kept.run}/{part}", last=mark)
    storage.upload(folder, kept.run, last=_RUN_MARK, leave={*_MARKS, *_STAYS})
