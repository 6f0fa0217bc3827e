"""deploy: a run behind `llm-service`, tried before it serves everyone, and taken back at once if need be.

    tuneship deploy runs/sql                     serve it; what was served before stays at hand
    tuneship deploy runs/sql --canary 10         a tenth of the requests first; then all, or none
    tuneship deploy --rollback                   what was served before

A canary stands in the same engine as what is served, under a name of its own, and the gateway draws
its share (tuneship/serve/shares.py). Beside a second Deployment behind the Service this needs no second
GPU, keeps to its share whatever the number of pods (one pod beside one pod would be half), and both are
measured under the same load. Promoting and rolling back are then a change of numbers in a ConfigMap:
no pod starts anew. What cannot stand side by side (a merged model, another base, another prompt
contract) is deployed by a rolling update, and rolled back by one.

A run whose evaluation has not passed its gate is not deployed, but with a reason, which is kept.
Every command is printed as one would type it.

Not covered: two who deploy at the same moment; the later record wins.
"""

from __future__ import annotations

import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuneship import hub, journal, prompt, storage
from tuneship.cluster import fetch, render, serving, trial
from tuneship.cluster import served as records
from tuneship.cluster.kubectl import Kubectl
from tuneship.cluster.outputs import Outputs
from tuneship.cluster.render import Files
from tuneship.cluster.served import CONFIG_MAP, Adapter, Served, Settings
from tuneship.console import say
from tuneship.damage import guarded, read_json, text_of
from tuneship.errors import GateError, InputError, OutsideError, TuneshipError
from tuneship.journal import PROVENANCE, Run, sha256_file

DEPLOYMENT = "deployment/vllm-gemma-deployment"
KEYS = "gateway-keys"
Sleep = Callable[[float], None]


@dataclass(frozen=True)
class Target:
    """Where to deploy."""

    outputs: Outputs
    kubectl: Kubectl
    out: Path
    """Where the rendered manifests go."""


def deploy(
    where: str,
    target: Target,
    *,
    changes: Mapping[str, Any] | None = None,
    merged: bool = False,
    canary: int | None = None,
    requests: int = 100,
    minutes: float = 30,
    force: str = "",
    fresh: bool = False,
    sleep: Sleep = time.sleep,
) -> Served:
    """Serves a run; returns the record of it.

    Args:
        where: a run's folder, here or under gs://, or an adapter on the Hub (hf://USER/NAME@COMMIT).
        changes: of `Settings`, by name; the rest stays as it is, or is what the recipe's cluster section says.
        merged: serve the run's merged model, not its adapter.
        canary: per cent of the requests, for the trial.
        requests: what the canary must have answered before it is promoted.
        minutes: in how much time.
        force: deploy although the gate has not passed, for this reason; it is kept.
        fresh: do not look at what is served now, and end it.

    Raises:
        InputError: the run cannot be served, or not beside what is served.
        GateError: the gate, or the trial, said no.
        OutsideError: the bucket or the cluster refuses, or the pods did not come up.
    """
    before = None if fresh else read(target.kubectl)
    with _opened(where, merged) as (run, uri):
        evaluation = run.gate(force)
        score = float(evaluation["scores"][-1]["score"]) if evaluation else None
        part = run.merged if merged else run.adapter
        if not (part / PROVENANCE).is_file():
            verb = "export" if merged else "train"
            raise InputError(f"the run has no {part.name} model yet", where=where, fix=f"tuneship {verb} RECIPE")
        name = f"{run.recipe.name}-{fetch.digest(part)[: fetch.DIGITS]}"
        settings = _settings(run, before, changes or {})
        adapter = _adapter(run, part, uri or f"{_bucket(target)}/runs/{run.recipe.name}/{name}", settings, score, force)
        after = _next(before, run.recipe.name, name, adapter, settings, canary)
        files = serving.manifests(after, target.outputs)
        if uri is None:
            _upload(run, part, adapter.uri, dry_run=target.kubectl.dry_run)
    _make_keys(target.kubectl, settings)
    _bring(target, after, files)
    if target.kubectl.dry_run:
        return after
    _rolled_out(target, before, after)
    if canary is None:
        if before is not None and before.loaded == after.loaded:
            # No pod started anew, so the shares have yet to reach them.
            trial.settled(target.kubectl, after, sleep=sleep)
        say(f"{after.model} is served by {after.serving}")
        return after
    say(f"{after.canary} has {canary} % of the requests for {after.model}")
    try:
        reasons = trial.watch(target.kubectl, after, requests=requests, minutes=minutes, sleep=sleep)
    except BaseException:
        say(f"the trial broke off, and {after.canary} keeps its share: tuneship deploy --promote, or --rollback")
        raise
    if reasons:
        _change(target, records.rolled_back(after, "; ".join(reasons)), sleep)
        raise GateError("the canary was taken back: " + "; ".join(reasons), where=name)
    return promote(target, sleep=sleep)


def promote(target: Target, *, sleep: Sleep = time.sleep) -> Served:
    """Serves the canary to everyone.

    Raises:
        InputError: there is none.
        OutsideError: the cluster refuses.
    """
    return _change(target, records.promoted(_present(target.kubectl)), sleep)


def roll_back(target: Target, reason: str = "", *, sleep: Sleep = time.sleep) -> Served:
    """Ends a trial; without one, serves what was served before.

    Raises:
        InputError: there was nothing before.
        OutsideError: the cluster refuses.
    """
    return _change(target, records.rolled_back(_present(target.kubectl), reason), sleep)


def read(kubectl: Kubectl) -> Served | None:
    """What is served now; None where nothing is.

    Raises:
        InputError: the record is damaged.
        OutsideError: the cluster does not answer. Where nothing will be changed, it is taken for empty.
    """
    try:
        text = kubectl.read(
            "get", "configmap", CONFIG_MAP, "--ignore-not-found", "--output=jsonpath={.data.record\\.json}"
        )
    except OutsideError as error:
        if not kubectl.dry_run:
            raise
        say(f"{error.what}: as if nothing were served yet")
        return None
    return records.parse(text, f"configmap {CONFIG_MAP}") if text.strip() else None


def _present(kubectl: Kubectl) -> Served:
    found = read(kubectl)
    if found is None:
        raise InputError("nothing is served yet", where=f"configmap {CONFIG_MAP}", fix="tuneship deploy RUN")
    return found


# --- the run ----------------------------------------------------------------------------------


@contextmanager
def _opened(where: str, merged: bool) -> Iterator[tuple[Run, str | None]]:
    """The run, and its URI if the pods can take it from there."""
    if not storage.is_remote(where) and not where.startswith(fetch.HUB):
        yield journal.read_run(Path(where)), None
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, uri = Path(scratch), where.rstrip("/")
        try:
            fetch.take(where, folder, merged=merged)
            run = journal.read_run(folder)
            if storage.is_remote(where) and "evaluation.json" in storage.listing(where):
                storage.get(f"{uri}/evaluation.json", run.evaluation_file)
            yield run, uri
        except TuneshipError as error:
            # Named by what stays.
            error.where, error.fix = (said.replace(scratch, uri) for said in (error.where, error.fix))
            raise


def _adapter(run: Run, part: Path, uri: str, settings: Settings, score: float | None, force: str) -> Adapter:
    with guarded(part / PROVENANCE):
        base = read_json(part / PROVENANCE)["base"]
        name, revision = text_of(base, "name"), text_of(base, "revision")
    merged = part == run.merged
    if not merged and settings.base is None and not (hub.is_id(name) and "/" in name):
        raise InputError(
            "the base is not on the Hub, so the pods cannot have it",
            where=name,
            fix="bring it into the bucket as safetensors, and name it with --base gs://BUCKET/…",
        )
    rank = 0
    if not merged:
        with guarded(part / "adapter_config.json"):
            rank = int(read_json(part / "adapter_config.json")["r"])
    with guarded(part / prompt.FILE):
        contract = sha256_file(part / prompt.FILE)
    return Adapter(
        uri=uri,
        base=name,
        revision=revision,
        rank=rank,
        merged=merged,
        contract=contract,
        serve=run.recipe.serve,
        score=score,
        forced=force,
    )


def _settings(run: Run, before: Served | None, changes: Mapping[str, Any]) -> Settings:
    if before is not None:
        tree = before.settings.model_dump()
    else:
        cluster = run.recipe.cluster
        tree = {"image": cluster.image, "accelerator": cluster.accelerator, "gpu": max(1, cluster.gpu)}
    tree |= changes
    if not tree.get("image"):
        raise InputError(
            "no image is named for the pods",
            where="cluster.image",
            fix="tuneship image builds one; or name one with --image",
        )
    if not _EXACT.search(tree["image"]):
        raise InputError(
            "the image has no exact tag", where=tree["image"], fix="name a tag other than latest, or a digest"
        )
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip(), where="tuneship deploy"
        ) from None


_EXACT = re.compile(r"[^/]:(?!latest$)[\w][\w.-]*$|@sha256:[0-9a-f]{64}$")


def _bucket(target: Target) -> str:
    return f"gs://{target.outputs.metaflow_datastore_bucket_name}"


def _upload(run: Run, part: Path, uri: str, *, dry_run: bool) -> None:
    """Sends what the pods need of a run that is here."""
    say(f"$ gcloud storage cp --recursive {part} {run.path / 'recipe.json'} {run.evaluation_file} {uri}/")
    if dry_run:
        return
    storage.upload(part, f"{uri}/{part.name}", last=PROVENANCE)
    for file in (run.evaluation_file, run.path / "recipe.json"):
        if file.is_file():
            storage.put(file, f"{uri}/{file.name}")


def _next(
    before: Served | None, model: str, name: str, adapter: Adapter, settings: Settings, canary: int | None
) -> Served:
    if canary is None:
        if before is None:
            return records.first(model, name, adapter, settings)
        return records.replaced(before, name, adapter, settings)
    if before is None:
        raise InputError(
            "nothing is served yet for a canary to stand beside", where=name, fix="deploy it without --canary"
        )
    if settings != before.settings:
        raise InputError(
            "a canary changes the adapter, not the pods", where=name, fix="change the pods by a deploy without --canary"
        )
    return records.tried(before, name, adapter, canary)


# --- the cluster ------------------------------------------------------------------------------


def _make_keys(kubectl: Kubectl, settings: Settings) -> None:
    """Makes an API key where there is none yet. It is never printed."""
    if settings.no_auth:
        return
    if not kubectl.dry_run and kubectl.read("get", "secret", KEYS, "--ignore-not-found", "--output=name").strip():
        return
    kubectl.change(
        *("create", "secret", "generic", KEYS, "--from-file=keys=/dev/stdin"),
        text=secrets.token_urlsafe(32) + "\n",
        before="head -c 24 /dev/urandom | base64 | ",
    )


def _bring(target: Target, after: Served, files: Files | None = None) -> None:
    render.write(files or serving.manifests(after, target.outputs), target.out)
    target.kubectl.apply(target.out)


def _rolled_out(target: Target, before: Served | None, after: Served) -> None:
    """Waits until the pods are ready; where they do not get ready, brings back what was there before."""
    try:
        target.kubectl.change("rollout", "status", DEPLOYMENT, "--timeout=45m")
    except OutsideError:
        if before is not None:
            say(f"the pods with {after.canary or after.serving} did not get ready: back to {before.serving}")
            _bring(target, before)
        raise


def _change(target: Target, after: Served, sleep: Sleep) -> Served:
    """From one record to the next: by shares alone where both adapters are loaded, else by a rolling update."""
    _bring(target, after)
    if not target.kubectl.dry_run:
        _rolled_out(target, None, after)
        trial.settled(target.kubectl, after, sleep=sleep)
        say(f"{after.model} is served by {after.serving}")
    return after
