"""watch: a workflow as it goes. Steps and their pods, the wait for a GPU, the training's lines with its loss.

It looks every few seconds and changes nothing: ctrl-C ends the looking, the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from typing import Any

from tuneship.cluster.commands import read
from tuneship.console import say
from tuneship.credentials import redact
from tuneship.errors import GateError, InputError, OutsideError, Stopped, TuneshipError

EVERY_S = 5.0
_BY_CODE = {kind.exit_code: kind for kind in (InputError, OutsideError, GateError, Stopped)}
_ENDED = ("Succeeded", "Failed", "Error")


def watch(run: str, namespace: str, *, every_s: float = EVERY_S) -> None:
    """Says what changes until the workflow has ended.

    Args:
        run: the workflow's name, with or without Metaflow's `argo-` before it.

    Raises:
        InputError: there is no such workflow.
        TuneshipError: it failed; of the kind that the failed step's exit code means.
    """
    name = run.removeprefix("argo-")
    say(f"$ kubectl --namespace {namespace} get workflow {name} --output=json   (every {every_s:g} s)")
    seen: dict[str, str] = {}
    tails: dict[str, _Tail] = {}
    pause = threading.Event()
    try:
        while True:
            workflow = _get(name, namespace)
            nodes = _pods(workflow)
            for node in nodes:
                if seen.get(node["id"]) != (line := _line(node)):
                    seen[node["id"]] = line
                    say(line)
                if node["phase"] == "Running" and node["id"] not in tails:
                    if pod := _pod_name(name, node["id"], namespace):
                        tails[node["id"]] = _Tail(node, pod, namespace)
                elif node["phase"] in _ENDED and node["id"] in tails:
                    tails[node["id"]].finish()
            if (phase := workflow.get("status", {}).get("phase", "Pending")) in _ENDED:
                break
            pause.wait(every_s)
    except KeyboardInterrupt:
        say(f"the run goes on; tuneship watch {name} looks at it again")
        return
    finally:
        for tail in tails.values():
            tail.close()
    if phase != "Succeeded":
        raise _failure(name, namespace, workflow, nodes)
    say(f"{name}: succeeded")


def _get(name: str, namespace: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(
            read("kubectl", "--namespace", namespace, "get", "workflow", name, "--output=json")
        )
    except OutsideError as error:
        if "NotFound" not in str(error):
            raise
        raise InputError(
            "there is no such run",
            where=f"workflow {name} in the namespace {namespace}",
            fix=f"kubectl --namespace {namespace} get workflows",
        ) from None
    return found


def _pods(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The workflow's pods, in the order in which they began."""
    nodes = workflow.get("status", {}).get("nodes", {}).values()
    return sorted((n for n in nodes if n["type"] == "Pod"), key=lambda n: (n.get("startedAt") or "~", n["id"]))


def _pod_name(workflow: str, node_id: str, namespace: str) -> str | None:
    """The pod of a node: its annotation says which, its name only nearly."""
    selector = f"--selector=workflows.argoproj.io/workflow={workflow}"
    pods = json.loads(read("kubectl", "--namespace", namespace, "get", "pods", selector, "--output=json"))["items"]
    for pod in pods:
        if pod["metadata"].get("annotations", {}).get("workflows.argoproj.io/node-id") == node_id:
            return str(pod["metadata"]["name"])
    return None


def _line(node: dict[str, Any]) -> str:
    """What is said of a pod; a new line is said when this changes."""
    message = (node.get("message") or "").strip()
    if node["phase"] == "Pending" and "nschedulable" in message:
        wait = "waits for a GPU node" if "nvidia.com/gpu" in message else "waits for a node"
        return f"{node['displayName']}: {wait} ({message[:160]})"
    return f"{node['displayName']}: {node['phase'].lower()}" + (f" ({message[:160]})" if message else "")


def _failure(name: str, namespace: str, workflow: dict[str, Any], nodes: list[dict[str, Any]]) -> TuneshipError:
    failed = [node for node in nodes if node["phase"] in ("Failed", "Error")]
    message = workflow["status"].get("message") or "it does not say why"
    if not failed:
        return TuneshipError(
            f"the run failed: {message}", where=name, fix=f"kubectl -n {namespace} describe workflow {name}"
        )
    last = failed[-1]
    code = str(last.get("outputs", {}).get("exitCode", ""))
    kind = _BY_CODE.get(int(code), TuneshipError) if code.isdigit() else TuneshipError
    why = (
        "it ran out of memory: raise cluster.memory_mb"
        if "OOMKilled" in str(last.get("message"))
        else last.get("message") or message
    )
    return kind(
        f"the step {last['templateName']} failed: {why}",
        where=f"{last['displayName']} of {name}",
        fix=f"kubectl -n {namespace} logs -l workflows.argoproj.io/workflow={name} -c main --tail=50",
    )


class _Tail:
    """The lines of one pod, said as they come."""

    def __init__(self, node: dict[str, Any], pod: str, namespace: str) -> None:
        self._name = node["displayName"]
        argv = ["kubectl", "--namespace", namespace, "logs", "--follow", "--container=main", pod]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            process_group=0,
        )
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            say(f"{self._name} | {redact(line.rstrip())}")

    def finish(self) -> None:
        """Lets it say the rest of an ended pod, which is there at once."""
        self._thread.join(10)

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
