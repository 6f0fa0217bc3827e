"""The verbs of the GKE path. cli.py adds them to the command line; as there, a verb imports what it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuneship.console import say

if TYPE_CHECKING:
    from tuneship.cluster.outputs import Outputs
    from tuneship.cluster.terraform import Terraform

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
    from tuneship.cluster.kubectl import Kubectl
    from tuneship.cluster.terraform import expect_context
    from tuneship.errors import InputError

    if (run is not None) + promote + rollback != 1:
        raise InputError("name a RUN, or say --promote or --rollback", where="tuneship deploy")
    built = _built(outputs)
    if not dry_run:
        expect_context(built)
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


TerraformFolder = Annotated[
    Path | None,
    typer.Option("--terraform", metavar="DIR", help="Terraform's files; infra/terraform here, or the package's."),
]
VariablesFile = Annotated[
    Path | None,
    typer.Option("--vars", metavar="FILE", help="The variables' values; default_env.tfvars beside them if unset."),
]
Project = Annotated[str | None, typer.Option("--project", metavar="ID", help="Instead of the file's project_id.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands, and run none.")]
FlowConfig = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="The flow's config, in which the image is recorded.")
]


@app.command()
def up(
    folder: TerraformFolder = None,
    variables: VariablesFile = None,
    project: Project = None,
    outputs: Annotated[Path, typer.Option("--outputs", metavar="FILE", help="Where the outputs go.")] = Path(
        "outputs.json"
    ),
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Build cluster, database, bucket, registry and Argo with Terraform; the plan is shown first."""
    from tuneship.cluster import terraform

    confirm = (lambda _: True) if yes else terraform.ask
    terraform.up(_terraform(folder, variables, project, dry_run), outputs, confirm)
    say("next: tuneship connect --no-forward; tuneship image; tuneship render; then tuneship connect, left running")


@app.command()
def connect(
    outputs: OutputsFile = "outputs.json",
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="Write config_NAME.json, for METAFLOW_PROFILE=NAME.")
    ] = None,
    forward: Annotated[bool, typer.Option("--forward/--no-forward", help="Keep port-forwards running.")] = True,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Point kubectl and Metaflow at the cluster, and keep port-forwards to its services alive."""
    import shlex

    from tuneship.cluster import commands, terraform
    from tuneship.cluster import connect as connection

    built = _built(outputs)
    if not dry_run:
        commands.need("gcloud", "kubectl", "gke-gcloud-auth-plugin")
    terraform.point_kubectl(built, dry_run=dry_run)
    confirm = (lambda _: True) if yes else terraform.ask
    connection.write_profile(built, connection.profile_file(profile), confirm, dry_run=dry_run)
    wanted = connection.forwards(built)
    if dry_run or not forward:
        for one in wanted:
            say(f"$ {shlex.join(one.argv)}")
        return
    say("the UI: http://localhost:8083   Argo: https://localhost:2746   ctrl-C ends the port-forwards")
    connection.keep_alive(wanted)
    say("the port-forwards are ended")


@app.command()
def image(
    outputs: OutputsFile = "outputs.json",
    config: FlowConfig = Path("finetune_flow_config.json"),
    dry_run: DryRun = False,
) -> None:
    """Build the pods' image with Cloud Build, and record its digest in the flow's config."""
    from tuneship.cluster import image as images

    print(images.image(_built(outputs), config, dry_run=dry_run))
    say("next: tuneship submit gemma2-9b-a100")


@app.command()
def submit(
    target: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file or name.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key. Repeatable.")
    ] = None,
    config: FlowConfig = Path("finetune_flow_config.json"),
    watch: Annotated[bool, typer.Option("--watch", help="Watch it until it ends.")] = False,
    namespace: Annotated[str, typer.Option(help="Argo's namespace.")] = "argo",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe on the cluster: its WorkflowTemplate is created, and a workflow of it started."""
    import os

    from tuneship import recipe
    from tuneship.cluster import argo
    from tuneship.cluster import watch as watching

    resolved = argo.with_image(recipe.load(target, overrides=overrides or (), environ=os.environ), config)
    name = argo.submit(resolved, dry_run=dry_run)
    print(json.dumps({"workflow": name, "run": f"argo-{name}"}) if as_json else name)
    if watch and not dry_run:
        watching.watch(name, namespace)
    say(f"next: tuneship watch {name}")


@app.command()
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The workflow's name, as submit printed it.")],
    namespace: Annotated[str, typer.Option(help="Argo's namespace.")] = "argo",
) -> None:
    """Watch a run on the cluster: its steps, the wait for a GPU, the loss. ctrl-C leaves it alone."""
    from tuneship.cluster import watch as watching

    watching.watch(run, namespace)


@app.command()
def down(
    folder: TerraformFolder = None,
    variables: VariablesFile = None,
    project: Project = None,
    outputs: OutputsFile = "outputs.json",
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Destroy everything that `up` built, the bucket too; then look whether anything billable is left."""
    from tuneship.cluster import terraform

    built = _built(outputs) if outputs == "-" or Path(outputs).is_file() else None
    confirm = (lambda _: True) if yes else terraform.ask
    terraform.down(_terraform(folder, variables, project, dry_run), built, confirm)


@app.command()
def doctor(outputs: OutputsFile = "outputs.json", as_json: AsJson = False) -> None:
    """Say what is missing here for the GKE path, and the command that mends it."""
    from dataclasses import asdict

    from tuneship import doctor as doctors

    checks = doctors.doctor(_built(outputs) if outputs == "-" or Path(outputs).is_file() else None)
    if as_json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        print("\n".join(doctors.table(checks)))
    if not all(check.ok for check in checks):
        raise doctors.missing(checks)


def _terraform(folder: Path | None, variables: Path | None, project: str | None, dry_run: bool) -> Terraform:
    from tuneship.cluster import terraform

    # Terraform looks for the file in the folder; a person names it from here.
    file = "default_env.tfvars" if variables is None else str(variables.resolve())
    return terraform.Terraform(folder or terraform.folder(), file, project, dry_run)


def _built(outputs: str) -> Outputs:
    """What Terraform built, from a file or from stdin."""
    from tuneship.cluster import outputs as terraform

    return terraform.read(sys.stdin.read() if outputs == "-" else Path(outputs))
