"""The Hub: which answers are asked for again, and how each failure is told.

python -m pytest tests/test_hub.py -v
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, Hub

from tuneship import hub as hubs
from tuneship.errors import InputError, OutsideError

CONFIG = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle", "run.py": b"code"}


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are not waited for."""
    taken: list[float] = []
    assert hubs.call.__kwdefaults__ is not None
    monkeypatch.setitem(hubs.call.__kwdefaults__, "sleep", taken.append)
    # huggingface_hub has waits of its own in some calls.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return taken


def info(name: str = "user/name") -> Any:
    return hubs.call(f"model {name}", lambda: hubs.api().model_info(name))


# --- answers (F10) ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "kind", "message"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, OutsideError, "refuses this token"),
        (403, {"X-Error-Message": "no"}, OutsideError, "refuses this token"),
        (403, {"X-Error-Code": "GatedRepo"}, OutsideError, "asks for a licence to be accepted"),
        (401, {"X-Error-Code": "GatedRepo"}, OutsideError, "asks for a licence to be accepted"),
        (404, {"X-Error-Code": "RepoNotFound"}, InputError, "no such repository"),
        (404, {"X-Error-Code": "RevisionNotFound"}, InputError, "no such revision or file"),
        (404, {"X-Error-Code": "EntryNotFound"}, InputError, "no such revision or file"),
        (400, {}, OutsideError, "the Hub answers 400"),
        (409, {}, OutsideError, "the Hub answers 409"),
    ],
)
def test_an_answer_is_told_and_never_asked_for_again(
    hub: Hub, naps: list[float], status: int, headers: dict[str, str], kind: type[Exception], message: str
) -> None:
    hub.add("user/name", CONFIG)
    hub.fail("GET", "/api/models", status, headers=headers)
    with pytest.raises(kind, match=message) as caught:
        info()
    assert caught.value.where == "model user/name"  # type: ignore[attr-defined]
    assert hub.asked("GET", "/api/models") == 1
    assert naps == []
    assert TOKEN not in str(caught.value)


def test_a_wrong_token_is_refused_by_the_hub_itself(
    hub: Hub, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/name", CONFIG)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "anotherstoken1234")
    with pytest.raises(OutsideError, match="refuses this token"):
        info()
    assert naps == []


def test_without_a_token_a_private_repository_does_not_exist(
    hub: Hub, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/name", CONFIG, private=True)
    assert info().private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no such repository; a private one needs HF_TOKEN"):
        info()
    assert naps == []


# --- busy, and away ---------------------------------------------------------------------------------


def growing(naps: list[float]) -> bool:
    """Whether the waits double, each with its jitter of up to a half."""
    return all(2**n * 0.5 <= nap <= 2**n for n, nap in enumerate(naps, start=1))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_again_with_growing_waits(hub: Hub, naps: list[float], status: int) -> None:
    hub.add("user/name", CONFIG)
    hub.fail("GET", "/api/models", status, times=2)
    assert info().id == "user/name"
    assert hub.asked("GET", "/api/models") == 3
    assert len(naps) == 2
    assert growing(naps)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy_is_told(hub: Hub, naps: list[float], status: int) -> None:
    hub.fail("GET", "/api/models", status)
    with pytest.raises(OutsideError, match=f"the Hub answers {status}"):
        info()
    assert hub.asked("GET", "/api/models") == hubs.ATTEMPTS == len(naps) + 1
    assert growing(naps)


def test_a_connection_that_breaks_is_tried_again(hub: Hub, naps: list[float]) -> None:
    hub.add("user/name", CONFIG)
    hub.cut("GET", "/api/models", times=2)
    assert info().id == "user/name"
    assert len(naps) == 2


def test_a_hub_that_is_not_there_is_told(hub: Hub, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    # Port 9 of this machine: nobody listens.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutsideError, match="cannot be reached") as caught:
        info()
    assert len(naps) == hubs.ATTEMPTS - 1
    assert "HF_ENDPOINT" in caught.value.fix


def test_jitter_keeps_two_clients_apart(hub: Hub, naps: list[float]) -> None:
    hub.fail("GET", "/api/models", 503)
    for _ in range(2):
        with pytest.raises(OutsideError):
            info()
    assert naps[:4] != naps[4:]


def test_offline_is_told_at_once(hub: Hub, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutsideError, match="cannot be reached"):
        info()
    with pytest.raises(OutsideError, match="cannot be reached"):
        hubs.download("user/name", None)
    assert hub.requests == []
    assert naps == []


# --- downloads --------------------------------------------------------------------------------------


def test_a_snapshot_holds_what_was_asked_for_and_comes_once(hub: Hub) -> None:
    repo = hub.add("user/name", CONFIG)
    folder = Path(hubs.download("user/name", None, patterns=["*.json", "*.safetensors"]))
    assert folder.name == repo.head.sha
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    # What is not asked for is not sent: no pickle, no code.
    assert hub.asked("GET", r"\.(bin|py)$") == 0
    sent = hub.asked("GET", "/resolve/")
    assert hubs.download("user/name", None, patterns=["*.json", "*.safetensors"]) == str(folder)
    assert hub.asked("GET", "/resolve/") == sent


def test_a_revision_is_kept_to(hub: Hub) -> None:
    repo = hub.add("user/name", CONFIG)
    first = repo.head.sha
    repo.commit({**CONFIG, "config.json": b'{"new": 1}'}, "changed")
    folder = Path(hubs.download("user/name", first))
    assert folder.name == first
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (Path(hubs.download("user/name", None)) / "config.json").read_bytes() == b'{"new": 1}'
    with pytest.raises(InputError, match="no such revision"):
        hubs.download("user/name", "f" * 40)


@pytest.mark.parametrize(
    ("spoil", "kind", "message", "waits"),
    [
        (lambda hub: hub.fail("GET", "/api/models", 503, times=1), None, "", 1),
        (lambda hub: hub.fail("GET", "/api/models", 429), OutsideError, "the Hub answers 429", 4),
        (lambda hub: hub.fail("GET", "/api/models", 403), OutsideError, "refuses this token", 0),
        (lambda hub: hub.repos.clear(), InputError, "no such repository", 0),
        (lambda hub: hub.add("user/name", CONFIG, gated=True), OutsideError, "licence", 0),
        (lambda hub: hub.cut("GET", "/api/models", times=1), None, "", 1),
        (lambda hub: hub.cut("GET", "/resolve/", times=1), None, "", 0),
    ],
    ids=["busy", "busy for long", "forbidden", "unknown", "gated", "broken off", "broken off in a file"],
)
def test_a_download_that_fails_is_told_or_tried_again(
    hub: Hub,
    naps: list[float],
    spoil: Callable[[Hub], object],
    kind: type[Exception] | None,
    message: str,
    waits: int,
) -> None:
    hub.add("user/name", CONFIG)
    spoil(hub)
    if kind is None:
        assert (Path(hubs.download("user/name", None)) / "config.json").read_bytes() == b"{}"
    else:
        with pytest.raises(kind, match=message):
            hubs.download("user/name", None)
    assert len(naps) == waits


# --- names (S6) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["google/gemma-2-9b", "gpt2", "a/b", "user_1/na.me-2", "0/0"])
def test_names_on_the_hub(name: str) -> None:
    assert hubs.is_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a/b/c",
        "../a",
        "a/..",
        "a/../b",
        "a/b..c",
        "./a",
        "~/a",
        "a b",
        "a/b\n",
        "a/b\x00",
        "a\\b",
        "a--b/c",
        "C:/a",
        "https://huggingface.co/a/b",
        "ä/b",
        "a/b?x",
        "a/b#x",
        "x" * 97,
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert not hubs.is_id(name)


def test_a_name_that_only_the_hub_knows_to_be_wrong(hub: Hub) -> None:
    with pytest.raises(InputError, match="not a name on the Hub"):
        info("user/name.git")


# --- rows from the Hub -----------------------------------------------------------------------------------

READ = """
import sys, time
time.sleep = lambda seconds: None
from tuneship.data import sources
from tuneship.errors import TuneshipError
from tuneship.recipe import Data
data = Data(dataset_name=sys.argv[1], dataset_train_split=sys.argv[2])
try:
    print(sources.revision(data))
    print(*(row for row in sources.read(data)), sep="\\n")
except TuneshipError as error:
    print(type(error).__name__, error)
"""


def rows_of(hub: Hub, folder: Path, name: str, split: str = "train") -> list[str]:
    environment = {**os.environ, **hub.environment, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", READ, name, split], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_rows_of_the_hub_are_streamed(hub: Hub, tmp_path: Path) -> None:
    lines = b"".join(b'{"question": "q%d", "context": "c", "answer": "a"}\n' % n for n in range(3))
    repo = hub.add("user/rows", {"train.jsonl": lines}, kind="datasets")
    sha, *rows = rows_of(hub, tmp_path, "user/rows")
    assert sha == repo.head.sha
    assert rows == [str((n + 1, {"question": f"q{n}", "context": "c", "answer": "a"})) for n in range(3)]


@pytest.mark.parametrize(
    ("name", "split", "spoil", "message"),
    [
        ("user/rows", "dev", lambda hub: None, "InputError"),
        ("user/other", "train", lambda hub: None, "InputError the Hub knows no such repository"),
        ("user/rows", "train", lambda hub: hub.fail("GET", "/resolve/.*jsonl", 403), "OutsideError"),
        ("user/rows", "train", lambda hub: hub.cut("GET", "/resolve/.*jsonl", times=10**9), "OutsideError"),
    ],
    ids=["no such split", "no such data set", "forbidden", "broken off"],
)
def test_rows_that_the_hub_does_not_give_are_told(
    hub: Hub, tmp_path: Path, name: str, split: str, spoil: Callable[[Hub], object], message: str
) -> None:
    hub.add("user/rows", {"train.jsonl": b'{"question": "q"}\n'}, kind="datasets")
    spoil(hub)
    assert any(line.startswith(message) for line in rows_of(hub, tmp_path, name, split))
