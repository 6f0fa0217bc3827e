"""The WorkflowTemplate that Metaflow's own commands deploy: what is in it, and what `submit` does around them.

Created for real, against a small cloud on loopback; tests/e2e/test_argo.py executes one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tools
import pytest
from hera.workflows.models import WorkflowTemplate
from small_cloud import Cloud, serving

from tuneship import recipe as recipes
from tuneship.cluster import argo, commands, template
from tuneship.cluster.kept import place
from tuneship.errors import InputError, OutsideError, TuneshipError
from tuneship.recipe import Cluster

ROOT = Path(__file__).parents[2]
IMAGE = "us-docker.pkg.dev/my-project/metaflow-tutorial-tf/finetune@sha256:" + "0" * 64
CANARY = "hf_canary0000000000000000"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with serving(tmp_path_factory.mktemp("cloud")) as started:
        yield started


def metaflow(cloud: Cloud, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "tuneship" / "flow.py"), *arguments]
    return subprocess.run(
        argv, env=cloud.environment | {"HF_TOKEN": CANARY}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def compiled(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the tutorial's config file, by the tutorial's command."""
    config = tmp_path_factory.mktemp("flow") / "finetune_flow_config.json"
    config.write_text(json.dumps({"image_name": IMAGE, "new_model": "finetunned-gemma2-9b"}))
    done = metaflow(cloud, "--config", "config", str(config), "argo-workflows", "create")
    assert done.returncode == 0, done.stdout + done.stderr
    return cloud.template("finetuneflow")


def steps(compiled: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in compiled["spec"]["templates"] if "container" in entry}


def test_argos_own_models_accept_it(compiled: dict[str, Any]) -> None:
    WorkflowTemplate.model_validate(compiled)


def test_one_pod_asks_for_a_gpu(compiled: dict[str, Any]) -> None:
    asking = {
        name: entry["container"]["resources"]["limits"]["nvidia.com/gpu"]
        for name, entry in steps(compiled).items()
        if "nvidia.com/gpu" in entry["container"]["resources"]["limits"]
    }
    assert asking == {"train": "1"}
    assert {name: entry["nodeSelector"] for name, entry in steps(compiled).items() if entry.get("nodeSelector")} == {
        "train": {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    }
    assert steps(compiled)["train"]["container"]["resources"]["requests"] == {
        "cpu": "8.0",
        "memory": "49152M",
        "ephemeral-storage": "81920M",
    }


def test_retries_are_for_what_may_be_better_the_next_time(compiled: dict[str, Any]) -> None:
    strategies = {name: entry["retryStrategy"] for name, entry in steps(compiled).items() if "retryStrategy" in entry}
    assert {name: strategy["limit"] for name, strategy in strategies.items()} == {
        "prepare": 2,
        "train": 4,
        "evaluate": 2,
        "publish": 2,
    }
    assert {strategy["expression"] for strategy in strategies.values()} == {
        "asInt(lastRetry.exitCode) != 2 && asInt(lastRetry.exitCode) != 4 && asInt(lastRetry.exitCode) != 202"
    }


def test_every_pod_is_restricted_on_a_read_only_root(compiled: dict[str, Any]) -> None:
    assert compiled["spec"]["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert len(steps(compiled)) == 7, "six steps, and the hook that tells why a run failed"
    for name, entry in steps(compiled).items():
        container = entry["container"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }, name
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {"/mnt/work", "/tmp"} <= mounts.keys()
        assert {volume["name"] for volume in entry["volumes"] if "emptyDir" in volume} >= set(mounts.values())
        assert container["workingDir"] == "/mnt/work"
        assert container["image"] == IMAGE
        assert {"name": "METAFLOW_SKIP_INSTALL_DEPENDENCIES", "value": "1"} in container["env"]
        assert entry["serviceAccountName"] == "metaflow-argo"


def test_the_training_has_time_to_save(compiled: dict[str, Any]) -> None:
    train = steps(compiled)["train"]
    assert json.loads(train["podSpecPatch"]) == {"terminationGracePeriodSeconds": 60}
    script = train["container"]["command"][-1]
    assert script.startswith("trap : TERM; ") and script.count("trap '' TERM") == 2


def test_secrets_are_named_and_never_in_it(cloud: Cloud, compiled: dict[str, Any]) -> None:
    named = {name: [s["secretRef"]["name"] for s in e["container"]["envFrom"]] for name, e in steps(compiled).items()}
    assert {name for name, secrets in named.items() if secrets} == {"prepare", "train", "publish"}
    assert named["train"] == ["hf-token"]
    assert CANARY not in json.dumps(compiled)


def test_the_tutorials_config_is_read(cloud: Cloud) -> None:
    program = "import json, sys; from tuneship.flow import read_config; print(json.dumps(read_config(sys.argv[1])))"

    def read(text: str) -> subprocess.CompletedProcess[str]:
        # In a process of its own: importing Metaflow here would warn, and stay.
        argv = [sys.executable, "-c", program, text]
        return subprocess.run(argv, env=cloud.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)

    config = json.loads(read(json.dumps({"image_name": IMAGE, "new_model": "Me/Finetunned-SQL"})).stdout)
    assert config["recipe"]["model"]["model_name_or_path"] == "google/gemma-2-9b"
    assert config["recipe"]["name"] == "finetunned-sql"
    assert config["recipe"]["publish"]["hub_model_id"] == "Me/Finetunned-SQL"
    assert config["recipe"]["cluster"]["image"] == IMAGE
    assert "the flow's config is not JSON" in read("{").stderr
    assert "InputError: the flow's config is no JSON object" in read("[]").stderr
    assert "InputError: the flow's config is not JSON" in read("[" * 10_000).stderr


@pytest.mark.parametrize("content", ['{"recipe": 5}', '{"recipe": "nope"}', '{"new_model": 5}', '{"recipe"'])
def test_a_wrong_config_is_told_in_one_message(cloud: Cloud, tmp_path: Path, content: str) -> None:
    config = tmp_path / "finetune_flow_config.json"
    config.write_text(content)
    done = metaflow(cloud, "--config", "config", str(config), "show")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "\n  fix:   " in done.stderr and "Traceback" not in done.stderr


def test_spot_and_several_accelerators() -> None:
    cluster = Cluster(
        spot=True, accelerator="nvidia-h100-80gb", accelerator_fallbacks=("nvidia-a100-80gb", "nvidia-l4")
    )
    wanted = template.gpu_pod(cluster)
    assert wanted["node_selector"] == {"cloud.google.com/gke-spot": "true"}
    assert [toleration["key"] for toleration in wanted["tolerations"]] == ["cloud.google.com/gke-spot"]
    affinity = template._any_of((cluster.accelerator, *cluster.accelerator_fallbacks))["nodeAffinity"]
    required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert required[0]["matchExpressions"][0]["values"] == ["nvidia-h100-80gb", "nvidia-a100-80gb", "nvidia-l4"]
    preferred = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [entry["weight"] for entry in preferred] == [100, 67, 34]
    with pytest.raises(InputError, match="accelerator_fallbacks has no effect with gpu: 0"):
        recipes.load("tiny", overrides=["cluster.gpu=0", "cluster.accelerator_fallbacks=[nvidia-l4]"])


def test_another_script_of_metaflows_is_refused() -> None:
    pod = {"container": {"command": ["bash", "-c", "python flow.py step train"]}}
    with pytest.raises(TuneshipError, match="compiles another script"):
        template._leave_the_signal_to_the_training(pod)


def test_checkpoints_lie_where_the_bucket_forgets_them() -> None:
    kept = place("gs://bucket/metaflow", "tiny", "argo-tiny-1")
    assert kept.run == "gs://bucket/runs/tiny/argo-tiny-1"
    storage = (ROOT / "infra" / "terraform" / "storage.tf").read_text()
    assert 'checkpoint_prefix   = "checkpoints/"' in storage
    assert kept.checkpoints == "gs://bucket/checkpoints/tiny/argo-tiny-1"


# --- submit -----------------------------------------------------------------------------------


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fake_tools.Tools:
    return fake_tools.install(tmp_path, monkeypatch, "kubectl")


def sql() -> recipes.Recipe:
    return recipes.load("gemma2-9b-a100", overrides=[f"cluster.image={IMAGE}"])


def test_submit_deploys_under_the_recipes_name_and_starts_it(
    cloud: Cloud, kubectl: fake_tools.Tools, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    kubectl.answer("get secrets", out="secret/hf-token-of-another\n")
    name = argo.submit(sql(), environ=cloud.environment)
    assert name.startswith("gemma2-9b-a100-") and cloud.workflows()[-1]["metadata"]["name"] == name
    assert cloud.template("gemma2-9b-a100")["spec"]["securityContext"]["runAsNonRoot"]
    assert kubectl.calls[1] == "kubectl create --filename=-"
    assert json.loads(kubectl.inputs[1]) == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "hf-token", "namespace": "argo"},
        "type": "Opaque",
        "stringData": {"HF_TOKEN": CANARY},
    }
    assert not any(CANARY in call for call in kubectl.calls)
    said = capsys.readouterr().err
    assert "$ … the token, as a manifest | kubectl create --filename=-\n" in said and CANARY not in said


def test_a_secret_that_is_there_is_left_alone(cloud: Cloud, kubectl: fake_tools.Tools) -> None:
    kubectl.answer("get secrets", out="secret/hf-token\n")
    argo.submit(sql(), environ=cloud.environment)
    assert len(kubectl.calls) == 1


def test_only_the_hubs_secret_is_made_of_the_hubs_token(
    cloud: Cloud, kubectl: fake_tools.Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    kubectl.answer("get secrets", out="secret/hf-token\n")
    secrets = "cluster.secrets=[hf-token,database]"
    other = recipes.load("gemma2-9b-a100", overrides=[f"cluster.image={IMAGE}", secrets])
    with pytest.raises(OutsideError, match="the secret database is not in the cluster") as caught:
        argo.submit(other, environ=cloud.environment)
    assert "create secret generic database" in caught.value.fix and len(kubectl.calls) == 2


def test_a_dry_run_reaches_for_nothing(
    cloud: Cloud, kubectl: fake_tools.Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(cloud.objects)
    nowhere = cloud.environment | {"METAFLOW_SERVICE_URL": "http://127.0.0.1:9"}
    assert argo.submit(sql(), dry_run=True, environ=nowhere) == "gemma2-9b-a100-XXXXX"
    assert kubectl.calls == [] and len(cloud.objects) == before
    command = "$ python -m tuneship.flow --config config FILE argo-workflows --name gemma2-9b-a100"
    assert capsys.readouterr().err.splitlines() == [f"{command} create", f"{command} trigger"]


def test_whoever_submits_has_a_name(cloud: Cloud, kubectl: fake_tools.Tools) -> None:
    """In a container one is root, whom Metaflow takes for nobody."""
    kubectl.answer("get secrets", out="secret/hf-token\n")
    names = ("METAFLOW_USER", "USER", "USERNAME")
    nobody = {key: value for key, value in cloud.environment.items() if key not in names}
    assert argo.submit(sql(), environ=nobody)
    template = cloud.template("gemma2-9b-a100")
    assert template["metadata"]["annotations"]["metaflow/owner"] == commands.metaflow_user({})


def test_another_users_template_is_not_replaced(cloud: Cloud, kubectl: fake_tools.Tools, tmp_path: Path) -> None:
    kubectl.answer("get secrets", out="secret/hf-token\n")
    argo.submit(sql(), environ=cloud.environment)
    # Metaflow keeps the token of what one has deployed in one's own folder, where the profile is too.
    settings = {key: value for key, value in cloud.environment.items() if key.startswith("METAFLOW_")}
    (tmp_path / "config_gke.json").write_text(json.dumps(settings))
    eve = {key: value for key, value in cloud.environment.items() if key not in settings}
    eve |= {"METAFLOW_USER": "eve", "METAFLOW_HOME": str(tmp_path), "METAFLOW_PROFILE": "gke"}
    with pytest.raises(OutsideError, match="another user has deployed a template of this name") as caught:
        argo.submit(sql(), environ=eve)
    assert "--set name=" in caught.value.fix and caught.value.where == "gemma2-9b-a100"


def test_what_stops_a_submit(
    cloud: Cloud, kubectl: fake_tools.Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = len(cloud.objects)
    with pytest.raises(OutsideError, match="the secret hf-token is not in the cluster") as caught:
        argo.submit(sql(), environ=cloud.environment)
    assert "HF_TOKEN" in caught.value.fix

    with pytest.raises(OutsideError, match="metadata service does not answer") as caught:
        argo.submit(sql(), environ=cloud.environment | {"METAFLOW_SERVICE_URL": "http://127.0.0.1:9"})
    assert "tuneship connect" in caught.value.fix

    with pytest.raises(OutsideError, match="not set up for the cluster") as caught:
        argo.submit(sql(), environ={"METAFLOW_HOME": str(tmp_path)})
    assert caught.value.fix == "tuneship connect"
    assert len(cloud.objects) == before

    kubectl.answer("get secrets", out="secret/hf-token\n")
    with pytest.raises(OutsideError, match="reaches no cluster"):
        argo.submit(sql(), environ=cloud.environment | {"KUBECONFIG": os.devnull})


NO_ANSWER, NO_SECRET = "the metadata service does not answer", "the secret hf-token is not in the cluster"


@pytest.mark.parametrize(
    ("changes", "what", "where"),
    [
        ({}, NO_SECRET, "namespace team"),
        ({"METAFLOW_KUBERNETES_NAMESPACE": None}, NO_SECRET, "namespace argo"),
        ({"METAFLOW_DEFAULT_DATASTORE": "local"}, "Metaflow is not set up for the cluster", "config.json"),
        ({"METAFLOW_SERVICE_URL": None}, NO_SECRET, "namespace team"),
        ({"METAFLOW_SERVICE_URL": "nowhere"}, NO_ANSWER, "nowhere"),
        ({"METAFLOW_SERVICE_URL": "nowhere", "METAFLOW_DEFAULT_METADATA": "local"}, NO_SECRET, "namespace team"),
    ],
)
@pytest.mark.parametrize("by", ["profile", "environment"])
def test_the_settings_are_the_environments_then_the_profiles(
    cloud: Cloud,
    kubectl: fake_tools.Tools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    what: str,
    where: str,
    by: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {key: value for key, value in cloud.environment.items() if key.startswith("METAFLOW_")}
    settings["METAFLOW_KUBERNETES_NAMESPACE"] = "team"
    wanted = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    # Where the environment has them, the profile's are not looked at.
    profile = wanted if by == "profile" else dict.fromkeys(wanted, "of the profile")
    (tmp_path / "config.json").write_text(json.dumps(profile))
    with pytest.raises(OutsideError) as caught:
        argo.submit(sql(), environ={"METAFLOW_HOME": "~", **({} if by == "profile" else wanted)})
    assert caught.value.what.startswith(what) and caught.value.where.endswith(where)
    assert kubectl.calls == [f"kubectl --namespace {where[10:]} get secrets --output=name"] * (what == NO_SECRET)


FIVE = "one\ntwo\n\nthree\nfour"


@pytest.mark.parametrize(
    ("verb", "said", "what", "where"),
    [
        ("create", "Incorrect production token", "another user has deployed a template of this name", "sql"),
        ("create", "Invalid kube-config file", "Metaflow reaches no cluster", "--name sql create"),
        ("create", "kubernetes.config.ConfigException", "Metaflow reaches no cluster", "--name sql create"),
        ("create", "Max retries exceeded with url", "Metaflow reaches no cluster", "--name sql create"),
        ("create", "Connection refused", "Metaflow reaches no cluster", "--name sql create"),
        ("trigger", "sql not found", "Argo does not know the template", "sql"),
        ("create", "x not found", "Metaflow: x not found", "--name sql create"),
        ("create", FIVE, "Metaflow: two three four", "--name sql create"),
    ],
)
@pytest.mark.parametrize(("stream", "code"), [("stdout", 1), ("stderr", 2)])
def test_what_metaflow_complains_of(verb: str, said: str, what: str, where: str, stream: str, code: int) -> None:
    program = f"import sys; sys.{stream}.write({said!r}); sys.exit({code})"
    options = ["--run-id-file", "run_id"] if verb == "trigger" else []
    with pytest.raises(OutsideError) as caught:
        argo._metaflow([sys.executable, "-c", program, "argo-workflows", "--name", "sql", verb, *options], {})
    assert (caught.value.what, caught.value.where) == (what, where) and caught.value.fix


@pytest.mark.parametrize("content", ["[]", "[1]", '"x"', "null", '{"METAFLOW', "[" * 100_000])
def test_a_damaged_profile_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        argo.submit(sql(), environ={"METAFLOW_HOME": str(tmp_path)})
    assert (caught.value.where, caught.value.fix) == (str(tmp_path / "config.json"), "tuneship connect")


def test_what_makes_no_template(tmp_path: Path) -> None:
    config = tmp_path / "finetune_flow_config.json"
    with pytest.raises(InputError, match="no image for the pods") as caught:
        argo.with_image(recipes.load("tiny"), config)
    assert caught.value.fix == "tuneship image"
    with pytest.raises(InputError, match="begins with a letter"):
        argo.with_image(recipes.load("tiny", overrides=["name=9b"]), config)
    with pytest.raises(InputError, match="at most 45 letters"):
        argo.with_image(recipes.load("tiny", overrides=[f"name={'a' * 46}"]), config)
    config.write_text('{"image_name": ""}')
    with pytest.raises(InputError, match="no image for the pods"):
        argo.with_image(recipes.load("tiny", overrides=[f"name={'a' * 45}"]), config)
    config.write_text("[]")
    with pytest.raises(InputError, match="no JSON object") as caught:
        argo.with_image(recipes.load("tiny"), config)
    assert caught.value.where == str(config) and "image_name" in caught.value.fix
    config.write_text(json.dumps({"image_name": IMAGE}))
    assert argo.with_image(recipes.load("tiny"), config).cluster.image == IMAGE
    own = recipes.load("tiny", overrides=["cluster.image=my:1"])
    assert argo.with_image(own, config).cluster.image == "my:1", "the recipe's own goes first"
