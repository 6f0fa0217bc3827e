"""terraform, gcloud and kubectl, as a person would call them: each command is printed, and can be run by hand.

What a tool complains of is said again in one message with the command that mends it, by what the
tool itself says (`_SAID`); anything else keeps the tool's last line.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import NoReturn

from tuneship.console import say
from tuneship.errors import InputError, OutsideError, Stopped
from tuneship.signals import caught

# Where a tool comes from.
INSTALL = {
    "terraform": "https://developer.hashicorp.com/terraform/install",
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl",
    "gke-gcloud-auth-plugin": "gcloud components install gke-gcloud-auth-plugin",
}

# What a tool says → what is wrong, and what to do. The first that matches is taken.
_SAID: tuple[tuple[str, str, str], ...] = (
    (
        r"application.default credentials|could not find default credentials|invalid_grant|invalid_rapt",
        "Terraform finds no Google credentials",
        "gcloud auth application-default login",
    ),
    (
        r"do not currently have an active account|Reauthentication|refreshing your current auth tokens",
        "gcloud is not logged in",
        "gcloud auth login",
    ),
    (
        r"has not been used in project (?P<project>\S+) before or it is disabled|SERVICE_DISABLED|accessNotConfigured",
        "Google refuses: an API of the project is switched off",
        "gcloud services enable serviceusage.googleapis.com cloudresourcemanager.googleapis.com --project {project}, "
        "wait a minute, and run the same command again",
    ),
    (
        r"[Bb]illing (account )?.{0,60}(not enabled|disabled|not found|absent)|requires billing",
        "the project has no billing",
        "gcloud billing projects link {project} --billing-account ACCOUNT",
    ),
    (
        r"QUOTA_EXCEEDED|Quota '?(?P<quota>[\w-]+)'? exceeded|[Ii]nsufficient (regional )?quota|quota exceeded",
        "the quota is too small: {quota}",
        "ask for more at https://console.cloud.google.com/iam-admin/quotas?project={project}, "
        "or choose another region or accelerator",
    ),
    (
        r"Error 409|alreadyExists|[Aa]lready (exists|own)|requested (bucket )?name is not available",
        "the name is taken: {taken}",
        "set another default_resource_name in the variables, or `terraform import` what is yours",
    ),
    (
        r"Error acquiring the state lock",
        "the state is locked: an earlier command was cut off, or another one runs now",
        "if none runs: terraform -chdir={folder} force-unlock {lock}",
    ),
    (
        r"deletion_protection is on|deletion_protection.{0,40}(true|enabled)",
        "deletion protection is on",
        "tuneship down switches it off first; by hand: terraform apply -var deletion_protection=false",
    ),
    (
        r"connection to the server .* was refused|Unable to connect to the server|no such host|i/o timeout|"
        r"current-context is not set|was refused - did you specify",
        "kubectl reaches no cluster",
        "tuneship connect",
    ),
    (
        r"PERMISSION_DENIED|Error 403|[Ff]orbidden|does not have permission",
        "Google refuses: the account lacks a right",
        "ask the project's owner for the roles that infra/terraform/README.md names",
    ),
)

# Of a cluster that is known and does not answer now; a moment later it may. No context is no such cluster.
_NO_ANSWER = (
    r"connection to the server (?!localhost:8080 )\S+ was refused|connection refused|connection reset by peer|"
    r"TLS handshake timeout|i/o timeout|no such host|network is unreachable|no route to host|unexpected EOF|: EOF|"
    r"connection lost|context deadline exceeded|Client\.Timeout exceeded|"
    r"Error from server \((InternalError|ServiceUnavailable|ServerTimeout|Timeout|TooManyRequests)\)|etcdserver: "
)

# What Terraform says of variables: the user's input, and nothing was started.
_INPUT = r"Invalid value for variable|Invalid value for input variable|No value for required variable"


class NoAnswer(OutsideError):
    """The cluster does not answer kubectl now."""


def need(*tools: str) -> None:
    """Refuses to begin where a tool is missing.

    Raises:
        OutsideError: names the first one, and where it comes from.
    """
    for tool in tools:
        if shutil.which(tool) is None:
            raise _missing(tool)


def _missing(tool: str) -> OutsideError:
    return OutsideError(f"{tool} is not installed", where="PATH", fix=INSTALL[tool])


def read(*argv: str, text: str | None = None) -> str:
    """What a command that changes nothing prints.

    Raises:
        OutsideError: the tool is missing, or fails.
    """
    try:
        done = subprocess.run(argv, input=text or "", capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise _missing(argv[0]) from None
    if done.returncode != 0:
        complain(argv, done.stderr or done.stdout)
    return done.stdout


def change(*argv: str, text: str | None = None, before: str = "", dry_run: bool = False) -> None:
    """Prints a command and runs it; what it says is shown while it says it.

    A signal is passed on to the tool as a ctrl-C, and its end is awaited: Terraform finishes what it
    has begun and writes its state. A second one it takes for an order to drop everything.

    Args:
        text: its standard input, which is not printed.
        before: the command that makes it, to print in its place.
        dry_run: print it only.

    Raises:
        OutsideError: the tool is missing, or fails.
        InputError: the user's variables are wrong.
        Stopped: a signal came, and the tool has ended.
    """
    say(f"$ {before}{shlex.join(argv)}")
    if dry_run:
        return
    said: list[str] = []
    signals: list[str] = []
    process: subprocess.Popen[str] | None = None

    def pass_on(name: str) -> None:
        signals.append(name)
        if process is not None:
            _interrupt(process)

    with caught(pass_on):
        process = _begin(argv, text)
        if signals:
            # They came while it began.
            _interrupt(process)
        with process:
            if text is not None:
                assert process.stdin is not None
                process.stdin.write(text)
                process.stdin.close()
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                say(line.rstrip("\n"))
    if signals:
        raise Stopped(
            f"stopped by {signals[0]}, and {argv[0]} has ended",
            where=shlex.join(argv),
            fix="run the same command again to go on",
        )
    if process.returncode != 0:
        complain(argv, "".join(said))


def _begin(argv: Sequence[str], text: str | None) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Its own group: a ctrl-C in the terminal reaches it from here, and once.
            process_group=0,
        )
    except FileNotFoundError:
        raise _missing(argv[0]) from None


def _interrupt(process: subprocess.Popen[str]) -> None:
    """A ctrl-C for a tool and whatever it has started, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)


def metaflow_user(environ: Mapping[str, str]) -> str:
    """Who runs this, for Metaflow, which takes root for nobody."""
    import psutil

    if named := environ.get("METAFLOW_USER"):
        return named
    name = psutil.Process().username()
    return "superuser" if name == "root" else name


def complain(argv: Sequence[str], said: str) -> NoReturn:
    """Raises what a tool complains of, as one message with the command that mends it."""
    where, plain = shlex.join(argv), re.sub(r"\x1b\[[0-9;]*m", "", said)
    if argv[0] == "terraform" and re.search(_INPUT, plain):
        raise InputError(_terraform_error(plain), where=where, fix="correct the variables file")
    kind = NoAnswer if argv[0] == "kubectl" and re.search(_NO_ANSWER, plain) else OutsideError
    for pattern, what, fix in _SAID:
        if match := re.search(pattern, plain):
            known = _names(plain, argv) | {key: value for key, value in match.groupdict().items() if value}
            raise kind(what.format_map(known), where=where, fix=fix.format_map(known))
    lines = [line for line in plain.strip().splitlines() if line.strip(" ╷│╵")]
    last = _terraform_error(plain) if argv[0] == "terraform" else (lines or ["it says nothing"])[-1]
    raise kind(f"{argv[0]}: {last}", where=where, fix="run the command by hand to see all that it says")


def _terraform_error(said: str) -> str:
    """The sentences of Terraform's first error, without its frame."""
    body = [line.strip(" ╷│╵") for line in said[said.find("Error:") :].splitlines()]
    return " ".join(line for line in body[:12] if line and not re.match(r"(on .* line \d+|\d+:)", line))[:400]


def _names(said: str, argv: Sequence[str]) -> dict[str, str]:
    """What a message may name: found in what was said, or a word that asks for it."""

    def found(pattern: str, otherwise: str) -> str:
        match = re.search(pattern, said)
        return match.group(1) if match else otherwise

    chdir = [part.partition("=")[2] for part in argv if part.startswith("-chdir=")]
    return {
        "project": found(r"projects?[ /=]([a-z0-9-]{6,30})", "PROJECT"),
        "quota": found(r"([A-Z0-9_]{6,}(?:GPUS?|CPUS|_TOTAL)[A-Z0-9_]*)", "see what it says above"),
        "taken": found(r"(?:Already ?[Ee]xists|already exists)[:,]? *(?:Resource )?'?([\w./:-]+)", "see above"),
        "lock": found(r"ID: +(\S+)", "LOCK_ID"),
        "folder": (chdir or ["."])[0],
    }
