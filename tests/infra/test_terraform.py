"""infra/terraform against its rules, and the rules against what breaks them. No cloud, no Terraform binary.

python -m pytest tests/infra/test_terraform.py -v
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

hcl2 = pytest.importorskip("hcl2", reason="pip install python-hcl2")

import provider_schema
import terraform_files as hcl
import terraform_layout as layout
import terraform_rules as rules
from terraform_broken import BROKEN, TUTORIAL

FILES = sorted(path for path in hcl.TERRAFORM.iterdir() if path.suffix in (".tf", ".tfvars"))
TEXT = "\n".join(hcl.texts())

# Each check that is waived, by the resource it is waived for. The reason stands in the code.
WAIVED = {
    "google_container_cluster.autopilot": {"CKV_GCP_12", "CKV_GCP_61", "CKV_GCP_65", "CKV_GCP_66", "CKV_GCP_69"},
    "google_container_cluster.standard": {"CKV_GCP_12", "CKV_GCP_65", "CKV_GCP_66"},
    "google_container_node_pool.gpu": {"CKV_GCP_68"},
    "google_sql_database_instance.metadata": {"CKV_GCP_6", "CKV_GCP_79", "CKV2_GCP_13"},
    "google_storage_bucket.datastore": {"CKV_GCP_62"},
    "google_artifact_registry_repository.images": {"CKV_GCP_84"},
}


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: rules.Rule) -> None:
    rule(hcl.load())


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        *(
            pytest.param(rule, old, new, id=f"{rule.__name__}-{number}")
            for rule, changes in BROKEN.items()
            for number, (old, new) in enumerate(changes)
        ),
        *(pytest.param(*change, id=f"tutorial-{name}") for name, change in TUTORIAL.items()),
    ],
)
def test_rule_catches(rule: rules.Rule, old: str, new: str) -> None:
    file = next((text for text in hcl.texts() if old in text), None)
    assert file is not None, f"nothing to break: {old}"
    broken = file.replace(old, new, 1)
    configuration = hcl.parse(tuple(broken if text == file else text for text in hcl.texts()))
    with pytest.raises((AssertionError, KeyError, ValueError)):
        rule(configuration)


def test_every_rule_was_seen_failing() -> None:
    assert {rule for rule, changes in BROKEN.items() if changes} == set(rules.RULES)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_file_a_concern_and_nothing_from_outside() -> None:
    concerns = "argo backend cluster database network outputs protection providers registry secrets service_accounts"
    concerns += " services storage variables versions"
    assert {path.name for path in FILES} == {f"{name}.tf" for name in concerns.split()} | {"default_env.tfvars"}
    assert not re.search(r"^\s*module\s", TEXT, re.MULTILINE), "a module brings what nobody here has read"
    hosts = set(re.findall(r"https?://([\w.-]+)", TEXT))
    assert hosts == {"www.googleapis.com", "argoproj.github.io"}, "a scope's name and the chart's repository"


def test_backend_is_the_tutorials_and_commented() -> None:
    text = (hcl.TERRAFORM / "backend.tf").read_text(encoding="utf-8")
    assert all(line.startswith("#") or not line.strip() for line in text.splitlines())
    bare = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines() if "Terraform" not in line)
    assert 'backend "gcs" {' in bare and 'prefix = "terraform/state/metaflow"' in bare


def test_every_value_of_the_example_is_declared() -> None:
    values = hcl.tfvars()
    assert set(values) == rules.TUTORIAL_VARIABLES | {"deletion_protection"}
    assert values["project_id"] == "<PROJECT_ID>", "somebody's project was left in the file"
    declared = hcl.load().variables
    for name, value in values.items():
        default = declared[name].get("default")
        assert name == "project_id" or default is None or value == default, f"{name}: the file and the default differ"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_layout(path: Path) -> None:
    assert layout.faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a = 1 \n", "line 1: space at the end"),
        ("a {\n    b = 1\n}\n", "line 2: 2 spaces wanted, 4 found"),
        ("a {\n\tb = 1\n}\n", "line 2: a tab"),
        ("a = 1\nlonger = 2\n", "line 1: the equals signs of a run do not stand under each other"),
        ("a = 1", "no newline at the end"),
        ("a = [\n  1,\n  ]\n", "line 3: 0 spaces wanted, 2 found"),
        ("a=1\n", "line 1: no space around the equals sign"),
    ],
)
def test_layout_sees(text: str, fault: str) -> None:
    assert fault in layout.faults(text)


def test_layout_is_not_pedantic() -> None:
    text = 'a      = 1\nlonger = "b = 2 # no"\n\nc = [\n  1, # one\n]\nd = <<-EOT\n      any = indent\nEOT\n'
    assert layout.faults(text) == []


def test_state_and_plans_are_not_committed() -> None:
    ignored = (hcl.TERRAFORM / ".gitignore").read_text(encoding="utf-8").split("\n")
    assert {".terraform/", "*.tfstate", "*.tfstate.*", "*.tfplan"} <= set(ignored)
    assert ".terraform.lock.hcl" not in ignored, "the providers' checksums belong in a commit"


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_schema_has_what_is_used() -> None:
    used = hcl.used(hcl.load())
    for kind, types in used.items():
        assert set(types) == set(rules.SCHEMA[kind]), f"{kind}: python tests/infra/provider_schema.py"


@pytest.mark.skipif(not provider_schema.installed(), reason="the bindings are not installed")
def test_schema_is_what_the_bindings_say() -> None:
    distilled = provider_schema.dump(provider_schema.distil(hcl.used(hcl.load())))
    assert distilled == provider_schema.SCHEMA.read_text(encoding="utf-8")


# ── Documents ────────────────────────────────────────────────────────────────────────────────────────────────


def test_readme_names_what_exists() -> None:
    text = (hcl.TERRAFORM / "README.md").read_text(encoding="utf-8")
    configuration = hcl.load()
    for name in re.findall(r"terraform output -raw (\w+)", text):
        assert name in configuration.outputs, f"README.md reads an output {name}"
    for name in re.findall(r"`(\w+\.tf(?:vars)?)`", text):
        assert (hcl.TERRAFORM / name).exists(), f"README.md names {name}"
    for path in FILES:
        assert path.name in text, f"README.md does not say what {path.name} is for"
    for name in configuration.outputs:
        assert f"`{name}`" in text, f"README.md does not list the output {name}"


def test_versions_are_recorded() -> None:
    text = (hcl.TERRAFORM.parents[1] / "docs" / "versions.md").read_text(encoding="utf-8")
    versions = [provider["version"] for provider in rules.SCHEMA["providers"].values()]
    release = hcl.load().of("helm_release")["argo_workflows"].get("version")
    for version in (*versions, release, hcl.load().locals["argo_version"], "POSTGRES_15"):
        assert version in text, f"docs/versions.md does not say where {version} was read"


# ── checkov ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_waived_checks_are_the_listed_ones_and_each_has_a_reason() -> None:
    waived: dict[str, set[str]] = {}
    resource = ""
    for line in TEXT.splitlines():
        opening = re.match(r'resource "(\w+)" "(\w+)" {', line)
        resource = f"{opening[1]}.{opening[2]}" if opening else resource
        skip = re.search(r"checkov:skip=(\w+):?\s*(.*)", line)
        if skip:
            waived.setdefault(resource, set()).add(skip[1])
            assert len(skip[2].split()) >= 5, f"{resource}: {skip[1]} is waived without a reason"
    assert waived == WAIVED


CHECKOV = os.environ.get("CHECKOV") or shutil.which("checkov")


@pytest.mark.skipif(CHECKOV is None, reason="make e2e sets checkov up; or name one by CHECKOV")
def test_checkov_finds_nothing(tmp_path: Path) -> None:
    assert CHECKOV is not None
    done = subprocess.run(
        [CHECKOV, "-d", str(hcl.TERRAFORM), "--framework", "terraform", "secrets", "--skip-download", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    reports = json.loads(done.stdout)
    for report in reports if isinstance(reports, list) else [reports]:
        failed = [f"{one['check_id']} {one['resource']}" for one in report["results"]["failed_checks"]]
        assert failed == []
        assert report["summary"]["parsing_errors"] == 0
        if report["check_type"] == "terraform":
            assert report["summary"]["passed"] > 60, "nothing was looked at"
            assert report["summary"]["skipped"] == sum(len(checks) for checks in WAIVED.values())
