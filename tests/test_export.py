"""export: the merged model is base + adapter, and the proof sees it where it is not (P4).

python -m pytest tests/test_export.py -v
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneship import export as exporting
from tuneship import journal, prompt
from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.data import heldout
from tuneship.errors import InputError, OutsideError, TuneshipError
from tuneship.export import export, merge
from tuneship.generation import Generator, Request, complete
from tuneship.kernels.attention import Documents

ROW = tiny.rows([80], seed=2)[0]


def opened(run: Path) -> Any:
    return journal.open_run(run, journal.read_run(run).recipe)


def logits(model: models.LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.states(ROW, torch.arange(len(ROW)), Documents([0, len(ROW)])))


@pytest.fixture(scope="module")
def exported(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its merged model."""
    folder = Path(shutil.copytree(trained_once, tmp_path_factory.mktemp("exported") / "run"))
    with opened(folder) as run:
        export(run)
    return folder


def by_hand(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The merged weights, straight from the definition of LoRA."""
    weights, deltas = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in deltas.items():
        if name.endswith("lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            weights[target] = weights[target] + (8 / 4) * deltas[name.replace("lora_A", "lora_B")] @ a
    return {name: weight.bfloat16() for name, weight in weights.items()}


def test_the_merged_weights_are_base_and_adapter_rounded_once(exported: Path, tiny_base: Path) -> None:
    expected = by_hand(tiny_base, exported / "adapter")
    merged = load_file(exported / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, rtol=1 / 128, atol=0)
    changed = load_file(tiny_base / "model.safetensors")
    assert sum(not torch.equal(merged[name], changed[name].bfloat16()) for name in merged) == 4 * 7


def test_the_merged_model_is_the_tuned_one_to_transformers(exported: Path, tiny_base: Path) -> None:
    tuned = models.load(BaseFiles("base", tiny_base, "local"), "float32")
    models.load_adapter(tuned, exported / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(exported / "merged", attn_implementation="eager", dtype=torch.float32)
    expected = logits(tuned)
    with torch.no_grad():
        actual = theirs(input_ids=ROW[None]).logits[0]
        before = logits(models.load(BaseFiles("base", tiny_base, "local"), "float32"))
    spread = float(expected.std(-1).mean())
    # Rounded to bfloat16, and not the base.
    assert float((actual - expected).abs().mean()) < 0.02 * spread
    assert float((actual - before).abs().mean()) > 0.2 * spread


def test_both_say_the_same_on_twenty_prompts(exported: Path, tiny_base: Path) -> None:
    run = journal.read_run(exported)
    contract = prompt.read(run.adapter)
    rows = [row for name in ("test", "validation", "examples") for row in heldout.read(run.data / f"{name}.jsonl", 20)][
        :20
    ]
    said = []
    for folder in (tiny_base, exported / "merged"):
        model = models.load(BaseFiles("model", folder, "local"), "float32")
        if folder == tiny_base:
            models.load_adapter(model, run.adapter)
        ids = prompt.encode(model.tokenizer, [contract.render(row.fields) for row in rows], start=True)
        done = dict(complete(Generator(model, slots=20, length=250), [Request(one, 20) for one in ids]))
        said.append([done[index].tokens for index in range(20)])
    # A tie may fall otherwise after rounding; then the rest of that answer differs too.
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 18


def test_the_folder_can_be_served_as_it_is(exported: Path, tiny_base: Path) -> None:
    merged = exported / "merged"
    config = json.loads((merged / "config.json").read_text())
    base = json.loads((tiny_base / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    assert config == {key: value for key, value in base.items() if key not in ("dtype", "torch_dtype")}
    names = {file.name for file in merged.iterdir()}
    assert names >= {"tokenizer.json", "generation_config.json", "prompt.json", "tuneship.json", "proof.json"}
    prompt.verify(merged, AutoTokenizer.from_pretrained(merged))
    # The head is the embedding here: no second copy of it.
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    assert not [entry.name for entry in exported.iterdir() if "partial" in entry.name]


def test_the_proof_says_what_was_compared(exported: Path) -> None:
    proof = json.loads((exported / "merged" / "proof.json").read_text())
    held = len(heldout.read(exported / "data" / "test.jsonl", 20))
    assert proof["prompts"] == held
    # Every position of the answers, and what comes after them.
    assert proof["positions"] > held * 10
    assert proof["positions"] * 0.9 < proof["same"] <= proof["positions"]
    assert 0 < proof["divergence"] < proof["tolerance"]


def test_twice_is_once(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = exported / "merged" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    with opened(exported) as run:
        proof = export(run)
    assert proof == json.loads((exported / "merged" / "proof.json").read_text())
    assert weights.stat().st_mtime_ns == before
    assert "already exported" in capfd.readouterr().err


# --- shards -----------------------------------------------------------------------------------


def sharded(base: Path, folder: Path) -> Path:
    """The base in three files with an index, as large models come."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(base / "model.safetensors")
    names, places = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_sharded_base_is_merged_shard_by_shard(trained_once: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = sharded(tiny_base, tmp_path / "base")
    merge(BaseFiles("base", base, "local"), trained_once / "adapter", tmp_path / "merged")
    expected = by_hand(tiny_base, trained_once / "adapter")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in expected.values())
    for name, file in index["weight_map"].items():
        torch.testing.assert_close(load_file(tmp_path / "merged" / file)[name], expected[name], rtol=1 / 128, atol=0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["another adapter", "half the adapter", "a layer lost", "the base itself"])
def test_a_merged_model_that_says_something_else_is_refused(
    trained: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def tampered(files: BaseFiles, adapter: Path, target: Path) -> None:
        merge(files, adapter, target)
        base, file = load_file(tiny_base / "model.safetensors"), target / "model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            delta = tensor.float() - base[name]
            if how == "another adapter":
                tensors[name] = (base[name] - delta).bfloat16()
            elif how == "half the adapter":
                tensors[name] = (base[name] + delta / 2).bfloat16()
            elif how == "the base itself" or name.startswith("model.layers.1.mlp"):
                tensors[name] = base[name].bfloat16() if how == "the base itself" else torch.zeros_like(tensor)
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "merge", tampered)
    with opened(trained) as run, pytest.raises(TuneshipError, match="the merged model says something else") as failure:
        export(run)
    assert "publish.merged: false" in failure.value.fix
    assert not (trained / "merged").exists()


def test_an_adapter_of_another_base_is_refused(trained_once: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    renamed = {name.replace("layers.3.", "layers.9."): tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="7 of the adapter's targets are not in the base"):
        merge(BaseFiles("base", base, "local"), trained_once / "adapter", tmp_path / "merged")


def test_without_an_adapter_it_is_refused(trained: Path) -> None:
    shutil.rmtree(trained / "adapter")
    with opened(trained) as run, pytest.raises(InputError, match="the run has no adapter yet"):
        export(run)


def test_a_disk_that_is_too_small_is_refused_first(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with (
        opened(trained) as run,
        pytest.raises(OutsideError, match=r"the merged model needs up to \d+ bytes, 10 are free"),
    ):
        export(run)
    assert not any("merged" in entry.name for entry in trained.iterdir())
