"""A canary's trial: its errors, its latency and its golden prompts beside those of what is served.

Counts come from the gateway of every pod (`tuneship_adapter_*` of /metrics), read inside the pod, so
no port has to be open and no key has to be known. Both adapters stand in the same engines, so what
differs between them is theirs.

Covered: errors, time to the first token, time a token, empty answers to golden prompts. Not covered:
whether answers are right; the evaluation said that before, on rows whose answer is known.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass

from tuneship.cluster.kubectl import Kubectl
from tuneship.cluster.served import Served
from tuneship.cluster.serving import ENGINE, MODELS
from tuneship.console import say
from tuneship.errors import OutsideError

LOOKS_EVERY_S = 15.0
# The kubelet brings a ConfigMap within two minutes.
SETTLES_WITHIN_S = 300.0
# What a canary may have more than the other: errors as a share of requests, and time as a factor.
MORE_ERRORS = 0.01
SLOWER = 1.25
# Below this a difference is nobody's: seconds to the first token, and seconds a token.
FIRST_S, TOKEN_S = 0.01, 0.002
# So many errors end a trial before its requests are complete.
ERRORS_AT_ONCE = 3

_SCRAPE = 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:8000/metrics", timeout=10).read().decode())'
_LINE = re.compile(r'^(tuneship_adapter_\w+)\{adapter="([^"]+)"(?:,outcome="(\w+)")?\} (\S+)$', re.M)


@dataclass(frozen=True)
class Counts:
    """What one adapter did."""

    requests: float = 0
    errors: float = 0
    first_s: float = 0
    """Sum of the times to the first token."""
    firsts: float = 0
    seconds: float = 0
    tokens: float = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def since(self, other: Counts) -> Counts:
        """What came after; a pod that began anew counts from zero."""
        return Counts(*(a - b if a >= b else a for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def error_share(self) -> float:
        """Errors as a share of requests."""
        return self.errors / self.requests if self.requests else 0.0

    def __str__(self) -> str:
        means = (_mean(self.first_s, self.firsts), _mean(self.seconds, self.tokens))
        first, token = ("–" if mean is None else f"{mean * 1000:.1f} ms" for mean in means)
        return f"{self.requests:.0f} requests, {self.errors:.0f} errors, first token {first}, a token {token}"


def against(canary: Counts, serving: Counts) -> list[str]:
    """Why the canary must not be promoted; nothing, if it may."""
    reasons = []
    if canary.error_share > serving.error_share + MORE_ERRORS:
        reasons.append(f"errors {canary.error_share:.1%} against {serving.error_share:.1%}")
    pairs = (
        ("first token", FIRST_S, _mean(canary.first_s, canary.firsts), _mean(serving.first_s, serving.firsts)),
        ("time a token", TOKEN_S, _mean(canary.seconds, canary.tokens), _mean(serving.seconds, serving.tokens)),
    )
    for name, least, mine, others in pairs:
        if mine is not None and others is not None and mine > max(SLOWER * others, others + least):
            reasons.append(f"{name} {mine * 1000:.1f} ms against {others * 1000:.1f} ms")
    return reasons


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def watch(
    kubectl: Kubectl, served: Served, *, requests: int, minutes: float, sleep: Callable[[float], None] = time.sleep
) -> list[str]:
    """Looks on until the canary has answered enough; returns why it must not be promoted, or nothing.

    Args:
        requests: how many it must have answered.
        minutes: in how much time.
        sleep: waits so many seconds.

    Raises:
        OutsideError: the cluster does not answer.
    """
    assert served.canary is not None
    if reasons := _goldens(kubectl, served):
        return reasons
    before = _look(kubectl)
    for _ in range(max(1, round(minutes * 60 / LOOKS_EVERY_S))):
        sleep(LOOKS_EVERY_S)
        now = _look(kubectl)
        canary, serving = (_total(before, now, name) for name in (served.canary, served.serving))
        say(f"canary: {canary}; served: {serving}")
        reasons = against(canary, serving)
        if canary.requests >= requests or (reasons and canary.errors >= ERRORS_AT_ONCE):
            return reasons
    return [f"only {canary.requests:.0f} of {requests} requests came in {minutes:g} minutes"]


def settled(kubectl: Kubectl, served: Served, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Waits until every gateway has the record's shares.

    Raises:
        OutsideError: they have not, after a while.
    """
    if served.adapters[served.serving].merged:
        # It has no shares: its pods are new ones.
        return
    wanted = {name: share / 100 for name, share in served.shares.items()}
    for _ in range(round(SETTLES_WITHIN_S / 5)):
        shares = [_shares(metrics) for metrics in _metrics(kubectl).values()]
        if shares and all(found == wanted for found in shares):
            return
        sleep(5.0)
    raise OutsideError(
        "the pods have not taken over the new shares",
        where=f"configmap {served.model}",
        fix="kubectl rollout restart deployment/vllm-gemma-deployment",
    )


def pods(kubectl: Kubectl) -> list[str]:
    """The model server's pods that run, and are not about to end."""
    found = json.loads(kubectl.read("get", "pods", "--selector=app=gemma-server", "--output=json"))["items"]
    alive = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
    return [pod["metadata"]["name"] for pod in alive if pod["status"]["phase"] == "Running"]


def _metrics(kubectl: Kubectl) -> dict[str, str]:
    """Pod → its gateway's metrics."""
    found = {}
    for pod in pods(kubectl):
        # A pod that the autoscaler takes away meanwhile has nothing more to say.
        with suppress(OutsideError):
            found[pod] = kubectl.read("exec", pod, "--container=gateway", "--", "python", "-c", _SCRAPE)
    return found


def _look(kubectl: Kubectl) -> dict[str, dict[str, Counts]]:
    return {pod: counts(metrics) for pod, metrics in _metrics(kubectl).items()}


def counts(metrics: str) -> dict[str, Counts]:
    """Adapter → what it did, from a gateway's metrics."""
    found: dict[str, dict[str, float]] = {}
    for name, adapter, outcome, value in _LINE.findall(metrics):
        part = name.removeprefix("tuneship_adapter_")
        sums = found.setdefault(adapter, {})
        if part == "requests_total" and outcome in ("ok", "error"):
            sums["requests"] = sums.get("requests", 0) + float(value)
            if outcome == "error":
                sums["errors"] = float(value)
        elif field := _FIELDS.get(part):
            sums[field] = float(value)
    return {adapter: Counts(**sums) for adapter, sums in found.items()}


_FIELDS = {
    "first_token_seconds_sum": "first_s",
    "first_token_seconds_count": "firsts",
    "seconds_total": "seconds",
    "completion_tokens_total": "tokens",
}


def _shares(metrics: str) -> dict[str, float]:
    return {adapter: float(value) for name, adapter, _, value in _LINE.findall(metrics) if name.endswith("_share")}


def _total(before: dict[str, dict[str, Counts]], now: dict[str, dict[str, Counts]], adapter: str) -> Counts:
    total = Counts()
    for pod, found in now.items():
        total += found.get(adapter, Counts()).since(before.get(pod, {}).get(adapter, Counts()))
    return total


def _goldens(kubectl: Kubectl, served: Served) -> list[str]:
    """Asks both for the golden prompts, in one pod; their token ids are compared there."""
    folders = [f"{MODELS}/{name}" for name in served.loaded]
    inside = ("--container=gateway", "--", "python", "-m", "tuneship.serve.goldens", ENGINE, *folders)
    answers: dict[str, list[str]] = json.loads(kubectl.read("exec", pods(kubectl)[0], *inside))
    assert served.canary is not None
    pairs = list(zip(answers[served.canary], answers[served.serving], strict=True))
    for mine, others in pairs:
        say(f"golden prompt: {mine.strip()!r}" + ("" if mine == others else f", served: {others.strip()!r}"))
    if any(others.strip() and not mine.strip() for mine, others in pairs):
        return ["it answers a golden prompt with nothing, and what is served does not"]
    return []
