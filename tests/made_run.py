"""A run's folder, as far as deploy looks at it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tuneship import journal
from tuneship.cluster import fetch

IMAGE = "us-central1-docker.pkg.dev/my-project/tuneship/tuneship:0.1.0"


def measured(score: float, gain: float = 0.1) -> dict[str, Any]:
    """What evaluate would have written, as far as the gate looks at it."""
    scores = [{"score": score, "rows": 10}]
    return {"metric": "execution_accuracy", "split": "test", "scores": scores, "gain": {"value": gain}}


def make_run(folder: Path) -> Path:
    """A run that has an adapter, a merged model, and has passed its gate."""
    for part in ("adapter", "merged"):
        (folder / part).mkdir(parents=True)
        about = {"base": {"name": "google/gemma-2-9b", "revision": "0" * 40, "fingerprint": "1" * 64}}
        journal.write_json(folder / part / "tuneship.json", about)
        journal.write_json(folder / part / "prompt.json", {"template": "{question}{answer}"})
    journal.write_json(folder / "adapter" / "adapter_config.json", {"r": 4})
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    recipe = {
        "name": "sql",
        "model": {"model_name_or_path": "google/gemma-2-9b"},
        "data": {"dataset_name": "builtin:text-to-sql"},
        "cluster": {"image": IMAGE, "accelerator": "nvidia-l4"},
    }
    journal.write_json(folder / "recipe.json", recipe)
    journal.write_json(folder / "evaluation.json", measured(0.8))
    return folder


def another(run: Path, weights: bytes = b"other weights") -> Path:
    """The run, trained again."""
    folder = Path(shutil.copytree(run, run.with_name(f"run-{len(weights)}")))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    return folder


def name(run: Path, part: str = "adapter") -> str:
    """What the run is called where it is served."""
    return f"sql-{fetch.digest(run / part)[:12]}"
