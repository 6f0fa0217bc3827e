"""export: the adapter merged into the base, as bfloat16 safetensors, with a proof that it is the same model.

Merging streams: one shard of the base at a time, each target W + (alpha / r)·B·A in float32, then
rounded once to bfloat16. A model of 9 billion parameters needs the memory of one shard.

The proof (merged/proof.json) runs base + adapter and the merged model on held-out prompts and
compares what they would say next at every position of the tuned model's own greedy answers: the
divergence (Kullback-Leibler, in nats) of the merged model's distribution from the tuned one's, as
quantised models are compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuneship import base, prompt
from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.console import progress, say
from tuneship.damage import guarded, read_json, remake
from tuneship.data import heldout
from tuneship.errors import InputError, OutsideError, TuneshipError
from tuneship.generation import Generator, Request, complete
from tuneship.journal import PROVENANCE, Run, put_in_place, write_json
from tuneship.kernels.attention import Documents
from tuneship.prompt import Prompt

PROOF_PROMPTS = 20
PROOF_TOKENS = 48
# Nats, the mean over positions. Rounding the weights to bfloat16 (8 bits of mantissa) costs 0.001 to 0.002 on
# SmolLM2 with adapters of 4 to 160 updates; an adapter merged at 1.3 of its scale 0.02, one left out 1.
TOLERANCE = 0.005


def export(run: Run) -> dict[str, Any]:
    """Writes the run's merged/ folder and proves it; returns the proof.

    Raises:
        InputError: there is no adapter, or the base is not the one that it was trained on.
        OutsideError: the disk is too small.
        TuneshipError: the merged model says something else.
    """
    if not (run.adapter / models.WEIGHTS).exists():
        raise InputError("the run has no adapter yet", where=str(run.path), fix="tuneship train RECIPE")
    if (run.merged / "proof.json").exists():
        say(f"already exported: {run.merged}")
        base.check_weights(run.merged, fix=remake(run.merged / PROVENANCE))
        proof: dict[str, Any] = read_json(run.merged / "proof.json")
        return proof
    base.check_weights(run.adapter, fix=remake(run.adapter / PROVENANCE))
    files = base.resolve(run.recipe.model)
    files.expect(run.trained_on(), "the adapter was trained")
    _check_room(run.path, files)
    partial = run.path / ".merged.partial"
    shutil.rmtree(partial, ignore_errors=True)
    merge(files, run.adapter, partial)
    proof = _prove(run, files, partial)
    write_json(partial / "proof.json", proof)
    put_in_place(partial, run.merged)
    say(
        f"merged model in {run.merged}: the same on {proof['prompts']} prompts "
        f"(divergence {proof['divergence']:.2g} nats, another choice at {proof['positions'] - proof['same']} "
        f"of {proof['positions']} positions)"
    )
    return proof


def merge(files: BaseFiles, adapter: Path, target: Path) -> None:
    """Writes base + adapter as one model into a folder.

    Raises:
        InputError: the adapter has a target that the base has not.
    """
    target.mkdir(parents=True)
    with guarded(adapter / models.CONFIG):
        config = read_json(adapter / models.CONFIG)
        scale = config["lora_alpha"] / config["r"]
    weights = load_file(adapter / models.WEIGHTS)
    pairs = {_base_name(n): (t, weights[n.replace("lora_A", "lora_B")]) for n, t in weights.items() if "lora_A" in n}
    merged = size = 0
    shards = files.weight_files()
    with progress("shards merged", len(shards)) as shown:
        for shard in shards:
            tensors: dict[str, Tensor] = {}
            with safe_open(shard, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118 - not a dict
                    tensor = source.get_tensor(name)
                    if name in pairs:
                        a, b = pairs[name]
                        tensor = tensor.float() + scale * (b.float() @ a.float())
                        merged += 1
                    tensors[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            save_file(tensors, target / shard.name, metadata={"format": "pt"})
            size += sum(tensor.nbytes for tensor in tensors.values())
            shown.advance()
    if merged != len(pairs):
        raise InputError(f"{len(pairs) - merged} of the adapter's targets are not in the base", where=str(files.folder))
    _write_index(files, target, size)
    _copy_rest(files, adapter, target)


def _base_name(name: str) -> str:
    """The base's weight that an adapter's lora_A belongs to."""
    return name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")


def _write_index(files: BaseFiles, target: Path, size: int) -> None:
    index = files.folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {"total_size": size}
        (target / index.name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _copy_rest(files: BaseFiles, adapter: Path, target: Path) -> None:
    config = {**files.config, "dtype": "bfloat16"}
    config.pop("torch_dtype", None)
    write_json(target / "config.json", config)
    for source in (files.folder, adapter):
        for file in source.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "generation_config")):
                shutil.copyfile(file, target / file.name)
    for name in (prompt.FILE, PROVENANCE):
        shutil.copyfile(adapter / name, target / name)


def _check_room(folder: Path, files: BaseFiles) -> None:
    needed = sum(file.stat().st_size for file in files.weight_files())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutsideError(
            f"the merged model needs up to {needed} bytes, {free} are free", where=str(folder), fix="free some room"
        )


def _prove(run: Run, files: BaseFiles, merged: Path) -> dict[str, Any]:
    """Compares base + adapter with the merged model on the tuned model's own greedy answers."""
    contract = prompt.read(run.adapter)
    tuned = models.load(files, run.recipe.model.precision)
    models.load_adapter(tuned, run.adapter)
    prompts = _prompts(run, contract, tuned)
    length = max(map(len, prompts)) + PROOF_TOKENS
    generator = Generator(tuned, slots=len(prompts), length=length)
    answers = dict(complete(generator, [Request(ids, PROOF_TOKENS) for ids in prompts]))
    texts = [ids + answers[index].tokens for index, ids in enumerate(prompts)]
    starts = [len(ids) for ids in prompts]

    expected = _logits(tuned, texts, starts)
    del tuned, generator
    actual = _logits(models.load(BaseFiles(str(merged), merged, "local"), run.recipe.model.precision), texts, starts)

    wanted = expected.log_softmax(-1)
    divergence = float((wanted.exp() * (wanted - actual.log_softmax(-1))).sum(-1).mean())
    proof = {
        "prompts": len(prompts),
        "positions": len(expected),
        "same": int((expected.argmax(-1) == actual.argmax(-1)).sum()),
        "divergence": divergence,
        "tolerance": TOLERANCE,
    }
    # A divergence that is no number is no proof.
    if not divergence <= TOLERANCE:
        raise TuneshipError(
            f"the merged model says something else: its divergence from the tuned one is {divergence:.3g} nats "
            f"(rounding costs at most {TOLERANCE})",
            where=str(merged),
            fix="publish and serve the adapter instead (publish.merged: false)",
        )
    return proof


def _prompts(run: Run, contract: Prompt, model: models.LoadedModel) -> list[list[int]]:
    rows = heldout.read(run.data / "test.jsonl", PROOF_PROMPTS) or heldout.read(
        run.data / "examples.jsonl", PROOF_PROMPTS
    )
    return prompt.encode(model.tokenizer, [contract.render(row.fields) for row in rows], start=True)


@torch.inference_mode()
def _logits(model: models.LoadedModel, texts: list[list[int]], starts: list[int]) -> Tensor:
    """(positions, vocabulary): the logits at every token of every answer."""
    bounds = [0]
    for ids in texts:
        bounds.append(bounds[-1] + len(ids))
    flat = torch.tensor([token for ids in texts for token in ids], device=model.device)
    positions = torch.cat([torch.arange(len(ids)) for ids in texts]).to(model.device)
    states = model.states(flat, positions, Documents(bounds))
    answered = [
        index
        for at, ids, start in zip(bounds, texts, starts, strict=False)
        for index in range(at + start - 1, at + len(ids))
    ]
    return model.logits(states[torch.tensor(answered, device=states.device)]).float().cpu()
