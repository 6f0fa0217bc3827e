"""V3 and the API's description: what docs/openapi.yaml says is what the gateway does, whatever is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from gateway_kit import KEY, Running, StubEngine, running
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from tuneship.serve.keys import KeyFile

FILE = Path(__file__).parents[2] / "docs" / "openapi.yaml"
api = schemathesis.openapi.from_path(FILE)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    with running(StubEngine(length=None), keys=KeyFile(file)) as found:
        yield found


def test_the_description_has_the_gateways_routes(keyed: Running) -> None:
    paths = yaml.safe_load(FILE.read_text())["paths"]
    routes = {path: method.lower() for path, (method, _) in keyed.gateway._routes.items()}
    assert {path: next(iter(operations)) for path, operations in paths.items()} == routes


@api.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_v3_whatever_is_sent_is_answered_as_described(case: Any, keyed: Running) -> None:
    # That no key means no answer is V1; this check would send ours.
    excluded = [ignored_auth]
    if case.operation.path in ("/v1/completions", "/v1/chat/completions"):
        # What a schema does not say: prompts × n are bounded, and somebody must ask.
        excluded.append(positive_data_acceptance)
    case.call_and_validate(base_url=keyed.url, headers={"authorization": f"Bearer {KEY}"}, excluded_checks=excluded)
