"""What infra/rendered/serving shows: an adapter of Gemma 2 9B on one A100, and the one before it still at hand.

python tests/infra/serving_example.py      renders it again
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneship.cluster import outputs, render, serving
from tuneship.cluster.render import Files
from tuneship.cluster.served import Adapter, Served, Settings
from tuneship.recipe import Serve

ROOT = Path(__file__).parents[2]
RENDERED = ROOT / "infra" / "rendered" / "serving"
OUTPUTS = outputs.read(ROOT / "infra" / "example-outputs.json")
NEW, OLD = "gemma2-9b-a100-1f2e3d4c5b6a", "gemma2-9b-a100-9c3b2a190817"


def adapter(**changes: Any) -> Adapter:
    about: dict[str, Any] = {
        "uri": f"gs://{OUTPUTS.metaflow_datastore_bucket_name}/runs/gemma2-9b-a100/argo-finetune-2",
        "base": "google/gemma-2-9b",
        "revision": "0" * 40,
        "rank": 8,
        "merged": False,
        "contract": "5d41402abc4b2a76b9719d911017c592" * 2,
        "serve": Serve(),
        "score": 0.81,
    }
    return Adapter(**(about | changes))


def settings(**changes: Any) -> Settings:
    about: dict[str, Any] = {
        "image": f"{OUTPUTS.image_registry_url}/tuneship:0.1.0",
        "base": f"gs://{OUTPUTS.metaflow_datastore_bucket_name}/base/gemma-2-9b-bf16",
        "accelerator": "nvidia-tesla-a100",
    }
    return Settings(**(about | changes))


def served(**changes: Any) -> Served:
    before = f"gs://{OUTPUTS.metaflow_datastore_bucket_name}/runs/gemma2-9b-a100/argo-finetune-1"
    about: dict[str, Any] = {
        "model": "gemma2-9b-a100",
        "serving": NEW,
        "previous": OLD,
        "adapters": {NEW: adapter(), OLD: adapter(uri=before, score=0.78)},
        "settings": settings(),
        "history": (f"2026-11-24T10:00:00+00:00 {OLD}", f"2026-11-25T10:00:00+00:00 {NEW}"),
    }
    return Served(**(about | changes))


def rendered(**changes: Any) -> Files:
    return serving.manifests(served(**changes), OUTPUTS)


if __name__ == "__main__":
    render.write(rendered(), RENDERED)
