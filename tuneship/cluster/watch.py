"""watch: a workflow as it goes. Steps and their pods, the wait for a GPU, the training's lines with its loss.

It looks every few seconds and changes nothing: a signal ends the looking, the run goes on. A cluster
that does not answer is looked at for a minute more.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterable
from typing import Any

from tuneship.cluster.commands import NoAnswer, read
from tuneship.console import say
from tuneship.credentials import redact
from tuneship.errors import GateError, InputError, OutsideError, Stopped, TuneshipError
from tuneship.signals import StopFlag, stop_flag

EVERY_S = 5.0
# How long a cluster may be silent before the watch ends.
PATIENCE_S = 60.0
_BY_CODE = {kind.exit_code: kind for kind in (InputError, OutsideError, GateError, Stopped)}
_ENDED = ("Succeeded", "Failed", "Error")


def watch(run: str, namespace: str, *, every_s: float = EVERY_S, patience_s: float = PATIENCE_S) -> None:
    """Says what changes until the workflow has ended.

    Args:
        run: the workflow's name, with or without Metaflow's `argo-` before it.
        patience_s: how long the cluster may not answer.

    Raises:
        InputError: there is no such workflow.
        OutsideError: kubectl is refused, or the cluster did not answer for so long.
        TuneshipError: it failed; of the kind that the failed step's exit code means.
    """
    name, phase = run.removeprefix("argo-"), ""
    say(f"$ kubectl --namespace {namespace} get workflow {name} --output=json   (every {every_s:g} s)")
    shown, patience = _Shown(name, namespace), _Patience(patience_s)
    # A flag, since an exception could come where a process is half begun.
    with stop_flag() as stop:
        try:
            while not stop:
                try:
                    workflow = _get(name, namespace)
                    patience.answered()
                    nodes = _pods(workflow)
                    for node in nodes:
                        shown.show(node)
                    if (phase := workflow.get("status", {}).get("phase", "Pending")) in _ENDED:
                        break
                except NoAnswer as error:
                    patience.failed(error)
                _pause(every_s, stop)
        except OutsideError:
            # ctrl-C ends kubectl too.
            if not stop:
                raise
        finally:
            shown.close()
    if phase not in _ENDED:
        say(f"the run goes on; tuneship watch {name} looks at it again")
        return
    if phase != "Succeeded":
        raise _failure(name, namespace, workflow, nodes)
    say(f"{name}: succeeded")


def _pause(seconds: float, stop: StopFlag) -> None:
    """In slices, so that a signal is heard soon."""
    end = time.monotonic() + seconds
    while not stop and (left := end - time.monotonic()) > 0:
        time.sleep(min(0.1, left))


class _Patience:
    """Bears with a cluster that does not answer, for a while."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._since: float | None = None

    def failed(self, error: NoAnswer) -> None:
        """Says it the first time, raises it when it has lasted."""
        if self._since is None:
            self._since = time.monotonic()
            say(f"the cluster does not answer; looking again, for {self._for_s:g} s")
        elif time.monotonic() - self._since >= self._for_s:
            raise error

    def answered(self) -> None:
        """Says that it is over."""
        if self._since is not None:
            self._since = None
            say("the cluster answers again")


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


class _Shown:
    """What has been said of a workflow's pods, and their logs."""

    def __init__(self, workflow: str, namespace: str) -> None:
        self._workflow, self._namespace = workflow, namespace
        self._lines: dict[str, str] = {}
        self._tails: dict[str, _Tail] = {}

    def show(self, node: dict[str, Any]) -> None:
        """Says what is new of a pod; that it has ended, after all that it had to say."""
        if self._lines.get(node["id"]) != (line := _line(node)):
            if node["phase"] in _ENDED and (tail := self._tail(node)):
                tail.finish()
            self._lines[node["id"]] = line
            say(line)
        if node["phase"] == "Running" and (tail := self._tail(node)):
            tail.follow()

    def _tail(self, node: dict[str, Any]) -> _Tail | None:
        if node["id"] not in self._tails and (pod := _pod_name(self._workflow, node["id"], self._namespace)):
            self._tails[node["id"]] = _Tail(node, pod, self._namespace)
        return self._tails.get(node["id"])

    def close(self) -> None:
        """Ends what still reads."""
        for tail in self._tails.values():
            tail.close()


class _Tail:
    """The lines of one pod, each said once, as they come."""

    def __init__(self, node: dict[str, Any], pod: str, namespace: str) -> None:
        self._name = node["displayName"]
        self._argv = ["kubectl", "--namespace", namespace, "logs", "--container=main", pod]
        self._process: subprocess.Popen[str] | None = None
        self._said = 0

    def follow(self) -> None:
        """Reads on while the pod runs; again where the connection has broken."""
        if self._process is None or self._process.poll() is not None:
            self._read("--follow")

    def finish(self) -> None:
        """Says the rest of an ended pod, which is there at once."""
        if self._process is not None:
            self._thread.join(10)
        if self._process is None or self._thread.is_alive() or self._process.wait() != 0:
            self._read()
            self._thread.join(10)

    def close(self) -> None:
        """Ends the reading."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self, *options: str) -> None:
        self.close()
        self._process = subprocess.Popen(
            [*self._argv, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            process_group=0,
        )
        self._thread = threading.Thread(target=self._relay, args=(self._process.stdout, self._said), daemon=True)
        self._thread.start()

    def _relay(self, lines: Iterable[str], known: int) -> None:
        for line in itertools.islice(lines, known, None):
            self._said += 1
            say(f"{self._name} | {redact(line.rstrip())}")
