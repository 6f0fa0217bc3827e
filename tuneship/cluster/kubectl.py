"""kubectl in one namespace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuneship.cluster import commands


@dataclass(frozen=True)
class Kubectl:
    """What `commands` does, said to kubectl."""

    namespace: str
    dry_run: bool = False
    """What would change something is printed and not run."""

    def read(self, *arguments: str) -> str:
        """What a command that changes nothing prints; see `commands.read`."""
        return commands.read(*self._kubectl, *arguments)

    def change(self, *arguments: str, text: str | None = None, before: str = "") -> None:
        """Runs a command that changes something; see `commands.change`."""
        commands.change(*self._kubectl, *arguments, text=text, before=before, dry_run=self.dry_run)

    def apply(self, folder: Path) -> None:
        """Brings a folder of manifests to the cluster."""
        self.change("apply", "--recursive", "--filename", str(folder))

    @property
    def _kubectl(self) -> tuple[str, ...]:
        return ("kubectl", "--namespace", self.namespace)
