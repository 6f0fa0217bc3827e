"""The flow as Metaflow runs it: every step a process, on the tiny model; stopped, taken up again, refused, judged.

python -m pytest tests/test_flow.py -v
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_hub
import psutil
import pytest
from made_run import make_run, measured
from samples import sql_rows, tiny_recipe, write_rows
from zygote import Commands, Finished, Process, until

from tuneship import journal
from tuneship import recipe as recipes

STEPS = ["start", "prepare", "train", "evaluate", "publish", "end"]
UPDATES = 120
CANARY = "hf_" + "CANARYsings0123456789"
# Six processes that import torch, on a machine that others use too.
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Place:
    """A folder with a recipe, and Metaflow's own folders in it."""

    folder: Path
    commands: Commands
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def metaflow(self) -> dict[str, str]:
        own = {"METAFLOW_HOME": "home", "METAFLOW_DATASTORE_SYSROOT_LOCAL": "store"}
        return {name: str(self.folder / folder) for name, folder in own.items()}

    def start(self, *arguments: str) -> Process:
        environment = {**self.metaflow, **self.environment}
        return self.commands.start(["run", *arguments], cwd=self.folder, env=environment)

    def run(self, *arguments: str) -> Finished:
        return self.start(*arguments).wait(deadline_s=DEADLINE_S)


def steps_started(finished: Finished) -> list[str]:
    return re.findall(r"\[\d+/(\w+)/\d+ \(pid \d+\)\] Task is starting", finished.err)


@dataclass(frozen=True)
class Story:
    """One run, stopped during training by a signal, and started once more; a token in its environment."""

    place: Place
    run: Path
    hub: fake_hub.Hub
    stopped: Finished
    updates_when_stopped: list[dict[str, Any]]
    finished: Finished
    commands_seen: set[str]
    """The command lines of the processes that ran."""


@pytest.fixture(scope="module")
def story(
    commands: Commands, tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    recipe = tiny_recipe(
        tiny_base,
        rows_file,
        train={"max_steps": UPDATES, "save_steps": 50},
        evaluate={"max_rows": 3, "few_shot": 0},
        publish={"folder": "published", "hub_model_id": "user/tiny"},
        # For the cluster; on this machine it has no effect.
        cluster={"image": "europe-docker.pkg.dev/example/train:1"},
    )
    folder = tmp_path_factory.mktemp("flow")
    (folder / "my.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    run = folder / "runs" / "tiny-test"
    seen: set[str] = set()

    def training(process: Process) -> bool:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                seen.add(" ".join(child.cmdline()))
        return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0

    with pytest.MonkeyPatch.context() as patch, fake_hub.serving() as hub:
        patch.setattr(fake_hub, "TOKEN", CANARY)
        place = Place(folder, commands, {**hub.environment, "HF_TOKEN": CANARY, "HF_HOME": str(folder / "hub")})
        process = place.start("my.yaml", "--json")
        until(lambda: process.ended() or training(process), deadline_s=DEADLINE_S)
        process.send(signal.SIGTERM)
        stopped = process.wait(deadline_s=DEADLINE_S)
        assert stopped.code == 75, stopped.err
        updates = journal.read_run(run).metrics()
        yield Story(place, run, hub, stopped, updates, place.run("my.yaml", "--json"), seen)


def test_a_signal_saves_and_ends_with_75(story: Story) -> None:
    assert 1 <= len(story.updates_when_stopped) < UPDATES
    assert len(re.findall(r"^error: stopped by SIGTERM", story.stopped.err, re.MULTILINE)) == 1
    assert steps_started(story.stopped) == STEPS[:3]
    assert story.stopped.out == ""


@pytest.mark.parametrize(
    ("step", "number"), [("start", signal.SIGINT), ("prepare", signal.SIGTERM), ("train", signal.SIGHUP)]
)
def test_a_stop_ends_the_flow_where_a_step_has_only_begun(
    commands: Commands, tmp_path: Path, make_recipe: Callable[..., Any], step: str, number: signal.Signals
) -> None:
    (tmp_path / "my.yaml").write_text(recipes.dump(make_recipe()), encoding="utf-8")
    process = Place(tmp_path, commands).start("my.yaml")
    until(lambda: f"/{step}/" in process.err() and "Task is starting" in process.err().rpartition(f"/{step}/")[2])
    process.send(number)
    finished = process.wait(deadline_s=DEADLINE_S)
    assert finished.code == 75, finished.err
    assert len(re.findall(r"^error: stopped by SIG", finished.err, re.MULTILINE)) == 1
    assert set(steps_started(finished)) <= set(STEPS[: STEPS.index(step) + 1])
    assert not (tmp_path / "runs" / "tiny-test" / "adapter").exists()


def test_the_same_command_goes_on_to_the_end(story: Story) -> None:
    assert story.finished.code == 0, story.finished.err
    assert steps_started(story.finished) == STEPS
    updates = journal.read_run(story.run).metrics()
    assert [line["step"] for line in updates] == list(range(1, UPDATES + 1))
    # The updates before the signal were not made again.
    assert updates[: len(story.updates_when_stopped)] == story.updates_when_stopped
    for name in ("adapter/adapter_model.safetensors", "evaluation.json", "report.html", "provenance.json"):
        assert (story.run / name).exists(), name
    assert (story.place.folder / "published" / "adapter_model.safetensors").exists()
    assert "adapter_model.safetensors" in story.hub.repos["models", "user/tiny"].head.files


def test_the_result_alone_is_on_stdout(story: Story) -> None:
    result = json.loads(story.finished.out)
    written = journal.read_json(story.run / "evaluation.json")
    del written["rows"]
    assert result == written
    assert "next: tuneship serve runs/tiny-test" in story.finished.err


READ = """
import json, sys
from metaflow import Flow, namespace
namespace(None)
run = Flow("FinetuneFlow").latest_run
plain = (dict, list, tuple, str, int, float, bool, type(None))
def check(value, where):
    assert type(value) in plain or type(value).__name__ == "ConfigValue", (where, type(value))
    if isinstance(value, (list, tuple)):
        for inner in value: check(inner, where)
    elif not isinstance(value, (str, int, float, type(None))):
        for key in value: check(value[key], f"{where}.{key}")
kept = {}
for step in run:
    for artifact in step.task:
        if not artifact.id.startswith("_"):
            check(artifact.data, f"{step.id}.{artifact.id}")
            kept[artifact.id] = artifact.data
print(json.dumps({"successful": run.successful, "steps": [step.id for step in run][::-1], "kept": kept}))
"""


def test_artifacts_are_plain_values(story: Story) -> None:
    command = [sys.executable, "-W", "ignore", "-c", READ]
    environment = {**story.place.metaflow, "PATH": "/usr/bin:/bin", "USERNAME": "reader"}
    done = subprocess.run(command, cwd=story.place.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["successful"] is True
    assert told["steps"] == STEPS
    assert {"recipe", "prepared", "trained", "evaluation", "published"} <= set(told["kept"])
    assert told["kept"]["recipe"]["name"] == "tiny-test"
    assert told["kept"]["evaluation"] == json.loads(story.finished.out)
    assert told["kept"]["trained"]["updates"] == UPDATES


def test_the_card_is_the_report(story: Story) -> None:
    cards = [card for card in story.place.folder.rglob("*.html") if "mf.cards" in card.parts]
    assert len(cards) == 1
    assert "evaluate" in cards[0].parts
    data = re.search(r'__MF_DATA__\["[\w-]+"\] = "([A-Za-z0-9+/=]+)"', cards[0].read_text(encoding="utf-8"))
    assert data is not None
    (page,) = json.loads(base64.b64decode(data[1]))["components"]
    shown = re.search(r'srcdoc="([^"]*)"', page["contents"][0]["data"])
    assert shown is not None
    assert html.unescape(shown[1]) == (story.run / "report.html").read_text(encoding="utf-8")


def test_s1_no_token_is_left_in_the_datastore(story: Story) -> None:
    assert any(request.token == CANARY for request in story.hub.requests)
    for finished in (story.stopped, story.finished):
        assert CANARY not in finished.out + finished.err
    # Metaflow's runtime and its steps.
    assert any("flow.py" in line and " step " in line for line in story.commands_seen)
    assert not any(CANARY in line for line in story.commands_seen)
    holders, blobs = [], 0
    for file in story.place.folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            if content[:2] == b"\x1f\x8b":
                # An artifact: a pickle, in which texts are as they are.
                content, blobs = content + gzip.decompress(content), blobs + 1
            if CANARY.encode() in content:
                holders.append(file)
    assert blobs > 10
    assert holders == []


def test_the_merged_model_is_made_where_it_is_to_be_published(story: Story) -> None:
    finished = story.place.run("my.yaml", "--set", "publish.merged=true", "--set", "publish.folder=whole")
    assert finished.code == 0, finished.err
    assert {"model.safetensors", "proof.json"} <= {file.name for file in (story.place.folder / "whole").iterdir()}


def test_the_gates_no_publishes_nothing_and_ends_with_4(story: Story) -> None:
    arguments = ["--set", "evaluate.gate.min_score=1.0", "--set", "publish.folder=elsewhere"]
    finished = story.place.run("my.yaml", *arguments)
    assert finished.code == 4, finished.err
    # The flow itself is done: a no is a result.
    assert steps_started(finished) == STEPS
    assert len(re.findall(r"^error: the gate said no: ", finished.err, re.MULTILINE)) == 1
    assert not (story.place.folder / "elsewhere").exists()


PUBLISH = """
import sys
from pathlib import Path
from tuneship import flow, journal
from tuneship.errors import InputError
run = journal.read_run(Path(sys.argv[1]))
for content in sys.argv[2:]:
    run.evaluation_file.write_text(content)
    try:
        flow._publish(run)
    except InputError as error:
        print(error.where)
"""


def test_an_evaluation_that_another_pod_left_damaged_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    gateless = json.dumps({**measured(0.8), "rows": []})
    contents = ["{}", "[]", '{"rows"', gateless, json.dumps({**measured(0.8), "rows": [], "gate": "passed"})]
    # In a process of its own: importing Metaflow here would warn, and stay.
    argv = [sys.executable, "-W", "ignore", "-c", PUBLISH, str(run), *contents]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.splitlines() == [str(run / "evaluation.json")] * len(contents)


STAGE = """
import sys
from types import SimpleNamespace
from tuneship import flow, recipe
made = recipe.load(sys.argv[1]).model_dump(mode="json")
with flow._stage(SimpleNamespace(recipe=made, run="run")):
    raise RuntimeError("refused: " + sys.argv[2])
"""


def test_s1_a_defect_in_a_step_is_shown_without_its_token(tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    (tmp_path / "my.yaml").write_text(recipes.dump(make_recipe()), encoding="utf-8")
    argv = [sys.executable, "-W", "ignore", "-c", STAGE, "my.yaml", CANARY]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: refused: " in done.stderr and CANARY not in done.stderr


def test_wrong_input_is_told_once_and_never_tried_again(
    commands: Commands, tmp_path: Path, make_recipe: Callable[..., Any]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*sql_rows(20), {"question": "q", "context": "c"}])
    (tmp_path / "my.yaml").write_text(recipes.dump(make_recipe(data={"dataset_name": str(rows)})), encoding="utf-8")
    finished = Place(tmp_path, commands).run("my.yaml")
    assert finished.code == 2, finished.err
    assert finished.out == ""
    message = rf"^error: 1 bad row:\n    row 21: answer is missing.*\n  where: {rows}\n  fix:   "
    assert len(re.findall(message, finished.err, re.MULTILINE)) == 1
    assert len(re.findall(r"^error: ", finished.err, re.MULTILINE)) == 1
    assert "Traceback" not in finished.err
    # Metaflow's own word, where a step ends with METAFLOW_EXIT_DISALLOW_RETRY.
    assert "This failed task will not be retried" in finished.err
    assert steps_started(finished) == ["start", "prepare"]
