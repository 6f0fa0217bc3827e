"""The verbs of the GKE path. cli.py adds them to the command line; as there, a verb imports what it needs."""

from __future__ import annotations

import typer

app = typer.Typer()
