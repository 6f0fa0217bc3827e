"""serve as a process: what it refuses before it starts, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_kit import WAIT_S, StubEngine, process, running

from tuneship.base import BaseFiles
from tuneship.errors import InputError, OutsideError
from tuneship.recipe import Serve
from tuneship.serve.gateway import Gateway
from tuneship.serve.limits import Limits
from tuneship.serve.server import Server, listen, serve

PROMPT = {"prompt": "one?"}


def settings(**changes: object) -> Serve:
    return Serve(port=0).model_copy(update=changes)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_a_taken_port_is_told(taken: int) -> None:
    with pytest.raises(OutsideError, match="the port is taken") as caught:
        serve([], settings=settings(port=taken), engine="http://127.0.0.1:9")
    assert caught.value.where == f"127.0.0.1:{taken}"


def test_of_two_that_start_together_one_is_told_that_the_port_is_taken() -> None:
    engine = StubEngine()
    gateway = Gateway(engine, {}, limits=Limits(), max_new_tokens=1)
    with listen("127.0.0.1", 0) as one, listen("127.0.0.1", one.getsockname()[1]) as other:
        Server(gateway, engine, one, Limits())
        with pytest.raises(OutsideError, match="the port is taken"):
            Server(gateway, engine, other, Limits())


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "999.0.0.1"])
def test_an_address_that_is_not_here_is_told(host: str) -> None:
    with pytest.raises(InputError):
        listen(host, 0)


def test_a_missing_key_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutsideError, match="API keys is missing"):
        serve([], engine="http://127.0.0.1:9", api_key_file=tmp_path / "keys")


def test_no_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter and no model here"):
        serve([tmp_path])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_others_may_ask_only_with_keys_or_a_word(host: str) -> None:
    with pytest.raises(InputError, match="without API keys only this machine may ask"):
        serve([], settings=settings(host=host), engine="http://127.0.0.1:9")


def test_contradictions_are_told(tmp_path: Path, made_adapter: Path) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef")
    with pytest.raises(InputError, match="exclude each other"):
        serve([], engine="http://x", api_key_file=tmp_path / "keys", no_auth=True)
    with pytest.raises(InputError, match="an engine is local, vllm or a URL"):
        serve([], settings=settings(), engine="x:80")
    with pytest.raises(InputError, match="--base has no effect"):
        serve([], settings=settings(), engine="http://x", base="y")
    with pytest.raises(InputError, match="no effect without its URL"):
        serve([made_adapter], settings=settings(), engine_key_file=tmp_path / "keys")
    with pytest.raises(InputError, match="has nothing to serve"):
        serve([], settings=settings())
    with pytest.raises(InputError, match="have one name"):
        serve([made_adapter, made_adapter], settings=settings(), engine="http://x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_v9_a_signal_lets_a_stream_end(number: signal.Signals) -> None:
    engine = StubEngine(hold=1)
    with (
        running(engine, contracts={}) as inner,
        process(f"serve([], settings=Serve(port=0), engine={inner.url!r})") as (child, url),
        httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client,
    ):
        while client.get("/health").status_code != 200:
            pass
        with client.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert "SELECT" in next(lines)
            child.send_signal(number)
            while client.get("/health").json().get("error", {}).get("code") != "draining":
                pass
            assert client.post("/v1/completions", json=PROMPT).status_code == 503
            engine.release()
            assert "data: [DONE]" in list(lines)
        assert child.wait(WAIT_S) == 0


def test_v9_a_second_signal_ends_it_at_once() -> None:
    engine = StubEngine(hold=1)
    with (
        running(engine, contracts={}) as inner,
        process(f"serve([], settings=Serve(port=0), engine={inner.url!r})") as (child, url),
        httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client,
    ):
        while client.get("/health").status_code != 200:
            pass
        with client.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            while client.get("/health").json().get("error", {}).get("code") != "draining":
                pass
            child.send_signal(signal.SIGTERM)
            assert child.wait(WAIT_S) == 0
        engine.wait_running(0)


def test_a_folder_is_served_and_its_failure_told(tiny_adapter: Path) -> None:
    with process(f"serve([Path({str(tiny_adapter)!r})], settings=Serve(port=0))") as (child, url):
        assert child.stderr is not None
        # It says so when it is: until then, 503.
        assert next(line for line in child.stderr if line.startswith("ready after "))
        with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            answer = client.post("/generate", json={"prompt": "Question:", "max_tokens": 4})
            assert answer.json()["predictions"][0].startswith("Prompt:\nQuestion:\nOutput:\n")
            client.post("/generate", json={"prompt": "the private prompt", "max_tokens": 4})
        child.send_signal(signal.SIGTERM)
        assert child.wait(WAIT_S) == 0
        text = child.stderr.read()
        assert '"route":"/generate"' in text
        assert "private" not in text
        assert "Traceback" not in text


def test_v9_a_signal_while_loading_ends_it(tiny_adapter: Path) -> None:
    with process(f"serve([Path({str(tiny_adapter)!r})], settings=Serve(port=0))") as (child, url):
        assert httpx.get(url + "/health?live", trust_env=False).status_code == 200
        child.send_signal(signal.SIGTERM)
        assert child.wait(WAIT_S) == 0


def test_a_model_that_does_not_load_is_one_message(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(tiny_base, tmp_path / "spoilt"))
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(config | {"hidden_activation": "none such"}))
    # Trained on it: nothing but loading finds that it is none.
    facts = json.loads((tiny_adapter / "tuneship.json").read_text())
    facts["base"]["fingerprint"] = BaseFiles("spoilt", spoilt, "local").fingerprint()
    (tiny_adapter / "tuneship.json").write_text(json.dumps(facts))
    call = f"serve([Path({str(tiny_adapter)!r})], settings=Serve(port=0), base={str(spoilt)!r})"
    with process(call) as (child, _):
        assert child.wait(WAIT_S) == 1
        assert child.stderr is not None
        text = child.stderr.read()
        assert "the engine died: KeyError" in text
        assert "Traceback" not in text
