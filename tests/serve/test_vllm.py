"""vLLM as the gateway's child: how it is started, and that the two end together.

A stand-in is started here (fake_vllm.py); tests/e2e starts the real one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from gateway_kit import WAIT_S, process, until

from tuneship.errors import InputError, OutsideError
from tuneship.recipe import Serve
from tuneship.serve import adapter as adapters
from tuneship.serve import vllm
from tuneship.serve.server import serve

FAKE = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-in on the PATH; it writes here how it was started."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_VLLM_SEEN", str(tmp_path / "seen.json"))
    return tmp_path / "seen.json"


def call(folder: Path) -> str:
    return f"serve([Path({str(folder)!r})], settings=Serve(port=0), engine='vllm', engine_args='--seed 3')"


def is_gone(pid: int) -> Callable[[], bool]:
    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # Where nobody reaps it, it stays as a name.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    return gone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_answers_and_ends_with_the_gateway(made_adapter: Path, seen: Path, number: signal.Signals) -> None:
    with process(call(made_adapter)) as (child, url):
        with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
            until(lambda: client.get("/health").status_code == 200)
            assert client.post("/ask", json={"question": "how many?"}).json() == {"answer": "SELECT 1"}
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
        started = json.loads(seen.read_text())
        assert started["argv"][-2:] == ["--seed", "3"]
        child.send_signal(number)
        assert child.wait(WAIT_S) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        until(is_gone(started["pid"]))


def test_a_child_that_does_not_start_is_told(
    made_adapter: Path, seen: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "dies")
    with pytest.raises(OutsideError, match="vLLM ended with exit code 2"):
        serve([made_adapter], settings=Serve(port=0), engine="vllm")
    assert "no such flag" in capfd.readouterr().err


def test_a_child_that_never_comes_up_is_told_and_ended(
    made_adapter: Path, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hangs")
    monkeypatch.setattr(vllm, "COMES_UP_WITHIN_S", 0.1)
    with pytest.raises(OutsideError, match=r"did not come up within 0\.1 s"):
        serve([made_adapter], settings=Serve(port=0), engine="vllm")
    if seen.exists():
        assert is_gone(json.loads(seen.read_text())["pid"])()


def test_a_child_that_dies_ends_the_gateway(made_adapter: Path, seen: Path) -> None:
    with process(call(made_adapter)) as (child, url):
        with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
            until(lambda: client.get("/health").status_code == 200)
            os.kill(json.loads(seen.read_text())["pid"], signal.SIGKILL)
            assert child.wait(WAIT_S) == OutsideError.exit_code
        assert child.stderr is not None
        assert "vLLM ended with exit code -9" in child.stderr.read()


def test_without_vllm_it_says_so(made_adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OutsideError, match="vLLM is not installed"):
        serve([made_adapter], settings=Serve(port=0), engine="vllm")


def started(folder: Path, settings: Serve | None = None) -> list[str]:
    found = adapters.find(folder)
    return vllm.command([found], adapters.base_of(found), settings or Serve())


def test_it_is_told_the_base_the_adapters_and_their_bounds(made_adapter: Path, tiny_base: Path) -> None:
    argv = started(made_adapter, Serve(max_model_len=4096, max_num_seqs=7))
    assert argv[0] == str(tiny_base)
    for name, value in [
        ("--served-model-name", "base"),
        ("--host", "127.0.0.1"),
        ("--dtype", "float32"),
        ("--max-model-len", "512"),
        ("--max-num-seqs", "7"),
        ("--max-loras", "1"),
        ("--max-lora-rank", "8"),
        ("--lora-modules", f"tiny={made_adapter}"),
    ]:
        assert argv[argv.index(name) + 1] == value, name
    assert "--enable-lora" in argv


def test_a_merged_model_needs_no_lora(tiny_base: Path) -> None:
    argv = started(tiny_base)
    assert argv[argv.index("--served-model-name") + 1] == tiny_base.name
    assert not [argument for argument in argv if "lora" in argument]


def test_a_rank_that_vllm_cannot_take_is_refused(tiny_adapter: Path) -> None:
    file = tiny_adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 513}))
    with pytest.raises(InputError, match="of rank 512 at most, and this one has 513"):
        started(tiny_adapter)
