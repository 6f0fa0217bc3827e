"""The model that trains: Gemma 2 on our own layers against transformers' with PEFT.

python -m pytest tests/test_trainable.py -v
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tuneship import model as models
from tuneship import trainable
from tuneship.base import BaseFiles
from tuneship.data.packing import Tokens, pack
from tuneship.errors import InputError
from tuneship.kernels.frozen import Fp8
from tuneship.loss import answer_loss, held_out_loss
from tuneship.model import LoadedModel
from tuneship.recipe import Lora
from tuneship.trainable import HandModel

CPU = torch.device("cpu")
LORAS = {
    "all": Lora(r=4, lora_alpha=12),
    "q,v": Lora(r=4, lora_alpha=12, target_modules=("q_proj", "v_proj")),
    "some": Lora(r=2, lora_alpha=3, target_modules=("o_proj", "gate_proj"), layers_to_transform=(0, 2)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return tiny.make("gemma2", tmp_path_factory.mktemp("models") / "gemma2")


def by_hand(files: BaseFiles, lora: Lora, *, seed: int = 0) -> HandModel:
    return trainable.load_by_hand(files, "float32", lora, seed=seed, device=CPU)


def by_peft(files: BaseFiles, lora: Lora) -> LoadedModel:
    model = models.load(files, "float32", CPU)
    models.add_lora(model, lora, seed=0)
    model.causal.train()
    return model


def filled(model: LoadedModel) -> LoadedModel:
    """With an adapter that does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in models.trainable(model).values():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def some_rows() -> Tokens:
    return Tokens.build([(row[:-4].tolist(), row[-4:].tolist()) for row in tiny.rows((30, 6, 22, 41))])


def loss_and_gradients(model: LoadedModel) -> tuple[float, dict[str, Tensor]]:
    loss = answer_loss(model, pack(some_rows(), [2, 0, 3, 1]))
    parameters = models.trainable(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_the_same_names_loss_and_gradients(files: BaseFiles, lora: Lora) -> None:
    ours, theirs = filled(by_hand(files, lora)), filled(by_peft(files, lora))
    shapes = [{name: (p.shape, p.dtype) for name, p in models.trainable(m).items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])
    loss, gradients = loss_and_gradients(ours)
    expected_loss, expected = loss_and_gradients(theirs)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        assert tiny.distance(gradients[name], gradient) < 1e-5, name
    for held in (ours, theirs):
        held.causal.train()
    assert held_out_loss(ours, some_rows(), tokens_per_batch=64) == pytest.approx(
        held_out_loss(theirs, some_rows(), tokens_per_batch=64), rel=1e-6
    )


def test_nothing_of_the_base_trains(files: BaseFiles) -> None:
    model = by_hand(files, LORAS["q,v"])
    assert {p.device.type for p in models.trainable(model).values()} == {"cpu"}
    assert all(p.is_meta for p in model.causal.parameters() if not p.requires_grad)
    assert not any(t.requires_grad for t in (model.embedding, model.last_norm))


def test_weights_may_be_split_over_files(files: BaseFiles, tmp_path: Path) -> None:
    causal = AutoModelForCausalLM.from_pretrained(files.folder)
    causal.save_pretrained(tmp_path / "split", max_shard_size="40KB")
    for file in files.folder.glob("tokenizer*"):
        (tmp_path / "split" / file.name).write_bytes(file.read_bytes())
    split = BaseFiles("split", tmp_path / "split", "local")
    assert len(split.weight_files()) > 2
    ours, theirs = (loss_and_gradients(filled(by_hand(f, LORAS["all"]))) for f in (split, files))
    assert ours[0] == theirs[0]
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


def test_peft_reads_its_adapter(files: BaseFiles, tmp_path: Path) -> None:
    model = filled(by_hand(files, LORAS["some"]))
    models.write_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / models.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (2, 3, [0, 2])
    assert config["target_modules"] == ["gate_proj", "o_proj"]
    assert config["base_model_name_or_path"] == files.name

    theirs = filled(by_peft(files, LORAS["some"]))
    models.write_adapter(theirs, tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / name / models.WEIGHTS) for name in ("adapter", "theirs"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())

    base = AutoModelForCausalLM.from_pretrained(files.folder, attn_implementation="eager")
    with warnings.catch_warnings():
        # PEFT calls transformers by a name that is to go.
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    row = tiny.rows((25,))[0]
    with torch.no_grad():
        logits = peft(input_ids=row[None]).logits[0]
        states = model.states(row, torch.arange(25), trainable.Documents([0, 25]))
    assert tiny.distance(model.logits(states), logits) < 1e-5


def test_the_fresh_adapter_is_as_pefts(files: BaseFiles) -> None:
    """B is zero; A is uniform up to 1/√inputs, as nn.Linear's weights are."""
    lora = Lora(r=16, lora_alpha=16)
    ours, theirs = models.trainable(by_hand(files, lora)), models.trainable(by_peft(files, lora))
    for name, parameter in ours.items():
        values, expected = parameter.detach(), theirs[name].detach()
        if ".lora_B." in name:
            assert not values.any() and not expected.any()
            continue
        edge = 1 / math.sqrt(values.shape[1])
        assert float(expected.abs().max()) <= edge
        assert 0.97 * edge < float(values.abs().max()) <= edge
        # The spread of a uniform distribution.
        assert float(values.std()) == pytest.approx(edge / math.sqrt(3), rel=0.1)
        assert float(expected.std()) == pytest.approx(edge / math.sqrt(3), rel=0.1)


def test_the_fresh_adapter_depends_on_the_seed_alone(files: BaseFiles) -> None:
    first, again, other = (models.trainable(by_hand(files, LORAS["all"], seed=seed)) for seed in (3, 3, 4))
    matrices = [name for name in first if ".lora_A." in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    # No two of one shape alike.
    assert len({first[name].detach().numpy().tobytes() for name in matrices}) == len(matrices)


def test_a_cpu_trains_transformers_model(files: BaseFiles) -> None:
    model = trainable.load(files, "float32", LORAS["q,v"], seed=0, tokens=64, longest=32, device=CPU)
    assert not isinstance(model, HandModel)
    assert (model.tokens_per_pass, model.planned_bytes) == (None, None)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_a_cpu_has_no_small_weights(files: BaseFiles, precision: str) -> None:
    with pytest.raises(InputError, match=f"{precision} needs a CUDA GPU"):
        trainable.load(files, precision, LORAS["q,v"], seed=0, tokens=64, longest=32, device=CPU)


def test_the_precision_is_that_of_every_product(files: BaseFiles) -> None:
    model = trainable.load_by_hand(files, "fp8", LORAS["q,v"], seed=0, device=CPU)
    assert all(isinstance(product, Fp8) for layer in model.layers for product in layer.products.values())


# --- cards that lack a precision --------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "capability", "said", "fix"),
    [
        ("fp8", (8, 0), "the Old Card has no fp8 arithmetic (compute capability 8.0, 8.9 is needed)", "bfloat16"),
        ("fp8", (7, 5), "the Old Card has no fp8 arithmetic (compute capability 7.5, 8.9 is needed)", "newer card"),
        ("bfloat16", (7, 5), "the Old Card has no bfloat16 arithmetic (compute capability 7.5", "newer card"),
        ("nf4", (7, 5), "the Old Card has no bfloat16 arithmetic (compute capability 7.5", "newer card"),
    ],
)
def test_an_old_card_is_refused_before_weights_are_read(
    files: BaseFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    capability: tuple[int, int],
    said: str,
    fix: str,
) -> None:
    """There is no card here; what the driver would say of one is put in its place."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((files.folder / "config.json").read_bytes())
    with pytest.raises(InputError) as refusal:
        trainable.load(
            BaseFiles("bare", bare, "local"),
            precision,
            LORAS["q,v"],
            seed=0,
            tokens=64,
            longest=32,
            device=torch.device("cuda"),
        )
    assert said in refusal.value.what
    assert refusal.value.where == "model.precision"
    assert fix in refusal.value.fix


def test_a_card_that_is_too_small_is_refused_before_weights_are_read(
    files: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Small Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((files.folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="the card is too small"):
        trainable.load(
            BaseFiles("bare", bare, "local"),
            "bfloat16",
            LORAS["q,v"],
            seed=0,
            tokens=64,
            longest=32,
            device=torch.device("cuda"),
        )
