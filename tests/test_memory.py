"""What a step needs of a card: the counts against real models, and what is chosen.

python -m pytest tests/test_memory.py -v
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config
from zygote import Commands, Finished

from tuneship import journal, memory, trainable
from tuneship import model as models
from tuneship import recipe as recipes
from tuneship.base import BaseFiles
from tuneship.errors import InputError
from tuneship.kernels.gemma2 import Keep
from tuneship.memory import Needs
from tuneship.prepare import prepare
from tuneship.recipe import Lora, Recipe
from tuneship.train import train

MakeRecipe = Callable[..., Recipe]
GB = 10**9
# Gemma-2-9B's config.json; Gemma2Config's own defaults are a 2B's.
NINE_B: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
}
QV = Lora(r=8, target_modules=("q_proj", "v_proj"))
ALL = Lora(r=8)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def parameters(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Gemma2Config(**config)).num_parameters()


# --- what is counted --------------------------------------------------------------------------


def test_weights_are_those_of_the_model(tiny_base: Path) -> None:
    tiny = config_of(tiny_base)
    assert Needs.of(tiny, QV, "bfloat16").weights == 2 * parameters(tiny)
    assert Needs.of(tiny, QV, "float32").weights == 4 * parameters(tiny)
    nine = parameters(NINE_B)
    assert nine == pytest.approx(9.24e9, rel=1e-3)
    assert Needs.of(NINE_B, QV, "bfloat16").weights == 2 * nine
    embedding = 256000 * 3584
    linears = nine - embedding
    # fp8 holds a linear twice, nf4 in half a byte and a scale for each block of 64.
    assert Needs.of(NINE_B, QV, "fp8").weights == pytest.approx(2 * nine, rel=2e-3)
    assert Needs.of(NINE_B, QV, "nf4").weights == pytest.approx(2 * embedding + 0.516 * linears, rel=2e-3)


def test_our_own_layers_hold_so_much(tiny_base: Path) -> None:
    files = BaseFiles("base", tiny_base, "local")
    model = trainable.load_by_hand(files, "float32", QV, seed=0, device=torch.device("cpu"))
    held = [model.embedding, model.last_norm, *(norm for layer in model.layers for norm in layer.norms.values())]
    held += [product.weight for layer in model.layers for product in layer.products.values()]  # type: ignore[attr-defined]
    assert Needs.of(config_of(tiny_base), QV, "float32").weights == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(
    "lora",
    [QV, ALL, Lora(r=3, layers_to_transform=(0, 2)), Lora(r=2, target_modules=("o_proj", "down_proj"))],
    ids=["q,v", "all", "two layers", "o,down"],
)
def test_the_adapter_is_as_peft_makes_it(tiny_base: Path, lora: Lora) -> None:
    files = BaseFiles("base", tiny_base, "local")
    model = models.load(files, "float32")
    models.add_lora(model, lora, seed=0)
    made = models.trainable(model)
    needs = Needs.of(config_of(tiny_base), lora, "bfloat16")
    assert needs.adapter_weights == sum(p.numel() for p in made.values())
    assert needs.adapters == len({name.split(".lora_")[0].rpartition(".")[2] for name in made})
    # The weight, its gradient and AdamW's two moments, all float32.
    assert needs.memory(64, "all").adapter == 4 * 4 * needs.adapter_weights


@pytest.mark.parametrize("keep", get_args(Keep))
@pytest.mark.parametrize("lora", [QV, ALL, Lora(r=8, lora_dropout=0.1)], ids=["q,v", "all", "dropout"])
def test_what_is_kept_is_what_a_pass_keeps(tiny_base: Path, lora: Lora, keep: Any) -> None:
    """Every byte that the layers hold on to between the way forward and the way back."""
    files = BaseFiles("base", tiny_base, "local")
    model = trainable.load_by_hand(files, "float32", lora, seed=0, device=torch.device("cpu"), keep=keep)
    model.causal.train()
    tokens = 128
    ids, positions = torch.full((tokens,), 5), torch.arange(tokens)
    own = {p.data_ptr() for p in models.trainable(model).values()} | {model.last_norm.data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = model.states(ids, positions, trainable.Documents([0, tokens]))
    masks: dict[int, int] = {}
    node = states.grad_fn
    while node is not None:
        for of in getattr(node, "masks", {}).values():
            masks |= {mask.data_ptr(): mask.nbytes for mask in of.values()}
        node = next((parent for parent, _ in node.next_functions if type(parent).__name__ == "_LayerBackward"), None)
    expected = Needs.of(config_of(tiny_base), lora, "float32").memory(tokens, keep).kept
    # Beyond the layers: the input and the scale of the last norm.
    last = tokens * (32 + 1) * 4
    assert sum(kept.values()) + sum(masks.values()) - last == pytest.approx(expected, rel=0.02)
    assert bool(masks) == bool(lora.lora_dropout)


# --- what is chosen ---------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [QV, ALL, Lora(r=64, lora_dropout=0.1)], ids=["q,v", "all", "r=64, dropout"])
@pytest.mark.parametrize("precision", ["bfloat16", "fp8", "nf4"])
def test_less_is_kept_as_the_card_shrinks(precision: str, lora: Lora) -> None:
    needs = Needs.of(NINE_B, lora, precision)
    longest, order = 1000, {keep: at for at, keep in enumerate(get_args(Keep))}
    chosen = []
    for free in range(160 * GB, 4 * GB, -GB // 2):
        try:
            fit = memory.fit(needs, tokens=16384, longest=longest, free=free)
        except InputError:
            continue
        assert fit.memory == needs.memory(fit.tokens, fit.keep)
        assert fit.memory.total <= 0.95 * free
        assert longest <= fit.tokens <= 16384
        chosen.append(fit)
    assert (chosen[0].keep, chosen[0].tokens) == ("all", 16384)
    # While passes stay long, a layer keeps less and less; then they become short, and again.
    long = [fit for fit in chosen if fit.tokens >= 4096]
    assert [order[fit.keep] for fit in long] == sorted(order[fit.keep] for fit in long)
    assert {fit.keep for fit in long} == set(order)
    # A pass is not cut for what costs little to make again.
    assert all(fit.tokens == 16384 for fit in chosen if fit.keep == "all")
    for before, after in itertools.pairwise(chosen):
        assert after.keep != before.keep or after.tokens <= before.tokens


def test_a_pass_holds_the_longest_row_or_nothing_fits() -> None:
    needs = Needs.of(NINE_B, ALL, "bfloat16")
    least = int(needs.memory(8000, "input").total / 0.95)
    assert memory.fit(needs, tokens=8192, longest=8000, free=least + 2**20).tokens >= 8000
    with pytest.raises(InputError, match="the card is too small"):
        memory.fit(needs, tokens=8192, longest=8000, free=least - 2**20)


def test_short_updates_need_no_long_pass() -> None:
    needs = Needs.of(NINE_B, QV, "bfloat16")
    fit = memory.fit(needs, tokens=200, longest=120, free=80 * GB)
    assert (fit.tokens, fit.keep) == (200, "all")


def test_what_would_fit_is_said() -> None:
    with pytest.raises(InputError) as refusal:
        memory.fit(Needs.of(NINE_B, ALL, "bfloat16"), tokens=8192, longest=512, free=16 * GB)
    assert "in bfloat16, 16.0 GB are free" in refusal.value.what
    assert refusal.value.where == "model.precision"
    needed = Needs.of(NINE_B, ALL, "nf4").memory(512, "input").total / GB
    assert refusal.value.fix == f"set model.precision: nf4 (needs {needed:.1f} GB), or take a larger card"

    with pytest.raises(InputError) as refusal:
        memory.fit(Needs.of(NINE_B, ALL, "nf4"), tokens=8192, longest=512, free=4 * GB)
    assert refusal.value.fix == f"take a card of {needed / 0.95:.0f} GB or more"


# --- tuneship plan ----------------------------------------------------------------------------


@pytest.fixture
def planned(commands: Commands, tmp_path: Path) -> Callable[..., Finished]:
    """`tuneship plan` of a recipe for the 9B's shape, of which there is a config.json alone."""
    base = tmp_path / "nine-b"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(NINE_B))
    recipe = {
        "name": "nine",
        "model": {"model_name_or_path": str(base), "precision": "bfloat16"},
        "data": {"dataset_name": "rows.jsonl"},
        "train": {"packing": True, "tokens_per_batch": 8192, "max_length": 512},
        "cluster": {"accelerator": "nvidia-h100-80gb"},
    }

    def run(*argv: str, **sections: Any) -> Finished:
        # JSON is YAML.
        (tmp_path / "nine.yaml").write_text(json.dumps(recipe | sections))
        return commands.run(["plan", "nine.yaml", *argv], cwd=tmp_path)

    return run


def test_plan_says_what_training_takes(planned: Callable[..., Finished]) -> None:
    said = planned()
    assert said.code == 0, said.err
    assert "weights" in said.out and "18.5 GB" in said.out
    assert "of 86 GB on nvidia-h100-80gb, in bfloat16" in said.out
    assert "a pass holds 8,192 tokens" in said.out


def test_plan_as_json(planned: Callable[..., Finished]) -> None:
    said = planned("--json", "--card-gb", "40")
    assert said.code == 0, said.err
    plan = json.loads(said.out)
    parts = [plan[f"{part}_bytes"] for part in ("weights", "adapter", "kept", "working")]
    assert plan["peak_bytes"] == sum(parts) <= plan["card_bytes"] == 40 * GB
    needs = Needs.of(NINE_B, Lora(), "bfloat16")
    assert plan["adapter_weights"] == needs.adapter_weights
    assert plan["peak_bytes"] == needs.memory(plan["tokens_per_pass"], plan["keep"]).total
    roomier = json.loads(planned("--json", "--card-gb", "200").out)
    assert roomier["keep"] == "all" and roomier["tokens_per_pass"] >= plan["tokens_per_pass"]


def test_plan_refuses(planned: Callable[..., Finished]) -> None:
    small = planned("--card-gb", "16")
    assert small.code == 2
    assert "the card is too small" in small.err and "model.precision: nf4" in small.err
    unknown = planned(cluster={"accelerator": "nvidia-tesla-p4"})
    assert unknown.code == 2
    assert "no card known by that name" in unknown.err and "--card-gb" in unknown.err


def test_plan_counts_the_disk_of_a_pod(planned: Callable[..., Finished]) -> None:
    # The Hub's google/gemma-2-9b is float32: 37 GB.
    pod = {"accelerator": "nvidia-h100-80gb", "image": "tuneship:1", "disk_mb": 50_000}
    adapter = planned("--json", cluster=pod)
    assert adapter.code == 0, adapter.err
    disk = json.loads(adapter.out)["disk_bytes"]
    assert 4 * parameters(NINE_B) < disk < 50 * GB
    merged = planned(cluster=pod, publish={"folder": "out", "merged": True})
    assert merged.code == 2
    assert "the training pod's disk is too small: 60 GB are needed" in merged.err
    assert re.search(r"set cluster.disk_mb: 6\d{4}$", merged.err, re.M)


def test_plan_counts_the_memory_of_a_pod(planned: Callable[..., Finished], tmp_path: Path) -> None:
    pod = {"accelerator": "nvidia-h100-80gb", "image": "tuneship:1", "disk_mb": 80_000, "memory_mb": 32_768}
    merged = {"folder": "out", "merged": True}
    adapter = planned("--json", cluster=pod)
    assert adapter.code == 0, adapter.err
    assert json.loads(adapter.out)["memory_bytes"] == pytest.approx(2 * parameters(NINE_B) + 4 * GB)
    one_file = planned(cluster=pod, publish=merged)
    assert one_file.code == 2
    assert "the training pod's memory is too small: 42 GB are needed" in one_file.err
    assert re.search(r"set cluster.memory_mb: 41\d{3}$", one_file.err, re.M)
    files = {f"weight{n}": f"model-{n}-of-8.safetensors" for n in range(8)}
    (tmp_path / "nine-b" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    eight = planned(cluster=pod, publish=merged)
    assert eight.code == 0 and "a pod's memory: 28 GB of the 33 it asks for" in eight.out


def test_what_is_loaded_in_its_own_type_stays_in_its_file() -> None:
    def bytes_of(config: dict[str, Any], *overrides: str) -> int:
        recipe = recipes.load("gemma2-9b-h100", overrides=overrides)
        needed: int = memory.plan(recipe, config, card=200 * GB)["memory_bytes"]
        return needed

    half = {**NINE_B, "dtype": "bfloat16"}
    assert bytes_of(half) == 4 * GB
    assert bytes_of(half, "model.precision=float32") == 4 * GB + 4 * parameters(NINE_B)
    assert bytes_of(half, "train.num_processes=2") == 12 * GB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' own count of a process's memory")
@pytest.mark.parametrize(("stored", "held"), [("float32", 2), ("bfloat16", 0)])
def test_loading_holds_what_is_counted(tmp_path: Path, stored: str, held: int) -> None:
    shape = {"vocab_size": 20000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2}
    made = AutoModelForCausalLM.from_config(Gemma2Config(**NINE_B | shape), dtype=getattr(torch, stored))
    made.save_pretrained(tmp_path)
    program = """
import re, sys
from pathlib import Path
from tuneship import base, model as models
from tuneship.base import BaseFiles
base.load_tokenizer = lambda files: None
def own() -> int:
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = own()
model = models.load(BaseFiles("base", Path(sys.argv[1]), "local"), "bfloat16")
print(own() - before)
"""
    grown = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(grown.stdout) == pytest.approx(held * made.num_parameters(), abs=0.3 * made.num_parameters())


@pytest.mark.parametrize("name", ["gemma2-9b-a100", "gemma2-9b-h100", "gemma2-9b-l4"])
def test_the_shipped_recipes_fit_their_cards_and_pods(name: str) -> None:
    recipe = recipes.load(name, overrides=["cluster.image=tuneship:1"])
    planned = memory.plan(recipe, NINE_B, card=memory.CARDS[recipe.cluster.accelerator])
    assert planned["disk_bytes"] <= recipe.cluster.disk_mb * 10**6
    assert planned["memory_bytes"] <= recipe.cluster.memory_mb * 10**6


def test_plan_is_for_gemma_2(planned: Callable[..., Finished], tmp_path: Path) -> None:
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**NINE_B, "model_type": "llama"}))
    said = planned(model={"model_name_or_path": str(other)})
    assert said.code == 2
    assert "what a llama needs is not known" in said.err and "max_steps=3" in said.err


# --- passes as short as the card wants them ---------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_shorter_passes_learn_the_same(
    packing: bool, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 3, "packing": packing, "tokens_per_batch": 512, "max_length": 128}
    recipe = make_recipe(train=settings)
    passes: dict[str, list[int]] = {}
    logs = {}
    loaded, theirs = trainable.load, models.LoadedModel.states
    for name, most in (("whole", None), ("cut", 130)):
        lengths = passes.setdefault(name, [])

        def load(*args: Any, most: int | None = most, **rest: Any) -> models.LoadedModel:
            model = loaded(*args, **rest)
            model.tokens_per_pass = most
            return model

        def states(self: Any, ids: Any, *rest: Any, lengths: list[int] = lengths) -> Any:
            lengths.append(len(ids))
            return theirs(self, ids, *rest)

        monkeypatch.setattr(trainable, "load", load)
        monkeypatch.setattr(models.LoadedModel, "states", states)
        with journal.open_run(tmp_path / name, recipe) as run:
            prepare(run)
            train(run)
            logs[name] = run.metrics()
    assert len(passes["cut"]) > len(passes["whole"]) >= 3
    assert max(passes["whole"]) > 130 >= max(passes["cut"])
    assert sum(passes["whole"]) == sum(passes["cut"])
    for whole, cut in zip(logs["whole"], logs["cut"], strict=True):
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        assert cut["tokens"] == whole["tokens"]
    assert logs["whole"][0]["loss"] != logs["whole"][-1]["loss"]
