"""A run's folder: what it holds, who may write to it, and how its log survives a kill.

    runs/<name>/
      recipe.json        the resolved recipe
      data/              what prepare made: token arrays and held-out rows
      metrics.jsonl      one object an update: step, loss, lr, tokens, seconds
      provenance.json    digests of data, base and code; packages; device
      checkpoints/       step-N/
      adapter/           the result
      evaluation.json    base against tuned, and the gate
      report.html        the run as one page

One process writes at a time (a lock); once it is prepared, a folder belongs to one recipe. Files
are replaced by rename, so a reader never sees half of one. metrics.jsonl only grows, except that a
resumed run drops the lines after the checkpoint that it resumes from: every update is in it exactly
once.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import tuneship
from tuneship.damage import full_disk, guarded, parse_json, read_json, text_of
from tuneship.errors import GateError, InputError, OutsideError, TuneshipError
from tuneship.recipe import Gate, Recipe, validate

# The sections that decide what the weights become. The others may change between two commands.
_WEIGHTS = ("model", "data", "lora", "train")

# How often a run is watched and how many work on it, not what it computes.
_HARMLESS = {
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.eval_steps",
    "train.num_processes",
}

# What prepare writes last: its presence means that the rows are there.
PREPARED = "prepared.json"

# Beside an adapter or a merged model, and written last: what it was made of.
PROVENANCE = "tuneship.json"

# 0.3 - 0.1 is a little less than 0.2, and a gain of 20 points all the same.
_ROUNDING = 1e-9

# What a kill may leave of a run that has just begun.
_BEGUN = {".lock", ".recipe.json.partial"}


class Run:
    """A run's folder. Make one with `open_run` (to write) or `read_run` (to read)."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self.data = path / "data"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.merged = path / "merged"
        self.evaluation_file = path / "evaluation.json"
        self.report_file = path / "report.html"
        self.provenance_file = path / "provenance.json"

    def metrics(self) -> list[dict[str, Any]]:
        """The updates so far; a torn last line, from a kill, is not one."""
        return list(_lines(self.metrics_file))

    def prepared(self) -> dict[str, Any]:
        """What prepare noted last.

        Raises:
            InputError: it is damaged, or the run is not prepared.
        """
        file = self.data / PREPARED
        if not file.exists():
            raise InputError("the run is not prepared", where=str(self.path), fix="tuneship prepare RECIPE")
        with guarded(file):
            facts: dict[str, Any] = read_json(file)
            for key in ("source", "splits", "train_sha256"):
                facts[key]
            for key in ("revision", "fingerprint"):
                facts["base"][key]
        return facts

    def evaluation(self) -> dict[str, Any]:
        """What evaluate wrote, or nothing where it has not.

        Raises:
            InputError: it is damaged.
        """
        if not self.evaluation_file.is_file():
            return {}
        with guarded(self.evaluation_file):
            facts: dict[str, Any] = read_json(self.evaluation_file)
            for key in ("metric", "split"):
                facts[key]
            for number in (facts["scores"][-1]["score"], facts["scores"][-1]["rows"], facts["gain"]["value"]):
                float(number)
        return facts

    def trained_on(self) -> str:
        """The fingerprint of the adapter's base.

        Raises:
            InputError: what stands beside the adapter is damaged.
        """
        with guarded(self.adapter / PROVENANCE):
            return text_of(read_json(self.adapter / PROVENANCE)["base"], "fingerprint")

    def rewind(self, step: int) -> None:
        """Drops what metrics.jsonl says of updates after `step`."""
        if self.metrics_file.exists():
            kept = [line for line in self.metrics() if line["step"] <= step]
            write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def gate(self, force: str) -> dict[str, Any]:
        """The evaluation, if it passes the recipe's gate; with a reason to go on all the same, whatever there is.

        The recipe may say something else now than when it was evaluated: the scores are judged anew.

        Raises:
            GateError: it does not pass, or nothing was evaluated as the recipe says, and no reason is given.
        """
        evaluation = self.evaluation()
        if force:
            return evaluation
        if not evaluation:
            raise GateError(
                "nothing was evaluated", where=str(self.path), fix="tuneship evaluate RECIPE, or --force with a reason"
            )
        wanted = self.recipe.evaluate
        for key, now in (("metric", wanted.metric), ("split", wanted.split)):
            if evaluation[key] != now:
                raise GateError(
                    f"the run was evaluated with evaluate.{key} {evaluation[key]}, the recipe says {now}",
                    where=str(self.evaluation_file),
                    fix="tuneship evaluate RECIPE, or --force with a reason",
                )
        tuned = evaluation["scores"][-1]
        verdict = judge(tuned["score"], evaluation["gain"]["value"], tuned["rows"], wanted.gate)
        if not verdict["passed"]:
            raise GateError(
                "the gate said no: " + "; ".join(verdict["reasons"]),
                where=str(self.evaluation_file),
                fix="train longer or on more rows, lower evaluate.gate, or --force with a reason",
            )
        return evaluation

    @contextmanager
    def log(self) -> Iterator[MetricsLog]:
        """Appends to metrics.jsonl."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            yield MetricsLog(file)

    def provenance(self) -> dict[str, Any]:
        """What is known of where the run came from."""
        if not self.provenance_file.exists():
            return {}
        with guarded(self.provenance_file):
            return dict(read_json(self.provenance_file))

    def record(self, **facts: Any) -> None:
        """Adds facts to provenance.json."""
        write_json(self.provenance_file, {**self.provenance(), **facts})


def judge(score: float, gain: float, rows: int, gate: Gate) -> dict[str, Any]:
    """The gate's word on the tuned model: `passed`, and `reasons` if not.

    Args:
        rows: how many were judged; a score of none says nothing.
    """
    reasons = []
    if rows == 0:
        reasons.append("no row was judged, since none of their own answers runs: set evaluate.metric: exact_match")
    else:
        if score < gate.min_score - _ROUNDING:
            reasons.append(f"score {score:.3f} is below evaluate.gate.min_score {gate.min_score:g}")
        if gain < gate.min_gain - _ROUNDING:
            reasons.append(f"gain {gain:+.3f} is below evaluate.gate.min_gain {gate.min_gain:g}")
    return {"passed": not reasons, "reasons": reasons}


class MetricsLog:
    """An open metrics.jsonl."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, **values: Any) -> None:
        """One line, given to the operating system at once: a killed process loses none."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Onto the disk: a checkpoint must not be newer than its log."""
        os.fsync(self._file.fileno())


@contextmanager
def open_run(path: Path, recipe: Recipe, *, fresh: bool = False) -> Iterator[Run]:
    """Opens a run's folder for writing, and makes it if there is none.

    Args:
        fresh: put an existing run aside (as `<name>.old-<time>`) and start anew.

    Raises:
        InputError: the folder is no run, or belongs to another recipe.
        OutsideError: another process writes to it, or it cannot be written.
    """
    file = path / "recipe.json"
    try:
        if path.is_symlink():
            raise InputError("a run's folder must not be a symbolic link", where=str(path), fix="name its target")
        if fresh and file.exists():
            with _lock(path):
                stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
                path.rename(path.with_name(f"{path.name}.old-{stamp}"))
        if path.exists() and not path.is_dir():
            raise InputError("a run needs a folder; this is a file", where=str(path), fix="name another with --run")
        if path.is_dir() and not file.exists() and not {entry.name for entry in path.iterdir()} <= _BEGUN:
            raise InputError(
                "the folder is not empty and holds no run",
                where=str(path),
                fix="name an empty or new folder with --run",
            )
        path.mkdir(parents=True, exist_ok=True)
    except TuneshipError:
        raise
    except OSError as error:
        raise _refused(path, error) from error
    with _lock(path):
        if (path / "data" / PREPARED).exists() or (path / "metrics.jsonl").exists():
            # Before that nothing is lost, and a recipe that was refused may be mended.
            _same_weights(_recipe(file), recipe, path)
        try:
            write_json(file, recipe.model_dump(mode="json"))
            for folder in ("data", "checkpoints"):
                (path / folder).mkdir(exist_ok=True)
        except OSError as error:
            raise _refused(path, error) from error
        with full_disk(path):
            yield Run(path, recipe)


def read_run(path: Path, recipe: Recipe | None = None) -> Run:
    """A run's folder for reading.

    Args:
        recipe: what it says now, where that may be something else than when the run was made.

    Raises:
        InputError: the folder holds no run, or belongs to another recipe.
    """
    check_run(path)
    made = _recipe(path / "recipe.json")
    if recipe is not None:
        _same_weights(made, recipe, path)
    return Run(path, recipe or made)


def check_run(path: Path, *, fix: str = "name a run folder, as runs/tiny") -> None:
    """Raises InputError where a folder holds no run."""
    if not is_run(path):
        raise InputError("no run here: recipe.json is missing", where=str(path), fix=fix)


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder."""
    return (path / "recipe.json").is_file()


def _recipe(file: Path) -> Recipe:
    with guarded(file):
        return validate(dict(read_json(file)), where=str(file))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        file = (path / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise _refused(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OutsideError(
                f"another process (pid {file.read().strip() or 'unknown'}) writes to this run",
                where=str(path),
                fix="wait for it, or name another folder with --run",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _refused(path: Path, error: OSError) -> OutsideError:
    return OutsideError(
        f"the run's folder cannot be written: {error.strerror}", where=str(path), fix="name another with --run"
    )


def _same_weights(old: Recipe, new: Recipe, path: Path) -> None:
    before, after = (dict(_flat(r.model_dump(mode="json", include=set(_WEIGHTS)), "")) for r in (old, new))
    changed = [key for key in before | after if before.get(key) != after.get(key) and key not in _HARMLESS]
    if changed:
        difference = "; ".join(f"{key}: {before.get(key)!r} there, {after.get(key)!r} now" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(
            f"the folder belongs to another recipe ({difference}{more})",
            where=str(path),
            fix="name another folder with --run, or start anew with --fresh (the old run is kept beside it)",
        )


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                found = parse_json(line, file, f":{number}")
                with guarded(file, f":{number}"):
                    int(found["step"])
                yield found


# --- files ------------------------------------------------------------------------------------


def write_text(file: Path, text: str) -> None:
    """Replaces a file by rename, after its bytes are on the disk."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Replaces a JSON file by rename."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def put_in_place(partial: Path, target: Path) -> None:
    """Moves a finished folder to its place by one rename, after its bytes are on the disk."""
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(file: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def code_facts() -> dict[str, Any]:
    """What ran: our code by digest, and the versions of the packages that compute."""
    digest = hashlib.sha256()
    root = Path(tuneship.__file__).parent
    for source in sorted(root.rglob("*.py")):
        digest.update(str(source.relative_to(root)).encode() + b"\0" + source.read_bytes())
    names = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "metaflow", "datasets")
    versions = {name: version for name in names if (version := _version(name))}
    return {
        "tuneship": tuneship.__version__,
        "code_sha256": digest.hexdigest(),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "packages": versions,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
