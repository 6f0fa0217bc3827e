"""infra/terraform run by the real Terraform, against stand-ins for its providers (terraform_providers.py).

python -m pytest tests/infra/test_terraform_runs.py -v

Skipped where there is no `terraform` of 1.11 or later on PATH. What only Google knows is not tested here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

for module in ("grpc", "hcl2", "msgpack"):
    pytest.importorskip(module, reason="pip install grpcio msgpack python-hcl2")

import terraform_files as hcl
import terraform_rules as rules
from terraform_providers import CANARY, Providers, providers


def _has_terraform() -> bool:
    binary = shutil.which("terraform")
    if binary is None:
        return False
    found = subprocess.run([binary, "version", "-json"], capture_output=True, text=True, timeout=30, check=False)
    version = re.search(r'"terraform_version":\s*"(\d+)\.(\d+)', found.stdout)
    return bool(version) and (int(version[1]), int(version[2])) >= (1, 11)


pytestmark = pytest.mark.skipif(not _has_terraform(), reason="terraform 1.11 or later on PATH")

VALUES = ("-var-file=default_env.tfvars", "-var=project_id=my-project")
KINDS = ("autopilot", "standard")


def _values(kind: str) -> tuple[str, ...]:
    return (*VALUES, f"-var=autopilot_cluster={'true' if kind == 'autopilot' else 'false'}")


@pytest.fixture(scope="module")
def served() -> Iterator[Providers]:
    """For what makes nothing."""
    with providers(hcl.TERRAFORM) as one:
        yield one


@pytest.fixture(scope="module", params=KINDS)
def plan(request: pytest.FixtureRequest, served: Providers) -> dict[str, Any]:
    """The first plan of each kind of cluster."""
    return served.plan(*_values(request.param))


@pytest.fixture(params=KINDS)
def applied(request: pytest.FixtureRequest) -> Iterator[tuple[Providers, tuple[str, ...]]]:
    """Each kind of cluster, made."""
    with providers(hcl.TERRAFORM) as one:
        values = _values(request.param)
        one.terraform("apply", "-input=false", "-auto-approve", *values)
        yield one, values


def _planned(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    resources = plan["planned_values"]["root_module"]["resources"]
    return {one["address"]: one["values"] for one in resources if one["mode"] == "managed"}


# ── Before anything is made ──────────────────────────────────────────────────────────────────────────────────


def test_terraform_fmt() -> None:
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-diff", "-recursive", str(hcl.TERRAFORM)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_terraform_validate(served: Providers) -> None:
    assert json.loads(served.terraform("validate", "-json").stdout)["valid"] is True


def test_validate_would_see_a_wrong_reference(served: Providers) -> None:
    extra = served.folder / "extra.tf"
    extra.write_text('output "x" {\n  value = google_compute_network.main.nothing\n}\n', encoding="utf-8")
    try:
        done = served.terraform("validate", "-json", check=False)
    finally:
        extra.unlink()
    assert "Unsupported attribute" in done.stdout


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("project_id=<PROJECT_ID>", "Did <PROJECT_ID> stay in the file?"),
        ("project_id=", "Not a project id"),
        ("default_resource_name=Tuneship", "lower-case letters"),
        ("default_resource_name=a-name-of-more-than-21-characters", "3 to 21"),
        ("cluster_location=us-central1-a", "An Autopilot cluster needs a region"),
        ("cluster_location=europe-west4", "must stand in subnetwork_region"),
        ("cluster_location=somewhere", "A region such as us-central1"),
        ("subnetwork_region=us-central1-a", "A region such as us-central1"),
        ("subnetwork_cidr=10.128.0.0", "An IPv4 range"),
        ("subnetwork_cidr=10.128.0.0/28", "An IPv4 range"),
        ("pods_cidr=10.16.0.0/24", "An IPv4 range"),
        ("services_cidr=10.20.0.0/8", "An IPv4 range"),
        ("bucket_name=Bucket", "lower-case letters"),
        ("service_account_name=abc", "6 to 30"),
        ("metaflow_kubernetes_namespace=argo", "A namespace of its own"),
        ("serving_kubernetes_namespace=metaflow", "A namespace of its own"),
        ("metaflow_kubernetes_service_account_name=default", "Not the default account"),
        ("metaflow_argo_workflows_sa_name=default", "Not the default account"),
        ("serving_kubernetes_service_account_name=default", "Not the default account"),
        ('authorized_networks={home="0.0.0.0/0"}', "the whole internet"),
        ('authorized_networks={home="home"}', "must be a range"),
        ("metaflow_cloudsql_tier=db-n1-standard-1", "db-f1-micro"),
        ("metaflow_db_user=postgres", "not postgres"),
        ("metaflow_db_password_version=0", "A whole number from 1"),
        ("checkpoint_retention_days=0.5", "A whole number of days"),
        ("private_services_prefix_length=28", "From 16 to 24"),
        ('labels={App="x"}', "a key starts with a letter"),
        ("deletion_protection=maybe", "a bool is required"),
        (
            'gpu_node_pools={l4={machine_type="g2-standard-16",accelerator_type="nvidia-l4",node_locations=[]}}',
            "Each pool needs a zone",
        ),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_made(served: Providers, value: str, message: str) -> None:
    done = served.terraform("plan", "-input=false", *VALUES, f"-var={value}", check=False)
    assert done.returncode == 1
    # Terraform draws a box around its errors and breaks lines.
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_gpu_zone_elsewhere_is_refused_where_it_counts(served: Providers) -> None:
    pool = 'gpu_node_pools={l4={machine_type="g2-standard-16",accelerator_type="nvidia-l4",node_locations=["x-y1-a"]}}'
    assert served.terraform("plan", "-input=false", *_values("autopilot"), f"-var={pool}").returncode == 0
    done = served.terraform("plan", "-input=false", *_values("standard"), f"-var={pool}", check=False)
    assert "must be a zone of" in done.stderr


def test_a_zonal_standard_cluster_elsewhere(served: Providers) -> None:
    elsewhere = [
        "-var=cluster_location=europe-west4-a",
        "-var=subnetwork_region=europe-west4",
        "-var=metaflow_cloudsql_instance_region=europe-west4",
        "-var=gpu_node_pools={}",
    ]
    planned = _planned(served.plan(*_values("standard"), *elsewhere))
    assert planned["google_container_cluster.standard[0]"]["location"] == "europe-west4-a"
    assert planned["google_storage_bucket.datastore"]["location"] == "EUROPE-WEST4"
    assert planned["google_artifact_registry_repository.images"]["location"] == "europe-west4"
    assert not [address for address in planned if "node_pool.gpu" in address]


# ── The plan ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_cluster_of_the_right_kind(plan: dict[str, Any]) -> None:
    planned = _planned(plan)
    clusters = [address for address in planned if address.startswith("google_container_cluster.")]
    pools = {address for address in planned if address.startswith("google_container_node_pool.")}
    if plan["variables"]["autopilot_cluster"]["value"] in (True, "true"):
        assert clusters == ["google_container_cluster.autopilot[0]"] and pools == set()
        assert planned[clusters[0]]["enable_autopilot"] is True
    else:
        assert clusters == ["google_container_cluster.standard[0]"]
        assert pools == {
            "google_container_node_pool.system[0]",
            'google_container_node_pool.gpu["a100"]',
            'google_container_node_pool.gpu["l4"]',
        }
    (private,) = planned[clusters[0]]["private_cluster_config"]
    assert private["enable_private_nodes"] is True and private["enable_private_endpoint"] is True
    assert planned[clusters[0]]["master_authorized_networks_config"][0]["cidr_blocks"] == []
    assert planned[clusters[0]]["deletion_protection"] is True
    assert planned[clusters[0]]["resource_labels"]["app"] == "tuneship"


def test_who_may_act_as_whom(plan: dict[str, Any]) -> None:
    planned = _planned(plan)
    members = {
        address: one["member"]
        for address, one in planned.items()
        if address.startswith("google_service_account_iam_member.")
    }
    pool = "serviceAccount:my-project.svc.id.goog"
    assert members == {
        'google_service_account_iam_member.workload_identity["metadata"]': f"{pool}[metaflow/metaflow-metadata]",
        'google_service_account_iam_member.workload_identity["serving"]': f"{pool}[serving/model-server]",
        'google_service_account_iam_member.workload_identity["training"]': f"{pool}[argo/metaflow-argo]",
    }
    accounts = {one["account_id"] for address, one in planned.items() if address.startswith("google_service_account.")}
    assert accounts == {"tuneship-nodes", "tuneship-metadata", "tuneship-train", "tuneship-serve", "tuneship-build"}


def test_argo_values(plan: dict[str, Any]) -> None:
    release = _planned(plan)["helm_release.argo_workflows"]
    values = yaml.safe_load(release["values"][0])
    assert release["version"] == "1.0.18" and release["namespace"] == "argo"
    assert values["images"]["tag"] == "v4.0.6"
    assert values["controller"]["workflowNamespaces"] == ["argo"]
    assert values["workflow"]["serviceAccount"] == {"create": False, "name": "metaflow-argo"}
    assert values["server"]["authModes"] == ["client"]
    assert values["executor"]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert [one["kind"] for one in values["extraObjects"]] == ["Role", "RoleBinding"]


def test_longest_names_fit() -> None:
    name = "a" * 21
    with providers(hcl.TERRAFORM) as one:
        planned = _planned(one.plan(*VALUES, f"-var=default_resource_name={name}"))
    for address, values in planned.items():
        if address.startswith("google_service_account."):
            assert len(values["account_id"]) <= 30, values["account_id"]
        for argument, longest in (("name", 63), ("secret_id", 255), ("repository_id", 63)):
            if isinstance(values.get(argument), str) and not address.startswith("google_project_"):
                assert len(values[argument]) <= longest, f"{address}: {values[argument]}"


def test_an_extra_label_cannot_take_ours(served: Providers) -> None:
    planned = _planned(served.plan(*VALUES, '-var=labels={app="theirs",team="data"}'))
    labels = planned["google_storage_bucket.datastore"]["labels"]
    assert labels == {"app": "tuneship", "deployment": "tuneship", "managed-by": "terraform", "team": "data"}


# ── Made and taken away ──────────────────────────────────────────────────────────────────────────────────────


def test_made_in_order_and_outputs_complete(applied: tuple[Providers, tuple[str, ...]]) -> None:
    served, values = applied
    made = [kind for _, kind, _ in served.log]
    waiting = {kind for kind in made if kind.startswith("google_") and kind != "google_project_service"}
    last_service = max(index for index, kind in enumerate(made) if kind == "google_project_service")
    assert min(made.index(kind) for kind in waiting) > last_service
    for earlier, later in (
        ("google_service_networking_connection", "google_sql_database_instance"),
        ("google_compute_router_nat", "google_container_cluster"),
        ("google_container_cluster", "google_service_account_iam_member"),
        ("google_container_cluster", "helm_release"),
    ):
        assert made.index(earlier) < made.index(later), f"{earlier} before {later}"

    outputs = json.loads(served.terraform("output", "-json").stdout)
    assert set(outputs) == set(hcl.load().outputs) and set(outputs) >= rules.TUTORIAL_OUTPUTS
    assert all(output["value"] not in (None, "") and output["sensitive"] is False for output in outputs.values())
    plain = {name: output["value"] for name, output in outputs.items()}
    assert plain["metaflow_datastore_bucket_name"] == plain["cloudsql_instance_name"] == "tuneship-0a1b2c"
    assert plain["checkpoint_root_uri"] == "gs://tuneship-0a1b2c/checkpoints"
    assert plain["build_source_uri"] == "gs://tuneship-0a1b2c/cloudbuild"
    assert plain["image_registry_url"] == "us-central1-docker.pkg.dev/my-project/tuneship"
    assert plain["gke_control_plane_cidr"] == "10.128.0.2/32"
    assert plain["gke_get_credentials_command"] == (
        "gcloud container clusters get-credentials tuneship --location us-central1 --project my-project --dns-endpoint"
    )
    assert served.terraform("plan", "-input=false", "-detailed-exitcode", *values).returncode == 0, (
        "a second plan moves"
    )


def test_the_password_is_kept_nowhere(applied: tuple[Providers, tuple[str, ...]]) -> None:
    served, values = applied
    served.plan(*values, "-var=metaflow_db_password_version=2")
    served.terraform("apply", "-input=false", "-auto-approve", *values, "-var=metaflow_db_password_version=2")
    kept = [path for path in served.folder.rglob("*") if path.is_file()]
    assert {"terraform.tfstate", "plan.bin"} <= {path.name for path in kept}
    for path in kept:
        assert CANARY.encode() not in path.read_bytes(), path.name
    shown = served.terraform("show", "-json", "plan.bin").stdout + served.terraform("show", "-json").stdout
    assert CANARY not in shown


def test_destroy_takes_all_or_nothing(applied: tuple[Providers, tuple[str, ...]]) -> None:
    served, values = applied
    made = len(served.log)
    served.log.clear()

    refused = served.terraform("destroy", "-input=false", "-auto-approve", *values, check=False)
    assert refused.returncode == 1 and "deletion_protection is on" in refused.stdout + refused.stderr
    assert served.log == [], "a refused destroy has taken something"

    unprotected = (*values, "-var=deletion_protection=false")
    served.terraform("apply", "-input=false", "-auto-approve", *unprotected)
    assert served.log == [], "the switch has replaced something"
    served.terraform("destroy", "-input=false", "-auto-approve", *unprotected)
    gone = [kind for _, kind, _ in served.log]
    assert len(gone) == made
    for earlier, later in (
        ("helm_release", "google_container_cluster"),
        ("google_sql_user", "google_sql_database_instance"),
        ("google_sql_database", "google_sql_database_instance"),
        ("google_sql_database_instance", "google_service_networking_connection"),
        ("google_container_cluster", "google_compute_router_nat"),
        ("google_service_networking_connection", "google_compute_network"),
    ):
        assert gone.index(earlier) < gone.index(later), f"{earlier} goes before {later}"
    assert gone.index("google_project_service") > gone.index("google_compute_network")
    assert json.loads((served.folder / "terraform.tfstate").read_text(encoding="utf-8"))["resources"] == []


def test_without_the_guard_a_refused_destroy_would_take_half() -> None:
    """Why protection.tf is there."""
    with providers(hcl.TERRAFORM) as one:
        (one.folder / "protection.tf").unlink()
        one.terraform("apply", "-input=false", "-auto-approve", *VALUES)
        one.log.clear()
        refused = one.terraform("destroy", "-input=false", "-auto-approve", *VALUES, check=False)
    assert refused.returncode == 1
    assert {"helm_release", "google_service_account_iam_member"} <= {kind for _, kind, _ in one.log}
