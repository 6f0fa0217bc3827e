"""watch: what is said of a workflow as it goes, and what its end becomes."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import fake_tools
import pytest

from tuneship.cluster.watch import watch
from tuneship.errors import GateError, InputError, OutsideError, TuneshipError


def workflow(phase: str, *nodes: dict[str, Any]) -> str:
    return json.dumps(
        {"status": {"phase": phase, "nodes": {node["id"]: node for node in nodes}, "message": "child failed"}}
    )


def node(step: str, phase: str, message: str = "", code: str = "", attempt: int = 0) -> dict[str, Any]:
    return {
        "id": f"tiny-abc-{step}{attempt}",
        "displayName": f"{step}({attempt})",
        "templateName": step,
        "type": "Pod",
        "phase": phase,
        "message": message,
        "startedAt": f"2026-11-25T00:00:0{attempt}Z",
        "outputs": {"exitCode": code} if code else {},
    }


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fake_tools.Tools:
    made = fake_tools.install(tmp_path, monkeypatch, "kubectl")
    pods = [
        {
            "metadata": {
                "name": f"tiny-abc-train-1{n}",
                "annotations": {"workflows.argoproj.io/node-id": f"tiny-abc-train{n}"},
            }
        }
        for n in (0, 1)
    ]
    made.answer("kubectl get pods", out=json.dumps({"items": pods}))
    return made


def test_steps_the_wait_for_a_gpu_and_the_loss_are_said_once(
    tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = node("train", "Pending", "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    for state in (waits, waits, node("train", "Running"), node("train", "Succeeded")):
        ended = state["phase"] == "Succeeded"
        tools.answer("kubectl get workflow", out=workflow("Succeeded" if ended else "Running", state))
    tools.answer("kubectl logs", out="updates 10/20  loss 1.234\nupdates 20/20  loss 0.567\n")
    watch("argo-tiny-abc", "argo", every_s=0.01)
    said = capsys.readouterr().err.splitlines()
    # The pod's own lines come between, when they come.
    steps = [line for line in said[1:] if "|" not in line]
    assert steps == [
        "train(0): waits for a GPU node (Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.)",
        "train(0): running",
        "train(0): succeeded",
        "tiny-abc: succeeded",
    ]
    lines = [line for line in said if "|" in line]
    assert lines == ["train(0) | updates 10/20  loss 1.234", "train(0) | updates 20/20  loss 0.567"]
    assert "kubectl --namespace argo logs --container=main tiny-abc-train-10 --follow" in tools.calls


def test_a_token_in_a_log_is_not_shown(tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str]) -> None:
    tools.answer("kubectl get workflow", out=workflow("Running", node("train", "Running")))
    tools.answer("kubectl get workflow", out=workflow("Succeeded", node("train", "Succeeded")))
    tools.answer("kubectl logs", out="using hf_abcdefghijklmnop\n")
    watch("tiny-abc", "argo", every_s=0.01)
    said = capsys.readouterr().err
    assert "using [redacted]" in said and "hf_abc" not in said


@pytest.mark.parametrize(
    ("code", "message", "kind", "what"),
    [
        ("2", "Error (exit code 2)", InputError, "the step train failed: Error (exit code 2)"),
        ("3", "Error (exit code 3)", OutsideError, "exit code 3"),
        ("4", "Error (exit code 4)", GateError, "exit code 4"),
        ("137", "OOMKilled (exit code 137)", TuneshipError, "raise cluster.memory_mb"),
        ("", "pod deleted", TuneshipError, "pod deleted"),
    ],
)
def test_a_failed_step_becomes_the_error_that_its_exit_code_means(
    tools: fake_tools.Tools, code: str, message: str, kind: type[TuneshipError], what: str
) -> None:
    failed = node("train", "Failed", message, code)
    tools.answer("kubectl get workflow", out=workflow("Failed", node("prepare", "Succeeded"), failed))
    with pytest.raises(kind) as caught:
        watch("tiny-abc", "argo", every_s=0.01)
    assert type(caught.value) is kind and what in caught.value.what
    assert "workflows.argoproj.io/workflow=tiny-abc" in caught.value.fix


def test_a_run_that_is_not_there(tools: fake_tools.Tools) -> None:
    said = 'Error from server (NotFound): workflows.argoproj.io "nix" not found\n'
    tools.answer("kubectl get workflow", err=said, code=1)
    with pytest.raises(InputError, match="there is no such run") as caught:
        watch("nix", "argo")
    assert "get workflows" in caught.value.fix


GONE = "Unable to connect to the server: dial tcp: lookup gke-x.gke.goog: no such host\n"


@pytest.mark.parametrize(
    "said",
    [
        GONE,
        "Unable to connect to the server: net/http: TLS handshake timeout\n",
        "The connection to the server 10.0.0.2 was refused - did you specify the right host or port?\n",
        "Error from server (ServiceUnavailable): the server is currently unable to handle the request\n",
    ],
)
def test_a_cluster_that_is_silent_for_a_moment_is_looked_at_again(
    tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    tools.answer("kubectl get workflow", out=workflow("Running", node("prepare", "Pending")))
    for _ in range(3):
        tools.answer("kubectl get workflow", err=said, code=1)
    tools.answer("kubectl get workflow", out=workflow("Running", node("prepare", "Pending")))
    tools.answer("kubectl get workflow", err=said, code=1)
    tools.answer("kubectl get workflow", out=workflow("Succeeded", node("prepare", "Succeeded")))
    watch("tiny-abc", "argo", every_s=0.01)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "prepare(0): pending",
        *["the cluster does not answer; looking again, for 60 s", "the cluster answers again"] * 2,
        "prepare(0): succeeded",
        "tiny-abc: succeeded",
    ]


def test_a_cluster_that_stays_silent(tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str]) -> None:
    tools.answer("kubectl get workflow", err=GONE, code=1)
    with pytest.raises(OutsideError, match="kubectl reaches no cluster") as caught:
        watch("tiny-abc", "argo", every_s=0.01, patience_s=0)
    assert caught.value.fix == "tuneship connect"
    assert len(tools.calls) == 2, "it was looked at again"
    assert capsys.readouterr().err.count("the cluster does not answer") == 1


@pytest.mark.parametrize(
    "said",
    [
        'Error from server (Forbidden): workflows.argoproj.io "tiny-abc" is forbidden\n',
        "error: You must be logged in to the server (Unauthorized)\n",
        "error: current-context is not set\n",
        "The connection to the server localhost:8080 was refused - did you specify the right host or port?\n",
        "Unable to connect to the server: getting credentials: exec: executable gke-gcloud-auth-plugin not found\n",
    ],
)
def test_what_will_not_pass_ends_it_at_once(tools: fake_tools.Tools, said: str) -> None:
    tools.answer("kubectl get workflow", err=said, code=1)
    with pytest.raises(OutsideError):
        watch("tiny-abc", "argo")
    assert len(tools.calls) == 1


def test_a_pod_that_ends_between_two_looks_has_its_lines_shown(
    tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.answer("kubectl get workflow", out=workflow("Running", node("train", "Pending")))
    tools.answer("kubectl get workflow", out=workflow("Failed", node("train", "Failed", code="2")))
    tools.answer("kubectl logs", out="the row 7 has no answer\n")
    with pytest.raises(InputError):
        watch("tiny-abc", "argo", every_s=0.01)
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == ["train(0): pending", "train(0) | the row 7 has no answer", "train(0): failed"]
    assert "kubectl --namespace argo logs --container=main tiny-abc-train-10" in tools.calls


def test_a_broken_connection_loses_and_repeats_no_line(
    tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.answer("kubectl get workflow", out=workflow("Running", node("train", "Running")))
    tools.answer("kubectl get workflow", out=workflow("Succeeded", node("train", "Succeeded")))
    tools.answer("kubectl logs", out="one\ntwo\n", code=1)
    tools.answer("kubectl logs", out="one\ntwo\nthree\n")
    watch("tiny-abc", "argo", every_s=0.01)
    said = [line for line in capsys.readouterr().err.splitlines()[1:] if line != "train(0): running"]
    lines = [f"train(0) | {line}" for line in ("one", "two", "three")]
    assert said == [*lines, "train(0): succeeded", "tiny-abc: succeeded"]


def test_a_log_is_followed_again_while_the_pod_runs(tools: fake_tools.Tools) -> None:
    for _ in range(10):
        tools.answer("kubectl get workflow", out=workflow("Running", node("train", "Running")))
    tools.answer("kubectl get workflow", out=workflow("Succeeded", node("train", "Succeeded")))
    tools.answer("kubectl logs", err="error: container is waiting to start: ContainerCreating\n", code=1)
    watch("tiny-abc", "argo", every_s=0.01)
    assert sum(call.endswith("--follow") for call in tools.calls) > 1


def test_pods_are_said_as_they_began_and_the_last_one_that_failed_is_blamed(
    tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {**node("dag", "Running"), "type": "DAG"}
    waits = node("prepare", "Pending", "Unschedulable: 0/3 nodes are available: 3 Insufficient cpu.")
    tools.answer("kubectl get workflow", out=workflow("Running", whole, waits))
    failed = node("evaluate", "Failed", code="4", attempt=1), node("prepare", "Failed", code="3")
    tools.answer("kubectl get workflow", out=workflow("Failed", whole, *failed))
    with pytest.raises(GateError, match="the step evaluate failed"):
        watch("tiny-abc", "argo", every_s=0.01)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "prepare(0): waits for a node (Unschedulable: 0/3 nodes are available: 3 Insufficient cpu.)",
        "prepare(0): failed",
        "evaluate(1): failed",
    ]


def test_a_run_that_fails_without_a_pod(tools: fake_tools.Tools) -> None:
    tools.answer("kubectl get workflow", out=workflow("Error"))
    with pytest.raises(TuneshipError, match="the run failed: child failed"):
        watch("tiny-abc", "argo")


def test_ctrl_c_ends_the_looking_alone(tools: fake_tools.Tools, capsys: pytest.CaptureFixture[str]) -> None:
    tools.answer("kubectl get workflow", out=workflow("Running", node("train", "Running")))
    tools.answer("kubectl logs", stay=True)

    with fake_tools.pressed((lambda: any("logs" in call for call in tools.calls), signal.SIGINT)):
        watch("tiny-abc", "argo", every_s=0.01)
    assert capsys.readouterr().err.endswith("the run goes on; tuneship watch tiny-abc looks at it again\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", ["get workflow", "get pods", "logs"])
def test_a_signal_while_a_tool_begins_leaves_none_behind(
    tools: fake_tools.Tools,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    number: signal.Signals,
) -> None:
    begun: list[subprocess.Popen[str]] = []
    tools.answer("kubectl get workflow", out=workflow("Running", node("train", "Running")))
    tools.answer("kubectl logs", stay=True)
    monkeypatch.setattr(subprocess, "Popen", fake_tools.signalled(number, words, begun))
    watch("tiny-abc", "argo", every_s=60)
    assert capsys.readouterr().err.endswith("the run goes on; tuneship watch tiny-abc looks at it again\n")
    assert begun and all(process.returncode is not None for process in begun)


def test_ctrl_c_ends_kubectl_too_and_is_no_error(
    tools: fake_tools.Tools, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.answer("kubectl get workflow", code=130)
    monkeypatch.setattr(subprocess, "Popen", fake_tools.signalled(signal.SIGINT, "get workflow"))
    watch("tiny-abc", "argo")
    assert capsys.readouterr().err.endswith("the run goes on; tuneship watch tiny-abc looks at it again\n")
