"""The engine in this process, on a tiny random model."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kit import WAIT_S, Running, frames, in_background, running

from tuneship import generation
from tuneship import model as models
from tuneship.errors import InputError, TuneshipError
from tuneship.generation import Generator, Request, complete
from tuneship.serve import adapter as adapters
from tuneship.serve import local
from tuneship.serve.adapter import Contract
from tuneship.serve.local import LocalEngine

PROMPT = "Question: how many?\nContext: CREATE TABLE t (age INTEGER)\nAnswer:"


@contextmanager
def serving(
    folder: Path, *, slots: int = 4, length: int = 200, **settings: Any
) -> Iterator[tuple[Running, LocalEngine]]:
    found = adapters.find(folder)
    engine = LocalEngine(found, adapters.base_of(found), slots=slots, length=length)
    contracts = {found.name: Contract(found.folder)}
    with running(engine, contracts=contracts, max_new_tokens=24, **settings) as served:
        yield served, engine


def wait_ready(served: Running) -> None:
    while served.get("/health").status_code != 200:
        assert not served.ended.is_set(), served.error


@pytest.fixture(scope="module")
def served(made_adapter: Path) -> Iterator[Running]:
    with serving(made_adapter) as (found, _):
        wait_ready(found)
        yield found


@pytest.fixture(scope="module")
def expected(made_adapter: Path) -> str:
    """The greedy completion of PROMPT, by base and adapter as evaluation runs them."""
    found = adapters.find(made_adapter)
    model = models.load(adapters.base_of(found), "float32")
    models.load_adapter(model, made_adapter)
    ids = Contract(made_adapter).ids(PROMPT)
    ((_, completion),) = complete(Generator(model, slots=1, length=200), [Request(ids, 24)])
    return completion.text


def test_greedy_answers_are_those_of_evaluation(served: Running, expected: str) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    answer = served.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"] == {"prompt_tokens": 25, "completion_tokens": 24, "total_tokens": 49}
    assert answer["choices"][0]["finish_reason"] == "length"
    events = frames(served.post("/v1/completions", {**body, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == expected
    asked = served.post("/ask", {"question": "how many?", "context": "CREATE TABLE t (age INTEGER)"}).json()
    assert asked == {"answer": expected.strip()}


def test_many_at_a_time_get_what_each_gets_alone(served: Running) -> None:
    """More than there are slots, of different lengths."""
    bodies = [{"prompt": PROMPT[:cut], "temperature": 0, "max_tokens": cut} for cut in range(8, 20)]

    def text(body: dict[str, Any]) -> str:
        found: str = served.post("/v1/completions", body).json()["choices"][0]["text"]
        return found

    alone = [text(body) for body in bodies]
    calls = [in_background(lambda body=body: text(body)) for body in bodies]  # type: ignore[misc]
    for thread, _ in calls:
        thread.join(WAIT_S)
    assert [results for _, results in calls] == [[answer] for answer in alone]


def test_sampling_follows_its_seed(served: Running) -> None:
    body = {"prompt": PROMPT, "temperature": 1.5, "top_p": 0.95, "seed": 7, "n": 3}
    first, again, other = (
        [choice["text"] for choice in served.post("/v1/completions", {**body, "seed": seed}).json()["choices"]]
        for seed in (7, 7, 9)
    )
    assert first == again
    assert len({*first, *other}) > 3


def test_several_prompts_are_answered_in_their_order(served: Running, expected: str) -> None:
    body = {"prompt": ["Question:", PROMPT], "temperature": 0, "max_tokens": 24, "n": 2}
    choices = served.post("/v1/completions", body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] == expected for choice in choices] == [False, False, True, True]


def test_a_stop_ends_the_answer_and_is_not_part_of_it(served: Running, expected: str) -> None:
    stop = expected[4:7]
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "stop": [stop]}
    choice = served.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected[: expected.index(stop)], "stop")


def test_a_prompt_longer_than_the_model_is_refused(served: Running) -> None:
    answer = served.post("/v1/completions", {"prompt": PROMPT * 20})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    body = {"prompt": PROMPT, "max_tokens": 176}
    assert "prompt has 25 tokens" in served.post("/v1/completions", body).json()["error"]["message"]
    assert served.post("/v1/completions", {**body, "max_tokens": 175}).status_code == 200


def test_503_until_the_model_is_loaded(made_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_load = threading.Event()
    load = local.load

    def slowly(*args: Any) -> models.LoadedModel:
        assert may_load.wait(WAIT_S)
        return load(*args)

    monkeypatch.setattr(local, "load", slowly)
    with serving(made_adapter) as (found, _):
        assert found.get("/health").json()["error"]["code"] == "not_ready"
        assert found.get("/health?live").status_code == 200
        assert found.post("/ask", {"question": "x"}).status_code == 503
        may_load.set()
        wait_ready(found)
        assert found.post("/ask", {"question": "x"}).status_code == 200


def test_what_does_not_load_ends_the_server(tiny_adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tiny_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    with serving(tiny_adapter) as (found, _):
        assert found.ended.wait(WAIT_S)
    assert isinstance(found.error, InputError)


def test_an_engine_that_dies_says_so_and_ends_the_server(made_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(made_adapter) as (found, engine):
        wait_ready(found)

        def broken(_: Generator) -> list[Any]:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(Generator, "step", broken)
        answer = found.post("/ask", {"question": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_gone")
        assert not engine.ready
        assert found.ended.wait(WAIT_S)
    assert type(found.error) is TuneshipError
    assert "out of memory" in str(found.error)


def test_who_leaves_frees_the_slot(made_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one slot, a request that nobody waits for would hold up the next to its end."""
    begun, cancelled = threading.Event(), threading.Event()
    step, cancel = Generator.step, Generator.cancel

    def noted_step(self: Generator) -> list[Any]:
        events = step(self)
        begun.set()
        return events

    def noted_cancel(self: Generator, request: Request) -> None:
        cancel(self, request)
        assert self.running == 0
        cancelled.set()

    with serving(made_adapter, slots=1, length=512) as (found, _):
        wait_ready(found)
        monkeypatch.setattr(Generator, "step", noted_step)
        monkeypatch.setattr(Generator, "cancel", noted_cancel)
        body = json.dumps({"prompt": "Question:", "max_tokens": 500, "temperature": 0})
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with found.connect() as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert begun.wait(WAIT_S)
        assert cancelled.wait(WAIT_S)
        assert found.post("/ask", {"question": "x"}).status_code == 200


def test_a_hanging_step_is_seen(made_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = adapters.find(made_adapter)
    engine = LocalEngine(found, adapters.base_of(found), slots=1, length=64)
    assert not engine.hung
    monkeypatch.setattr(engine, "_step_since", 0.0)
    monkeypatch.setattr(local.time, "monotonic", lambda: local.HANGS_AFTER_S + 1)
    assert engine.hung


def test_the_model_bounds_the_length(made_adapter: Path) -> None:
    found = adapters.find(made_adapter)
    assert LocalEngine(found, adapters.base_of(found), slots=1, length=10**6).length("tiny") == 512


def test_a_folder_answers_without_a_server(made_adapter: Path, expected: str) -> None:
    found = adapters.find(made_adapter)
    contract = Contract(made_adapter)
    loaded = local.load(found, adapters.base_of(found))
    pieces = local.answer(loaded, contract.ids(PROMPT), stop=contract.prompt.stop, max_tokens=24)
    assert "".join(pieces) == expected


def test_a_merged_model_is_served(made_adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(tiny_base, merged)
    for name in ("prompt.json", "tuneship.json"):
        shutil.copyfile(made_adapter / name, merged / name)
    found = adapters.find(merged)
    ids = Contract(merged).ids(PROMPT)
    base = models.load(adapters.base_of(found), "float32")
    ((_, completion),) = complete(Generator(base, slots=1, length=200), [Request(ids, 24)])
    with serving(merged) as (served, _):
        wait_ready(served)
        answer = served.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}).json()
    assert (answer["model"], answer["choices"][0]["text"]) == ("tiny", completion.text)


def test_a_cache_that_grows_changes_nothing(made_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts of different lengths, so that copies between slots meet a grown cache, too."""
    found = adapters.find(made_adapter)
    loaded = local.load(found, adapters.base_of(found))
    contract = Contract(made_adapter)
    requests = [Request(contract.ids(PROMPT * count), 40 * count) for count in (3, 1, 2)]

    def texts(room: int) -> list[str]:
        monkeypatch.setattr(generation, "FIRST_ROOM", room)
        generator = Generator(loaded, slots=2, length=400)
        return [completion.text for _, completion in sorted(complete(generator, requests), key=lambda pair: pair[0])]

    assert texts(20) == texts(400)


def test_the_engine_ends_while_it_loads(made_adapter: Path) -> None:
    async def briefly() -> None:
        found = adapters.find(made_adapter)
        engine = LocalEngine(found, adapters.base_of(found), slots=1, length=64)
        await engine.start()
        await engine.close()
        assert engine.failure is None

    asyncio.run(briefly())
