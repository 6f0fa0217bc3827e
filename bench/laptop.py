"""The README's figures for one machine without a GPU, each beside what it is compared with.

python bench/laptop.py                  speed: training, generation, validate, start-up (5 minutes)
python bench/laptop.py validate         validate on a million rows alone (20 seconds)
python bench/laptop.py seeds            the demo's recipe with three seeds (25 minutes)

Machines are noisy: both sides of a comparison run in the same process, in turn, and the ratio is
what counts. The peer is transformers + PEFT as one would write it: rows padded to the longest of a
batch, logits of every position, PEFT's own adapter layers, `generate`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tuneship import base, generation, journal, model, prepare, prompt, recipe
from tuneship.data import heldout
from tuneship.data.packing import Tokens, pack, plan
from tuneship.kernels import cpu
from tuneship.loss import answer_loss
from tuneship.prompt import Prompt

warnings.simplefilter("ignore")
STEPS = 8
PROMPTS = 48


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each side's rate, the sides run in turn; the first round is a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            rate = side()
            if turn:
                rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def training(tiny: recipe.Recipe, folder: Path) -> dict[str, float]:
    """Tokens that are not padding, per second."""
    with journal.open_run(folder / "train", tiny) as run:
        prepare.prepare(run)
    tokens = Tokens.load(folder / "train" / "data" / "train.safetensors")
    files = base.resolve(tiny.model)

    ours = model.load(files, tiny.model.precision)
    model.add_lora(ours, tiny.lora, seed=0)
    ours.causal.train()
    optimizer = torch.optim.AdamW(model.trainable(ours).values(), fused=True)
    updates = iter(plan(tokens.lengths, tiny.train).updates * 9)

    def our_step() -> float:
        began, packed = time.perf_counter(), pack(tokens, next(updates)[0])
        (answer_loss(ours, packed) / len(packed.labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(packed.ids) / (time.perf_counter() - began)

    plain, plain_optimizer = _plain(files, tiny, ours)
    batches = _padded(tokens, len(plan(tokens.lengths, tiny.train).updates[0][0]))

    def plain_step() -> float:
        began, (ids, mask, labels) = time.perf_counter(), next(batches)
        plain(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        return int(mask.sum()) / (time.perf_counter() - began)

    return alternate({"tuneship": our_step, "transformers + PEFT": plain_step}, STEPS)


def _plain(files: base.BaseFiles, tiny: recipe.Recipe, ours: model.LoadedModel) -> tuple[Any, torch.optim.AdamW]:
    causal = AutoModelForCausalLM.from_pretrained(files.folder, dtype=ours.causal.dtype, attn_implementation="sdpa")
    assert ours.peft is not None
    config = ours.peft.peft_config["default"]
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        task_type="CAUSAL_LM",
    )
    plain = get_peft_model(causal, lora)
    return plain, torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad])


def _padded(tokens: Tokens, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of as many rows as our packs hold, padded to the longest."""
    order = list(range(len(tokens)))
    while True:
        for at in range(0, len(order) - size, size):
            rows = [
                torch.from_numpy(tokens.ids[tokens.bounds[r] : tokens.bounds[r + 1]]).long()
                for r in order[at : at + size]
            ]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            labels = ids.masked_fill(mask == 0, -100)
            for index, row in enumerate(order[at : at + size]):
                labels[index, : int(tokens.prompts[row])] = -100
            yield ids, mask, labels


def generating(tiny: recipe.Recipe, folder: Path) -> dict[str, float]:
    """New tokens per second over the same prompts, 48 tokens each."""
    files = base.resolve(tiny.model)
    rows = heldout.read(folder / "train" / "data" / "test.jsonl", PROMPTS)
    ours = model.load(files, tiny.model.precision)
    contract = Prompt(tiny.data.template, tiny.data.stop)
    prompts = prompt.encode(ours.tokenizer, [contract.render(row.fields) for row in rows], start=True)
    length = max(map(len, prompts)) + 48

    def our_rate() -> float:
        began = time.perf_counter()
        generator = generation.Generator(ours, slots=32, length=length)
        requests = [generation.Request(ids, 48, ignore_eos=True) for ids in prompts]
        count = sum(len(done.tokens) for _, done in generation.complete(generator, requests))
        return count / (time.perf_counter() - began)

    plain = AutoModelForCausalLM.from_pretrained(files.folder, dtype=ours.causal.dtype)
    ours.tokenizer.padding_side = "left"

    def plain_rate() -> float:
        began, count = time.perf_counter(), 0
        for at in range(0, len(prompts), 32):
            batch = ours.tokenizer.pad({"input_ids": prompts[at : at + 32]}, return_tensors="pt")
            out = plain.generate(**batch, max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=0)
            count += out[:, batch["input_ids"].shape[1] :].numel()
        return count / (time.perf_counter() - began)

    return alternate({"tuneship": our_rate, "transformers.generate": plain_rate}, 2)


# In a small process between: one that was started by this one would inherit its peak of memory.
MEASURED = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def validating(folder: Path) -> dict[str, float]:
    """`tuneship validate` on a million JSONL rows: seconds, those of the CPU, and megabytes at the peak."""
    file = folder / "million.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for index in range(1_000_000):
            row = {
                "question": f"How many attendees of event {index} are older than 30?",
                "context": "CREATE TABLE attendees (name VARCHAR, age INTEGER, event INTEGER)",
                "answer": f"SELECT COUNT(*) FROM attendees WHERE age > 30 AND event = {index}",
            }
            out.write(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "tuneship.cli", "validate", "tiny", "--json"]
    settings = ["--set", f"data.dataset_name={file}", "--set", "data.split_by=null"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, *settings], check=True, capture_output=True, text=True
    )
    return dict(zip(("seconds", "cpu_seconds", "megabytes"), map(float, done.stdout.split()), strict=True))


def starting() -> float:
    """Seconds of `tuneship --help`, the median of nine."""
    times = []
    for _ in range(9):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tuneship.cli", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def speed() -> None:
    """Prints the speed table."""
    tiny = recipe.load("tiny")
    cpu.keep_memory()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checked = validating(folder)
        help_seconds = starting()
        trained = training(tiny, folder)
        generated = generating(tiny, folder)
    print(f"\n{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for title, rates in (("training, tokens/s", trained), ("generation, new tokens/s", generated)):
        (ours, peer), (_, peer_name) = list(rates.values()), list(rates)
        print(f"{title:28} tuneship {ours:7.0f}   {peer_name} {peer:7.0f}   ratio {ours / peer:.2f}")
    print_validate(checked)
    print(f"{'tuneship --help':28} {help_seconds:.2f} s")


def print_validate(checked: dict[str, float]) -> None:
    """Prints the line of `validate`."""
    seconds = f"{checked['seconds']:.1f} s ({checked['cpu_seconds']:.1f} s of CPU)"
    print(f"{'validate, 1,000,000 rows':28} {seconds}, {checked['megabytes']:.0f} MB at the peak")


def validate() -> None:
    """Prints what `validate` takes."""
    with tempfile.TemporaryDirectory() as scratch:
        print_validate(validating(Path(scratch)))


def seeds() -> None:
    """Prints the demo's evaluation with three seeds."""
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in (1, 2, 3):
            folder = Path(scratch) / f"seed-{seed}"
            began = time.perf_counter()
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "tuneship.cli",
                    "run",
                    "tiny",
                    "--run",
                    str(folder),
                    "--set",
                    f"train.seed={seed}",
                ],
                stdout=subprocess.DEVNULL,
                check=False,
            )
            scores = journal.read_json(folder / "evaluation.json")["scores"]
            metrics = journal.read_run(folder).metrics()
            seconds = sum(line["seconds"] for line in metrics)
            lines.append(
                {
                    "seed": seed,
                    **{score["name"]: score["score"] for score in scores},
                    "ended": scores[-1]["ended"],
                    "training_s": seconds,
                    "tokens_per_s": sum(line["tokens"] for line in metrics) / seconds,
                    "all_s": time.perf_counter() - began,
                }
            )
            print(lines[-1], flush=True)
    for key in list(lines[0])[1:]:
        print(f"{key:20} mean {statistics.mean(line[key] for line in lines):.3f}")


if __name__ == "__main__":
    {"seeds": seeds, "validate": validate, "speed": speed}[sys.argv[1] if len(sys.argv) > 1 else "speed"]()
