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
from gateway_kit import WAIT_S, Running, frames, in_background, running

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
    *folders: Path, slots: int = 4, length: int = 200, **settings: Any
) -> Iterator[tuple[Running, LocalEngine]]:
    found = [adapters.find(folder) for folder in folders]
    engine = LocalEngine(found, adapters.shared_base(found), slots=slots, length=length)
    contracts = {one.name: Contract(one.folder) for one in found}
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


def evaluated(folder: Path, text: str) -> str:
    """The greedy completion of a text, by base and adapter as evaluation runs them."""
    model = models.load(adapters.base_of(adapters.find(folder)), "float32")
    models.load_adapter(model, folder)
    ((_, completion),) = complete(Generator(model, slots=1, length=200), [Request(Contract(folder).ids(text), 24)])
    return completion.text


@pytest.fixture(scope="module")
def expected(made_adapter: Path) -> str:
    return evaluated(made_adapter, PROMPT)


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


def renamed(folder: Path, target: Path, name: str, **facts: object) -> Path:
    """A copy of an adapter under another name, with another sign, so that it answers otherwise."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    save_file({key: -t if "lora_B" in key else t for key, t in load_file(file).items()}, file)
    told = json.loads((target / "tuneship.json").read_text())
    told["recipe"]["name"] = name
    (target / "tuneship.json").write_text(json.dumps({**told, **facts}))
    return target


def test_adapters_share_a_base_and_a_batch(made_adapter: Path, expected: str, tmp_path: Path) -> None:
    other = renamed(made_adapter, tmp_path / "other", "other")
    with serving(made_adapter, other) as (found, _):
        wait_ready(found)
        assert [model["id"] for model in found.get("/v1/models").json()["data"]] == ["tiny", "other"]

        def text(model: str, prompt: str) -> str:
            body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 24}
            answer: str = found.post("/v1/completions", body).json()["choices"][0]["text"]
            return answer

        prompts = [PROMPT, PROMPT[:40], PROMPT[:25]]
        calls = [in_background(lambda m=m, p=p: text(m, p)) for p in prompts for m in ("tiny", "other")]  # type: ignore[misc]
        for thread, _ in calls:
            thread.join(WAIT_S)
        folders = {"tiny": made_adapter, "other": other}
        assert [results for _, results in calls] == [[evaluated(folders[m], p)] for p in prompts for m in folders]
    assert calls[0][1] != calls[1][1]


def test_adapters_of_different_bases_are_refused(made_adapter: Path, tmp_path: Path) -> None:
    base = json.loads((made_adapter / "tuneship.json").read_text())["base"]
    other = renamed(made_adapter, tmp_path / "other", "other", base={**base, "fingerprint": "0" * 64})
    with pytest.raises(InputError, match="other was trained on another base than tiny"):
        adapters.shared_base([adapters.find(made_adapter), adapters.find(other)])


def test_a_merged_model_is_served_alone(made_adapter: Path, tiny_base: Path) -> None:
    with pytest.raises(InputError, match="a merged model is served alone"):
        adapters.shared_base([adapters.find(made_adapter), adapters.find(tiny_base)])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_dora": True}, "an adapter with use_dora is not served"),
        ({"rank_pattern": {"q_proj": 2}}, "an adapter with rank_pattern is not served"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tiny_adapter: Path, change: dict[str, Any], what: str) -> None:
    file = tiny_adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    found = adapters.find(tiny_adapter)
    with pytest.raises(InputError, match=what):
        local.load([found], adapters.base_of(found), slots=1, length=64)


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

    def slowly(*args: Any, **sizes: Any) -> Generator:
        assert may_load.wait(WAIT_S)
        return load(*args, **sizes)

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


def test_v6_who_leaves_frees_the_slot(made_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    engine = LocalEngine([found], adapters.base_of(found), slots=1, length=64)
    assert not engine.hung
    monkeypatch.setattr(engine, "_step_since", 0.0)
    monkeypatch.setattr(local.time, "monotonic", lambda: local.HANGS_AFTER_S + 1)
    assert engine.hung


def test_the_model_bounds_the_length(made_adapter: Path) -> None:
    found = adapters.find(made_adapter)
    assert LocalEngine([found], adapters.base_of(found), slots=1, length=10**6).length("tiny") == 512


def test_a_folder_answers_without_a_server(made_adapter: Path, expected: str) -> None:
    found = adapters.find(made_adapter)
    contract = Contract(made_adapter)
    files = adapters.base_of(found)
    pieces = local.answer(found, files, contract.ids(PROMPT), stop=contract.prompt.stop, max_tokens=24)
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
    files = adapters.base_of(found)
    contract = Contract(made_adapter)
    requests = [Request(contract.ids(PROMPT * count), 40 * count, adapter="tiny") for count in (3, 1, 2)]

    def texts(room: int) -> list[str]:
        monkeypatch.setattr(generation, "FIRST_ROOM", room)
        generator = local.load([found], files, slots=2, length=400)
        return [completion.text for _, completion in sorted(complete(generator, requests), key=lambda pair: pair[0])]

    assert texts(20) == texts(400)


def test_the_engine_ends_while_it_loads(made_adapter: Path) -> None:
    async def briefly() -> None:
        found = adapters.find(made_adapter)
        engine = LocalEngine([found], adapters.base_of(found), slots=1, length=64)
        await engine.start()
        await engine.close()
        assert engine.failure is None

    asyncio.run(briefly())
