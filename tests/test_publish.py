"""publish: into a folder and to a Hub; twice is once, killed is as good as never, others' work stays.

python -m pytest tests/test_publish.py -v
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_gcs
import pytest
from fake_hub import Hub
from zygote import Commands

from tuneship import export, journal, storage
from tuneship.errors import GateError, InputError, OutsideError
from tuneship.journal import sha256_file
from tuneship.publish import publish
from tuneship.recipe import validate

pytestmark = [
    # huggingface_hub's own way to send a file.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # Google's client says it while it is imported; gRPC is not used.
    pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning"),
]

REPO = "user/tiny"
Publish = Callable[..., dict[str, str]]


@pytest.fixture
def published(trained: Path) -> Publish:
    """A function that publishes the trained run, with the recipe's publish section and others changed."""

    def go(*, update: bool = False, force: str = "", sections: dict[str, Any] | None = None, **settings: Any) -> Any:
        tree = journal.read_run(trained).recipe.model_dump(mode="json")
        tree["publish"] |= settings
        for section, changes in (sections or {}).items():
            tree[section] = {**tree[section], **changes} if isinstance(changes, dict) else changes
        with journal.open_run(trained, validate(tree, where="test")) as run:
            return publish(run, update=update, force=force)

    return go


@pytest.fixture
def no_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    from tuneship import hub as hubs

    assert hubs.call.__kwdefaults__ is not None
    monkeypatch.setitem(hubs.call.__kwdefaults__, "sleep", lambda seconds: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def files(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir())}


def remote(hub: Hub) -> dict[str, bytes]:
    there = dict(hub.repos["models", REPO].head.files)
    there.pop(".gitattributes", None)
    return there


@dataclass(frozen=True)
class Place:
    """Where to publish: the recipe's settings, the names of what is there, and a way to put a file there."""

    settings: dict[str, Any]
    names: Callable[[], set[str]]
    put: Callable[[str, bytes], None]


def by_hand(hub: Hub, name: str, content: bytes) -> None:
    repo = hub.repos["models", REPO]
    repo.commit({**repo.head.files, name: content}, f"{name} by hand")


# --- what is sent -----------------------------------------------------------------------------------------


def test_a_folder_gets_the_adapter_and_its_card(published: Publish, trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert list(published(folder=str(target))) == [str(target)]
    adapter = files(trained / "adapter")
    assert files(target).keys() == {*adapter, "README.md"}
    assert all(files(target)[name] == adapter[name] for name in adapter.keys() - {"tuneship.json"})
    about = journal.read_json(target / "tuneship.json")
    assert about.pop("files") == sorted(files(target))
    assert about == journal.read_json(trained / "adapter" / "tuneship.json")
    card = (target / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| tuned | " in card
    assert "Question: {question}" in card


def test_the_merged_model_is_sent_where_it_is_asked_for(published: Publish, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no merged model yet"):
        published(folder=str(tmp_path / "out"), merged=True)
    assert not (tmp_path / "out").exists()
    with journal.open_run(trained, journal.read_run(trained).recipe) as run:
        export.export(run)
    published(folder=str(tmp_path / "out"), merged=True)
    assert "model.safetensors" in files(tmp_path / "out")
    assert "adapter_model.safetensors" not in files(tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_damaged_weights_are_not_sent(published: Publish, trained: Path, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "out"
    published(folder=str(target))
    good = files(target)
    weights = trained / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage != "removed":
        weights.write_bytes(content[:-100] if damage == "truncated" else b"")
    with pytest.raises(InputError, match=r"the weights are (damaged|missing)") as caught:
        published(folder=str(target))
    assert str(trained / "adapter") in caught.value.where
    assert "tuneship train RECIPE" in caught.value.fix
    assert files(target) == good


@pytest.mark.parametrize("inside", ["", "adapter", "publish", "adapter/../new"])
def test_a_run_is_not_published_into_itself(published: Publish, trained: Path, inside: str) -> None:
    before = files(trained / "adapter")
    with pytest.raises(InputError, match="into its own folder") as caught:
        published(folder=str(trained / inside), update=True)
    assert caught.value.where.startswith("publish.folder: ")
    assert files(trained / "adapter") == before


def test_nowhere_is_said(published: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    assert published() == {}
    assert "nothing to publish" in capsys.readouterr().err


# --- the gate -----------------------------------------------------------------------------------------------


def test_what_the_gate_refused_is_not_sent(published: Publish, trained: Path, tmp_path: Path) -> None:
    # It was evaluated with a gate that everything passes; the recipe's present one counts.
    strict = {"evaluate": {"gate": {"min_score": 0.99}}}
    with pytest.raises(GateError, match=r"the gate said no: score .* is below evaluate.gate.min_score 0.99"):
        published(folder=str(tmp_path / "out"), sections=strict)
    (trained / "evaluation.json").unlink()
    with pytest.raises(GateError, match="nothing was evaluated"):
        published(folder=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    published(folder=str(tmp_path / "out"), force="for a trial")
    assert "> Published although the gate did not pass: for a trial" in (tmp_path / "out" / "README.md").read_text()


# --- twice is once (P1) ----------------------------------------------------------------------------------------


def test_p1_a_folder_twice_is_once(published: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    first = published(folder=str(target))
    times = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    assert published(folder=str(target)) == first
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == times
    assert f"already published: {target}" in capsys.readouterr().err


def test_p1_the_hub_gets_one_private_commit_once(
    hub: Hub, published: Publish, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sha = published(hub_model_id=REPO)[REPO]
    repo = hub.repos["models", REPO]
    assert repo.private
    assert [commit.message for commit in repo.commits[1:]] == ["Publish tiny-test"]
    assert repo.head.sha == sha
    adapter = {file.name: file.read_bytes() for file in (trained / "adapter").iterdir()}
    assert remote(hub).keys() == {*adapter, "README.md"}
    assert all(remote(hub)[name] == adapter[name] for name in adapter.keys() - {"tuneship.json"})
    before = len(hub.requests)
    assert published(hub_model_id=REPO) == {REPO: sha}
    assert f"already published: {REPO} at {sha}" in capsys.readouterr().err
    # Not a byte of the model goes out again.
    assert [request.path for request in hub.requests[before:] if request.method in ("POST", "PUT")] == [
        "/api/repos/create"
    ]
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/preupload/"), ("PUT", "/lfs/"), ("POST", "/commit/")], ids=["before", "in", "after"]
)
def test_p1_killed_and_started_again(
    commands: Commands, hub: Hub, published: Publish, trained: Path, tmp_path: Path, method: str, path: str
) -> None:
    argv = ["publish", trained, "--set", f"publish.hub_model_id={REPO}"]
    settings: dict[str, Any] = {
        "cwd": tmp_path, "env": hub.environment, "prelude": hub.prelude(tmp_path / "cache")
    }  # fmt: skip
    victims: list[int] = []
    hub.on(method, path, lambda: os.kill(victims[0], signal.SIGKILL))
    # It waits for its first answer until we know its number.
    hub.lock.acquire()
    process = commands.start(argv, **settings)
    victims.append(process.pid)
    hub.lock.release()
    assert process.wait().code == -signal.SIGKILL
    finished = commands.run(argv, **settings)
    assert finished.code == 0, finished.err
    repo = hub.repos["models", REPO]
    assert len(repo.commits) == 2
    assert remote(hub)["adapter_model.safetensors"] == (trained / "adapter" / "adapter_model.safetensors").read_bytes()


def test_p1_a_reply_that_got_lost(hub: Hub, no_naps: None, published: Publish) -> None:
    hub.cut("POST", "/commit/", after=True)
    with pytest.raises(OutsideError) as caught:
        published(hub_model_id=REPO)
    assert "run the same command again" in caught.value.fix
    repo = hub.repos["models", REPO]
    assert published(hub_model_id=REPO) == {REPO: repo.head.sha}
    assert len(repo.commits) == 2


def test_p1_a_busy_hub_is_asked_again(hub: Hub, no_naps: None, published: Publish) -> None:
    hub.fail("POST", "/commit/", 503, times=1)
    hub.fail("PUT", "/lfs/", 503, times=1)
    assert published(hub_model_id=REPO) == {REPO: hub.repos["models", REPO].head.sha}
    assert len(hub.repos["models", REPO].commits) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda hub: hub.fail("PUT", "/lfs/", 403), "the Hub refuses this token"),
        (lambda hub: hub.fail("PUT", "/lfs/", 503), "the Hub answers 503"),
        (lambda hub: hub.fail("PUT", "/lfs/", 400), "the Hub answers 400"),
        (lambda hub: hub.cut("PUT", "/lfs/", times=10**9), "the Hub cannot be reached"),
    ],
    ids=["forbidden", "busy for long", "refused", "broken off"],
)
def test_p1_weights_that_do_not_arrive_are_no_commit(
    hub: Hub, no_naps: None, published: Publish, spoil: Callable[[Hub], object], message: str
) -> None:
    spoil(hub)
    with pytest.raises(OutsideError, match=message):
        published(hub_model_id=REPO)
    assert len(hub.repos["models", REPO].commits) == 1
    hub.faults.clear()
    published(hub_model_id=REPO)
    assert len(hub.repos["models", REPO].commits) == 2


def test_p1_a_copy_that_was_cut_off_is_finished(published: Publish, trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    published(folder=str(target))
    whole = files(target)
    # What says whose it is goes last.
    (target / "tuneship.json").unlink()
    (target / "adapter_model.safetensors").write_bytes(b"half")
    published(folder=str(target))
    assert files(target) == whole


# --- what stands there is what was published ----------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket."""
    from google.cloud.storage import Client

    with fake_gcs.serving() as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        client = Client()
        client.create_bucket("published")
        yield "gs://published"
        client.close()


@pytest.fixture(params=["folder", "gs", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each kind of destination."""
    if request.param == "hub":
        hub = request.getfixturevalue("hub")
        return Place(
            {"hub_model_id": REPO}, lambda: set(remote(hub)), lambda name, content: by_hand(hub, name, content)
        )
    root = str(tmp_path / "out") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/out"

    def put(name: str, content: bytes) -> None:
        file = tmp_path / "by-hand"
        file.write_bytes(content)
        storage.put(file, f"{root}/{name}")

    return Place({"folder": root}, lambda: set(storage.listing(root)), put)


def test_the_merged_model_takes_the_place_of_the_adapter_and_back(
    published: Publish, trained: Path, place: Place
) -> None:
    with journal.open_run(trained, journal.read_run(trained).recipe) as run:
        export.export(run)
    for part, merged in (("adapter", False), ("merged", True), ("adapter", False)):
        published(**place.settings, merged=merged)
        assert place.names() == {*files(trained / part), "README.md"}


def test_a_file_that_is_not_sent_any_more_goes(published: Publish, trained: Path, place: Place) -> None:
    extra = trained / "adapter" / "added_tokens.json"
    extra.write_text("{}")
    published(**place.settings)
    assert extra.name in place.names()
    extra.unlink()
    published(**place.settings)
    assert place.names() == {*files(trained / "adapter"), "README.md"}


def test_a_persons_file_beside_ours_is_no_ours(published: Publish, place: Place) -> None:
    published(**place.settings)
    whole = place.names()
    # One has the name of a model's file, but we did not put it there.
    for name in ("notes.txt", "config.json"):
        place.put(name, b"{}")
    with pytest.raises(InputError, match="something else is published there"):
        published(**place.settings)
    assert place.names() == {*whole, "notes.txt", "config.json"}
    published(**place.settings, update=True)
    # A loader would take it for a part of the model; the notes harm nobody.
    assert place.names() == {*whole, "notes.txt"}


def test_the_hub_gets_it_all_in_one_commit(hub: Hub, published: Publish, trained: Path) -> None:
    with journal.open_run(trained, journal.read_run(trained).recipe) as run:
        export.export(run)
    published(hub_model_id=REPO)
    published(hub_model_id=REPO, merged=True)
    commits = hub.repos["models", REPO].commits
    assert len(commits) == 3
    assert ".gitattributes" in commits[-1].files


# --- others' work stays (P2, P3) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["another run's", "somebody's"])
def test_p2_what_is_there_stays(hub: Hub, published: Publish, trained: Path, tmp_path: Path, whose: str) -> None:
    theirs = {"adapter_model.safetensors": b"theirs"}
    if whose == "another run's":
        theirs["tuneship.json"] = json.dumps({"recipe": {"name": "another"}}).encode()
    repo = hub.add(REPO, theirs, private=True)
    target = tmp_path / "out"
    target.mkdir()
    for name, content in {**theirs, "notes.txt": b"mine"}.items():
        (target / name).write_bytes(content)
    for settings in ({"hub_model_id": REPO}, {"folder": str(target)}):
        with pytest.raises(InputError, match="something else is published there") as caught:
            published(**settings)
        assert "--update" in caught.value.fix
    assert remote(hub) == theirs
    assert (target / "adapter_model.safetensors").read_bytes() == b"theirs"
    published(hub_model_id=REPO, folder=str(target), update=True)
    weights = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    assert remote(hub)["adapter_model.safetensors"] == (target / "adapter_model.safetensors").read_bytes() == weights
    assert len(repo.commits) == 2
    # Not ours to delete.
    assert (target / "notes.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("content", [b"{}", b"", b"{torn", b"[]", b'"x"', b'{"recipe": []}', b'{"files": 1}', b"\xff"])
def test_p2_a_tuneship_json_that_is_none(published: Publish, tmp_path: Path, hub: Hub, content: bytes) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "tuneship.json").write_bytes(content)
    hub.add(REPO, {"tuneship.json": content}, private=True)
    for settings in ({"folder": str(target)}, {"hub_model_id": REPO}):
        with pytest.raises(InputError, match="something else is published there"):
            published(**settings)
    assert (target / "tuneship.json").read_bytes() == content
    published(folder=str(target), hub_model_id=REPO, update=True)
    assert "adapter_model.safetensors" in files(target)
    assert "adapter_model.safetensors" in remote(hub)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"name": "another"}},
        {"recipe": {"train": {"seed": 7}}},
        {"recipe": {"lora": {"r": 2}}},
        {"data": {"train_sha256": "0" * 64}},
        {"base": {"fingerprint": "0" * 64}},
    ],
    ids=["name", "seed", "rank", "rows", "base"],
)
def test_p2_another_run_of_the_same_name_stays(
    published: Publish, trained: Path, place: Place, change: dict[str, dict[str, Any]]
) -> None:
    published(**place.settings)
    facts = journal.read_json(trained / "adapter" / "tuneship.json")
    ((section, settings),) = change.items()
    journal.write_json(trained / "adapter" / "tuneship.json", {**facts, section: {**facts[section], **settings}})
    with pytest.raises(InputError, match="something else is published there"):
        published(**place.settings)
    published(**place.settings, update=True)


def test_p2_the_same_run_trained_anew_replaces_itself(hub: Hub, published: Publish, trained: Path) -> None:
    published(hub_model_id=REPO)
    facts = journal.read_json(trained / "adapter" / "tuneship.json")
    journal.write_json(trained / "adapter" / "tuneship.json", {**facts, "updates": 99})
    published(hub_model_id=REPO)
    assert len(hub.repos["models", REPO].commits) == 3


def test_p2_a_name_that_is_not_ours(hub: Hub, published: Publish) -> None:
    with pytest.raises(OutsideError, match="the Hub refuses this token"):
        published(hub_model_id="others/tiny")
    hub.add(REPO, {}, private=True, writable=False)
    with pytest.raises(OutsideError, match="read access only"):
        published(hub_model_id=REPO)


@pytest.mark.parametrize("private", [True, False])
def test_p2_another_visibility_is_refused(hub: Hub, published: Publish, private: bool) -> None:
    repo = hub.add(REPO, {}, private=private)
    with pytest.raises(InputError, match=f"the repository is {'private' if private else 'public'}, the recipe says"):
        published(hub_model_id=REPO, hub_private_repo=not private)
    assert len(repo.commits) == 1


def test_p2_without_a_token(hub: Hub, published: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutsideError, match="needs a token"):
        published(hub_model_id=REPO)
    assert hub.requests == []


def test_p3_a_card_by_hand_is_kept(hub: Hub, published: Publish) -> None:
    hub.add(REPO, {"README.md": b"by hand"}, private=True)
    for _ in range(2):
        published(hub_model_id=REPO)
    assert remote(hub)["README.md"] == b"by hand"
    assert "README.md" not in json.loads(remote(hub)["tuneship.json"])["files"]
    assert len(hub.repos["models", REPO].commits) == 2
    assert "adapter_model.safetensors" in remote(hub)
