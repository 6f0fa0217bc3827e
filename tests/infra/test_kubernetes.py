"""infra/kubernetes as it is rendered: against the rules, the policies' table, Kubernetes' schemas, the golden files.

python -m pytest tests/infra/test_kubernetes.py -v

No cluster: what only an API server, an admission controller or Dataplane V2 knows is not tested here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import kubernetes_rules as rules
import pytest
import yaml
from kubernetes_broken import BROKEN, Change, broken
from kubernetes_policies import Peer, Pod, allowed

from tuneship.cluster import outputs, render

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "infra" / "example-outputs.json"
RENDERED = ROOT / "infra" / "rendered"

# GKE's minors of these months (docs/versions.md).
MINORS = ("1.34", "1.35", "1.36", "1.37")

# Kinds that no schema of Kubernetes describes: their fields are asserted in kubernetes_rules.
CUSTOM = {"PodMonitoring", "SecretProviderClass"}


def documents(folder: Path = RENDERED) -> list[rules.Document]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.yaml"))]
    return [document for text in texts for document in yaml.safe_load_all(text)]


PLATFORM = documents(RENDERED / "platform")
POLICIES = [document for document in PLATFORM if document["kind"] == "NetworkPolicy"]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: rules.Rule) -> None:
    rule(documents())


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        pytest.param(rule, change, id=f"{rule.__name__}-{number}")
        for rule, changes in BROKEN.items()
        for number, change in enumerate(changes)
    ],
)
def test_rule_catches(rule: rules.Rule, change: Change) -> None:
    rule(PLATFORM)
    with pytest.raises((AssertionError, KeyError)):
        rule(broken(PLATFORM, change))


def test_every_rule_was_seen_failing() -> None:
    assert {rule for rule, changes in BROKEN.items() if changes} == set(rules.RULES)


# ── Who may speak to whom ────────────────────────────────────────────────────────────────────────────────────

STEP = Pod("argo", {"workflows.argoproj.io/workflow": "finetune-x", "app": "metaflow"})
CONTROLLER = Pod("argo", {"app.kubernetes.io/name": "argo-workflows-workflow-controller"})
ARGO_SERVER = Pod("argo", {"app.kubernetes.io/name": "argo-workflows-server"})
METADATA = Pod("metaflow", {"app": "metaflow-metadata"})
UI = Pod("metaflow", {"app": "metaflow-ui"})
STRANGER = Pod("default", {"app": "metaflow-ui", "workflows.argoproj.io/workflow": "x"})
INTRUDER = Pod("metaflow", {"app": "other"})
SERVER = Pod("serving", {"app": "other"})
DNS = Pod("kube-system", {"k8s-app": "kube-dns"})
DNS_CACHE = Pod("kube-system", {"k8s-app": "node-local-dns"})
KUBERNETES = "10.128.0.2"
DATABASE = "10.100.0.3"
OTHER_DATABASE = "10.100.0.4"
GKE_METADATA = "169.254.169.254"
NODE = "10.128.0.7"
HUB = "3.163.189.90"


TABLE: list[tuple[Peer, Peer, int, bool]] = [
    # Steps: metadata, Kubernetes, tokens, the hub; nothing else inside, and nobody reaches them.
    (STEP, METADATA, 8080, True),
    (STEP, METADATA, 5432, False),
    (STEP, UI, 8083, False),
    (STEP, KUBERNETES, 443, True),
    (STEP, KUBERNETES, 10250, False),
    (STEP, GKE_METADATA, 80, True),
    (STEP, GKE_METADATA, 443, False),
    (STEP, "169.254.169.252", 80, False),
    (STEP, HUB, 443, True),
    (STEP, HUB, 80, False),
    (STEP, HUB, 22, False),
    (STEP, DATABASE, 3307, False),
    (STEP, NODE, 443, False),
    (STEP, SERVER, 8000, False),
    (STEP, STEP, 8080, False),
    (CONTROLLER, STEP, 8080, False),
    (ARGO_SERVER, STEP, 8080, False),
    (METADATA, STEP, 8080, False),
    (STRANGER, STEP, 8080, False),
    # Argo itself asks Kubernetes, and nothing else.
    (CONTROLLER, KUBERNETES, 443, True),
    (ARGO_SERVER, KUBERNETES, 443, True),
    (CONTROLLER, METADATA, 8080, False),
    (CONTROLLER, HUB, 443, False),
    (CONTROLLER, GKE_METADATA, 80, False),
    (ARGO_SERVER, HUB, 443, False),
    (STEP, ARGO_SERVER, 2746, False),
    (STRANGER, ARGO_SERVER, 2746, False),
    # The metadata service: its database by the proxy's port, Google's APIs, no other.
    (METADATA, DATABASE, 3307, True),
    (METADATA, DATABASE, 5432, False),
    (METADATA, OTHER_DATABASE, 3307, False),
    (METADATA, GKE_METADATA, 80, True),
    (METADATA, GKE_METADATA, 8080, True),
    (METADATA, HUB, 443, True),
    (METADATA, KUBERNETES, 443, False),
    (METADATA, UI, 8083, False),
    (UI, METADATA, 8080, True),
    (UI, DATABASE, 3307, True),
    (UI, HUB, 443, True),
    (STRANGER, METADATA, 8080, False),
    (STRANGER, UI, 8083, False),
    (INTRUDER, METADATA, 8080, False),
    (INTRUDER, HUB, 443, False),
    (HUB, METADATA, 8080, False),
    (SERVER, METADATA, 8080, False),
    (SERVER, DATABASE, 3307, False),
    # What serves asks nobody unless its own policies say so.
    (SERVER, HUB, 443, False),
    (STRANGER, SERVER, 8000, False),
]


@pytest.mark.parametrize(("source", "target", "port", "expected"), TABLE)
def test_who_may_speak_to_whom(source: Peer, target: Peer, port: int, expected: bool) -> None:
    assert allowed(PLATFORM, source, target, port) is expected


@pytest.mark.parametrize("name", sorted({(d["metadata"]["namespace"], d["metadata"]["name"]) for d in POLICIES}))
def test_every_policy_is_needed(name: tuple[str, str]) -> None:
    without = [d for d in POLICIES if (d["metadata"]["namespace"], d["metadata"]["name"]) != name]
    rows = [(source, target, port, "TCP") for source, target, port, _ in TABLE]
    rows += [(Pod(name[0], {"app": "new"}), DNS, 53, "UDP"), (STRANGER, Pod(name[0], {"app": "new"}), 8080, "TCP")]
    assert any(allowed(without, *row) is not allowed(POLICIES, *row) for row in rows)


@pytest.mark.parametrize("source", [STEP, CONTROLLER, METADATA, UI, SERVER, INTRUDER])
@pytest.mark.parametrize("target", [DNS, DNS_CACHE, "169.254.20.10", GKE_METADATA])
def test_everybody_may_ask_for_names(source: Pod, target: Peer) -> None:
    for protocol in ("UDP", "TCP"):
        assert allowed(PLATFORM, source, target, 53, protocol)
    assert not allowed(PLATFORM, source, DNS, 8080)


@pytest.mark.parametrize("namespace", sorted(rules.NAMESPACES))
def test_each_namespace_denies_by_default(namespace: str) -> None:
    (deny,) = [
        d for d in PLATFORM if d["metadata"]["name"] == "default-deny" and d["metadata"]["namespace"] == namespace
    ]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


# ── Schemas and scanners ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kubernetes_knows_every_field(minor: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    checked = [document for document in documents() if document["kind"] not in CUSTOM]
    for document in checked:
        validate(document, minor, strict=True)
    assert len(checked) >= 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kubernetes_would_refuse_a_wrong_field() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    change: Change = (("Deployment", "metaflow-ui"), ("spec", "template", "spec", "containers", 0, "readinesProbe"), {})
    (wrong,) = [d for d in broken(PLATFORM, change) if (d["kind"], d["metadata"]["name"]) == change[0]]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, MINORS[-1], strict=True)


CHECKOV = os.environ.get("CHECKOV") or shutil.which("checkov")
TRIVY = os.environ.get("TRIVY") or shutil.which("trivy")

# Each check of checkov that is waived, and why.
WAIVED = {
    "CKV_K8S_15": "imagePullPolicy Always would ask the registry at every start; the tags are exact",
    "CKV_K8S_9": "vLLM listens on loopback; the gateway beside it is ready when both are",
    "CKV_K8S_43": "images.lock has the digest once a registry was asked; none is invented",
}


@pytest.mark.skipif(CHECKOV is None, reason="make e2e sets checkov up; or name one by CHECKOV")
def test_checkov_finds_nothing() -> None:
    command = [str(CHECKOV), "-d", str(RENDERED), "--framework", "kubernetes", "--output", "json", "--compact"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    report = json.loads(found.stdout)
    failed = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    assert {check for check, _ in failed} == WAIVED.keys(), sorted(failed)
    assert report["summary"]["passed"] > 100


@pytest.mark.skipif(TRIVY is None, reason="make e2e sets trivy up; or name one by TRIVY")
@pytest.mark.parametrize("folder", ["infra/rendered", "image"])
def test_trivy_finds_nothing(folder: str, tmp_path: Path) -> None:
    command = [str(TRIVY), "config", "--skip-check-update", "--cache-dir", str(tmp_path), "--format", "json", folder]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    results = json.loads(found.stdout)["Results"]
    assert [m["Message"] for result in results for m in result.get("Misconfigurations", [])] == []
    assert sum(result["MisconfSummary"]["Successes"] for result in results) > 50


# ── Rendering again ──────────────────────────────────────────────────────────────────────────────────────────


def test_rendered_is_what_the_templates_say() -> None:
    files = render.platform(outputs.read(EXAMPLE), render.read_lock(render.lock_file()))
    assert render.diff(files, RENDERED / "platform") == "", "make it again: tuneship render (infra/README.md)"


def test_every_name_is_an_output() -> None:
    declared = set(re.findall(r'^output "(\w+)"', (ROOT / "infra/terraform/outputs.tf").read_text(), re.MULTILINE))
    assert set(outputs.Outputs.model_fields) == declared
    assert set(json.loads(EXAMPLE.read_text())) == declared
    used = {
        name
        for path in (render.templates() / "platform").rglob("*.yaml")
        for name in re.findall(r"\$\{(\w+)\}", path.read_text())
    }
    assert used <= declared
    assert len(used) >= 16


def test_the_lock_has_every_image() -> None:
    assert set(render.read_lock(render.lock_file())) == set(render.image_names())


def test_it_is_quick() -> None:
    begin = time.perf_counter()
    render.platform(outputs.read(EXAMPLE), render.read_lock(render.lock_file()))
    assert time.perf_counter() - begin < 1
