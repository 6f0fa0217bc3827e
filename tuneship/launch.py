"""Starts the flow on this machine, and tells its outcome as our errors and exit codes.

The flow runs in processes of its own, started by Metaflow's runtime: the same code path as in a
pod. A SIGTERM, a ctrl-C or a closed terminal here goes to the step that runs, which saves and ends;
no other is started, and the same command then goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tuneship import journal
from tuneship.cluster.commands import metaflow_user
from tuneship.damage import read_json
from tuneship.errors import Stopped, TuneshipError, from_dict
from tuneship.recipe import Recipe
from tuneship.signals import caught

_LOOKS_EVERY_S = 0.3


def run_flow(recipe: Recipe, folder: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Runs start to end as one Metaflow run; returns the evaluation, without its answers.

    Raises:
        TuneshipError: the error that ended a step, of its own kind.
    """
    # Refused here, in one line, before any process is started.
    with journal.open_run(folder, recipe, fresh=fresh):
        # This machine runs the steps, whatever image the recipe names for the cluster.
        tree = recipe.model_dump(mode="json")
        tree["cluster"]["image"] = None
        config = folder / "flow.json"
        journal.write_json(config, {"recipe": tree, "run": str(folder)})
    with tempfile.TemporaryDirectory() as scratch:
        error_file = Path(scratch) / "error.json"
        code, stopped = _run(["--config", "config", str(config), "run"], error_file)
        if error_file.exists():
            raise from_dict(read_json(error_file))
        if code != 0 and stopped:
            raise Stopped(f"stopped by {stopped}", where=str(folder), fix="run the same command again to go on")
        if code != 0:
            raise TuneshipError("the flow failed; its own lines above say why", where=str(folder))
    evaluation: dict[str, Any] = read_json(folder / "evaluation.json")
    del evaluation["rows"]
    return evaluation


def _run(arguments: list[str], error_file: Path) -> tuple[int, str | None]:
    """The flow's exit code, and the signal that stopped it."""
    flow = Path(__file__).with_name("flow.py")
    environment = {
        **os.environ,
        "TUNESHIP_ERROR_FILE": str(error_file),
        "METAFLOW_USER": metaflow_user(os.environ),
        "PYTHONUNBUFFERED": "1",
    }
    # A group of its own: a ctrl-C in the terminal reaches this process only, which passes it on.
    # What Metaflow prints is no result, so it goes to stderr.
    process = subprocess.Popen(
        [sys.executable, str(flow), *arguments], env=environment, stdout=sys.stderr, process_group=0
    )

    stopped: list[str] = []
    told: set[int] = set()

    def stop(name: str) -> None:
        stopped.append(name)
        _end_steps(process, told)

    with caught(stop):
        idle = 0
        while (code := process.poll()) is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOKS_EVERY_S)
            # A step that had only begun dies of the signal, and Metaflow would try it again: not after a stop.
            idle = idle + 1 if stopped and not _end_steps(process, told) else 0
            if idle > 2:
                process.terminate()
        return code, stopped[0] if stopped else None


def _end_steps(process: subprocess.Popen[bytes], told: set[int]) -> int:
    """SIGTERM, once each, to the steps. Not to Metaflow's runtime: it would go first, and take their output along.

    Returns:
        How many there are.
    """
    try:
        workers = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    for worker in workers:
        if worker.pid not in told:
            told.add(worker.pid)
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGTERM)
    return len(workers)
