"""up and down: the commands, their order, what is asked first, and what each tool's complaint becomes."""

from __future__ import annotations

from pathlib import Path

import fake_tools
import pytest

from tuneship.cluster import outputs
from tuneship.cluster.terraform import Terraform, down, up
from tuneship.errors import InputError, OutsideError, TuneshipError

EXAMPLE = Path(__file__).parents[2] / "infra" / "example-outputs.json"
BUILT = outputs.read(EXAMPLE)
CONTEXT = f"gke_{BUILT.project_id}_{BUILT.gke_cluster_location}_{BUILT.gke_cluster_name}"


def yes(_: str) -> bool:
    return True


def no(_: str) -> bool:
    return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "terraform"
    made.mkdir()
    (made / "default_env.tfvars").write_text('project_id = "my-project" # not <PROJECT_ID>\n')
    return made


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fake_tools.Tools:
    made = fake_tools.install(tmp_path, monkeypatch, "terraform", "gcloud", "kubectl")
    made.answer("terraform output", out=EXAMPLE.read_text())
    made.answer("kubectl config current-context", out=f"{CONTEXT}\n")
    made.answer("terraform state list", out="google_storage_bucket.datastore\nterraform_data.protection\n")
    made.answer("gcloud clusters list --filter=name=tuneship", out="tuneship\n")
    return made


def test_up_shows_the_plan_and_applies_that_very_plan(folder: Path, tools: fake_tools.Tools, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def confirm(_: str) -> bool:
        asked.append([call.split()[2] for call in tools.calls])
        return True

    up(Terraform(folder), tmp_path / "outputs.json", confirm)
    assert asked == [["init", "plan"]], "the plan is on the screen before anything is asked"
    assert [call.split()[2] for call in tools.calls] == ["init", "plan", "apply", "output"]
    plan = next(part for part in tools.calls[1].split() if part.startswith("-out=")).removeprefix("-out=")
    assert tools.calls[2].split()[-1] == plan
    assert outputs.read(tmp_path / "outputs.json") == BUILT


def test_up_without_a_yes_changes_nothing(folder: Path, tools: fake_tools.Tools, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not confirmed"):
        up(Terraform(folder), tmp_path / "outputs.json", no)
    assert not any("apply" in call for call in tools.calls)


def test_a_dry_run_runs_nothing(
    folder: Path, tools: fake_tools.Tools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up(Terraform(folder, dry_run=True), tmp_path / "outputs.json", no)
    down(Terraform(folder, dry_run=True), BUILT, no)
    assert tools.calls == []
    shown = capsys.readouterr().err
    assert f"$ terraform -chdir={folder} plan -input=false -var-file=default_env.tfvars -out=tfplan\n" in shown
    assert f"$ terraform -chdir={folder} destroy" in shown


def test_a_project_that_nobody_wrote_is_refused(folder: Path, tools: fake_tools.Tools, tmp_path: Path) -> None:
    (folder / "default_env.tfvars").write_text('project_id = "<PROJECT_ID>"\n')
    with pytest.raises(InputError, match="still <PROJECT_ID>"):
        up(Terraform(folder), tmp_path / "outputs.json", yes)
    with pytest.raises(InputError, match="no such variables file"):
        up(Terraform(folder, "mine.tfvars"), tmp_path / "outputs.json", yes)
    assert tools.calls == []
    up(Terraform(folder, project="other-project"), tmp_path / "outputs.json", yes)
    assert "-var=project_id=other-project" in tools.calls[1]


def test_a_missing_tool_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools.install(tmp_path, monkeypatch, "gcloud")
    with pytest.raises(OutsideError, match="terraform is not installed") as caught:
        up(Terraform(folder), tmp_path / "outputs.json", yes)
    assert "developer.hashicorp.com" in caught.value.fix


# What the tools really say, shortened.
COMPLAINTS = [
    (
        "Error: Attempted to load application default credentials since neither `credentials` nor `access_token` was "
        "set in the provider block.  No credentials loaded.",
        OutsideError,
        "no Google credentials",
        "gcloud auth application-default login",
    ),
    (
        "Error: Error creating Network: googleapi: Error 403: Compute Engine API has not been used in project "
        "my-project before or it is disabled. Enable it by visiting …, accessNotConfigured",
        OutsideError,
        "API of the project is switched off",
        "gcloud services enable serviceusage.googleapis.com cloudresourcemanager.googleapis.com --project my-project",
    ),
    (
        "Error: Error waiting for creating GKE NodePool: Quota 'NVIDIA_A100_GPUS' exceeded.  Limit: 0.0 in region "
        "us-central1.",
        OutsideError,
        "the quota is too small: NVIDIA_A100_GPUS",
        "https://console.cloud.google.com/iam-admin/quotas",
    ),
    (
        "Error: Error creating Repository: googleapi: Error 409: the repository already exists.",
        OutsideError,
        "the name is taken",
        "default_resource_name",
    ),
    (
        "Error: Error acquiring the state lock\n\nLock Info:\n  ID:        1234-abcd\n  Path:      …",
        OutsideError,
        "the state is locked",
        "force-unlock 1234-abcd",
    ),
    (
        '╷\n│ Error: Invalid value for variable\n│ \n│   on default_env.tfvars line 2:\n│    2: project_id = "x"\n│ \n'
        "│ Not a project id: 6 to 30 lower-case letters.\n╵\n",
        InputError,
        "Not a project id",
        "variables file",
    ),
    (
        "Error: Error creating Instance: googleapi: Error 403: The billing account for the owning project is disabled "
        "in state absent",
        OutsideError,
        "no billing",
        "gcloud billing projects link",
    ),
    ("Error: something that nobody knows", OutsideError, "something that nobody knows", "by hand"),
]


@pytest.mark.parametrize(("said", "kind", "what", "fix"), COMPLAINTS, ids=[what for _, _, what, _ in COMPLAINTS])
def test_a_complaint_becomes_one_message_with_what_mends_it(
    folder: Path, tools: fake_tools.Tools, tmp_path: Path, said: str, kind: type[TuneshipError], what: str, fix: str
) -> None:
    tools.answer("terraform plan", err=said, code=1)
    with pytest.raises(kind) as caught:
        up(Terraform(folder), tmp_path / "outputs.json", yes)
    assert type(caught.value) is kind
    assert what in caught.value.what and fix in caught.value.fix
    assert not any("apply" in call for call in tools.calls) and not (tmp_path / "outputs.json").exists()


def test_down_empties_switches_off_destroys_and_looks(folder: Path, tools: fake_tools.Tools) -> None:
    down(Terraform(folder), BUILT, yes)
    calls = [call for call in tools.calls if "get-credentials" in call or not call.startswith("gcloud")]
    assert [call.split()[0] + " " + call.split()[2] for call in calls] == [
        "gcloud clusters",
        "kubectl current-context",
        "kubectl namespace",
        "terraform init",
        "terraform state",
        "terraform apply",
        "terraform destroy",
    ]
    assert "-var=deletion_protection=false" in calls[-2] and "-var=deletion_protection=false" in calls[-1]
    looked = tools.calls[-6:]
    assert all("deployment=tuneship" in call and "list" in call for call in looked)


def test_a_half_done_destroy_goes_on_without_building_anew(
    folder: Path, tools: fake_tools.Tools, tmp_path: Path
) -> None:
    other = fake_tools.Tools(tools.folder)
    other.answer("terraform state list", out="google_compute_network.main\n")
    down(Terraform(folder), BUILT, yes)
    assert not any("apply" in call or call.startswith("kubectl") for call in tools.calls)
    assert any("destroy" in call for call in tools.calls)


def test_down_tells_what_is_left(folder: Path, tools: fake_tools.Tools) -> None:
    tools.answer("gcloud compute disks list", out="pvc-1234\n")
    with pytest.raises(TuneshipError, match="still there, and billed: compute disks: pvc-1234") as caught:
        down(Terraform(folder), BUILT, yes)
    assert caught.value.exit_code == 1


def test_down_keeps_away_from_another_cluster(folder: Path, tools: fake_tools.Tools) -> None:
    fresh = fake_tools.Tools(tools.folder)
    fresh.answer("gcloud clusters list --filter=name=tuneship", out="tuneship\n")
    fresh.answer("kubectl config current-context", out="gke_other_us_prod\n")
    with pytest.raises(OutsideError, match="another cluster: gke_other_us_prod"):
        down(Terraform(folder), BUILT, yes)
    assert not any("delete" in call or "destroy" in call for call in tools.calls)


def test_down_refuses_another_platforms_variables(folder: Path, tools: fake_tools.Tools) -> None:
    (folder / "default_env.tfvars").write_text('project_id = "my-project"\ndefault_resource_name = "other"\n')
    with pytest.raises(InputError, match="default_resource_name is other, tuneship was built"):
        down(Terraform(folder), BUILT, yes)
    with pytest.raises(InputError, match="project_id is your-project, my-project was built"):
        down(Terraform(folder, project="your-project"), BUILT, yes)
    assert tools.calls == []


def test_down_without_a_yes_changes_nothing(folder: Path, tools: fake_tools.Tools) -> None:
    with pytest.raises(InputError, match="not confirmed"):
        down(Terraform(folder), BUILT, no)
    assert tools.calls == []
