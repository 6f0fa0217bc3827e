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


@app.command()
def deploy(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run's folder, here or under gs://; or hf://USER/NAME@COMMIT.")
    ] = None,
    outputs: OutputsFile = "outputs.json",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the manifests.")] = Path("rendered"),
    canary: Annotated[
        int | None, typer.Option(min=1, max=99, metavar="PERCENT", help="Try it on a share of the requests first.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of a canary: how many it must answer.")] = 100,
    minutes: Annotated[float, typer.Option(min=0.1, help="Of a canary: in how much time.")] = 30,
    promote: Annotated[bool, typer.Option("--promote", help="End a trial now: the canary is served.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Serve what was served before.")] = False,
    force: Annotated[str, typer.Option("--force", metavar="REASON", help="Although the gate said no.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not look at what is served; end it.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Serve the merged model, not the adapter.")] = False,
    image: Annotated[str | None, typer.Option(help="Image of the gateway; the recipe's by default.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="gs://…", help="The base in the bucket; the Hub's if unset.")
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="Kind of GPU; the recipe's by default.")] = None,
    gpu: Annotated[int | None, typer.Option(min=1, help="GPUs of a pod.")] = None,
    spot: Annotated[bool | None, typer.Option("--spot/--no-spot", help="On Spot nodes.")] = None,
    min_replicas: Annotated[int | None, typer.Option(min=1, help="Pods at least.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Pods at most.")] = None,
    no_auth: Annotated[bool | None, typer.Option("--no-auth/--auth", help="Answer without keys.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the manifests, print the commands, stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a run from the cluster, on trial first if told so; or take it back."""
    from tuneship.cluster import deploy as deployment
    from tuneship.cluster import outputs as terraform
    from tuneship.cluster.kubectl import Kubectl
    from tuneship.errors import InputError

    if (run is not None) + promote + rollback != 1:
        raise InputError("name a RUN, or say --promote or --rollback", where="tuneship deploy")
    built = terraform.read(sys.stdin.read() if outputs == "-" else Path(outputs))
    kubectl = Kubectl(built.serving_k8s_namespace, dry_run=dry_run)
    target = deployment.Target(built, kubectl, out / "serving")
    if run is None:
        served = deployment.promote(target) if promote else deployment.roll_back(target, force)
    else:
        options = {
            "image": image,
            "base": base,
            "accelerator": accelerator,
            "gpu": gpu,
            "spot": spot,
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "no_auth": no_auth,
        }
        served = deployment.deploy(
            run,
            target,
            changes={name: value for name, value in options.items() if value is not None},
            merged=merged,
            canary=canary,
            requests=requests,
            minutes=minutes,
            force=force,
            fresh=fresh,
        )
    if as_json:
        print(served.model_dump_json())
    say(f"next: kubectl --namespace {built.serving_k8s_namespace} port-forward svc/llm-service 8000:8000")
