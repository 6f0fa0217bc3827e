"""What is served: which folders are taken, and which are refused before anything is loaded."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneship import prompt
from tuneship.errors import InputError
from tuneship.recipe import Recipe
from tuneship.serve import adapter as adapters
from tuneship.serve.adapter import Contract


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


def test_an_adapters_folder_is_found(tiny_adapter: Path, tiny_base: Path) -> None:
    found = adapters.find(tiny_adapter)
    assert (found.name, found.folder, found.merged) == ("tiny", tiny_adapter, False)
    assert adapters.base_of(found).folder == tiny_base


def test_a_runs_folder_is_found(tiny_adapter: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(make_recipe(serve={"port": 1234}).model_dump_json())
    with pytest.raises(InputError, match="the run has no adapter yet"):
        adapters.find(run)
    shutil.copytree(tiny_adapter, run / "adapter")
    found = adapters.find(run)
    assert (found.folder, found.settings.port) == (run / "adapter", 1234)


def test_a_merged_models_folder_is_found(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(tiny_base, merged)
    for name in ("prompt.json", "tuneship.json"):
        shutil.copyfile(tiny_adapter / name, merged / name)
    found = adapters.find(merged)
    assert (found.name, found.merged) == ("tiny", True)
    assert adapters.base_of(found).folder == merged


def test_a_model_that_does_not_say_its_length_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(tiny_base, tmp_path / "merged"))
    (merged / "config.json").write_text("{}")
    with pytest.raises(InputError, match="how long a text may be"):
        adapters.base_of(adapters.find(merged)).length  # noqa: B018 - it is read


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter and no model"):
        adapters.find(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        adapters.find(tmp_path / "none")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights"),
        (lambda folder: cut(folder / "adapter_model.safetensors"), "the weights are damaged"),
        (lambda folder: (folder / "tuneship.json").unlink(), "does not say which base"),
        (lambda folder: (folder / "tuneship.json").write_text("{}"), "does not say which base"),
        (lambda folder: (folder / "tuneship.json").write_text('{"recipe": '), "not JSON"),
        (lambda folder: (folder / "tuneship.json").write_text("[]"), "the file is damaged"),
        (lambda folder: change(folder / "tuneship.json", base={}), "does not say which base"),
        (lambda folder: change(folder / "tuneship.json", base=["x"]), "the file is damaged"),
        (
            lambda folder: change(folder / "tuneship.json", base={"name": "x", "fingerprint": None}),
            "fingerprint is no text",
        ),
        (lambda folder: change(folder / "tuneship.json", recipe={"name": "tiny"}), "has no 'model'"),
        (lambda folder: change(folder / "tuneship.json", recipe={"name": "x", "model": {}}), "the file is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "the file is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda folder: change(folder / "adapter_config.json", base_model_name_or_path="x/y"), "name two bases"),
    ],
)
def test_a_spoilt_adapter_is_refused(tiny_adapter: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(tiny_adapter)
    with pytest.raises(InputError, match=message) as caught:
        adapters.find(tiny_adapter)
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "prompt.json").unlink(), "no prompt contract"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "the file is missing"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "the file is damaged"),
        (lambda folder: append(folder / "tokenizer.json", "\n"), "not the one that the adapter was trained with"),
        (lambda folder: change(folder / "tokenizer_config.json", eos_token="<bos>"), "other tokens than training saw"),
    ],
)
def test_a_spoilt_contract_is_refused(tiny_adapter: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(tiny_adapter)
    with pytest.raises(InputError, match=message):
        Contract(tiny_adapter)


def test_another_base_is_refused(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    found = adapters.find(tiny_adapter)
    assert adapters.base_of(found, str(other)).folder == other
    weights = next(other.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(InputError, match="not the one that tiny was trained on"):
        adapters.base_of(found, str(other))


def test_ids_are_those_of_training(tiny_adapter: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_adapter)
    contract = Contract(tiny_adapter)
    texts = ["Question: what?\nContext: \nAnswer:", "Übergröße, 数, 🚢", "", " <eos> "]
    assert [contract.ids(text) for text in texts] == prompt.encode(tokenizer, texts, start=True)


def test_special_tokens_in_a_request_are_plain_text(tiny_adapter: Path) -> None:
    ids = Contract(tiny_adapter).ids("a<eos><bos><end_of_turn>")
    assert ids[0] == 2
    assert not set(ids[1:]) & {0, 1, 2, 3, 4}


def test_a_long_text_is_tokenised_beside_the_loop(tiny_adapter: Path) -> None:
    contract = Contract(tiny_adapter)
    text = "Question: how many? <eos> " * 2000
    assert asyncio.run(contract.encode(text)) == contract.ids(text)


def test_what_the_gateway_imports_is_light() -> None:
    code = (
        "import sys, tuneship.serve\n"
        "assert not set(sys.modules) & {'uvicorn', 'aiohttp', 'httpx', 'tokenizers'}\n"
        "import tuneship.serve.server, tuneship.serve.upstream, tuneship.serve.client\n"
        "assert not set(sys.modules) & {'torch', 'transformers', 'peft', 'numpy'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
