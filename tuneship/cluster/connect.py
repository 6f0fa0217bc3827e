"""connect: kubectl and Metaflow pointed at the cluster, and port-forwards that are kept alive.

    kubectl                    gcloud container clusters get-credentials … --dns-endpoint
    ~/.metaflowconfig/         the profile, as the tutorial's config.json
    localhost:8080             Metaflow's metadata service
    localhost:8083             its UI
    localhost:2746             Argo's UI (https)

A port-forward ends when its pod is replaced or the connection breaks. Each one is started again, at
once the first time, then after 1, 2, 4 … 30 seconds, until it has held for half a minute.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneship.cluster.commands import INSTALL
from tuneship.cluster.outputs import Outputs
from tuneship.console import say
from tuneship.damage import guarded
from tuneship.errors import InputError, OutsideError
from tuneship.journal import write_text
from tuneship.signals import stop_flag

LONGEST_PAUSE_S = 30.0
HELD_S = 30.0


@dataclass(frozen=True)
class Forward:
    """A port of this machine that leads to a service."""

    namespace: str
    service: str
    port: int

    @property
    def argv(self) -> list[str]:
        """The command."""
        return [
            "kubectl",
            "--namespace",
            self.namespace,
            "port-forward",
            f"svc/{self.service}",
            f"{self.port}:{self.port}",
        ]


def forwards(built: Outputs) -> list[Forward]:
    """What the laptop needs of the cluster."""
    return [
        Forward(built.metaflow_k8s_namespace, "metaflow-metadata-svc", 8080),
        Forward(built.metaflow_k8s_namespace, "metaflow-ui-svc", 8083),
        Forward(built.argo_namespace, "argo-server", 2746),
    ]


def profile(built: Outputs) -> dict[str, str | int]:
    """Metaflow's configuration, under the tutorial's names."""
    return {
        "METAFLOW_DEFAULT_METADATA": "service",
        "METAFLOW_SERVICE_URL": "http://localhost:8080",
        "METAFLOW_SERVICE_INTERNAL_URL": f"http://metaflow-metadata-svc.{built.metaflow_k8s_namespace}:8080/",
        "METAFLOW_DEFAULT_DATASTORE": "gs",
        "METAFLOW_DATASTORE_SYSROOT_GS": built.metaflow_datastore_sysroot_gs,
        "METAFLOW_KUBERNETES_NAMESPACE": built.argo_namespace,
        "METAFLOW_KUBERNETES_SERVICE_ACCOUNT": built.argo_workflows_k8s_sa_name,
        "METAFLOW_KUBERNETES_DISK": 2048,
    }


def profile_file(name: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where Metaflow reads a profile: config.json, or config_NAME.json with METAFLOW_PROFILE=NAME."""
    home = Path(environ.get("METAFLOW_HOME") or Path.home() / ".metaflowconfig")
    return home.expanduser() / (f"config_{name}.json" if name else "config.json")


def read_profile(file: Path) -> dict[str, Any]:
    """Metaflow's settings in a profile; none where there is no such file.

    Raises:
        InputError: it holds no JSON object.
        OutsideError: it cannot be read.
    """
    if not file.exists():
        return {}
    with guarded(file):
        content = file.read_bytes()
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError("Metaflow's profile is no JSON object", where=str(file), fix="tuneship connect")
    return settings


def write_profile(built: Outputs, file: Path, confirm: Callable[[str], bool], *, dry_run: bool = False) -> None:
    """Writes the profile; never over another one without asking.

    Raises:
        InputError: there is another one, and the answer was no.
    """
    text = json.dumps(profile(built), indent=2) + "\n"
    # To be shown, whatever is in it.
    there = file.read_text(encoding="utf-8", errors="replace") if file.exists() else None
    if there == text:
        say(f"{file} is as it should be")
        return
    if there is not None:
        for line in difflib.unified_diff(there.splitlines(), text.splitlines(), "there", "new", lineterm=""):
            say(line)
        if not dry_run and not confirm(f"Replace {file}"):
            raise InputError(
                "another Metaflow profile is there; it was left alone",
                where=str(file),
                fix="--profile NAME writes config_NAME.json, for METAFLOW_PROFILE=NAME",
            )
    say(f"write {file}")
    if not dry_run:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def keep_alive(wanted: Sequence[Forward], *, pause_s: float = 1.0) -> None:
    """Runs the port-forwards until a signal comes.

    Raises:
        OutsideError: there is no kubectl, or a port is taken on this machine.
    """
    failed: list[OutsideError] = []
    stop = threading.Event()

    def keep(forward: Forward) -> None:
        try:
            _keep(forward, stop, pause_s)
        except OutsideError as error:
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=keep, args=(forward,)) for forward in wanted]
    with stop_flag() as signalled:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                if signalled:
                    stop.set()
                # In slices, so that a signal is heard soon.
                thread.join(0.1)
    if failed:
        raise failed[0]


def _keep(forward: Forward, stop: threading.Event, pause_s: float) -> None:
    say(f"$ {shlex.join(forward.argv)}")
    pause = 0.0
    while not stop.is_set():
        began = time.monotonic()
        said = _once(forward, stop)
        if stop.is_set():
            return
        if "address already in use" in said:
            raise OutsideError(
                f"port {forward.port} is taken on this machine",
                where=shlex.join(forward.argv),
                fix=f"end what listens there (an older tuneship connect?): lsof -i :{forward.port}",
            )
        if time.monotonic() - began > HELD_S:
            pause = 0.0
        last = (said.strip().splitlines() or ["the connection was closed"])[-1]
        say(f"{forward.service}: {last}; again" + (f" in {pause:g} s" if pause else ""))
        stop.wait(pause)
        pause = min(LONGEST_PAUSE_S, max(pause_s, 2 * pause))


def _once(forward: Forward, stop: threading.Event) -> str:
    """One port-forward, to its end or the stop; what it complained of."""
    try:
        process = subprocess.Popen(
            forward.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # Its own group: a ctrl-C is ours to hear, and we end it.
            process_group=0,
        )
    except FileNotFoundError:
        raise OutsideError("kubectl is not installed", where="PATH", fix=INSTALL["kubectl"]) from None
    with process:
        while not stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=0.2)[1]
        process.terminate()
        return process.communicate()[1]
