"""What every manifest here must say: the restricted Pod Security Standard and more, and Autopilot's rules.

A rule takes all documents and asserts. test_kubernetes.py runs each on what is rendered, and sees each fail on
documents with one thing broken (kubernetes_broken.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

Document = dict[str, Any]
Rule = Callable[[list[Document]], None]

LEAST_UID = 10_000
GPU = "nvidia.com/gpu"
ACCELERATOR = "cloud.google.com/gke-accelerator"
NAMESPACES = {"metaflow", "argo", "serving"}

# The tutorial's names and ports; argo-server's comes with Argo's chart.
TUTORIAL_SERVICES = {"metaflow-metadata-svc": 8080, "metaflow-ui-svc": 8083}


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every workload's name and its pod's spec."""
    for document in documents:
        template = document.get("spec", {}).get("template", {})
        if "containers" in template.get("spec", {}):
            yield f"{document['kind']} {document['metadata']['name']}", template["spec"]


def containers(documents: list[Document]) -> Iterator[tuple[str, Document, Document]]:
    """Every container with where it is and its pod's spec, init containers included."""
    for name, pod in pods(documents):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield f"{name}/{container['name']}", pod, container


def stays(pod: Document, container: Document) -> bool:
    """Whether a container runs as long as its pod does: the ordinary ones, and sidecars."""
    return container in pod["containers"] or container.get("restartPolicy") == "Always"


def namespaces_are_restricted(documents: list[Document]) -> None:
    found = {d["metadata"]["name"]: d["metadata"]["labels"] for d in documents if d["kind"] == "Namespace"}
    assert found.keys() == NAMESPACES
    for name, labels in found.items():
        for mode in ("enforce", "audit", "warn"):
            assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted", name
    homeless = [
        d["metadata"]["name"] for d in documents if d["kind"] != "Namespace" and "namespace" not in d["metadata"]
    ]
    assert not homeless
    assert {d["metadata"]["namespace"] for d in documents if d["kind"] != "Namespace"} <= NAMESPACES


def nothing_is_root(documents: list[Document]) -> None:
    for where, pod, container in containers(documents):
        own, shared = container["securityContext"], pod.get("securityContext", {})
        both = {**shared, **own}
        assert both["runAsNonRoot"] is True, where
        assert both["runAsUser"] >= LEAST_UID and both["runAsGroup"] >= LEAST_UID, where
        assert both["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert own["allowPrivilegeEscalation"] is False, where
        assert own["capabilities"] == {"drop": ["ALL"]}, where
        assert "privileged" not in own and "procMount" not in own, where


def roots_are_read_only(documents: list[Document]) -> None:
    for where, pod, container in containers(documents):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, where
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted <= {volume["name"] for volume in pod.get("volumes", [])}, where
    for where, pod in pods(documents):
        for volume in pod.get("volumes", []):
            kind = (volume.keys() - {"name"}).pop()
            assert kind in ("emptyDir", "csi", "configMap", "secret"), f"{where}: {kind}"
            if kind == "emptyDir":
                assert "sizeLimit" in volume[kind], f"{where}: a volume without bounds: {volume['name']}"
            if kind == "csi":
                assert volume[kind]["readOnly"] is True, where


def nothing_touches_the_node(documents: list[Document]) -> None:
    for where, pod in pods(documents):
        assert not {"hostNetwork", "hostPID", "hostIPC", "nodeName", "hostAliases"} & pod.keys(), where
    for where, _, container in containers(documents):
        assert not any("hostPort" in port for port in container.get("ports", [])), where


def tokens_are_not_mounted(documents: list[Document]) -> None:
    for where, pod in pods(documents):
        assert pod["automountServiceAccountToken"] is False, where
        assert pod["serviceAccountName"] != "default", where


def accounts_exist(documents: list[Document]) -> None:
    accounts = {
        (d["metadata"]["namespace"], d["metadata"]["name"]): d["metadata"]["annotations"]
        for d in documents
        if d["kind"] == "ServiceAccount"
    }
    for about in accounts.values():
        assert re.fullmatch(
            r"[a-z0-9-]+@[a-z0-9-]+\.iam\.gserviceaccount\.com", about["iam.gke.io/gcp-service-account"]
        )
    used = {
        (d["metadata"]["namespace"], d["spec"]["template"]["spec"]["serviceAccountName"])
        for d in documents
        if "template" in d.get("spec", {})
    }
    assert used <= accounts.keys()
    assert len({a["iam.gke.io/gcp-service-account"] for a in accounts.values()}) == len(accounts)


def nobody_may_ask_kubernetes(documents: list[Document]) -> None:
    assert not [d["metadata"]["name"] for d in documents if "Role" in d["kind"]], "Argo's chart has the only Roles"


def resources_are_bounded(documents: list[Document]) -> None:
    for where, _, container in containers(documents):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= requests.keys() and "memory" in limits, where
        for name, limit in limits.items():
            assert quantity(limit) >= quantity(requests.get(name, limit)), f"{where}: {name}"


def what_runs_is_probed(documents: list[Document]) -> None:
    for where, pod, container in containers(documents):
        if not stays(pod, container):
            continue
        start = container["startupProbe"]
        assert start.get("periodSeconds", 10) * start.get("failureThreshold", 3) >= 60, f"{where}: too short a start"
        assert "livenessProbe" in container, where
        # A sidecar's readiness would take its pod out of the service.
        assert "readinessProbe" not in container or container in pod["containers"], where
        assert any("readinessProbe" in each for each in pod["containers"]), where
        names = {port["name"] for port in container.get("ports", [])}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container.get(kind, {}).get("httpGet", {}).get("port")
            assert asked is None or asked in names, f"{where}: {kind} asks a port that is not there"


def images_are_exact(documents: list[Document]) -> None:
    for where, _, container in containers(documents):
        image = container["image"]
        exact = re.fullmatch(r"[a-z0-9.-]+\.[a-z]+/[\w./-]+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", image)
        assert exact and (exact[1] or exact[2]) and exact[1] != ":latest", f"{where}: {image}"
        # An exact tag means one image: no reason to ask for it again.
        assert container.get("imagePullPolicy", "IfNotPresent") == "IfNotPresent", where


def evictions_are_bounded(documents: list[Document]) -> None:
    budgets = [d for d in documents if d["kind"] == "PodDisruptionBudget"]
    for document in documents:
        if document["kind"] != "Deployment":
            continue
        name, labels = document["metadata"]["name"], document["spec"]["template"]["metadata"]["labels"]
        selector = document["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items(), name
        mine = [
            b
            for b in budgets
            if b["metadata"]["namespace"] == document["metadata"]["namespace"]
            and b["spec"]["selector"]["matchLabels"].items() <= labels.items()
        ]
        assert len(mine) == 1, f"{name}: one budget"
        # A budget that lets nothing go keeps a node from being drained.
        assert mine[0]["spec"].get("maxUnavailable", 1) >= 1 and "minAvailable" not in mine[0]["spec"], name
        spread = document["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert all(each["labelSelector"]["matchLabels"].items() <= labels.items() for each in spread) and spread, name


def services_find_their_pods(documents: list[Document]) -> None:
    services = [d for d in documents if d["kind"] == "Service"]
    for service in services:
        name, spec = service["metadata"]["name"], service["spec"]
        assert spec.get("type", "ClusterIP") == "ClusterIP", f"{name}: nothing is public"
        behind = [
            d["spec"]["template"]["spec"]
            for d in documents
            if d["kind"] == "Deployment"
            and d["metadata"]["namespace"] == service["metadata"]["namespace"]
            and spec["selector"].items() <= d["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert len(behind) == 1, name
        ports = {port["name"]: port["containerPort"] for c in behind[0]["containers"] for port in c.get("ports", [])}
        assert all(port["targetPort"] in ports for port in spec["ports"]), name
    found = {s["metadata"]["name"]: s["spec"]["ports"][0]["port"] for s in services}
    assert found.items() >= TUTORIAL_SERVICES.items()
    assert not [d["metadata"]["name"] for d in documents if d["kind"] in ("Ingress", "Gateway", "HTTPRoute")]


def secrets_are_files(documents: list[Document]) -> None:
    assert not [d["metadata"]["name"] for d in documents if d["kind"] == "Secret"]
    classes = {}
    for document in documents:
        if document["kind"] == "SecretProviderClass":
            assert document["spec"]["provider"] == "gke"
            entries = yaml.safe_load(document["spec"]["parameters"]["secrets"])
            assert all(re.fullmatch(r"projects/[\w-]+/secrets/[\w-]+/versions/\w+", e["resourceName"]) for e in entries)
            assert all(re.fullmatch(r"[\w.-]+", e["path"]) for e in entries)
            classes[document["metadata"]["name"]] = document["metadata"]["namespace"]
    for document in documents:
        for _, pod in pods([document]):
            for volume in pod.get("volumes", []):
                if "csi" in volume and volume["csi"]["driver"] == "secrets-store-gke.csi.k8s.io":
                    named = volume["csi"]["volumeAttributes"]["secretProviderClass"]
                    assert classes[named] == document["metadata"]["namespace"], named
    for where, _, container in containers(documents):
        for entry in container.get("env", []):
            assert "secretKeyRef" not in entry.get("valueFrom", {}), f"{where}: {entry['name']}"
            plain = re.search(r"(PSWD|PASSWORD|TOKEN|KEY|SECRET)$", entry["name"])
            assert not plain, f"{where}: {entry['name']} stands in the manifest"
        assert "envFrom" not in container, where


def migrations_follow_the_proxy(documents: list[Document]) -> None:
    for where, pod in pods(documents):
        names = [container["name"] for container in pod.get("initContainers", [])]
        if "cloud-sql-proxy" not in names:
            continue
        proxy = pod["initContainers"][0]
        assert proxy["name"] == "cloud-sql-proxy" and proxy["restartPolicy"] == "Always", f"{where}: a sidecar, first"
        assert "--private-ip" in proxy["args"], where
        assert re.fullmatch(r"[\w-]+:[\w-]+:[\w-]+", proxy["args"][-1]), where
        assert not any(argument.startswith("--address") for argument in proxy["args"]), f"{where}: this pod only"


def autopilot_takes_it(documents: list[Document]) -> None:
    """Autopilot's rules: what it would refuse, and what it would change behind our back."""
    for where, pod in pods(documents):
        gpus = [c for c in pod["containers"] if GPU in c["resources"].get("limits", {})]
        assert not pod.get("tolerations"), f"{where}: GKE sets them"
        if gpus:
            selected = {**pod.get("nodeSelector", {}), **_affinity_keys(pod)}
            assert ACCELERATOR in selected, f"{where}: a GPU without a kind"
            for container in gpus:
                resources = container["resources"]
                assert resources["limits"][GPU] == resources["requests"].get(GPU, resources["limits"][GPU]), where
            continue
        cpu, memory, disk = (_pod_request(pod, name) for name in ("cpu", "memory", "ephemeral-storage"))
        # Clusters that cannot burst give no less; those that can give from 50m and 52Mi.
        assert cpu >= 0.25 and memory >= 512 * 2**20, f"{where}: less than Autopilot gives"
        assert 1 <= memory / 2**30 / cpu <= 6.5, f"{where}: {memory / 2**30 / cpu:.2f} GiB a core, 1 to 6.5 are allowed"
        assert disk <= 10 * 2**30, f"{where}: more disk than Autopilot gives"


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi|Ti|k|M|G|T)?", str(text)).groups()  # type: ignore[union-attr]
    factors = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    factors |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
    return float(number) * factors.get(unit, 1.0)


def _pod_request(pod: Document, name: str) -> float:
    """What a pod asks for as a whole: what stays, or an init container with the sidecars before it."""

    def asks(container: Document) -> float:
        return quantity(container["resources"]["requests"].get(name, 0))

    sidecars = 0.0
    most = 0.0
    for container in pod.get("initContainers", []):
        if container.get("restartPolicy") == "Always":
            sidecars += asks(container)
        else:
            most = max(most, sidecars + asks(container))
    return max(most, sidecars + sum(map(asks, pod["containers"])))


def _affinity_keys(pod: Document) -> dict[str, Any]:
    node = pod.get("affinity", {}).get("nodeAffinity", {})
    terms = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    return {e["key"]: e["values"] for term in terms for e in term.get("matchExpressions", [])}


RULES: list[Rule] = [
    namespaces_are_restricted,
    nothing_is_root,
    roots_are_read_only,
    nothing_touches_the_node,
    tokens_are_not_mounted,
    accounts_exist,
    nobody_may_ask_kubernetes,
    resources_are_bounded,
    what_runs_is_probed,
    images_are_exact,
    evictions_are_bounded,
    services_find_their_pods,
    secrets_are_files,
    migrations_follow_the_proxy,
    autopilot_takes_it,
]
