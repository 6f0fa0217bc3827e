"""The gateway's metrics, by Prometheus' conventions; the engine's own come behind them.

No label holds what a client can choose freely. Scale on `tuneship_requests_waiting`: the gateway
holds back what the engine cannot take, so the engine's own queue stays short.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from tuneship.serve.call import Call
from tuneship.serve.limits import Gate

CONTENT_TYPE = (b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode())
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One gateway's."""

    def __init__(self, gate: Gate) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("tuneship_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "tuneship_request_seconds", "From head to last byte.", ["route"], buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "tuneship_first_token_seconds", "From head to first token.", buckets=_SECONDS, registry=registry
        )
        self._waited = Histogram(
            "tuneship_wait_seconds", "From head to its turn with the engine.", buckets=_SECONDS, registry=registry
        )
        self._prompt = Counter("tuneship_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._completion = Counter("tuneship_completion_tokens", "Tokens of completions.", registry=registry)
        self._gone = Counter("tuneship_clients_gone", "Clients that left before the end.", registry=registry)
        running = Gauge("tuneship_requests_running", "Requests with the engine.", registry=registry)
        running.set_function(lambda: gate.running)
        waiting = Gauge("tuneship_requests_waiting", "Requests that wait for the engine.", registry=registry)
        waiting.set_function(lambda: gate.inside - gate.running)
        self._ready = Gauge("tuneship_ready", "1 where /health says so.", registry=registry)

    def note(self, call: Call, *, gone: bool) -> None:
        """A request has ended."""
        self._requests.labels(call.route, "gone" if gone else str(call.status)).inc()
        self._seconds.labels(call.route).observe(call.seconds)
        if call.first is not None:
            self._first.observe(call.first)
        if call.waited is not None:
            self._waited.observe(call.waited)
        self._prompt.inc(call.usage.prompt_tokens)
        self._completion.inc(call.usage.completion_tokens)
        if gone:
            self._gone.inc()

    def text(self, *, ready: bool) -> bytes:
        """All of them."""
        self._ready.set(ready)
        return generate_latest(self._registry)
