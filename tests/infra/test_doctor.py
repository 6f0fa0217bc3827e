"""doctor: what it finds here, and what it says to do; and the verbs' exit codes where there is no terminal."""

from __future__ import annotations

import json
from pathlib import Path

import fake_tools
import pytest
from zygote import Commands

from tuneship import doctor
from tuneship.cluster import argo, connect, outputs

EXAMPLE = Path(__file__).parents[2] / "infra" / "example-outputs.json"
BUILT = outputs.read(EXAMPLE)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("METAFLOW_HOME", "METAFLOW_PROFILE", "CLOUDSDK_CONFIG", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fixes(checks: list[doctor.Check]) -> dict[str, str]:
    return {check.name: check.fix for check in checks if not check.ok}


def test_a_bare_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools.install(home, monkeypatch)
    found = fixes(doctor.doctor(None))
    assert list(found) == ["terraform", "gcloud", "kubectl", "gke-gcloud-auth-plugin", "platform"]
    assert found["kubectl"] == "gcloud components install kubectl" and found["platform"] == "tuneship up"


def test_tools_without_a_login_or_a_cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = fake_tools.install(home, monkeypatch, "terraform", "gcloud", "kubectl", "gke-gcloud-auth-plugin")
    tools.answer("terraform version", out='{"terraform_version": "1.9.8"}')
    tools.answer("gcloud config get-value account", out="(unset)\n")
    tools.answer("kubectl config current-context", err="error: current-context is not set\n", code=1)
    found = fixes(doctor.doctor(BUILT))
    assert found == {
        "terraform": "1.11 or later: https://developer.hashicorp.com/terraform/install",
        "gcloud account": "gcloud auth login",
        "application default credentials": "gcloud auth application-default login",
        "kubectl context": "tuneship connect",
        "Metaflow profile": "tuneship connect",
        "metadata service": "keep tuneship connect running",
        "image": "tuneship image",
    }


def test_everything_there_but_the_port_forward(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = fake_tools.install(home, monkeypatch, "terraform", "gcloud", "kubectl", "gke-gcloud-auth-plugin")
    tools.answer("terraform version", out='{"terraform_version": "1.11.4"}')
    tools.answer("gcloud config get-value account", out="me@example.com\n")
    context = f"gke_{BUILT.project_id}_{BUILT.gke_cluster_location}_{BUILT.gke_cluster_name}"
    tools.answer("kubectl config current-context", out=f"{context}\n")
    credentials = home / ".config" / "gcloud" / "application_default_credentials.json"
    credentials.parent.mkdir(parents=True)
    credentials.write_text("{}")
    connect.write_profile(BUILT, connect.profile_file(None), lambda _: False)
    Path(argo.CONFIG).write_text('{"image_name": "r/p/i@sha256:0"}')
    checks = doctor.doctor(BUILT)
    assert fixes(checks) == {"metadata service": "keep tuneship connect running"}
    assert "→ keep tuneship connect running" in "\n".join(doctor.table(checks))
    assert doctor.missing(checks).exit_code == 3

    Path(argo.CONFIG).write_text("[]")
    connect.profile_file(None).write_text('{"METAFLOW_DEFAULT_DATASTORE": "s3"}')
    found = {check.name: check.found for check in doctor.doctor(BUILT)}
    assert "no JSON object" in found["image"] and "says something else" in found["Metaflow profile"]

    connect.profile_file(None).write_text("[1]")
    found = {check.name: check.found for check in doctor.doctor(BUILT)}
    assert found["Metaflow profile"].endswith("config.json: Metaflow's profile is no JSON object")


def test_verbs_end_with_the_exit_codes_of_the_contract(commands: Commands, tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    doctored = commands.run(["doctor", "--json"], cwd=tmp_path, env=bare)
    assert doctored.code == 3 and "missing, the first" in doctored.err
    assert {check["name"] for check in json.loads(doctored.out)} >= {"python", "terraform", "platform"}

    nothing_built = commands.run(["image"], cwd=tmp_path, env=bare)
    assert nothing_built.code == 2 and "no such file" in nothing_built.err
    no_tool = commands.run(["up", "--project", "my-project"], cwd=tmp_path, env=bare)
    assert no_tool.code == 3 and "terraform is not installed" in no_tool.err
    no_terminal = commands.run(["connect", "--outputs", EXAMPLE, "--no-forward"], cwd=tmp_path, env=bare)
    assert no_terminal.code == 3 and "gcloud is not installed" in no_terminal.err
    no_image = commands.run(["submit", "tiny"], cwd=tmp_path, env=bare)
    assert no_image.code == 2 and "no image for the pods" in no_image.err
    shown = commands.run(["down", "--outputs", EXAMPLE, "--dry-run", "--project", "my-project"], cwd=tmp_path, env=bare)
    assert shown.code == 0 and "terraform -chdir=" in shown.err and "destroy" in shown.err
