"""For each rule, manifests with one thing broken: the path of a value in a document, and what it becomes."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_rules as rules

GONE = object()
POD = ("spec", "template", "spec")
PROXY = (*POD, "initContainers", 0)
MIGRATIONS = (*POD, "initContainers", 1)
MAIN = (*POD, "containers", 0)
LOCKED = (*MAIN, "securityContext")

METADATA = ("Deployment", "metaflow-metadata")
UI = ("Deployment", "metaflow-ui")

Change = tuple[tuple[str, str], tuple[str | int, ...], Any]

BROKEN: dict[rules.Rule, list[Change]] = {
    rules.namespaces_are_restricted: [
        (("Namespace", "argo"), ("metadata", "labels", "pod-security.kubernetes.io/enforce"), "baseline"),
        (("Namespace", "serving"), ("metadata", "name"), "default"),
        (METADATA, ("metadata", "namespace"), GONE),
        (UI, ("metadata", "namespace"), "default"),
    ],
    rules.nothing_is_root: [
        (METADATA, (*POD, "securityContext", "runAsUser"), 0),
        (METADATA, (*POD, "securityContext", "runAsUser"), GONE),
        (METADATA, (*POD, "securityContext", "runAsNonRoot"), False),
        (METADATA, (*POD, "securityContext", "seccompProfile"), GONE),
        (METADATA, (*PROXY, "securityContext", "runAsGroup"), 0),
        (METADATA, (*MIGRATIONS, "securityContext", "allowPrivilegeEscalation"), GONE),
        (UI, (*LOCKED, "capabilities", "drop"), []),
        (UI, (*LOCKED, "capabilities", "add"), ["NET_BIND_SERVICE"]),
        (UI, (*LOCKED, "privileged"), True),
    ],
    rules.roots_are_read_only: [
        (UI, (*LOCKED, "readOnlyRootFilesystem"), False),
        (UI, (*POD, "volumes", 2, "emptyDir"), {}),
        (UI, (*POD, "volumes", 2), {"name": "cache", "hostPath": {"path": "/tmp"}}),
        (UI, (*POD, "volumes", 2, "name"), "other"),
        (METADATA, (*POD, "volumes", 0, "csi", "readOnly"), False),
    ],
    rules.nothing_touches_the_node: [
        (UI, (*POD, "hostNetwork"), True),
        (UI, (*MAIN, "ports", 0, "hostPort"), 8083),
    ],
    rules.tokens_are_not_mounted: [
        (UI, (*POD, "automountServiceAccountToken"), GONE),
        (UI, (*POD, "serviceAccountName"), "default"),
    ],
    rules.accounts_exist: [
        (UI, (*POD, "serviceAccountName"), "other"),
        (("ServiceAccount", "metaflow-argo"), ("metadata", "annotations"), {}),
        (
            ("ServiceAccount", "metaflow-argo"),
            ("metadata", "annotations", "iam.gke.io/gcp-service-account"),
            "tuneship-metadata@my-project.iam.gserviceaccount.com",
        ),
    ],
    rules.nobody_may_ask_kubernetes: [(("Service", "metaflow-ui-svc"), ("kind",), "ClusterRoleBinding")],
    rules.resources_are_bounded: [
        (UI, (*MAIN, "resources", "limits"), GONE),
        (UI, (*MAIN, "resources", "requests", "cpu"), GONE),
        (UI, (*MAIN, "resources", "limits", "memory"), "512Mi"),
        (METADATA, (*PROXY, "resources"), {}),
    ],
    rules.what_runs_is_probed: [
        (UI, (*MAIN, "startupProbe"), GONE),
        (UI, (*MAIN, "startupProbe", "failureThreshold"), 3),
        (UI, (*MAIN, "livenessProbe"), GONE),
        (UI, (*MAIN, "readinessProbe"), GONE),
        (UI, (*MAIN, "readinessProbe", "httpGet", "port"), "web"),
        (UI, (*PROXY, "livenessProbe"), GONE),
        (UI, (*PROXY, "readinessProbe"), {"httpGet": {"path": "/readiness", "port": "proxy-health"}}),
    ],
    rules.images_are_exact: [
        (UI, (*PROXY, "image"), "gcr.io/cloud-sql-connectors/cloud-sql-proxy"),
        (UI, (*PROXY, "image"), "gcr.io/cloud-sql-connectors/cloud-sql-proxy:latest"),
        (UI, (*PROXY, "image"), "cloud-sql-proxy:2.25.3"),
        (UI, (*PROXY, "image"), "gcr.io/cloud-sql-connectors/cloud-sql-proxy:2.25.3@sha256:0"),
        (UI, (*PROXY, "imagePullPolicy"), "Always"),
    ],
    rules.evictions_are_bounded: [
        (("PodDisruptionBudget", "metaflow-ui"), ("spec", "selector", "matchLabels", "app"), "other"),
        (("PodDisruptionBudget", "metaflow-ui"), ("spec", "maxUnavailable"), 0),
        (("PodDisruptionBudget", "metaflow-ui"), ("spec", "minAvailable"), 1),
        (UI, ("spec", "selector", "matchLabels", "app"), "other"),
        (UI, (*POD, "topologySpreadConstraints"), []),
        (UI, (*POD, "topologySpreadConstraints", 0, "labelSelector", "matchLabels", "app"), "other"),
    ],
    rules.services_find_their_pods: [
        (("Service", "metaflow-ui-svc"), ("spec", "type"), "LoadBalancer"),
        (("Service", "metaflow-ui-svc"), ("spec", "selector", "app"), "other"),
        (("Service", "metaflow-ui-svc"), ("spec", "ports", 0, "targetPort"), "web"),
        (("Service", "metaflow-ui-svc"), ("spec", "ports", 0, "port"), 80),
        (("Service", "metaflow-ui-svc"), ("metadata", "name"), "ui"),
    ],
    rules.secrets_are_files: [
        (("Service", "metaflow-ui-svc"), ("kind",), "Secret"),
        (("SecretProviderClass", "metadata-database"), ("spec", "provider"), "gcp"),
        (("SecretProviderClass", "metadata-database"), ("metadata", "name"), "other"),
        (("SecretProviderClass", "metadata-database"), ("metadata", "namespace"), "argo"),
        (UI, (*MAIN, "env", 0), {"name": "MF_METADATA_DB_PSWD", "value": "hunter2"}),
        (UI, (*MAIN, "env", 0), {"name": "X", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}),
        (UI, (*MAIN, "envFrom"), [{"secretRef": {"name": "db-secret"}}]),
    ],
    rules.migrations_follow_the_proxy: [
        (METADATA, (*PROXY, "restartPolicy"), GONE),
        (METADATA, (*PROXY, "args", 0), "--public-ip"),
        (METADATA, (*PROXY, "args", 7), "--address=0.0.0.0"),
        (METADATA, (*POD, "initContainers"), [{"name": "migrations"}, {"name": "cloud-sql-proxy"}]),
    ],
    rules.autopilot_takes_it: [
        (UI, (*POD, "tolerations"), [{"operator": "Exists"}]),
        (UI, (*MAIN, "resources", "requests", "memory"), "64Mi"),
        (UI, (*MAIN, "resources", "requests", "cpu"), "10m"),
        (METADATA, (*MIGRATIONS, "resources", "requests", "memory"), "4Gi"),
        (UI, (*MAIN, "resources", "requests", "ephemeral-storage"), "20Gi"),
        (UI, (*MAIN, "resources", "limits", rules.GPU), 1),
    ],
}


def broken(documents: list[rules.Document], change: Change) -> list[rules.Document]:
    """The documents with one change."""
    (kind, name), path, value = change
    documents = copy.deepcopy(documents)
    (place,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    for step in path[:-1]:
        place = place[step]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return documents
