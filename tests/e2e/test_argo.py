"""The compiled flow really runs: created and triggered by Metaflow's own commands, executed pod by pod.

    python -m pytest tests/e2e/test_argo.py

Created on a small cloud of loopback servers (`small_cloud.py`), executed by `small_argo.py`. Shown: the
run ends, its artifacts and its card read back through Metaflow's client, the adapter lies in the
bucket. Killed in the middle of training, it goes on from the last checkpoint and does no update
twice; its losses are those of a run that nobody disturbed.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import make_gemma2, sql_rows, tiny_recipe, write_rows
from small_argo import ROOT, Attempt, Pod, mounts_work, run
from small_cloud import BUCKET, Cloud, serving

pytestmark = pytest.mark.skipif(
    not mounts_work(), reason="a pod needs mounts of its own: run as root, or allow user namespaces"
)

FLOW = ROOT / "tuneship" / "flow.py"
UPDATES = 120
IMAGE = "europe-docker.pkg.dev/p/images/finetune:1.0"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and rows, which every pod finds as if they were in its image."""
    folder = tmp_path_factory.mktemp("samples")
    make_gemma2(folder / "base")
    write_rows(folder / "rows.jsonl", sql_rows(60))
    return folder


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with serving(tmp_path_factory.mktemp("cloud")) as started:
        yield started


def recipe_tree(samples: Path, **sections: Any) -> dict[str, Any]:
    train = {"max_steps": UPDATES, "save_steps": 10, **sections.pop("train", {})}
    recipe = tiny_recipe(samples / "base", samples / "rows.jsonl", train=train, **sections)
    return recipe.model_dump(mode="json")


def create(cloud: Cloud, samples: Path, name: str, **sections: Any) -> None:
    """The tutorial's command, on a recipe of ours."""
    config = samples / f"{name}.json"
    config.write_text(json.dumps({"recipe": recipe_tree(samples, **sections), "image_name": IMAGE, "new_model": name}))
    metaflow(cloud, "--config", "config", str(config), "argo-workflows", "--name", name, "create")
    metaflow(cloud, "--config", "config", str(config), "argo-workflows", "--name", name, "trigger")


def metaflow(cloud: Cloud, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FLOW), *arguments], env=cloud.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_back(cloud: Cloud, run_id: str) -> dict[str, Any]:
    """The run as Metaflow's client sees it."""
    program = """
import json, sys
from metaflow import Run, namespace
from metaflow.cards import get_cards
namespace(None)
run = Run(f"FinetuneFlow/{sys.argv[1]}")
train = run["train"].task
print(json.dumps({
    "successful": run.successful,
    "steps": [step.id for step in run],
    "attempt": train.current_attempt,
    "train_log": run["train"].task.stdout + run["train"].task.stderr,
    "evaluation": run["evaluate"].task.data.evaluation,
    "adapter": run["end"].task.data.adapter,
    "card": get_cards(run["evaluate"].task)[0].get(),
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, run_id], env=cloud.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def card_data(card: str) -> str:
    """What a card shows: Metaflow embeds it in base64."""
    parts = re.findall(r'"([A-Za-z0-9+/=]{200,})"', card)
    return "".join(base64.b64decode(part).decode("utf-8", "ignore") for part in parts if len(part) % 4 == 0)


def content(cloud: Cloud, name: str) -> bytes:
    from urllib.request import urlopen

    with urlopen(f"{cloud.gcs}/download/storage/v1/b/{BUCKET}/o/{name.replace('/', '%2F')}?alt=media") as answer:
        return bytes(answer.read())


def losses(lines: bytes) -> dict[int, float]:
    found = [json.loads(line) for line in lines.splitlines()]
    steps = [line["step"] for line in found]
    assert steps == list(range(1, UPDATES + 1)), "each update once, in order"
    return {line["step"]: line["loss"] for line in found}


@pytest.fixture(scope="module")
def undisturbed(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same recipe on one machine."""
    folder = tmp_path_factory.mktemp("here") / "run"
    program = (
        "import json, sys; from pathlib import Path\n"
        "from tuneship import recipe; from tuneship.journal import open_run\n"
        "from tuneship.prepare import prepare; from tuneship.train import train\n"
        "with open_run(Path(sys.argv[1]), recipe.validate(json.loads(sys.argv[2]), where='test')) as run:\n"
        "    prepare(run); train(run)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder.parent)}
    argv = [sys.executable, "-c", program, str(folder), json.dumps(recipe_tree(samples))]
    subprocess.run(argv, env=environment, cwd=ROOT, check=True, capture_output=True)
    return losses((folder / "metrics.jsonl").read_bytes())


def pods(attempts: list[Attempt]) -> list[tuple[str, int, int]]:
    return [(attempt.step, attempt.number, attempt.code) for attempt in attempts]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 137), (signal.SIGTERM, 75)])
def test_a_training_pod_stopped_in_the_middle_goes_on(
    cloud: Cloud, samples: Path, undisturbed: dict[int, float], tmp_path: Path, number: int, code: int
) -> None:
    name = f"stopped-{code}"
    # A merged model is made where the GPU and the base are, an adapter published by a pod without one.
    merged = number == signal.SIGTERM
    create(cloud, samples, name, publish={"folder": f"gs://{BUCKET}/published/{name}", "merged": merged})
    workflow = cloud.workflows()[-1]
    run_id = f"argo-{workflow['metadata']['name']}"

    def stop_it(pod: Pod, line: str) -> None:
        if pod.step == "train" and pod.number == 0 and f"updates 20/{UPDATES}" in line:
            pod.send(number)

    succeeded, attempts = run(workflow, cloud.template(name), cloud, tmp_path, keep=[samples], listen=stop_it)
    logs = "\n".join(f"== {attempt.step} {attempt.number}\n{attempt.log}" for attempt in attempts)
    print(logs)
    assert succeeded, logs
    assert pods(attempts) == [
        ("start", 0, 0),
        ("prepare", 0, 0),
        ("train", 0, code),
        ("train", 1, 0),
        ("evaluate", 0, 0),
        ("publish", 0, 0),
        ("end", 0, 0),
    ], logs
    assert "going on after update" in attempts[3].log

    place = f"runs/{name}/{run_id}"
    assert losses(content(cloud, f"{place}/metrics.jsonl")) == undisturbed
    seen = read_back(cloud, run_id)
    assert seen["successful"] and seen["attempt"] == 1
    assert seen["steps"][::-1] == ["start", "prepare", "train", "evaluate", "publish", "end"]
    assert "going on after update" in seen["train_log"]
    assert seen["evaluation"]["gate"]["passed"]
    page = card_data(seen["card"])
    assert "<iframe" in page and name in page
    assert seen["adapter"] == f"gs://{BUCKET}/{place}/adapter"
    assert f"{place}/adapter/adapter_model.safetensors" in cloud.names(place)
    weights = "model.safetensors" if merged else "adapter_model.safetensors"
    assert f"published/{name}/{weights}" in cloud.names("published")
    assert ("published to" in attempts[3].log) == merged


def test_rows_that_are_wrong_are_not_tried_again(cloud: Cloud, samples: Path, tmp_path: Path) -> None:
    (samples / "bad.jsonl").write_text('{"question": "How many?", "context": "CREATE TABLE t (n INTEGER)"}\n')
    create(cloud, samples, "wrong-rows", data={"dataset_name": str(samples / "bad.jsonl")})
    workflow = cloud.workflows()[-1]
    succeeded, attempts = run(workflow, cloud.template("wrong-rows"), cloud, tmp_path, keep=[samples])
    assert not succeeded
    assert pods(attempts) == [("start", 0, 0), ("prepare", 0, 2)], attempts[-1].log
    assert "row 1" in attempts[-1].log and "answer" in attempts[-1].log
