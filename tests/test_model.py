"""The base, its adapter, and what is refused before weights are read."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from samples import make_gemma2
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneship import base
from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.errors import InputError
from tuneship.kernels.attention import Documents
from tuneship.recipe import Lora


@pytest.fixture
def hollow_base(tiny_base: Path, tmp_path: Path) -> BaseFiles:
    """The tiny base with weights that nobody can read."""
    folder = shutil.copytree(tiny_base, tmp_path / "hollow")
    (folder / "model.safetensors").write_bytes(b"not weights")
    return BaseFiles("hollow", folder, "local")


def files(folder: Path) -> BaseFiles:
    return BaseFiles(str(folder), folder, "local")


@pytest.mark.parametrize(
    ("lora", "what", "where"),
    [
        (Lora(layers_to_transform=(0, 4)), "the base has layers 0 to 3, not 4", "lora.layers_to_transform"),
        (Lora(target_modules=("q_proj", "qproj")), "the base has no linear layer qproj", "lora.target_modules"),
        (Lora(target_modules=("lm_head",)), "the base has no linear layer lm_head", "lora.target_modules"),
        (Lora(r=17, target_modules=("k_proj",)), r"rank 17 is more than k_proj has \(16 × 32\)", "lora.r"),
        (Lora(r=64), "rank 64 is more than", "lora.r"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(
    hollow_base: BaseFiles, lora: Lora, what: str, where: str
) -> None:
    with pytest.raises(InputError, match=what) as refusal:
        models.check_lora(hollow_base, lora)
    assert refusal.value.where == where
    assert refusal.value.fix


@pytest.mark.parametrize(
    "lora",
    [Lora(), Lora(r=32, target_modules=("q_proj",)), Lora(layers_to_transform=(3,), target_modules=("up_proj",))],
)
def test_an_adapter_that_fits_is_not(hollow_base: BaseFiles, lora: Lora) -> None:
    models.check_lora(hollow_base, lora)


def test_an_unproven_architecture_is_refused_before_weights_are_read(hollow_base: BaseFiles) -> None:
    config = hollow_base.config
    (hollow_base.folder / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}))
    for refuse in (models.check_architecture, models.load):
        with pytest.raises(InputError, match="the architecture phi3 is not supported") as refusal:
            refuse(hollow_base)  # type: ignore[operator]
        assert "gemma2" in refusal.value.fix


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_a_precision_that_the_device_lacks_is_refused(hollow_base: BaseFiles, precision: str) -> None:
    with pytest.raises(InputError, match=precision):
        models.load(hollow_base, precision, torch.device("cpu"))


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="no end-of-sequence token"):
        base.load_tokenizer(files(folder))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_base_is_frozen_in_its_precision(tiny_base: Path, precision: str) -> None:
    model = models.load(files(tiny_base), precision, torch.device("cpu"))
    assert {p.dtype for p in model.causal.parameters()} == {getattr(torch, precision)}
    models.add_lora(model, Lora(r=4), seed=0)
    trainable = models.trainable(model)
    assert all(".lora_" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert len(trainable) == 4 * 7 * 2


def test_a_fresh_adapter_depends_on_its_seed_alone(tiny_base: Path) -> None:
    made = []
    for seed in (3, 3, 4):
        torch.rand(seed + len(made))
        model = models.load(files(tiny_base), "float32")
        models.add_lora(model, Lora(r=4, layers_to_transform=(1,), target_modules=("q_proj", "up_proj")), seed=seed)
        made.append(model.adapter_tensors())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not all(torch.equal(made[0][name], made[2][name]) for name in made[0])
    assert {name.split(".")[4] for name in made[0]} == {"1"}


def test_pefts_own_loader_gives_the_same_logits(tiny_base: Path, tmp_path: Path) -> None:
    model = tiny.tuned(files(tiny_base))
    folder = tmp_path / "adapter"
    models.write_adapter(model, folder)
    row = tiny.rows([60])[0]
    with torch.no_grad():
        ours = model.logits(model.states(row, torch.arange(60), Documents([0, 60])))

    causal = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="eager", dtype=torch.float32)
    with warnings.catch_warnings():
        # PEFT calls transformers by a name that is to go.
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(causal, folder)
    with torch.no_grad():
        assert tiny.distance(ours, peft(input_ids=row[None]).logits[0]) < 1e-5
        with peft.disable_adapter():
            assert tiny.distance(ours, peft(input_ids=row[None]).logits[0]) > 1e-2

    again = models.load(files(tiny_base), "float32")
    models.load_adapter(again, folder)
    with torch.no_grad():
        assert torch.equal(ours, again.logits(again.states(row, torch.arange(60), Documents([0, 60]))))


def test_the_adapters_folder_is_complete(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    models.write_adapter(tiny.tuned(files(tiny_base)), folder)
    config = json.loads((folder / models.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert config["inference_mode"] is True
    # Python orders a set otherwise in each process; the file must not.
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["r"], config["lora_alpha"], config["bias"], config["task_type"]) == (4, 8, "none", "CAUSAL_LM")
    ours, theirs = (AutoTokenizer.from_pretrained(where) for where in (folder, tiny_base))
    assert ours("SELECT name FROM table_1").input_ids == theirs("SELECT name FROM table_1").input_ids
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    models.write_adapter(tiny.tuned(files(tiny_base)), folder)
    wider = files(make_gemma2(tmp_path / "wider", hidden_size=48))
    with pytest.raises(InputError, match="another base or shape"):
        models.load_adapter(models.load(wider, "float32"), folder)


@pytest.mark.parametrize("change", ["missing", "more"])
def test_an_adapter_with_other_tensors_is_refused(tiny_base: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "adapter"
    models.write_adapter(tiny.tuned(files(tiny_base)), folder)
    tensors = load_file(folder / models.WEIGHTS)
    name = next(iter(tensors))
    if change == "missing":
        del tensors[name]
    else:
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()
    save_file(tensors, folder / models.WEIGHTS)
    with pytest.raises(InputError, match="another base or shape"):
        models.load_adapter(models.load(files(tiny_base), "float32"), folder)


@pytest.mark.parametrize("name", [models.WEIGHTS, models.CONFIG])
def test_half_an_adapter_is_none(tiny_base: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    model = tiny.tuned(files(tiny_base))
    models.write_adapter(model, folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="no adapter here") as refusal:
        models.load_adapter(models.load(files(tiny_base), "float32"), folder)
    assert refusal.value.where == str(folder)
