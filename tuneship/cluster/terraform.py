"""up and down: what Terraform builds, shown before it is built, and taken away so that nothing is billed.

terraform init → plan (shown, confirmed) → apply of that very plan → outputs.json
the manifests' namespaces → apply without deletion protection → destroy → is anything left?
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneship import recipe
from tuneship.cluster import outputs
from tuneship.cluster.commands import change, need, read
from tuneship.cluster.outputs import Outputs
from tuneship.console import say
from tuneship.errors import InputError, OutsideError, TuneshipError

# Resources that cost money, and how gcloud's filter names the label on each.
BILLABLE = {
    "compute instances": "labels",
    "compute disks": "labels",
    "container clusters": "resourceLabels",
    "sql instances": "settings.userLabels",
    "storage buckets": "labels",
    "artifacts repositories": "labels",
}


@dataclass(frozen=True)
class Terraform:
    """A folder of Terraform files, and the values for it.

    Args:
        folder: what -chdir gets.
        variables: the file of values; relative to the folder where it is not absolute, as Terraform has it.
        project: overrides project_id.
        dry_run: print the commands only.
    """

    folder: Path
    variables: str = "default_env.tfvars"
    project: str | None = None
    dry_run: bool = False

    def values(self, *more: str) -> list[str]:
        """The options that give the variables their values."""
        named = [f"-var=project_id={self.project}"] if self.project else []
        return [f"-var-file={self.variables}", *named, *(f"-var={value}" for value in more)]

    def change(self, *arguments: str) -> None:
        """Runs a command in the folder."""
        change("terraform", f"-chdir={self.folder}", *arguments, dry_run=self.dry_run)

    def outputs(self) -> Outputs:
        """What was built.

        Raises:
            InputError: nothing was.
        """
        return outputs.read(self.output())

    def output(self) -> str:
        """What was built, as Terraform tells it: JSON."""
        return read("terraform", f"-chdir={self.folder}", "output", "-json")

    def untouched(self) -> bool:
        """Whether no destroy has begun: it takes protection.tf's resource first. An apply would build the rest anew."""
        return "terraform_data.protection" in read("terraform", f"-chdir={self.folder}", "state", "list").split()

    def check(self) -> None:
        """Refuses values that would only fail later.

        Raises:
            InputError: no such file, or the project is not named in it.
        """
        file = self.folder / self.variables
        if not file.is_file():
            raise InputError("no such variables file", where=str(file), fix="name another with --vars")
        if self.named("project_id") == "<PROJECT_ID>":
            raise InputError(
                "project_id is still <PROJECT_ID>", where=str(file), fix="write your project id there, or --project ID"
            )

    def named(self, variable: str) -> str | None:
        """A variable's value in the file, if it stands there as plain text."""
        if variable == "project_id" and self.project:
            return self.project
        text = (self.folder / self.variables).read_text(encoding="utf-8")
        found = re.search(rf'^\s*{variable}\s*=\s*"([^"]*)"', text, re.MULTILINE)
        return found.group(1) if found else None

    def expect(self, built: Outputs) -> None:
        """Refuses variables of another platform than the one that was built: an apply would replace it.

        Raises:
            InputError: names the first that differs.
        """
        is_built = {"project_id": built.project_id, "default_resource_name": built.labels["deployment"]}
        for variable, value in is_built.items():
            if (named := self.named(variable)) not in (None, value):
                raise InputError(
                    f"these are another platform's variables: {variable} is {named}, {value} was built",
                    where=str(self.folder / self.variables),
                    fix="name the file that `up` was given: --vars FILE",
                )


def folder() -> Path:
    """infra/terraform here, or the one that came with the package."""
    here = Path("infra/terraform")
    return here if here.is_dir() else recipe.share() / "infra" / "terraform"


def up(terraform: Terraform, target: Path, confirm: Callable[[str], bool]) -> None:
    """Builds everything, and writes outputs.json.

    Args:
        target: the file for the outputs.
        confirm: asked once the plan is on the screen.

    Raises:
        OutsideError: a tool is missing, not logged in, or Google refuses. What was built is in the
            state: the same command goes on from there.
    """
    terraform.check()
    if not terraform.dry_run:
        need("terraform", "gcloud")
    with tempfile.TemporaryDirectory() as scratch:
        # Of mode 0700: a plan holds every value, and nobody else's business is in it.
        plan = "tfplan" if terraform.dry_run else str(Path(scratch) / "tfplan")
        terraform.change("init", "-input=false")
        terraform.change("plan", "-input=false", *terraform.values(), f"-out={plan}")
        if not terraform.dry_run and not confirm("Build this? It costs money from now on"):
            raise InputError("not confirmed; nothing was changed", where="tuneship up")
        terraform.change("apply", "-input=false", plan)
    say(f"$ terraform -chdir={terraform.folder} output -json > {shlex.quote(str(target))}")
    if not terraform.dry_run:
        text = terraform.output()
        outputs.read(text)
        target.write_text(text, encoding="utf-8")


def down(terraform: Terraform, built: Outputs | None, confirm: Callable[[str], bool]) -> None:
    """Takes everything away, the bucket with what is in it, and looks whether something billable is left.

    Args:
        built: what there is; None where the state has no outputs any more, after a half-done destroy.

    Raises:
        OutsideError: something refuses; the same command goes on.
        TuneshipError: it is done, and something with our label is still there.
    """
    terraform.check()
    if built is not None:
        terraform.expect(built)
    if not terraform.dry_run:
        need("terraform", "gcloud", "kubectl")
        if not confirm("Destroy everything, the bucket and its adapters too"):
            raise InputError("not confirmed; nothing was changed", where="tuneship down")
    if built is not None and (terraform.dry_run or _cluster_exists(built)):
        # Load balancers and disks that a workload asked for belong to no Terraform state, and hold the network.
        point_kubectl(built, dry_run=terraform.dry_run)
        namespaces = (built.serving_k8s_namespace, built.metaflow_k8s_namespace)
        change("kubectl", "delete", "namespace", *namespaces, "--ignore-not-found", "--wait", dry_run=terraform.dry_run)
    off = "deletion_protection=false"
    terraform.change("init", "-input=false")
    if terraform.dry_run or terraform.untouched():
        terraform.change("apply", "-input=false", "-auto-approve", *terraform.values(off))
    terraform.change("destroy", "-input=false", "-auto-approve", *terraform.values(off))
    if built is not None:
        _nothing_left(built, dry_run=terraform.dry_run)


def _cluster_exists(built: Outputs) -> bool:
    named = f"--filter=name={built.gke_cluster_name}"
    return bool(
        read("gcloud", "container", "clusters", "list", f"--project={built.project_id}", named, "--format=value(name)")
    )


def point_kubectl(built: Outputs, *, dry_run: bool = False) -> None:
    """Points kubectl at the cluster, by its DNS endpoint, and sees that it does."""
    change(*shlex.split(built.gke_get_credentials_command), dry_run=dry_run)
    if not dry_run:
        expect_context(built)


def expect_context(built: Outputs) -> None:
    """Refuses to talk to another cluster than the one that was built.

    Raises:
        OutsideError: kubectl's context is another one's.
    """
    # gcloud's own name for it.
    wanted = f"gke_{built.project_id}_{built.gke_cluster_location}_{built.gke_cluster_name}"
    found = read("kubectl", "config", "current-context").strip()
    if found != wanted:
        raise OutsideError(
            f"kubectl points at another cluster: {found}",
            where=f"wanted: {wanted}",
            fix=f"kubectl config use-context {wanted}, or tuneship connect",
        )


def _nothing_left(built: Outputs, *, dry_run: bool) -> None:
    label = f"deployment={built.labels['deployment']}"
    left = []
    for kind, key in BILLABLE.items():
        argv = ["gcloud", *kind.split(), "list", f"--project={built.project_id}", f"--filter={key}.{label}"]
        argv.append("--format=value(name)")
        say(f"$ {shlex.join(argv)}")
        if not dry_run:
            left += [f"{kind}: {name}" for name in read(*argv).split()]
    if left:
        raise TuneshipError(
            "still there, and billed: " + "; ".join(left),
            where=f"label {label}",
            fix="delete them by hand, or run the same command again",
        )
    if not dry_run:
        say(f"nothing billable with the label {label} is left")


def ask(question: str) -> bool:
    """Asks on the terminal.

    Raises:
        InputError: there is none.
    """
    if not sys.stdin.isatty():
        raise InputError("there is no terminal to ask on", where=question, fix="--yes, if you mean it")
    return input(f"{question}? [y/N] ").strip().lower() in ("y", "yes")
