"""connect and image: the profile, port-forwards that die and come back, the digest that is recorded."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import fake_tools
import pytest

from tuneship.cluster import connect, outputs
from tuneship.cluster import image as images
from tuneship.cluster.connect import Forward, forwards, keep_alive, profile, profile_file, write_profile
from tuneship.errors import InputError, OutsideError

BUILT = outputs.read(Path(__file__).parents[2] / "infra" / "example-outputs.json")
DIGEST = "sha256:" + "ab" * 32


def no(_: str) -> bool:
    return False


def test_the_profile_is_the_tutorials() -> None:
    names = "DEFAULT_METADATA SERVICE_URL SERVICE_INTERNAL_URL DEFAULT_DATASTORE DATASTORE_SYSROOT_GS"
    names += " KUBERNETES_NAMESPACE KUBERNETES_SERVICE_ACCOUNT KUBERNETES_DISK"
    assert list(profile(BUILT)) == [f"METAFLOW_{name}" for name in names.split()]
    assert profile(BUILT)["METAFLOW_SERVICE_INTERNAL_URL"] == "http://metaflow-metadata-svc.metaflow:8080/"


def test_the_profile_lies_where_metaflow_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFLOW_HOME", str(tmp_path))
    assert profile_file(None) == tmp_path / "config.json"
    assert profile_file("gke") == tmp_path / "config_gke.json"
    monkeypatch.delenv("METAFLOW_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_file(None) == tmp_path / ".metaflowconfig" / "config.json"


def test_another_profile_is_never_written_over_without_asking(tmp_path: Path) -> None:
    file = tmp_path / "home" / "config.json"
    write_profile(BUILT, file, no)
    assert json.loads(file.read_text()) == profile(BUILT)
    write_profile(BUILT, file, no)

    file.write_text('{"METAFLOW_DEFAULT_DATASTORE": "s3"}')
    with pytest.raises(InputError, match="left alone"):
        write_profile(BUILT, file, no)
    write_profile(BUILT, file, no, dry_run=True)
    assert file.read_text() == '{"METAFLOW_DEFAULT_DATASTORE": "s3"}'
    write_profile(BUILT, file, lambda _: True)
    assert json.loads(file.read_text()) == profile(BUILT)


def test_a_profile_that_is_no_text_is_written_over_like_another(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"{\xff")
    with pytest.raises(InputError, match="another Metaflow profile is there"):
        write_profile(BUILT, file, lambda _: False)
    write_profile(BUILT, file, lambda _: True)
    assert json.loads(file.read_text()) == profile(BUILT)


def test_port_forwards_that_die_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connect, "LONGEST_PAUSE_S", 0.03)
    tools = fake_tools.install(tmp_path, monkeypatch, "kubectl")
    for _ in range(4):
        tools.answer("svc/argo-server", err="error: lost connection to pod\n", code=1)
    tools.answer("svc/argo-server", stay=True)
    tools.answer("svc/metaflow-ui-svc", stay=True)

    def all_of_them() -> bool:
        return sum("argo-server" in call for call in tools.calls) == 5 and len(tools.calls) == 6

    with fake_tools.pressed((all_of_them, signal.SIGTERM)):
        keep_alive([Forward("argo", "argo-server", 2746), Forward("metaflow", "metaflow-ui-svc", 8083)], pause_s=0.01)
    assert tools.calls.count("kubectl --namespace argo port-forward svc/argo-server 2746:2746") == 5
    assert tools.calls.count("kubectl --namespace metaflow port-forward svc/metaflow-ui-svc 8083:8083") == 1
    said = capsys.readouterr().err
    assert "argo-server: error: lost connection to pod; again\n" in said
    # Twice as long each time, up to the longest.
    assert re.findall(r"again in (\S+) s", said) == ["0.01", "0.02", "0.03"]


def test_without_kubectl_nothing_is_kept_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools.install(tmp_path, monkeypatch)
    with pytest.raises(OutsideError, match="kubectl is not installed"):
        keep_alive(forwards(BUILT))


def test_the_ports_are_those_that_connect_names() -> None:
    assert connect.__doc__ is not None
    named = [int(port) for port in re.findall(r"localhost:(\d+)", connect.__doc__)]
    assert [forward.port for forward in forwards(BUILT)] == named
    assert profile(BUILT)["METAFLOW_SERVICE_URL"] == f"http://localhost:{named[0]}"


def test_a_taken_port_ends_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = fake_tools.install(tmp_path, monkeypatch, "kubectl")
    tools.answer("8080:8080", err="unable to listen on port 8080: … bind: address already in use\n", code=1)
    tools.answer("port-forward", stay=True)
    with pytest.raises(OutsideError, match="port 8080 is taken") as caught:
        keep_alive(forwards(BUILT))
    assert "lsof -i :8080" in caught.value.fix


def images_of(tag: str) -> str:
    package = f"{BUILT.image_registry_url}/tuneship"
    other = {"package": f"{BUILT.image_registry_url}/metaflow-metadata", "tags": [tag], "version": "sha256:0"}
    return json.dumps([other, {"package": package, "tags": ["older", tag], "version": DIGEST}])


def test_an_image_is_built_once_and_recorded_by_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = images.tag()
    tools = fake_tools.install(tmp_path, monkeypatch, "gcloud")
    monkeypatch.setattr(images, "tag", lambda: tag)
    tools.answer("images list", out="[]")
    tools.answer("images list", out=images_of(tag))
    config = tmp_path / "finetune_flow_config.json"
    config.write_text('{"new_model": "mine"}')
    pinned = f"{BUILT.image_registry_url}/tuneship@{DIGEST}"
    assert images.image(BUILT, config) == pinned
    assert json.loads(config.read_text()) == {"new_model": "mine", "image_name": pinned}
    builds = [call for call in tools.calls if "builds submit" in call]
    assert len(builds) == 1 and f"_TAG={tag}" in builds[0] and BUILT.build_service_account_email in builds[0]
    assert f"--project {BUILT.project_id} --region {BUILT.region}" in builds[0]
    assert "image/.gcloudignore" in builds[0] and "--include-tags" in tools.calls[0]

    assert images.image(BUILT, config) == pinned
    assert sum("builds submit" in call for call in tools.calls) == 1, "what is there is not built again"


def test_a_build_that_fails_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = fake_tools.install(tmp_path, monkeypatch, "gcloud")
    tools.answer("images list", out="[]")
    said = "ERROR: (gcloud.builds.submit) You do not currently have an active account selected.\n"
    tools.answer("builds submit", err=said, code=1)
    with pytest.raises(OutsideError, match="gcloud is not logged in") as caught:
        images.image(BUILT, tmp_path / "config.json")
    assert caught.value.fix == "gcloud auth login"
    assert not (tmp_path / "config.json").exists()


def test_an_image_of_another_tag_is_not_this_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = fake_tools.install(tmp_path, monkeypatch, "gcloud")
    tools.answer("images list", out=images_of("another"))
    with pytest.raises(OutsideError, match="the build ended, and its image is not there"):
        images.image(BUILT, tmp_path / "config.json")
    assert sum("builds submit" in call for call in tools.calls) == 1
    assert not (tmp_path / "config.json").exists()


def test_a_dry_run_builds_and_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = fake_tools.install(tmp_path, monkeypatch, "gcloud")
    assert images.image(BUILT, tmp_path / "config.json", dry_run=True).endswith("@sha256:DIGEST")
    assert tools.calls == [] and not (tmp_path / "config.json").exists()


def test_the_tag_is_the_commit_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_ROOT", tmp_path)
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "Dockerfile").write_text("FROM scratch\n")

    def git(*arguments: str) -> str:
        argv = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org", *arguments]
        return subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init")
    git("add", "--all")
    git("commit", "--message=One")
    (tmp_path / "notes").write_text("no part of an image")
    assert images.tag() == git("rev-parse", "HEAD")[:12]
    (tmp_path / "image" / "Dockerfile").write_text("FROM another\n")
    assert images.tag().startswith("code-")


def test_the_context_of_an_installed_package_is_that_of_a_checkout(tmp_path: Path) -> None:
    images.lay_out(tmp_path)
    assert {"image/Dockerfile", "recipes/tiny.yaml", "tuneship/flow.py"} <= {
        file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")
    }
