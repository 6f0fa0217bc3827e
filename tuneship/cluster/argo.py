"""submit: a recipe becomes a WorkflowTemplate by Metaflow's own commands, and a workflow of it starts.

    python …/flow.py --config config FILE argo-workflows --name NAME create
    python …/flow.py --config config FILE argo-workflows --name NAME trigger

The template bears the recipe's name, so that two recipes do not replace each other. Before that: an
image, Metaflow's profile, the metadata service, and the secrets that the recipe names. A secret goes
to kubectl by its standard input, never by an argument.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneship.cluster import connect
from tuneship.cluster.commands import change, metaflow_user, read
from tuneship.cluster.image import recorded
from tuneship.console import say
from tuneship.credentials import hub_token
from tuneship.errors import InputError, OutsideError
from tuneship.recipe import Recipe, validate

FLOW = Path(__file__).parent.parent / "flow.py"
# The flow's config, where `tuneship image` records the image. The tutorial's name.
CONFIG = "finetune_flow_config.json"

HUB_SECRET = "hf-token"  # noqa: S105 - its name

# Metaflow's own limit and letters for a template's name; the API server's for a workflow of it is longer.
_NAME = re.compile(r"[a-z]([a-z0-9.-]{0,43}[a-z0-9])?")


def with_image(recipe: Recipe, config: Path) -> Recipe:
    """The recipe with the image that `tuneship image` has recorded, unless it names one itself.

    Raises:
        InputError: neither names an image, the config is no JSON object, or the recipe's name is none for a template.
    """
    if not _NAME.fullmatch(recipe.name):
        raise InputError(
            "a template's name begins with a letter and has at most 45 letters, digits, dots and dashes",
            where=f"name: {recipe.name}",
            fix="--set name=…",
        )
    if recipe.cluster.image is not None:
        return recipe
    record = recorded(config)
    if not record.get("image_name"):
        raise InputError("there is no image for the pods", where=str(config), fix="tuneship image")
    tree = recipe.model_dump(mode="json")
    tree["cluster"]["image"] = record["image_name"]
    return validate(tree, where="the recipe")


def submit(recipe: Recipe, *, dry_run: bool = False, environ: Mapping[str, str] = os.environ) -> str:
    """Creates the recipe's template and starts it; returns the workflow's name.

    Raises:
        OutsideError: no cluster, no metadata service, no token for the hub, or Argo refuses.
    """
    environment = {**environ, "METAFLOW_USER": metaflow_user(environ)}
    settings = _profile(environment)
    namespace = str(settings.get("METAFLOW_KUBERNETES_NAMESPACE", "argo"))
    if not dry_run:
        _reach_metadata(settings)
        for secret in recipe.cluster.secrets:
            _ensure_secret(secret, namespace)
    with tempfile.TemporaryDirectory() as scratch:
        config, run_id = Path(scratch) / "flow.json", Path(scratch) / "run_id"
        config.write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}), encoding="utf-8")
        shown = ["python", "-m", "tuneship.flow", "--config", "config", "FILE", "argo-workflows", "--name", recipe.name]
        run = [sys.executable, str(FLOW), "--config", "config", str(config), "argo-workflows", "--name", recipe.name]
        for verb in (["create"], ["trigger", "--run-id-file", str(run_id)]):
            say(f"$ {shlex.join([*shown, verb[0]])}")
            if not dry_run:
                _metaflow([*run, *verb], environment)
        if dry_run:
            return f"{recipe.name}-XXXXX"
        return run_id.read_text(encoding="utf-8").strip().removeprefix("argo-")


def _metaflow(argv: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said, name = (done.stdout + done.stderr).strip(), argv[argv.index("--name") + 1]
    if "Incorrect production token" in said:
        raise OutsideError(
            "another user has deployed a template of this name",
            where=name,
            fix="--set name=… for one of your own, or with their token: argo-workflows create --authorize TOKEN",
        )
    if re.search(r"Invalid kube-config|ConfigException|Max retries exceeded|Connection refused", said):
        raise OutsideError("Metaflow reaches no cluster", where=shlex.join(argv[-3:]), fix="tuneship connect")
    if "not found" in said and "trigger" in argv:
        raise OutsideError("Argo does not know the template", where=name, fix="tuneship submit RECIPE creates it")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    raise OutsideError(
        f"Metaflow: {' '.join(lines[-3:])[:400]}",
        where=shlex.join(argv[-3:]),
        fix="tuneship doctor says what is missing",
    )


def _profile(environment: Mapping[str, str]) -> dict[str, Any]:
    """Metaflow's settings: the environment's, then the profile's."""
    file = connect.profile_file(environment.get("METAFLOW_PROFILE"), environment)
    settings = connect.read_profile(file)
    settings |= {key: value for key, value in environment.items() if key.startswith("METAFLOW_")}
    if settings.get("METAFLOW_DEFAULT_DATASTORE") != "gs":
        raise OutsideError("Metaflow is not set up for the cluster", where=str(file), fix="tuneship connect")
    return settings


def _reach_metadata(settings: Mapping[str, Any]) -> None:
    url = settings.get("METAFLOW_SERVICE_URL")
    if settings.get("METAFLOW_DEFAULT_METADATA") != "service" or not url:
        return
    try:
        # The profile's own address.
        urllib.request.urlopen(f"{str(url).rstrip('/')}/ping", timeout=5).close()  # noqa: S310
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise OutsideError(
            f"the metadata service does not answer: {getattr(error, 'reason', error)}",
            where=str(url),
            fix="keep this running in another terminal: tuneship connect",
        ) from None


def _ensure_secret(name: str, namespace: str) -> None:
    """Makes the hub's secret out of the token in the environment, where the cluster has none yet.

    Raises:
        OutsideError: it is not there, and there is no token to make it of.
    """
    there = read("kubectl", "--namespace", namespace, "get", "secrets", "--output=name").split()
    if f"secret/{name}" in there:
        return
    token = hub_token() if name == HUB_SECRET else None
    if token is None:
        raise OutsideError(
            f"the secret {name} is not in the cluster",
            where=f"namespace {namespace}",
            fix="set HF_TOKEN or HF_TOKEN_FILE, and run the same command again"
            if name == HUB_SECRET
            else f"kubectl --namespace {namespace} create secret generic {name} --from-env-file=/dev/stdin",
        )
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "Opaque",
        "stringData": {"HF_TOKEN": token},
    }
    change(
        *["kubectl", "create", "--filename=-"],
        text=json.dumps(secret),
        before="… the token, as a manifest | ",
    )
