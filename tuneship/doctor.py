"""doctor: what is missing here for the GKE path, and the command that mends it. It changes nothing.

tuneship doctor                  tools, packages, logins, kubectl, Metaflow's profile, its service
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tuneship.cluster import argo, connect
from tuneship.cluster.commands import INSTALL, read
from tuneship.cluster.outputs import Outputs
from tuneship.errors import OutsideError, TuneshipError

# infra/terraform/versions.tf
TERRAFORM = (1, 11)
PACKAGES = {
    "metaflow": "flow",
    "kubernetes": "gke",
    "google.cloud.storage": "gke",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def doctor(built: Outputs | None) -> list[Check]:
    """Everything that the GKE path needs of this machine.

    Args:
        built: what Terraform built; without it, the cluster is not looked at.
    """
    checks = [_python(), *(_package(name, extra) for name, extra in PACKAGES.items())]
    checks += [_terraform(), *(_tool(name) for name in ("gcloud", "kubectl", "gke-gcloud-auth-plugin"))]
    if shutil.which("gcloud"):
        checks += [_login(), _default_credentials()]
    if built is None:
        return [*checks, Check("platform", False, "no outputs.json: nothing has been built yet", "tuneship up")]
    if shutil.which("kubectl"):
        checks.append(_context(built))
    return [*checks, _profile(built), _metadata(), _image()]


def table(checks: list[Check]) -> list[str]:
    """The checks as lines for a person."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok ' if check.ok else 'NO '} {check.name:{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':{width + 4}}  → {check.fix}")
    return lines


def missing(checks: list[Check]) -> OutsideError:
    """The error that says that something is missing."""
    first = next(check for check in checks if not check.ok)
    count = sum(not check.ok for check in checks)
    return OutsideError(f"{count} missing, the first: {first.name}: {first.found}", where="this machine", fix=first.fix)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(
        "python", sys.version_info >= (3, 11), version, "" if sys.version_info >= (3, 11) else "install 3.11 or later"
    )


def _package(name: str, extra: str) -> Check:
    try:
        there = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        there = False
    return Check(
        name, there, "installed" if there else "not installed", "" if there else f"pip install 'tuneship[{extra}]'"
    )


def _tool(name: str) -> Check:
    path = shutil.which(name)
    return Check(name, path is not None, path or "not installed", "" if path else INSTALL[name])


def _terraform() -> Check:
    if not shutil.which("terraform"):
        return _tool("terraform")
    version = str(json.loads(read("terraform", "version", "-json"))["terraform_version"])
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    fine = numbers >= TERRAFORM
    return Check("terraform", fine, version, "" if fine else f"1.11 or later: {INSTALL['terraform']}")


def _login() -> Check:
    account = _said("gcloud", "config", "get-value", "account")
    fine = bool(account) and account != "(unset)"
    return Check("gcloud account", fine, account or "not logged in", "" if fine else "gcloud auth login")


def _default_credentials() -> Check:
    home = os.environ.get("CLOUDSDK_CONFIG") or str(Path.home() / ".config" / "gcloud")
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or str(Path(home) / "application_default_credentials.json")
    fine = Path(named).is_file()
    return Check(
        "application default credentials",
        fine,
        named if fine else "none",
        "" if fine else "gcloud auth application-default login",
    )


def _context(built: Outputs) -> Check:
    wanted = f"gke_{built.project_id}_{built.gke_cluster_location}_{built.gke_cluster_name}"
    found = _said("kubectl", "config", "current-context")
    return Check("kubectl context", found == wanted, found or "none", "" if found == wanted else "tuneship connect")


def _profile(built: Outputs) -> Check:
    file = connect.profile_file(os.environ.get("METAFLOW_PROFILE"))
    if not file.is_file():
        return Check("Metaflow profile", False, f"no {file}", "tuneship connect")
    try:
        there = connect.read_profile(file)
    except TuneshipError as error:
        return Check("Metaflow profile", False, f"{file}: {error.what}", error.fix)
    other = [key for key, value in connect.profile(built).items() if there.get(key) != value]
    if other:
        return Check("Metaflow profile", False, f"{file} says something else of {', '.join(other)}", "tuneship connect")
    return Check("Metaflow profile", True, str(file))


def _metadata() -> Check:
    url = "http://localhost:8080/ping"
    try:
        urllib.request.urlopen(url, timeout=3).close()
    except (urllib.error.URLError, TimeoutError, OSError):
        return Check("metadata service", False, f"{url} does not answer", "keep tuneship connect running")
    return Check("metadata service", True, url)


def _image() -> Check:
    file = Path(argo.CONFIG)
    named = ""
    if file.is_file():
        try:
            named = str(json.loads(file.read_text(encoding="utf-8")).get("image_name", ""))
        except (ValueError, AttributeError):
            return Check("image", False, f"{file} is no JSON object", "move it away, then: tuneship image")
    return Check("image", bool(named), named or f"none in {file}", "" if named else "tuneship image")


def _said(*argv: str) -> str:
    """What a command says, or nothing where it fails."""
    try:
        return read(*argv).strip()
    except TuneshipError:
        return ""
