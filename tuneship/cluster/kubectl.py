"""kubectl, as a person would call it: each command is printed before it runs, and can be run by hand instead."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from tuneship.console import say
from tuneship.errors import OutsideError


class Kubectl:
    """kubectl in one namespace.

    Args:
        dry_run: what would change something is printed and not run.
    """

    def __init__(self, namespace: str, *, dry_run: bool = False) -> None:
        self._namespace, self.dry_run = namespace, dry_run

    def read(self, *arguments: str) -> str:
        """What a command that changes nothing prints.

        Raises:
            OutsideError: there is no kubectl, no cluster, or it refuses.
        """
        return self._run(arguments, None)

    def change(self, *arguments: str, text: str | None = None, before: str = "") -> None:
        """Runs a command that changes something.

        Args:
            text: its standard input. It is not printed.
            before: the command that makes it, to print in its place.

        Raises:
            OutsideError: there is no kubectl, no cluster, or it refuses.
        """
        say(f"$ {before}{shlex.join(self._argv(arguments))}")
        if not self.dry_run:
            self._run(arguments, text)

    def apply(self, folder: Path) -> None:
        """Brings a folder of manifests to the cluster."""
        self.change("apply", "--recursive", "--filename", str(folder))

    def _argv(self, arguments: tuple[str, ...]) -> list[str]:
        return ["kubectl", "--namespace", self._namespace, *arguments]

    def _run(self, arguments: tuple[str, ...], text: str | None) -> str:
        argv = self._argv(arguments)
        try:
            done = subprocess.run(argv, input=text or "", capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise OutsideError(
                "kubectl is not installed", where=shlex.join(argv), fix="gcloud components install kubectl"
            ) from None
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise OutsideError(
                f"kubectl: {said[-1]}",
                where=shlex.join(argv),
                fix="tuneship connect points kubectl at the cluster; tuneship explain looks at what runs there",
            )
        return done.stdout
