"""The verbs of the GKE path. cli.py adds them to the command line; as there, a verb imports what it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tuneship.console import say

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutputsFile = Annotated[
    str, typer.Option("--outputs", metavar="FILE", help="What `terraform output -json` printed; - reads it from stdin.")
]


@app.command()
def render(
    outputs: OutputsFile = "outputs.json",
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the manifests; they go to platform/ in it.")
    ] = Path("rendered"),
    diff: Annotated[
        bool, typer.Option("--diff", help="Write nothing; show what would change. Exits 1 if anything would.")
    ] = False,
    lock: Annotated[
        bool, typer.Option("--lock", help="First ask the registries for the images' digests, into the lock file.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="FILE", help="The lock file; infra/images.lock by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the platform's manifests from what Terraform built; `deploy --dry-run` writes those of a served run."""
    from tuneship.cluster import outputs as terraform
    from tuneship.cluster import registry
    from tuneship.cluster import render as manifests

    built = terraform.read(sys.stdin.read() if outputs == "-" else Path(outputs))
    lock_file = images or manifests.lock_file()
    if lock:
        # All of them or none: the lock is written once every registry has answered.
        manifests.write_lock(lock_file, {image: registry.digest(image) for image in manifests.image_names()})
    digests = manifests.read_lock(lock_file)
    files = manifests.platform(built, digests)
    folder = out / "platform"
    if diff:
        change = manifests.diff(files, folder)
        print(change, end="")
        raise typer.Exit(1 if change else 0)
    manifests.write(files, folder)
    if missing := [image for image in manifests.image_names() if digests.get(image) is None]:
        say(f"by tag, without a digest yet: {', '.join(missing)}; tuneship render --lock asks their registries")
    if as_json:
        print(json.dumps({"folder": str(folder), "files": sorted(files), "without_digest": missing}))
    else:
        say(f"{len(files)} files in {folder}")
    say(f"next: kubectl apply --server-side --recursive -f {folder}")
