"""What is served, as one value: which adapters are loaded, who gets which share, and what came before.

It is kept in the ConfigMap vllm-config, which the gateway reads its shares from: what is recorded is
what is served. Every change is a function from one record to the next.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tuneship.errors import InputError
from tuneship.recipe import Serve

CONFIG_MAP = "vllm-config"
_HISTORY = 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class Settings(_Part):
    """How the pods run, whatever adapter they serve."""

    image: str
    """Of the gateway and the init container, by exact tag or digest."""
    base: str | None = None
    """gs:// URI of the base in safetensors; None for the Hub's, as the run names it."""
    accelerator: str
    """Value of the node label cloud.google.com/gke-accelerator."""
    gpu: Annotated[int, Field(ge=1)] = 1
    """GPUs of a pod."""
    spot: bool = False
    """On Spot nodes: cheaper, and taken away with 25 seconds' notice."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Pods at least."""
    max_replicas: Annotated[int, Field(ge=1)] = 2
    """Pods at most."""
    no_auth: bool = False
    """Answer without keys whoever the network policies let through."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


class Adapter(_Part):
    """A run, as it is served."""

    uri: str
    """Where the pods take it from."""
    base: str
    """The base's name on the Hub."""
    revision: str | None
    """Its commit there."""
    rank: int
    """0 for a merged model."""
    merged: bool
    """The whole model is served, not an adapter on the base."""
    contract: str
    """sha256 of its prompt.json."""
    serve: Serve
    """The recipe's limits of a request, for the gateway and vLLM."""
    score: float | None
    """What the evaluation measured, where there was one."""
    forced: str = ""
    """Why it was deployed although the gate had not passed."""

    def sits_beside(self, other: Adapter) -> bool:
        """Whether one engine and one contract serve both."""
        mine, others = ((a.base, a.revision, a.merged, a.contract, a.serve) for a in (self, other))
        return not self.merged and mine == others


class Served(_Part):
    """The record."""

    model: str
    """The name that clients ask for."""
    serving: str
    """The adapter that is served."""
    previous: str | None = None
    """The one before it: what a rollback goes back to."""
    canary: str | None = None
    """The one on trial."""
    share: Annotated[int, Field(ge=0, le=99)] = 0
    """Per cent of the requests that the one on trial gets."""
    adapters: dict[str, Adapter]
    """Those that are named above."""
    settings: Settings
    """How the pods run."""
    history: tuple[str, ...] = ()
    """What was done, the last of it last."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        unknown = {self.serving, self.previous, self.canary} - {None, *self.adapters}
        if unknown:
            raise ValueError(f"it names {', '.join(sorted(map(str, unknown)))}, and adapters does not")
        return self

    @property
    def loaded(self) -> dict[str, Adapter]:
        """What the engine has: what is served, and beside it what can be had at once."""
        serving = self.adapters[self.serving]
        other = self.canary or self.previous
        if other is not None and self.adapters[other].sits_beside(serving):
            # In one order, whoever serves: a change of shares must not look like a change of pods.
            return {name: self.adapters[name] for name in sorted({self.serving, other})}
        return {self.serving: serving}

    @property
    def shares(self) -> dict[str, int]:
        """Adapter → its share of the requests."""
        shares = dict.fromkeys(self.loaded, 0)
        if self.canary is not None:
            shares[self.canary] = self.share
        shares[self.serving] = 100 - self.share
        return shares


def first(model: str, name: str, adapter: Adapter, settings: Settings) -> Served:
    """Nothing was served before."""
    return _noted(Served(model=model, serving=name, adapters={name: adapter}, settings=settings), adapter, name)


def replaced(before: Served, name: str, adapter: Adapter, settings: Settings) -> Served:
    """Served at once; the one before stays at hand.

    Raises:
        InputError: another model is served under these names.
    """
    _same_model(before, name, adapter)
    previous = before.serving if name != before.serving else before.previous
    changes = {"serving": name, "previous": previous, "canary": None, "share": 0, "settings": settings}
    return _changed(before, changes, name, {name: adapter})


def tried(before: Served, name: str, adapter: Adapter, percent: int) -> Served:
    """On trial beside the one that is served.

    Raises:
        InputError: it is that one, or cannot stand beside it.
    """
    _same_model(before, name, adapter)
    if name == before.serving:
        raise InputError("this run is served already", where=name)
    if not adapter.sits_beside(before.adapters[before.serving]):
        raise InputError(
            "a canary needs the base, the prompt contract and the limits of what is served, and is no merged model",
            where=f"{name} beside {before.serving}",
            fix="deploy it without --canary, or under a name of its own",
        )
    return _changed(before, {"canary": name, "share": percent}, f"canary of {percent} %: {name}", {name: adapter})


def promoted(before: Served) -> Served:
    """The one on trial is served.

    Raises:
        InputError: none is on trial.
    """
    if before.canary is None:
        raise InputError("there is no canary to promote", where=before.model, fix="tuneship deploy RUN --canary 10")
    changes = {"serving": before.canary, "previous": before.serving, "canary": None, "share": 0}
    return _changed(before, changes, f"promoted {before.canary}")


def rolled_back(before: Served, reason: str = "") -> Served:
    """The trial is over; or, where there is none, what was served before is served again.

    Raises:
        InputError: there was nothing before.
    """
    why = f": {reason}" if reason else ""
    if before.canary is not None:
        # It stays loaded beside the other until the next deploy: no pod has to start anew.
        changes = {"previous": before.canary, "canary": None, "share": 0}
        return _changed(before, changes, f"ended the canary {before.canary}{why}")
    if before.previous is None:
        raise InputError("nothing was served before", where=before.model, fix="tuneship deploy RUN")
    changes = {"serving": before.previous, "previous": before.serving}
    return _changed(before, changes, f"rolled back to {before.previous}{why}")


def parse(text: str, where: str) -> Served:
    """The record from its JSON.

    Raises:
        InputError: it is none of this version's.
    """
    try:
        return Served.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "record.json"
        raise InputError(
            f"the record of what is served is damaged: {place}: {first['msg']}",
            where=where,
            fix="tuneship deploy RUN --fresh writes it anew",
        ) from None


def _same_model(before: Served, name: str, adapter: Adapter) -> None:
    model = name.rpartition("-")[0]
    if model != before.model:
        raise InputError(
            f"{before.model} is served here, and this run is {model}",
            where=adapter.uri,
            fix="deploy it with --fresh, which ends the other, or into a namespace of its own",
        )


def _changed(before: Served, changes: dict[str, Any], said: str, new: dict[str, Adapter] | None = None) -> Served:
    tree = {name: getattr(before, name) for name in Served.model_fields} | changes
    named = {tree["serving"], tree["previous"], tree["canary"]}
    tree["adapters"] = {name: one for name, one in (before.adapters | (new or {})).items() if name in named}
    return _noted(Served.model_validate(tree), next(iter((new or {}).values()), None), said)


def _noted(served: Served, adapter: Adapter | None, said: str) -> Served:
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    why = f" (forced: {adapter.forced})" if adapter is not None and adapter.forced else ""
    return served.model_copy(update={"history": (*served.history, f"{when} {said}{why}")[-_HISTORY:]})
