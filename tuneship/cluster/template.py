"""The last touch on what Metaflow compiles for Argo Workflows: what its decorators have no word for.

    retries        an exit code that says "wrong input" (2), "the gate said no" (4) or "failed for good" (202)
                   is not tried again; a stop by a signal (75), a kill, a lost node are
    security       as the `restricted` Pod Security Standard wants it, on a read-only root: a pod writes to
                   /mnt/work (its home), /tmp and /mnt/out
    accelerators   any of several, in an order of preference
    the stop       SIGTERM is for the training, which saves and ends: the shell around it waits
    installs       none at a pod's start; the image has all of it

`finish` is a pure function on the WorkflowTemplate's JSON. tuneship.flow calls it wherever Metaflow
compiles one: `argo-workflows create` and `tuneship submit` deploy the same. `gpu_pod` is what the
decorators do have words for.
"""

from __future__ import annotations

import json
from typing import Any

from tuneship.errors import TuneshipError
from tuneship.recipe import Cluster

ACCELERATOR = "cloud.google.com/gke-accelerator"
SPOT = "cloud.google.com/gke-spot"

# Seconds from SIGTERM to SIGKILL; a Spot node that is taken away gives about 15 of them.
GRACE_S = 60

# InputError, GateError, and what the flow exits with where nothing will be better the next time.
FINAL_CODES = (2, 4, 202)

# Argo gives the code as text, -1 where there is none: the pod was evicted, its node is gone.
RETRY_IF = " && ".join(f"asInt(lastRetry.exitCode) != {code}" for code in FINAL_CODES)

_POD_SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_ENVIRONMENT = {"HOME": "/mnt/work", "METAFLOW_SKIP_INSTALL_DEPENDENCIES": "1"}
_WRITABLE = {"work": "/mnt/work", "tmp": "/tmp"}  # noqa: S108 - an emptyDir of the pod


# A trap is not handed down to a subshell; an ignored signal is, to everything below.
_SIGNALS = (
    ("flush_mflogs && (", "flush_mflogs && (trap : TERM; ", 1),
    (">(python -m metaflow.mflog.tee ", ">(trap '' TERM; python -m metaflow.mflog.tee ", 2),
)


def gpu_pod(cluster: Cluster) -> dict[str, Any]:
    """What Metaflow's @kubernetes is told of the training pod; of several accelerators, `finish` says which."""
    wants: dict[str, Any] = {"cpu": cluster.cpu, "memory": cluster.memory_mb, "disk": cluster.disk_mb}
    selector = {}
    if cluster.gpu:
        wants["gpu"] = cluster.gpu
        if not cluster.accelerator_fallbacks:
            selector[ACCELERATOR] = cluster.accelerator
    if cluster.spot:
        selector[SPOT] = "true"
        # Autopilot adds it by itself; a tainted pool of a Standard cluster wants to be told.
        wants["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    return {**wants, "node_selector": selector}


def finish(template: dict[str, Any], cluster: Cluster, *, gpu_step: str) -> dict[str, Any]:
    """A compiled WorkflowTemplate with what Metaflow leaves out.

    Args:
        gpu_step: name of the template that trains.
    """
    template = _without_nulls(template)
    spec = template["spec"]
    spec["securityContext"] = _POD_SECURITY
    for pod in spec["templates"]:
        if "container" not in pod:
            continue
        _harden(pod)
        if "retryStrategy" in pod:
            pod["retryStrategy"]["expression"] = RETRY_IF
        if pod["name"] == gpu_step:
            _leave_the_signal_to_the_training(pod)
            if cluster.gpu and cluster.accelerator_fallbacks:
                pod["affinity"] = _any_of((cluster.accelerator, *cluster.accelerator_fallbacks))
    return template


def _without_nulls(tree: Any) -> Any:
    """A copy without the fields that Metaflow leaves empty."""
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value is not None}
    return [_without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def _harden(pod: dict[str, Any]) -> None:
    container = pod["container"]
    container["securityContext"] = _CONTAINER_SECURITY
    container["workingDir"] = "/mnt/work"
    container.setdefault("env", []).extend({"name": name, "value": value} for name, value in _ENVIRONMENT.items())
    container.setdefault("volumeMounts", []).extend({"name": n, "mountPath": path} for n, path in _WRITABLE.items())
    pod.setdefault("volumes", []).extend({"name": name, "emptyDir": {}} for name in _WRITABLE)


def _leave_the_signal_to_the_training(pod: dict[str, Any]) -> None:
    """Argo passes SIGTERM to the whole process group.

    By themselves the shells around the training would end at once, and the two processes that carry
    its output to the log: the container would be gone before anything is saved. The shells wait, the
    two ignore it (nobody else: Metaflow ends its own helpers by SIGTERM); the training saves, and
    exits with 75.
    """
    *shell, script = pod["container"]["command"]
    for old, new, times in _SIGNALS:
        if script.count(old) != times:
            raise TuneshipError(
                f"Metaflow compiles another script than the one that is known: {old!r} is not in it {times} times",
                where="tuneship.cluster.template",
                fix="install the version of metaflow that requirements/ names",
            )
        script = script.replace(old, new)
    pod["container"]["command"] = [*shell, f"trap : TERM; {script}"]
    pod["podSpecPatch"] = json.dumps({"terminationGracePeriodSeconds": GRACE_S})


def _any_of(accelerators: tuple[str, ...]) -> dict[str, Any]:
    def expression(values: list[str]) -> dict[str, Any]:
        return {"matchExpressions": [{"key": ACCELERATOR, "operator": "In", "values": values}]}

    step = 100 // len(accelerators)
    return {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [expression(list(accelerators))]},
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100 - step * place, "preference": expression([name])}
                for place, name in enumerate(accelerators)
            ],
        }
    }
