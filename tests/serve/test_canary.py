"""A canary from deploy to its end: two real gateways, each as in a pod, in front of engines that do what the test says.

The cluster is a kubectl that hands the ConfigMap's shares to the gateways as the kubelet would, and runs what is
executed in a pod against that pod's gateway. Time passes by requests: each wait of the trial is some traffic.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fake_gcs
import fake_kubectl
import pytest
from fake_kubectl import Kubectl
from gateway_kit import Running, StubContract, StubEngine, running
from made_run import another, make_run, name

from tuneship.cluster import deploy as deployment
from tuneship.cluster import outputs, trial
from tuneship.cluster.deploy import Target, deploy, promote, roll_back
from tuneship.errors import GateError, OutsideError
from tuneship.serve.engine import Piece, Usage, Wanted
from tuneship.serve.shapes import ApiError
from tuneship.serve.shares import Shares

pytestmark = pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning")

OUTPUTS = outputs.read(Path(__file__).parents[2] / "infra" / "example-outputs.json")
PODS = ("pod-a", "pod-b")
ASKED = 20


class Engine(StubEngine):
    """One that fails for some adapters."""

    def __init__(self, names: tuple[str, ...], bad: str) -> None:
        super().__init__(names=names)
        self.bad = bad

    async def generate(self, wanted: Wanted, usage: Usage) -> AsyncGenerator[list[Piece], None]:
        if wanted.model == self.bad:
            self._count(1, wanted)
            self._count(-1)
            raise ApiError(502, "the engine broke off", code="engine_broke_off")
        async for pieces in super().generate(wanted, usage):
            yield pieces


class Cluster:
    """What serves an old run, and a new one that may be bad."""

    def __init__(self, kubectl: Kubectl, target: Target, old: Path, new: Path) -> None:
        self.kubectl, self.target, self.old, self.new = kubectl, target, old, new
        self.engines: list[Engine] = []
        self.gateways: list[Running] = []

    def start(self, stack: ExitStack, *, bad: str = "", mounted: Path | None = None) -> None:
        """Serves the old run, by two gateways that have both adapters and read their shares where they are mounted."""
        deploy(str(self.old), self.target)
        if mounted is not None:
            shutil.copyfile(self.kubectl.shares_file, mounted)
        names = (name(self.old), name(self.new))
        for number in range(len(PODS)):
            engine = Engine(names, bad)
            shared = Shares(engine, mounted or self.kubectl.shares_file, names, random.Random(number))
            contracts: dict[str, Any] = {each: StubContract() for each in (*names, "sql")}
            self.engines.append(engine)
            self.gateways.append(stack.enter_context(running(shared, contracts=contracts)))
        self.configure({each: ["SELECT 1"] for each in names})

    def configure(self, goldens: dict[str, list[str]], failing: str = "") -> None:
        urls = {pod: gateway.url for pod, gateway in zip(PODS, self.gateways, strict=True)}
        self.kubectl.configure(gateways=urls, goldens=goldens, failing=failing)

    def traffic(self, seconds: float) -> None:
        """What comes in while somebody waits."""
        for gateway in self.gateways:
            with gateway.client() as client:
                for _ in range(ASKED):
                    client.post("/v1/completions", json={"model": "sql", "prompt": "one?"})

    def answered(self) -> Counter[str]:
        """How often each adapter was asked."""
        return Counter(wanted.model for engine in self.engines for wanted in engine.wanted)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with fake_gcs.serving() as url:
        yield url


@pytest.fixture
def cluster(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    from google.cloud.storage import Client

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    client = Client()
    bucket = client.create_bucket(OUTPUTS.metaflow_datastore_bucket_name)
    kubectl = fake_kubectl.install(tmp_path, monkeypatch)
    target = Target(OUTPUTS, deployment.Kubectl("serving"), tmp_path / "rendered")
    run = make_run(tmp_path / "run")
    yield Cluster(kubectl, target, run, another(run))
    bucket.delete(force=True)
    client.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def try_it(
    cluster: Cluster, *, percent: int = 25, minutes: float = 5, sleep: Callable[[float], None] | None = None
) -> Any:
    return deploy(
        str(cluster.new),
        cluster.target,
        canary=percent,
        requests=20,
        minutes=minutes,
        sleep=sleep or cluster.traffic,
    )


def test_a_good_canary_gets_its_share_and_then_everything(cluster: Cluster, stack: ExitStack) -> None:
    cluster.start(stack)
    served = try_it(cluster)
    asked = cluster.answered()
    assert 0.1 < asked[name(cluster.new)] / asked.total() < 0.45
    assert (served.serving, served.previous, served.canary) == (name(cluster.new), name(cluster.old), None)
    before = cluster.answered()[name(cluster.old)]
    cluster.traffic(0)
    assert cluster.answered()[name(cluster.old)] == before, "everything goes to the new one"
    # The pods start anew once, to load the canary; promoting it changes shares alone.
    assert [call[0] for call in cluster.kubectl.changes].count("apply") == 3


def test_a_canary_that_fails_is_taken_back(cluster: Cluster, stack: ExitStack) -> None:
    cluster.start(stack, bad=name(cluster.new))
    with pytest.raises(GateError, match=r"errors 100.0% against 0.0%") as caught:
        try_it(cluster)
    assert caught.value.exit_code == 4
    record = cluster.kubectl.record()
    assert (record["serving"], record["canary"], record["share"]) == (name(cluster.old), None, 0)
    assert "errors 100.0%" in record["history"][-1]
    before = cluster.answered()[name(cluster.new)]
    cluster.traffic(0)
    assert cluster.answered()[name(cluster.new)] == before, "nobody gets the bad one any more"


def test_a_canary_that_answers_goldens_with_nothing_gets_no_traffic_to_judge(
    cluster: Cluster, stack: ExitStack
) -> None:
    cluster.start(stack)
    cluster.configure({name(cluster.old): ["SELECT 1"], name(cluster.new): [" "]})
    with pytest.raises(GateError, match="answers a golden prompt with nothing"):
        try_it(cluster)
    assert cluster.kubectl.record()["serving"] == name(cluster.old)


def test_a_canary_that_too_few_have_asked_is_taken_back(cluster: Cluster, stack: ExitStack) -> None:
    cluster.start(stack)
    with pytest.raises(GateError, match=r"only 0 of 20 requests came in 0\.5 minutes"):
        try_it(cluster, minutes=0.5, sleep=lambda seconds: None)
    assert cluster.kubectl.record()["canary"] is None


def test_a_trial_that_was_left_is_ended_by_hand(
    cluster: Cluster, stack: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    class Left(Exception):
        pass

    def leave(seconds: float) -> None:
        raise Left

    cluster.start(stack)
    for end, serving in ((promote, cluster.new), (roll_back, cluster.old)):
        if end is promote:
            with pytest.raises(Left):
                try_it(cluster, sleep=leave)
            assert cluster.kubectl.record()["canary"] == name(cluster.new)
            assert "keeps its share: tuneship deploy --promote, or --rollback" in capsys.readouterr().err
        assert end(cluster.target, sleep=cluster.traffic).serving == name(serving)
        before = cluster.answered()
        cluster.traffic(0)
        assert set(cluster.answered() - before) == {name(serving)}


def test_a_pod_that_goes_away_does_not_end_the_trial(cluster: Cluster, stack: ExitStack) -> None:
    cluster.start(stack)
    cluster.configure({each: ["SELECT 1"] for each in (name(cluster.old), name(cluster.new))}, failing="exec pod-b")
    assert try_it(cluster).serving == name(cluster.new)


def test_each_adapter_can_be_asked_by_its_own_name(cluster: Cluster, stack: ExitStack) -> None:
    cluster.start(stack)
    models = [model["id"] for model in cluster.gateways[0].get("/v1/models").json()["data"]]
    assert models == ["sql", name(cluster.old), name(cluster.new)]
    assert cluster.gateways[0].post("/v1/completions", {"model": name(cluster.new), "prompt": "x"}).status_code == 200
    assert cluster.answered() == {name(cluster.new): 1}


def test_a_change_is_done_when_every_pod_has_it(cluster: Cluster, stack: ExitStack, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted.json"
    cluster.start(stack, mounted=mounted)
    deploy(str(cluster.new), cluster.target)
    waits = []

    def kubelet(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            shutil.copyfile(cluster.kubectl.shares_file, mounted)

    roll_back(cluster.target, sleep=kubelet)
    assert len(waits) == 3


def test_a_change_that_never_comes_is_told(
    cluster: Cluster, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "SETTLES_WITHIN_S", 10)
    cluster.start(stack, mounted=tmp_path / "mounted.json")
    deploy(str(cluster.new), cluster.target)
    # No pod is left that could say so.
    cluster.kubectl.configure()
    with pytest.raises(OutsideError, match="have not taken over the new shares"):
        roll_back(cluster.target, sleep=lambda seconds: None)
