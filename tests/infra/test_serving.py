"""The model server's manifests, beyond what every manifest must say (test_kubernetes.py looks at these too)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from kubernetes_policies import Peer, Pod, allowed
from serving_example import NEW, OLD, OUTPUTS, RENDERED, ROOT, adapter, rendered, served, settings

from tuneship.cluster import render, serving
from tuneship.cluster.served import Served
from tuneship.errors import InputError


def documents(files: dict[str, str]) -> list[dict[str, Any]]:
    return [document for text in files.values() for document in yaml.safe_load_all(text)]


def one(kind: str, files: dict[str, str] | None = None) -> dict[str, Any]:
    (found,) = [d for d in documents(files or rendered()) if d["kind"] == kind]
    return found


def pod(files: dict[str, str] | None = None) -> dict[str, Any]:
    spec: dict[str, Any] = one("Deployment", files)["spec"]["template"]["spec"]
    return spec


def container(name: str, files: dict[str, str] | None = None) -> dict[str, Any]:
    (found,) = [c for c in [*pod(files)["initContainers"], *pod(files)["containers"]] if c["name"] == name]
    return dict(found)


def test_rendered_is_what_the_templates_say() -> None:
    assert render.diff(rendered(), RENDERED) == "", "make it again: python tests/infra/serving_example.py"


def test_the_tutorials_names() -> None:
    found = {(d["kind"], d["metadata"]["name"]) for d in documents(rendered())}
    assert {("Deployment", "vllm-gemma-deployment"), ("Service", "llm-service"), ("ConfigMap", "vllm-config")} <= found
    service = one("Service")["spec"]
    assert service["type"] == "ClusterIP" and service["ports"][0]["port"] == 8000
    assert one("ConfigMap")["data"]["model_id"] == adapter().uri


def test_the_record_is_in_the_config_map() -> None:
    data = one("ConfigMap")["data"]
    assert Served.model_validate_json(data["record.json"]) == served()
    assert json.loads(data["shares.json"]) == {"model": "gemma2-9b-a100", "shares": {NEW: 100, OLD: 0}}


@pytest.mark.parametrize("spot", [False, True])
def test_the_times_of_an_end_add_up(spot: bool) -> None:
    files = rendered(settings=settings(spot=spot))
    gateway, vllm = container("gateway", files), container("vllm", files)
    stop = gateway["lifecycle"]["preStop"]["sleep"]["seconds"]
    (drain,) = [float(a.removeprefix("--drain-s=")) for a in gateway["args"] if a.startswith("--drain-s=")]
    outlives = vllm["lifecycle"]["preStop"]["sleep"]["seconds"]
    (shutdown,) = [float(a.removeprefix("--shutdown-timeout=")) for a in vllm["args"] if "--shutdown-timeout" in a]
    grace = pod(files)["terminationGracePeriodSeconds"]
    assert stop + drain < outlives, "vLLM ends before the gateway has drained"
    assert outlives + shutdown < grace, "the kubelet kills before vLLM has ended"
    assert drain >= (5 if spot else 30)
    # GKE gives an ordinary pod of a Spot node 15 seconds.
    assert grace <= (15 if spot else 600)


def test_only_the_gateway_is_reached() -> None:
    assert "--host=127.0.0.1" in container("vllm")["args"]
    assert "ports" not in container("vllm")
    assert [port["containerPort"] for port in container("gateway")["ports"]] == [8000]
    assert f"--engine={serving.ENGINE}" in container("gateway")["args"]
    port = serving.ENGINE.rpartition(":")[2]
    assert f"--port={port}" in container("vllm")["args"]


def test_a_start_has_half_an_hour_and_a_roll_out_more() -> None:
    start = container("vllm")["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1800
    assert one("Deployment")["spec"]["progressDeadlineSeconds"] > 1800
    assert container("gateway")["readinessProbe"]["httpGet"]["path"] == "/health"
    assert container("gateway")["livenessProbe"]["httpGet"]["path"] == "/health?live"


def test_it_scales_by_what_waits() -> None:
    scaler = one("HorizontalPodAutoscaler", rendered(settings=settings(min_replicas=2, max_replicas=5)))["spec"]
    names = [metric["pods"]["metric"]["name"] for metric in scaler["metrics"]]
    assert names == [
        "prometheus.googleapis.com|tuneship_requests_waiting|gauge",
        "prometheus.googleapis.com|vllm:num_requests_waiting|gauge",
    ]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert scaler["scaleTargetRef"]["name"] == one("Deployment")["metadata"]["name"]
    # A number of its own would undo the scaler's with every deploy.
    assert "replicas" not in one("Deployment")["spec"]


def test_the_metrics_are_collected_where_they_are() -> None:
    (endpoint,) = one("PodMonitoring")["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics" and endpoint["port"] == container("gateway")["ports"][0]["name"]


def test_shares_alone_start_no_pod_anew() -> None:
    before, after = rendered(), rendered(serving=OLD, previous=NEW)
    assert [name for name in before if before[name] != after[name]] == ["config.yaml"]
    trial = rendered(serving=OLD, previous=None, canary=NEW, share=10)
    assert [name for name in before if before[name] != trial[name]] == ["config.yaml"]
    assert json.loads(one("ConfigMap", trial)["data"]["shares.json"])["shares"] == {NEW: 10, OLD: 90}


def test_what_cannot_stand_beside_is_not_loaded() -> None:
    files = rendered(adapters={NEW: adapter(), OLD: adapter(revision="1" * 40)})
    assert not [a for a in container("vllm", files)["args"] if OLD in a]
    assert container("adapters", files)["args"] == [f"{NEW}={adapter().uri}", "/models"]


def test_a_base_in_the_bucket_is_streamed_and_one_on_the_hub_is_pinned() -> None:
    streamed = container("vllm")["args"]
    assert streamed[0].startswith("gs://") and "--load-format=runai_streamer" in streamed
    pinned = container("vllm", rendered(settings=settings(base=None)))["args"]
    assert pinned[0] == "google/gemma-2-9b" and f"--revision={adapter().revision}" in pinned
    assert not [a for a in pinned if "load-format" in a]


def test_a_merged_model_is_the_engines_only_one() -> None:
    files = rendered(adapters={NEW: adapter(merged=True, rank=0), OLD: adapter()}, settings=settings(base=None))
    args = container("vllm", files)["args"]
    assert args[:2] == [f"{adapter().uri}/merged", "--served-model-name=gemma2-9b-a100"]
    assert "--load-format=runai_streamer" in args and "--enable-lora" not in args
    assert container("gateway", files)["args"][0] == f"/models/{NEW}/merged"
    assert not [a for a in container("gateway", files)["args"] if a.startswith("--shares")]


@pytest.mark.parametrize(("rank", "told"), [(1, 1), (4, 8), (8, 8), (9, 16), (64, 64), (257, 320), (512, 512)])
def test_the_rank_is_one_that_vllm_takes(rank: int, told: int) -> None:
    assert serving.lora_rank(rank) == told


def test_a_rank_beyond_vllm_is_refused() -> None:
    with pytest.raises(InputError, match="rank 512 at most"):
        serving.lora_rank(513)


def test_spot_is_asked_for_and_tolerated_where_nobody_else_does() -> None:
    spot = served(settings=settings(spot=True))
    assert pod(serving.manifests(spot, OUTPUTS))["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod(serving.manifests(spot, OUTPUTS))["tolerations"] == []
    standard = OUTPUTS.model_copy(update={"autopilot_cluster": False})
    assert pod(serving.manifests(spot, standard))["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert "cloud.google.com/gke-spot" not in pod()["nodeSelector"]


def test_keys_are_needed_unless_said_otherwise() -> None:
    def keys(files: dict[str, str]) -> tuple[bool, bool]:
        (volume,) = [v for v in pod(files)["volumes"] if v["name"] == "keys"]
        return volume["secret"]["optional"], "--no-auth" in container("gateway", files)["args"]

    assert keys(rendered()) == (False, False)
    assert keys(rendered(settings=settings(no_auth=True))) == (True, True)


def test_the_hubs_token_is_a_file_and_only_where_an_adapter_is_there() -> None:
    assert [entry["name"] for entry in container("adapters")["env"]] == ["HOME"]
    hub = rendered(adapters={NEW: adapter(uri="hf://me/sql@" + "0" * 40), OLD: adapter(revision=None)})
    assert [entry["name"] for entry in container("adapters", hub)["env"]] == ["HOME", "HF_TOKEN_FILE"]


SERVER = Pod("serving", {"app": "gemma-server"})
CLIENT = Pod("default", {"llm-client": "true"})
STEP = Pod("argo", {"workflows.argoproj.io/workflow": "x"})
COLLECTOR = Pod("gke-gmp-system", {"app.kubernetes.io/name": "collector"})
STRANGER = Pod("default", {"app": "gemma-server"})
NEIGHBOUR = Pod("serving", {"app": "other"})

TABLE: list[tuple[Peer, Peer, int, bool]] = [
    (CLIENT, SERVER, 8000, True),
    (CLIENT, SERVER, 8001, False),
    (CLIENT, NEIGHBOUR, 8000, False),
    (STRANGER, SERVER, 8000, False),
    (NEIGHBOUR, SERVER, 8000, False),
    (STEP, SERVER, 8000, False),
    ("203.0.113.9", SERVER, 8000, False),
    (COLLECTOR, SERVER, 8000, True),
    (COLLECTOR, SERVER, 8001, False),
    (SERVER, "169.254.169.254", 80, True),
    (SERVER, "169.254.169.254", 443, False),
    (SERVER, "142.250.1.1", 443, True),
    (SERVER, "142.250.1.1", 80, False),
    (SERVER, "10.128.0.2", 443, False),
    (SERVER, Pod("metaflow", {"app": "metaflow-metadata"}), 8080, False),
    (SERVER, SERVER, 8000, False),
]


@pytest.fixture(scope="module")
def policies() -> list[dict[str, Any]]:
    platform = [
        d for path in (ROOT / "infra/rendered/platform").rglob("*.yaml") for d in yaml.safe_load_all(path.read_text())
    ]
    return [*platform, *documents(rendered())]


@pytest.mark.parametrize(("source", "target", "port", "expected"), TABLE)
def test_who_may_speak_to_the_model(
    policies: list[dict[str, Any]], source: Peer, target: Peer, port: int, expected: bool
) -> None:
    assert allowed(policies, source, target, port) is expected


def test_every_policy_is_needed(policies: list[dict[str, Any]]) -> None:
    mine = [d for d in documents(rendered()) if d["kind"] == "NetworkPolicy"]
    assert len(mine) == 4
    for policy in mine:
        without = [d for d in policies if d != policy]
        assert any(allowed(without, *row[:3]) is not row[3] for row in TABLE), policy["metadata"]["name"]


def test_nothing_secret_is_written() -> None:
    text = "\n".join(rendered().values())
    assert not re.search(r"hf_\w{8,}|kind: Secret\b|stringData", text)
