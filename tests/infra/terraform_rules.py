"""What infra/terraform must be, as functions of the parsed configuration: each asserts one rule.

test_terraform.py runs every rule on the real files, and on files with one thing broken, where it must fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from terraform_arguments import SCHEMA, arguments_are_the_providers
from terraform_files import Block, Configuration, Expression, references
from terraform_golden import (
    ACCELERATORS,
    AUTOPILOT,
    BUCKET,
    CLUSTER,
    DATABASE,
    POOL,
    REGISTRY,
    RIGHTS,
    SERVICES,
    STANDARD,
    TUTORIAL_OUTPUTS,
    TUTORIAL_VARIABLES,
)

Rule = Callable[[Configuration], None]

# The names of the chart's values, from the source that the file names; `{}` is a value, or a map of anything.
CHART: dict[str, Any] = json.loads((Path(__file__).parent / "argo_chart_values.json").read_text(encoding="utf-8"))

# ── Versions ─────────────────────────────────────────────────────────────────────────────────────────────────


def everything_is_pinned(configuration: Configuration) -> None:
    """Providers exactly, as the schema has them; the chart exactly; nothing is fetched besides."""
    (required,) = configuration.terraform.blocks["required_providers"]
    for name, provider in SCHEMA["providers"].items():
        assert required.arguments[name] == {"source": f"hashicorp/{name}", "version": provider["version"]}, name
    assert set(required.arguments) == set(SCHEMA["providers"]), "a provider without a schema"
    assert configuration.terraform.get("required_version") == ">= 1.11.0, < 2.0.0"
    for name, release in configuration.of("helm_release").items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", str(release.get("version"))), f"{name}: no exact version"
    assert re.fullmatch(r"v\d+\.\d+\.\d+", configuration.locals["argo_version"])
    assert configuration.locals["argo_values"]["images"]["tag"] == Expression("local.argo_version")
    assert not [kind for kind, _ in configuration.data if kind != "google_project"], "a data source that fetches"


# ── Services ─────────────────────────────────────────────────────────────────────────────────────────────────


def services_are_enabled_first(configuration: Configuration) -> None:
    """Every resource waits for the services, and its own is among them."""
    enabled = {name.removesuffix(".googleapis.com") for name in _services(configuration)}
    for (kind, name), block in configuration.resources.items():
        if kind.startswith("google_"):
            service = max((one for one in SERVICES if kind.startswith(one)), key=len)
            assert SERVICES[service] in enabled, f"{kind}.{name} needs {SERVICES[service]}.googleapis.com"
            if kind != "google_project_service":
                needed = configuration.needed(block)
                assert ("google_project_service", "enabled") in needed, f"{kind}.{name} does not wait for the services"
    assert {"cloudbuild", "containerscanning", "containersecurity", "containerfilesystem"} <= enabled
    assert configuration.of("google_project_service")["enabled"].get("disable_on_destroy") is False


def _services(configuration: Configuration) -> list[str]:
    return re.findall(r'"([\w.]+\.googleapis\.com)"', str(configuration.locals["services"]))


# ── Who may do what ──────────────────────────────────────────────────────────────────────────────────────────


def rights_are_the_listed_ones(configuration: Configuration) -> None:
    """RIGHTS is all of it; nothing broad, nothing authoritative, nothing for everybody."""
    given = {}
    for (kind, name), block in configuration.resources.items():
        assert not re.search(r"_iam_(binding|policy|audit_config)$", kind), f"{kind}.{name} throws others out"
        if kind.endswith("_iam_member") and kind != "google_service_account_iam_member":
            role, member = block.get("role"), block.get("member")
            assert not re.search(r"roles/(owner|editor|viewer)$|[aA]dmin", role), f"{kind}.{name}: {role} is too much"
            if kind == "google_project_iam_member":
                assert not role.startswith(("roles/storage.", "roles/artifactregistry.", "roles/secretmanager.")), (
                    f"{kind}.{name}: {role} belongs on one bucket, repository or secret"
                )
            account = re.fullmatch(r"google_service_account\.(\w+)\.member", member)
            assert account, f"{kind}.{name}: {member} is no service account of ours"
            given[f"{kind}.{name}"] = (role, account[1])
    assert given == RIGHTS
    roles = [block.get("role") for block in configuration.of("google_service_account_iam_member").values()]
    assert roles == ["roles/iam.workloadIdentityUser"]


def rights_lie_on_one_resource(configuration: Configuration) -> None:
    """On the one bucket, repository and secret; the database's by a condition, and the build's by a prefix."""
    for block in configuration.of("google_storage_bucket_iam_member").values():
        assert block.get("bucket") == "google_storage_bucket.datastore.name"
    for block in configuration.of("google_artifact_registry_repository_iam_member").values():
        assert block.get("repository") == "google_artifact_registry_repository.images.name"
    secrets = configuration.of("google_secret_manager_secret_iam_member")
    assert secrets["training_hub_token"].get("secret_id") == "google_secret_manager_secret.hub_token.secret_id"
    assert secrets["metadata_database_password"].get("secret_id") == (
        "google_secret_manager_secret.database_password.secret_id"
    )
    condition = str(configuration.of("google_project_iam_member")["metadata_database"].get("condition.expression"))
    assert 'resource.type == "sqladmin.googleapis.com/Instance" &&' in condition
    assert (
        'resource.name == "projects/${var.project_id}/instances/${google_sql_database_instance.metadata.name}"'
        in condition
    )
    build = str(configuration.of("google_storage_bucket_iam_member")["build"].get("condition.expression"))
    assert "resource.name.startsWith(" in build and "local.build_source_prefix" in build


def one_account_a_workload(configuration: Configuration) -> None:
    """Five accounts; three of them stand behind exactly one Kubernetes account each; no key is ever made."""
    assert set(configuration.of("google_service_account")) == {"nodes", "metadata", "training", "serving", "build"}
    assert configuration.locals["workload_identities"] == {
        "metadata": {
            "account": "google_service_account.metadata.name",
            "namespace": "var.metaflow_kubernetes_namespace",
            "name": "var.metaflow_kubernetes_service_account_name",
        },
        "training": {
            "account": "google_service_account.training.name",
            "namespace": "local.argo_namespace",
            "name": "var.metaflow_argo_workflows_sa_name",
        },
        "serving": {
            "account": "google_service_account.serving.name",
            "namespace": "var.serving_kubernetes_namespace",
            "name": "var.serving_kubernetes_service_account_name",
        },
    }
    binding = configuration.of("google_service_account_iam_member")["workload_identity"]
    assert binding.get("member") == (
        "serviceAccount:${local.workload_pool}[${each.value.namespace}/${each.value.name}]"
    )
    assert configuration.locals["workload_pool"] == "${var.project_id}.svc.id.goog"
    waits = {one for value in binding.get("depends_on") for one in references(value)}
    assert {("google_container_cluster", "autopilot"), ("google_container_cluster", "standard")} <= waits, (
        "the pool of identities comes with the first cluster"
    )
    assert not configuration.of("google_service_account_key")


def no_secret_in_the_state(configuration: Configuration) -> None:
    """A password is ephemeral and goes into write-only arguments; no token is read by a data source."""
    forbidden = {"random_password", "google_service_account_key", "google_client_config", "tls_private_key"}
    kinds = {kind for kind, _ in configuration.resources} | {kind for kind, _ in configuration.data}
    assert not kinds & forbidden
    for (kind, name), block in configuration.resources.items():
        for argument in ("password", "secret_data", "root_password", "set_sensitive", "repository_password"):
            assert block.get(argument) is None, f"{kind}.{name}.{argument} stays in the state"
        for argument, value in block.arguments.items():
            if isinstance(value, Expression) and value.startswith("ephemeral."):
                assert argument.endswith("_wo"), f"{kind}.{name}.{argument} is not write-only"
    for output in configuration.outputs.values():
        assert not any(reference[0] == "ephemeral" for reference in output.references())
    user = configuration.of("google_sql_user")["metadata"]
    version = configuration.of("google_secret_manager_secret_version")["database_password"]
    assert user.get("password_wo") == version.get("secret_data_wo") == "ephemeral.random_password.database.result"
    assert (
        user.get("password_wo_version") == version.get("secret_data_wo_version") == "var.metaflow_db_password_version"
    )
    assert set(configuration.of("google_secret_manager_secret_version")) == {"database_password"}, (
        "the hub token's value is added by hand"
    )


# ── Resources ────────────────────────────────────────────────────────────────────────────────────────────────


def clusters_are_hardened(configuration: Configuration) -> None:
    """The golden lists CLUSTER, AUTOPILOT and STANDARD."""
    clusters = configuration.of("google_container_cluster")
    assert set(clusters) == {"autopilot", "standard"}
    _holds("autopilot", clusters["autopilot"], CLUSTER | AUTOPILOT)
    _holds("standard", clusters["standard"], CLUSTER | STANDARD)
    for name, cluster in clusters.items():
        (networks,) = cluster.blocks["master_authorized_networks_config"]
        (allowed,) = networks.blocks["cidr_blocks"]
        assert allowed.get("__for_each__") == "var.authorized_networks", f"{name}: networks that nobody named"
        waits = {one for value in cluster.get("depends_on") for one in references(value)}
        assert ("google_compute_router_nat", "main") in waits, f"{name}: nodes without a way out"
        assert ("google_project_iam_member", "nodes") in waits, f"{name}: nodes without rights"
    assert configuration.variables["authorized_networks"].get("default") == {}
    assert configuration.variables["private_cluster"].get("default") is True
    assert configuration.variables["autopilot_cluster"].get("default") is True


def node_pools_are_hardened(configuration: Configuration) -> None:
    """The golden list POOL; GPU pools are empty until asked for, and their accelerators fit what was asked."""
    pools = configuration.of("google_container_node_pool")
    assert set(pools) == {"system", "gpu"}
    for name, pool in pools.items():
        _holds(name, pool, POOL)
    assert pools["system"].get("node_config.shielded_instance_config.enable_secure_boot") is True
    gpu = pools["gpu"]
    assert gpu.get("autoscaling.total_min_node_count") == 0 and gpu.get("initial_node_count") == 0
    assert gpu.get("for_each") == "var.autopilot_cluster ? {} : var.gpu_node_pools"
    assert gpu.get("node_config.guest_accelerator.gpu_driver_installation_config.gpu_driver_version") == "DEFAULT"
    defaults = configuration.variables["gpu_node_pools"].get("default")
    kinds = {pool["accelerator_type"] for pool in defaults.values()}
    assert kinds == {"nvidia-l4", "nvidia-tesla-a100"}, "the tutorial asks for an A100, and made a pool of L4s only"
    for name, pool in defaults.items():
        assert pool.get("accelerator_count", 1) == ACCELERATORS[pool["machine_type"]], f"{name}: no such machine"


def database_is_private(configuration: Configuration) -> None:
    """The golden list DATABASE, its logs, and that it waits for the peering."""
    (instance,) = configuration.of("google_sql_database_instance").values()
    _holds("metadata", instance, DATABASE)
    flags = {flag.get("name"): flag.get("value") for flag in instance.blocks["settings"][0].blocks["database_flags"]}
    assert flags["log_connections"] == flags["log_disconnections"] == flags["cloudsql.enable_pgaudit"] == "on"
    assert not instance.blocks["settings"][0].blocks["ip_configuration"][0].blocks.get("authorized_networks")
    assert ("google_service_networking_connection", "private_services") in instance.references()


def bucket_is_guarded(configuration: Configuration) -> None:
    """The golden list BUCKET, and lifecycle rules that touch only what may go."""
    (bucket,) = configuration.of("google_storage_bucket").values()
    _holds("datastore", bucket, BUCKET)
    deletes = [rule for rule in bucket.blocks["lifecycle_rule"] if rule.get("action.type") == "Delete"]
    old_versions = [rule for rule in deletes if rule.get("condition.with_state") == "ARCHIVED"]
    assert [rule.get("condition.days_since_noncurrent_time") for rule in old_versions] == [14]
    by_prefix = {str(rule.get("condition.matches_prefix")): rule for rule in deletes if rule not in old_versions}
    assert set(by_prefix) == {
        str([Expression("local.checkpoint_prefix")]),
        str([Expression("local.build_source_prefix")]),
    }
    checkpoints = by_prefix[str([Expression("local.checkpoint_prefix")])]
    assert checkpoints.get("condition.age") == "var.checkpoint_retention_days"
    assert configuration.locals["checkpoint_prefix"] == "checkpoints/", "a prefix without a slash takes neighbours too"
    assert configuration.locals["build_source_prefix"] == "cloudbuild/"


def registry_keeps_tags(configuration: Configuration) -> None:
    """The golden list REGISTRY; only what has no tag is cleaned up."""
    (registry,) = configuration.of("google_artifact_registry_repository").values()
    _holds("images", registry, REGISTRY)
    states = [policy.get("condition.tag_state") for policy in registry.blocks["cleanup_policies"]]
    assert states == ["UNTAGGED"]


def network_is_closed(configuration: Configuration) -> None:
    """No public way in, one way out, storage without it; the peering does not hold up a destroy."""
    assert configuration.of("google_compute_network")["main"].get("auto_create_subnetworks") is False
    subnetwork = configuration.of("google_compute_subnetwork")["main"]
    assert subnetwork.get("private_ip_google_access") is True
    assert subnetwork.blocks["log_config"]
    assert {one.get("range_name") for one in subnetwork.blocks["secondary_ip_range"]} == {"pods", "services"}
    (nat,) = configuration.of("google_compute_router_nat").values()
    assert nat.get("source_subnetwork_ip_ranges_to_nat") == "LIST_OF_SUBNETWORKS"
    assert (
        configuration.of("google_service_networking_connection")["private_services"].get("deletion_policy") == "ABANDON"
    )
    for name, firewall in configuration.of("google_compute_firewall").items():
        assert not firewall.blocks.get("allow"), f"{name} opens something"
        assert firewall.blocks["log_config"]
    assert {kind for kind, _ in configuration.resources if kind.startswith("google_compute_")} == {
        "google_compute_firewall",
        "google_compute_global_address",
        "google_compute_network",
        "google_compute_router",
        "google_compute_router_nat",
        "google_compute_subnetwork",
    }
    (address,) = configuration.of("google_compute_global_address").values()
    assert address.get("address_type") == "INTERNAL"


def argo_is_narrow(configuration: Configuration) -> None:
    """One namespace, visitors' own rights, Roles without secrets, no object that is open to the outside."""
    values = configuration.locals["argo_values"]
    assert values["singleNamespace"] is True and values["createAggregateRoles"] is False
    assert values["crds"]["full"] is False, "a job would download them during the install"
    server, controller = values["server"], values["controller"]
    assert server["authModes"] == ["client"], "any other mode acts with the server's rights, not the visitor's"
    assert server["secure"] is True and server["serviceType"] == "ClusterIP"
    assert server["ingress"]["enabled"] is False and server["sso"]["enabled"] is False
    assert server["rbac"]["create"] is False, "the chart's Role reads every secret of the namespace"
    assert controller["workflowNamespaces"] == [Expression("local.argo_namespace")]
    assert controller["rbac"]["accessAllSecrets"] is False and controller["rbac"]["secretWhitelist"] == []
    for part in (server, controller):
        assert part["clusterWorkflowTemplates"]["enabled"] is False, "a ClusterRole"
        assert part["podSecurityContext"] == Expression("local.argo_pod_security")
        assert part["securityContext"] == Expression("local.argo_container_security")
        assert part["resources"]["requests"] and part["resources"]["limits"]
    assert configuration.locals["argo_container_security"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    workflow = values["workflow"]
    assert workflow["serviceAccount"] == {"create": False, "name": Expression("var.metaflow_argo_workflows_sa_name")}
    assert workflow["rbac"] == {"create": True, "agentPermissions": False, "artifactGC": False}
    role, binding = values["extraObjects"]
    verbs = {verb for rule in role["rules"] for verb in rule["verbs"]}
    resources = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert role["kind"] == "Role" and verbs == {"get", "list", "watch"}
    assert resources == {"configmaps", "workflows", "workflowtemplates", "cronworkflows"}
    assert binding["kind"] == "RoleBinding" and len(binding["subjects"]) == 1
    assert configuration.locals["argo_namespace"] == "argo"
    (release,) = configuration.of("helm_release").values()
    assert release.get("namespace") == "local.argo_namespace" and release.get("create_namespace") is True
    assert release.get("repository") == "https://argoproj.github.io/argo-helm"
    assert release.get("atomic") is True


def argo_values_are_the_charts(configuration: Configuration) -> None:
    """The pinned chart has every value that is set: Helm takes any other without a word."""
    (release,) = configuration.of("helm_release").values()
    assert release.get("version") == CHART["version"], "argo_chart_values.json is of another chart"
    assert configuration.locals["argo_version"] == CHART["app_version"], "the chart was made for another Argo"
    unknown = list(_unknown_values(CHART["keys"], configuration.locals["argo_values"], ""))
    assert not unknown, f"the chart has no {', '.join(unknown)}"


def _unknown_values(chart: dict[str, Any], ours: dict[str, Any], path: str) -> Iterator[str]:
    for name, value in ours.items():
        if name not in chart:
            yield f"{path}{name}"
        elif isinstance(value, dict) and chart[name]:
            yield from _unknown_values(chart[name], value, f"{path}{name}.")


def names_do_not_collide(configuration: Configuration) -> None:
    """Buckets share one namespace with the world; an instance's name is taken for a week after its end."""
    for name, suffix in (("bucket_name", "random_id.bucket.hex"), ("database_instance_name", "random_id.database.hex")):
        value = configuration.locals[name]
        assert suffix in value and "var.default_resource_name" in value, f"{name}: {value}"
    assert configuration.of("google_storage_bucket")["datastore"].get("name") == "local.bucket_name"
    assert configuration.of("google_sql_database_instance")["metadata"].get("name") == "local.database_instance_name"


def everything_is_labelled(configuration: Configuration) -> None:
    """What can carry labels carries the common ones, and `app` cannot be taken from them."""
    for (kind, name), block in configuration.resources.items():
        known = SCHEMA["resource"].get(kind, {"arguments": {}})["arguments"]
        for argument in ("labels", "resource_labels"):
            if argument in known and kind != "google_container_node_pool":
                assert block.get(argument) == "local.labels", f"{kind}.{name} has no {argument}"
    labels = str(configuration.locals["labels"])
    assert re.match(r"merge\(var\.labels, \{", labels) and '"tuneship"' in labels, "ours come last: they win"


def tearing_down_takes_one_switch(configuration: Configuration) -> None:
    """One variable, on by default; the guard hangs on everything; Argo goes before the cluster."""
    assert configuration.variables["deletion_protection"].get("default") is True
    for kind in ("google_container_cluster", "google_sql_database_instance", "google_secret_manager_secret"):
        for name, block in configuration.of(kind).items():
            assert block.get("deletion_protection") == "var.deletion_protection", f"{kind}.{name} can just go"
    guard = configuration.of("terraform_data")["protection"]
    covered = configuration.needed(guard)
    for address in configuration.resources:
        assert address in covered or address == ("terraform_data", "protection"), f"{'.'.join(address)} goes unasked"
    (release,) = configuration.of("helm_release").values()
    waits = {one for value in release.get("depends_on") for one in references(value)}
    assert {("google_container_cluster", "autopilot"), ("google_container_cluster", "standard")} <= waits
    assert configuration.of("google_sql_user")["metadata"].get("deletion_policy") == "ABANDON"
    assert configuration.of("google_sql_database")["metadata"].get("deletion_policy") == "ABANDON"


# ── Variables and outputs ────────────────────────────────────────────────────────────────────────────────────


def variables_explain_and_check_themselves(configuration: Configuration) -> None:
    """Type, description, no null, and a validation where the type alone does not do."""
    assert set(configuration.variables) >= TUTORIAL_VARIABLES
    for name, variable in configuration.variables.items():
        assert variable.get("type"), f"{name} has no type"
        assert len(variable.get("description") or "") > 15, f"{name} has no description"
        assert variable.get("nullable") is False, f"{name} may be null"
        if variable.get("type") != "bool":
            assert variable.blocks.get("validation"), f"{name} takes anything"
        for validation in variable.blocks.get("validation", ()):
            assert ("var", name) in validation.references(), f"{name}: a validation of something else"
            assert validation.get("error_message")
    assert configuration.variables["project_id"].get("default") is None


def outputs_explain_themselves(configuration: Configuration) -> None:
    """The tutorial's and ours, each with a description, none secret."""
    assert set(configuration.outputs) >= TUTORIAL_OUTPUTS
    for name, output in configuration.outputs.items():
        assert len(output.get("description") or "") > 15, f"{name} has no description"
        assert output.get("sensitive") is None, f"{name} is secret: it does not belong here"


def _holds(name: str, block: Block, golden: dict[str, Any]) -> None:
    for path, value in golden.items():
        assert block.get(path) == value, f"{name}: {path} is {block.get(path)!r}, not {value!r}"


RULES: tuple[Rule, ...] = (
    arguments_are_the_providers,
    everything_is_pinned,
    services_are_enabled_first,
    rights_are_the_listed_ones,
    rights_lie_on_one_resource,
    one_account_a_workload,
    no_secret_in_the_state,
    clusters_are_hardened,
    node_pools_are_hardened,
    database_is_private,
    bucket_is_guarded,
    registry_keeps_tags,
    network_is_closed,
    argo_is_narrow,
    argo_values_are_the_charts,
    names_do_not_collide,
    everything_is_labelled,
    tearing_down_takes_one_switch,
    variables_explain_and_check_themselves,
    outputs_explain_themselves,
)
