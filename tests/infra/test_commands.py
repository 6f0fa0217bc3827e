"""terraform, gcloud and kubectl as they are called: what they are told, what is shown, what a complaint becomes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import fake_tools
import psutil
import pytest

from tuneship.cluster import commands
from tuneship.errors import InputError, OutsideError, Stopped


def test_what_a_tool_is_told_and_what_is_shown_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = fake_tools.install(tmp_path, monkeypatch, "kubectl")
    tools.answer("kubectl create", out="secret/x created\n")
    commands.change("kubectl", "create", "--filename=-", text="token: 1234", before="… a manifest | ")
    assert tools.inputs == ["token: 1234"]
    assert capsys.readouterr().err.splitlines() == ["$ … a manifest | kubectl create --filename=-", "secret/x created"]


def test_a_tool_that_is_not_there_is_told_before_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools.install(tmp_path, monkeypatch, "gcloud")
    commands.need("gcloud")
    with pytest.raises(OutsideError, match="gke-gcloud-auth-plugin is not installed") as caught:
        commands.need("gcloud", "gke-gcloud-auth-plugin")
    assert "components install" in caught.value.fix


# As Terraform: what has begun is finished, and written down, after what it is told; a pipe nobody reads ends it.
GRACEFUL = """#!{python} -IS
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(len(told)))
for wanted in range({count}):
    open(f"waits{{wanted}}", "x").close()
    while len(told) == wanted:
        signal.sigtimedwait([], 0.01)
    print(f"Interrupt {{wanted}} received", flush=True)
for number in range(20):
    print("still modifying", flush=True)
    signal.sigtimedwait([], 0.01)
open("state", "w").write(f"{{len(told)}} interrupts")
sys.exit(1)
"""


def graceful(folder: Path, monkeypatch: pytest.MonkeyPatch, *, count: int) -> None:
    """Terraform in a folder, which becomes the current one, and waits for so many signals."""
    (folder / "terraform").write_text(GRACEFUL.format(python=sys.executable, count=count))
    (folder / "terraform").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGINT, signal.SIGINT)]
)
def test_a_signal_is_passed_on_and_the_tools_end_awaited(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    numbers: tuple[signal.Signals, ...],
) -> None:
    graceful(tmp_path, monkeypatch, count=len(numbers))

    presses = [(Path(f"waits{count}").exists, number) for count, number in enumerate(numbers)]
    said = f"stopped by {numbers[0].name}, and terraform has ended"
    with fake_tools.pressed(*presses), pytest.raises(Stopped, match=said) as caught:
        commands.change("terraform", "apply")
    assert caught.value.where == "terraform apply"
    assert Path("state").read_text() == f"{len(numbers)} interrupts"
    assert capsys.readouterr().err.count("still modifying") == 20


def test_a_tool_comes_to_its_end_though_nobody_reads_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: TextIO
) -> None:
    graceful(tmp_path, monkeypatch, count=0)
    monkeypatch.setattr(sys, "stderr", unread)
    with pytest.raises(OutsideError):
        commands.change("terraform", "apply")
    assert Path("state").exists()


def test_a_signal_while_a_tool_begins_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools.install(tmp_path, monkeypatch, "kubectl").answer("kubectl delete", stay=True)
    monkeypatch.setattr(subprocess, "Popen", fake_tools.signalled(signal.SIGINT, "delete"))
    with pytest.raises(Stopped):
        commands.change("kubectl", "delete")


def test_metaflow_is_told_a_name_that_it_takes() -> None:
    assert commands.metaflow_user({"METAFLOW_USER": "ada"}) == "ada"
    name = psutil.Process().username()
    assert commands.metaflow_user({}) == ("superuser" if name == "root" else name)


REFUSED = "Unable to connect to the server: dial tcp 10.0.0.2:443: i/o timeout"
COLOURED = "E1126 memcache\nerror: \x1b[31mno such x\x1b[0m\n\n"
LOCKED = "Error acquiring the state lock\n  ID:  12-ab"


@pytest.mark.parametrize(
    ("argv", "said", "kind", "what", "fix"),
    [
        ("kubectl get pods", REFUSED, commands.NoAnswer, "kubectl reaches no cluster", "tuneship connect"),
        ("gcloud builds list", REFUSED, OutsideError, "kubectl reaches no cluster", "tuneship connect"),
        ("kubectl get x", COLOURED, OutsideError, "kubectl: error: no such x", "by hand"),
        ("kubectl get x", "", OutsideError, "kubectl: it says nothing", "by hand"),
        ("kubectl apply", "Invalid value for variable", OutsideError, "kubectl: Invalid value for variable", "by hand"),
        ("terraform plan", "Error: Invalid value for variable", InputError, "Invalid value", "variables file"),
        ("terraform plan", "Error: Quota 'cpus-per-vm' exceeded.", OutsideError, "too small: cpus-per-vm", "=PROJECT,"),
        ("terraform -chdir=here plan", LOCKED, OutsideError, "locked", "=here force-unlock 12-ab"),
    ],
)
def test_a_complaint(argv: str, said: str, kind: type[Exception], what: str, fix: str) -> None:
    with pytest.raises((InputError, OutsideError)) as caught:
        commands.complain(argv.split(), said)
    assert type(caught.value) is kind
    assert what in caught.value.what and fix in caught.value.fix and caught.value.where == argv
