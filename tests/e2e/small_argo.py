"""A WorkflowTemplate, executed: each pod a process, in DAG order, with the template's own retries.

A pod is what a container would see of itself: its own processes, its own mounts (an empty directory for each emptyDir,
the rest of the machine read-only where its root is), the environment of the template and nothing of
the test's, a process group of its own, the downward API. Not here: scheduling, images, networks.

    finished = run(workflow, template, cloud, folder, keep=[samples])
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_cloud import NAMESPACE, Cloud

ROOT = Path(__file__).resolve().parents[2]
# A minute alone; the machine may be busy.
DEADLINE_S = 400.0


@dataclass(frozen=True)
class Attempt:
    """One pod that ended."""

    step: str
    number: int
    code: int
    log: str


@dataclass
class Pod:
    """A pod that runs."""

    step: str
    number: int
    process: subprocess.Popen[str]

    def send(self, number: int) -> None:
        """A signal to the whole group, as Argo's executor (SIGTERM) and the kernel (SIGKILL) do it."""
        os.killpg(self.process.pid, number)


# Called with each line that a pod says.
Listener = Callable[[Pod, str], None]


def mounts_work() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    return subprocess.run([*_unshare(), "mount", "--make-rprivate", "/"], stderr=subprocess.DEVNULL).returncode == 0


def run(
    workflow: dict[str, Any],
    template: dict[str, Any],
    cloud: Cloud,
    folder: Path,
    *,
    keep: Sequence[Path] = (),
    listen: Listener = lambda pod, line: None,
) -> tuple[bool, list[Attempt]]:
    """Executes a workflow; returns whether it succeeded, and its pods in order.

    Args:
        keep: folders that every pod sees, as if they were in its image.
        listen: called with each line that a pod says.
    """
    templates = {entry["name"]: entry for entry in template["spec"]["templates"]}
    scope = {
        "workflow.name": workflow["metadata"]["name"],
        "workflow.namespace": NAMESPACE,
        "workflow.creationTimestamp": "2026-11-25T00:00:00Z",
    }
    attempts: list[Attempt] = []
    succeeded: set[str] = set()
    for task in templates[template["spec"]["entrypoint"]]["dag"]["tasks"]:
        needed = [name.removesuffix(".Succeeded") for name in task["depends"].split(" && ") if name]
        assert set(needed) <= succeeded, f"{task['name']} comes before {needed}"
        inputs = {f"inputs.parameters.{p['name']}": _fill(p["value"], scope) for p in task["arguments"]["parameters"]}
        outputs = _retried(templates[task["template"]], scope | inputs, cloud, folder, keep, listen, attempts)
        if outputs is None:
            return False, attempts
        succeeded.add(task["name"])
        scope |= {f"tasks.{task['name']}.outputs.parameters.{name}": value for name, value in outputs.items()}
    return True, attempts


def _retried(
    entry: dict[str, Any],
    scope: dict[str, str],
    cloud: Cloud,
    folder: Path,
    keep: Sequence[Path],
    listen: Listener,
    attempts: list[Attempt],
) -> dict[str, str] | None:
    """The template's outputs, or None where its retries are used up or its expression says no."""
    strategy = entry.get("retryStrategy", {"limit": 0})
    assert strategy.get("retryPolicy", "Always") == "Always"
    for number in range(int(strategy["limit"]) + 1):
        pod_folder = folder / f"{entry['name']}-{number}"
        code, log = _pod(entry, scope | {"retries": str(number)}, cloud, pod_folder, number, keep, listen)
        attempts.append(Attempt(entry["name"], number, code, log))
        if code == 0:
            wanted = entry.get("outputs", {}).get("parameters", [])
            return {p["name"]: _out(pod_folder, p["valueFrom"]["path"]) for p in wanted}
        if "expression" in strategy and not worth_another(strategy["expression"], code):
            return None
    return None


def worth_another(expression: str, code: int) -> bool:
    """Argo's expression on lastRetry.exitCode; the part of its language that the template uses."""
    terms = re.fullmatch(r"asInt\(lastRetry\.exitCode\) != \d+( && asInt\(lastRetry\.exitCode\) != \d+)*", expression)
    assert terms, expression
    return code not in {int(number) for number in re.findall(r"\d+", expression)}


def _pod(
    entry: dict[str, Any],
    scope: dict[str, str],
    cloud: Cloud,
    folder: Path,
    number: int,
    keep: Sequence[Path],
    listen: Listener,
) -> tuple[int, str]:
    """Runs a pod to its end; returns its exit code as Kubernetes has it (137 for SIGKILL), and its log."""
    container = entry["container"]
    downward = {
        "metadata.namespace": NAMESPACE,
        "metadata.name": f"{entry['name']}-{number}",
        "metadata.uid": f"uid-{entry['name']}-{number}",
        "spec.serviceAccountName": entry["serviceAccountName"],
        "status.hostIP": "127.0.0.1",
    }
    environment = {**cloud.pod_environment, "PYTHONPATH": str(ROOT)}
    for variable in container["env"]:
        source = variable.get("valueFrom")
        environment[variable["name"]] = (
            downward[source["fieldRef"]["fieldPath"]] if source else _fill(variable["value"], scope)
        )
    empty = {volume["name"] for volume in entry["volumes"] if "emptyDir" in volume}
    mounted = {m["mountPath"]: folder / m["name"] for m in container["volumeMounts"]}
    assert {m["name"] for m in container["volumeMounts"]} <= empty
    for directory in mounted.values():
        directory.mkdir(parents=True)
    command = [_fill(part, scope) for part in container["command"]]
    kept = [Path(sys.prefix), Path(sys.base_prefix), ROOT, *keep]
    script = _mounts(mounted, kept, read_only=container["securityContext"]["readOnlyRootFilesystem"])
    # The first process waits for the command, as Argo's executor does; with it ends whatever the pod has started.
    script += f"cd {shlex.quote(container['workingDir'])}\nset +e\ntrap : TERM\n{shlex.join(command)}\nexit $?\n"
    process = subprocess.Popen(
        [*_unshare(), "bash", "-ec", script],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    pod, said = Pod(entry["name"], number, process), []
    # A pod that hangs would hang the test: its end is the end of its output.
    watch = threading.Timer(DEADLINE_S, pod.send, [signal.SIGKILL])
    watch.start()
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            listen(pod, line)
        code = process.wait()
    watch.cancel()
    watch.join()
    return (128 - code if code < 0 else code), "".join(said)


def _unshare() -> list[str]:
    own = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["unshare", *own] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", *own]


def _mounts(mounted: dict[str, Path], kept: Sequence[Path], *, read_only: bool) -> str:
    """Lines of bash that give the process its own view: /mnt empty but for the volumes, as in an image."""
    lines = ["mount --make-rprivate /", "mount -t tmpfs tmpfs /mnt"]
    # What a volume would hide stays visible inside it.
    for path, directory in mounted.items():
        for folder in {folder for folder in kept if folder.is_relative_to(path)}:
            inside = directory / folder.relative_to(path)
            lines += [f"mkdir -p {inside}", f"mount --bind {folder} {inside}", f"mount -o remount,bind,ro {inside}"]
    for path, directory in mounted.items():
        lines += [f"mkdir -p {path}", f"mount --rbind {directory} {path}"]
    if read_only:
        lines.append("mount -o remount,bind,ro /")
    return "\n".join(lines) + "\n"


def _fill(text: str, scope: dict[str, str]) -> str:
    """Argo's simple tags; one that is not known is an error, as it would be there."""
    return re.sub(r"\{\{([^{}]+)\}\}", lambda match: scope[match.group(1).strip()], text)


def _out(folder: Path, path: str) -> str:
    assert path.startswith("/mnt/out/")
    return (folder / "out" / path.removeprefix("/mnt/out/")).read_text(encoding="utf-8").strip()
