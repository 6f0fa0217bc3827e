"""The model server's manifests: what infra/kubernetes/serving leaves open, filled in from the record.

    files = manifests(served, outputs)

Pods differ only where what they load differs: a change of shares alone is a change of the ConfigMap
alone, so no pod starts anew for it.
"""

from __future__ import annotations

import json
from typing import Any

from tuneship.cluster import fetch, render
from tuneship.cluster.outputs import Outputs
from tuneship.cluster.render import Files
from tuneship.cluster.served import Served
from tuneship.errors import InputError

ENGINE = "http://127.0.0.1:8001"
MODELS = "/models"

# The values that vLLM takes for --max-lora-rank (MaxLoRARanks in vllm/config/lora.py).
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Seconds from SIGTERM to SIGKILL, and what they are made of: first no service sends anything any more, then the
# gateway lets running requests end, then vLLM stops. On Spot, GKE gives an ordinary pod 15 s in all.
_DRAIN = {"stop": 10, "drain": 60, "engine": 15}
_DRAIN_SPOT = {"stop": 2, "drain": 8, "engine": 3}


def manifests(served: Served, outputs: Outputs) -> Files:
    """The rendered files."""
    values = outputs.model_dump() | _values(served, outputs)
    return render.render(render.templates() / "serving", values, images=render.read_lock(render.lock_file()))


def _values(served: Served, outputs: Outputs) -> dict[str, Any]:
    settings = served.settings
    serving = served.adapters[served.serving]
    drain = _DRAIN_SPOT if settings.spot else _DRAIN
    selector = {"cloud.google.com/gke-accelerator": settings.accelerator}
    tolerations = []
    if settings.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        if not outputs.autopilot_cluster:
            # Autopilot sets it; a tainted pool of a Standard cluster wants to be told.
            tolerations = [
                {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
            ]
    return {
        "model_id": serving.uri,
        "shares": json.dumps({"model": served.model, "shares": served.shares}, indent=2),
        "record": served.model_dump_json(indent=2),
        "image": settings.image,
        "fetch_args": [*_fetched(served), MODELS],
        "fetch_env": _fetch_env(served),
        "vllm_args": vllm_args(served),
        "gateway_args": _gateway_args(served, drain["drain"]),
        "node_selector": selector,
        "tolerations": tolerations,
        "vllm_resources": _resources(served),
        # The base from the Hub lies on the disk first; from the bucket it goes past it.
        "cache_size": "20Gi" if _streamed(served) else "80Gi",
        "no_auth": settings.no_auth,
        "min_replicas": settings.min_replicas,
        "max_replicas": settings.max_replicas,
        "gateway_pre_stop_s": drain["stop"],
        # The gateway takes a second more to tell those whom it cuts off.
        "vllm_pre_stop_s": drain["stop"] + drain["drain"] + 1,
        "grace_s": drain["stop"] + drain["drain"] + 1 + drain["engine"],
    }


def vllm_args(served: Served) -> list[str]:
    """What `vllm serve` is started with."""
    settings, serving = served.settings, served.adapters[served.serving]
    if serving.merged:
        model, name, lora = f"{serving.uri}/merged", served.model, []
    else:
        model, name = settings.base or serving.base, "base"
        ranks = [adapter.rank for adapter in served.loaded.values()]
        lora = [
            "--enable-lora",
            f"--max-loras={len(served.loaded)}",
            f"--max-lora-rank={lora_rank(max(ranks))}",
            "--lora-modules",
            *(f"{name}={MODELS}/{name}/adapter" for name in served.loaded),
        ]
    if _streamed(served):
        load = ["--load-format=runai_streamer", '--model-loader-extra-config={"concurrency":16}']
    else:
        load = [f"--revision={serving.revision}"] if serving.revision else []
    return [
        model,
        f"--served-model-name={name}",
        "--host=127.0.0.1",
        "--port=8001",
        "--dtype=bfloat16",
        f"--tensor-parallel-size={settings.gpu}",
        f"--max-model-len={serving.serve.max_model_len}",
        f"--max-num-seqs={serving.serve.max_num_seqs}",
        "--shutdown-timeout=1",
        *load,
        *lora,
    ]


def lora_rank(rank: int) -> int:
    """The least rank that vLLM can be told and that holds this one.

    Raises:
        InputError: there is none.
    """
    for allowed in _RANKS:
        if allowed >= rank:
            return allowed
    raise InputError(
        f"vLLM serves adapters of rank {_RANKS[-1]} at most, and this one has {rank}",
        where="lora.r",
        fix="tuneship export merges it into the base; deploy that with --merged",
    )


def _streamed(served: Served) -> bool:
    return served.settings.base is not None or served.adapters[served.serving].merged


def _fetched(served: Served) -> list[str]:
    return [f"{name}={one.uri}{'/merged' if one.merged else ''}" for name, one in served.loaded.items()]


def _fetch_env(served: Served) -> list[dict[str, str]]:
    home = {"name": "HOME", "value": "/tmp"}  # noqa: S108 - an emptyDir of the pod's own
    if any(one.uri.startswith(fetch.HUB) for one in served.loaded.values()):
        return [home, {"name": "HF_TOKEN_FILE", "value": "/var/run/secrets/hub/HF_TOKEN"}]
    return [home]


def _gateway_args(served: Served, drain_s: int) -> list[str]:
    keys = ["--no-auth"] if served.settings.no_auth else ["--api-key-file=/etc/tuneship/keys/keys"]
    if served.adapters[served.serving].merged:
        folders = [f"{MODELS}/{served.serving}/merged"]
    else:
        folders = [*(f"{MODELS}/{name}" for name in served.loaded), "--shares=/etc/tuneship/serving/shares.json"]
    return [
        *folders,
        "--host=0.0.0.0",
        "--port=8000",
        f"--engine={ENGINE}",
        f"--drain-s={drain_s}",
        *keys,
    ]


def _resources(served: Served) -> dict[str, Any]:
    gpus = served.settings.gpu
    # The streamer's buffer, CUDA's own memory and /dev/shm; the weights are on the GPU.
    wants = {
        "cpu": str(4 * gpus),
        "memory": f"{24 * gpus}Gi",
        "ephemeral-storage": "25Gi" if _streamed(served) else "90Gi",
        "nvidia.com/gpu": str(gpus),
    }
    return {"requests": wants, "limits": wants}
