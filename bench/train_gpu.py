"""LoRA steps of Gemma-2-9B on one GPU, ours beside TRL's: one table, docs/performance.md.

    python bench/train_gpu.py --tokenizer DIR --out build/train_gpu        everything (about 12 minutes on an H100)
    python bench/train_gpu.py --only "ours bfloat16 q,v" "TRL at its best"

The weights are random (speed does not depend on them), made once into --base: 18.5 GB. Rows are
drawn around 92 tokens, half of each an answer; every line trains on the same rows with the same
LoRA (r=8), soft-capped attention and head. Each line is a process of its own.

tokens/s counts real tokens, from the fourth update on. 4N is LoRA's arithmetic: forward, and the
gradient of each layer's input; its limit is the rate of an 8192³ product on the card at hand. TRL's
tutorial line needs bitsandbytes for 4 bits; without it, it runs in bfloat16, which is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

QV = ("q_proj", "v_proj")
ALL = (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARAMETERS = 9.24e9
CONFIG: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
LINES = [
    "rate",
    *(f"ours {precision} {targets}" for precision in ("bfloat16", "fp8", "nf4") for targets in ("q,v", "all")),
    "ours bfloat16 two rows an update",
    "ours fp8 two rows an update",
    "ours bfloat16 the tutorial's job",
    "ours fp8 recipes/gemma2-9b-h100.yaml",
    "ours bfloat16 one GPU, two packs an update",
    "ours bfloat16 two GPUs, two packs an update",
    "profile bfloat16",
    "profile fp8",
    "profile bfloat16 all",
    "profile fp8 all",
    "profile two rows an update",
    "TRL, the tutorial's recipe",
    "TRL at its best",
]


def draw_rows(count: int) -> list[list[int]]:
    """Token ids of rows around 92 tokens."""
    chance = random.Random(1)
    lengths = [max(40, min(400, int(chance.lognormvariate(math.log(92), 0.35)))) for _ in range(count)]
    return [[chance.randrange(10, 40000) for _ in range(length)] for length in lengths]


def make_base(folder: Path, tokenizer: Path) -> None:
    """Random weights in bfloat16, in files of 4 GB."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config

    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    with torch.device("cuda"):
        causal = AutoModelForCausalLM.from_config(Gemma2Config(**CONFIG), dtype=torch.bfloat16)
    causal.save_pretrained(folder, max_shard_size="4GB")
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens")):
            shutil.copyfile(file, folder / file.name)


def recipe_of(base: Path, **sections: Any) -> Any:
    """A recipe of the 9B base, with sections changed."""
    from tuneship import recipe

    tree: dict[str, Any] = {
        "name": "bench",
        "model": {"model_name_or_path": str(base), "precision": "bfloat16"},
        "data": {"dataset_name": "builtin:text-to-sql", "split_by": "domain"},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": list(QV)},
        "train": {
            "packing": True,
            "tokens_per_batch": 8192,
            "max_length": 512,
            "max_steps": 14,
            "learning_rate": 2e-4,
            "save_steps": 1000,
        },
    }
    for name, changes in sections.items():
        tree[name] = {**tree[name], **changes}
    return recipe.validate(tree, where="bench")


def ours(
    base: Path, folder: Path, precision: str, targets: str, *, small: bool = False, gpus: int | None = None
) -> dict[str, Any]:
    """Our training function on prepared rows; with `gpus`, two packs an update."""
    import psutil

    from tuneship import journal
    from tuneship.base import BaseFiles
    from tuneship.data.packing import Tokens
    from tuneship.train import train

    began = psutil.Process().create_time()
    changes: dict[str, Any] = {}
    if small:
        changes = {
            "packing": False,
            "per_device_train_batch_size": 2,
            "tokens_per_batch": 1024,
            "max_steps": 250,
            "logging_steps": 100,
        }
    if gpus is not None:
        changes = {"gradient_accumulation_steps": 2, "num_processes": gpus}
    recipe = recipe_of(
        base,
        model={"precision": precision},
        lora={"target_modules": list(QV if targets == "q,v" else ALL)},
        train=changes,
    )
    tokens = Tokens.build([(row[: len(row) // 2], row[len(row) // 2 :]) for row in draw_rows(2000)])
    first: list[float] = []

    def watch(file: Path) -> None:
        while not (file.exists() and file.stat().st_size):
            time.sleep(0.02)
        first.append(time.time() - began)

    with journal.open_run(folder, recipe, fresh=True) as run:
        tokens.save(run.data / "train.safetensors")
        files = BaseFiles(str(base), base, "local")
        facts = {"name": files.name, "revision": "local", "fingerprint": files.fingerprint()}
        prepared = {"base": facts, "source": {}, "train_sha256": "", "splits": {}}
        journal.write_json(run.data / "prepared.json", prepared)
        threading.Thread(target=watch, args=(run.metrics_file,), daemon=True).start()
        train(run)
        # The first updates compile kernels and capture graphs; the last writes the checkpoint's tensors.
        warm = 60 if small else 3
        lines = run.metrics()[warm:-1]
        provenance = run.provenance()
    seconds = sum(line["seconds"] for line in lines)
    return {
        "tokens_per_second": sum(line["tokens"] for line in lines) / seconds,
        "milliseconds": 1000 * seconds / len(lines),
        "peak_gb": provenance["peak_memory_bytes"] / 1e9,
        "planned_gb": provenance["planned_memory_bytes"] / 1e9,
        "first_step_s": first[0],
        "adapter_s": time.time() - began,
        "losses": [round(line["loss"], 4) for line in lines[:8]],
    }


def profile(base: Path, file: Path, precision: str, targets: tuple[str, ...], *, small: bool) -> dict[str, Any]:
    """The kernels of one update, by time, into a file."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from tuneship import replay, trainable
    from tuneship.base import BaseFiles
    from tuneship.data.packing import Tokens, pack, plan
    from tuneship.loss import answer_loss

    recipe = recipe_of(base, lora={"target_modules": list(targets)})
    tokens = Tokens.build([(row[: len(row) // 2], row[len(row) // 2 :]) for row in draw_rows(2000)])
    files = BaseFiles(str(base), base, "local")
    model = trainable.load(files, precision, recipe.lora, seed=0, tokens=8192, longest=512)
    model.causal.train()
    rows = (0, 1) if small else plan(tokens.lengths, recipe.train).updates[0][0]
    packed = pack(tokens, rows)
    captured = replay.Replay(model) if small else None

    def update() -> None:
        if captured is not None:
            captured.backward(packed, 1.0)
        else:
            answer_loss(model, packed).backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()

    for _ in range(3):
        update()
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        update()
    kernels = sorted(
        ((event.self_device_time_total / 1000, event.count, event.key) for event in seen.key_averages()), reverse=True
    )
    total = sum(time for time, _, _ in kernels)
    lines = [
        f"{len(packed.ids)} tokens, {total:.1f} ms of kernels",
        *(f"{t:8.2f} ms {n:5} {k[:110]}" for t, n, k in kernels[:40]),
    ]
    file.write_text("\n".join(lines) + "\n")
    return {"kernels_ms": total, "tokens": len(packed.ids), "launches": sum(count for _, count, _ in kernels)}


def job(base: Path, folder: Path, recipe: Path | None) -> dict[str, Any]:
    """By our command line, from rows of text, start to saved adapter: a recipe, or the tutorial's job.

    Either has as many rows as the tutorial: about 97,000 tokens, of the built-in set.
    """
    from tuneship import journal
    from tuneship import recipe as recipes

    changes: list[str] = []
    if recipe is None:
        recipe = folder.with_suffix(".yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        train = {"max_steps": None, "num_train_epochs": 1, "tokens_per_batch": 4096}
        recipe.write_text(recipes.dump(recipe_of(base, data={"dataset_limit": 1140}, train=train)))
    else:
        for change in (f"model.model_name_or_path={base}", "data.dataset_name=builtin:text-to-sql"):
            changes += ["--set", change]
        changes += ["--set", "data.dataset_limit=1140"]
    began = time.time()
    command = [sys.executable, "-m", "tuneship", "train", str(recipe), "--run", str(folder), "--fresh", *changes]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    seconds = time.time() - began
    lines = journal.read_run(folder).metrics()
    check_with_peft(base, folder / "adapter")
    tokens = sum(line["tokens"] for line in lines)
    return {"adapter_s": seconds, "tokens": tokens, "training_s": sum(line["seconds"] for line in lines)}


def check_with_peft(base: Path, adapter: Path) -> None:
    """PEFT makes of adapter_config.json an adapter that has just the tensors of adapter_model.safetensors."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model = get_peft_model(causal, PeftConfig.from_pretrained(str(adapter)))
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    written = {name: tensor.shape for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    assert expected == written, set(expected.items()) ^ set(written.items())


def trl(base: Path, folder: Path, *, best: bool) -> dict[str, Any]:
    """TRL's SFTTrainer: the tutorial's settings, or every option right."""
    import importlib.util

    import psutil

    began = psutil.Process().create_time()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = draw_rows(1000 if best else 120)
    masks = [[int(at >= len(row) // 2) for at in range(len(row))] for row in rows]
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": masks})
    four_bits = not best and importlib.util.find_spec("bitsandbytes") is not None
    loading: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    if best:
        loading["attn_implementation"] = "flex_attention"
        changes: dict[str, Any] = {
            "per_device_train_batch_size": 1,
            "packing": True,
            "packing_strategy": "bfd",
            "max_length": 8192,
            "pad_to_multiple_of": 8192,
            "use_liger_kernel": True,
            "gradient_checkpointing": False,
        }
    else:
        if four_bits:
            loading["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_length": 512}
        changes |= {"gradient_checkpointing": True}
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        learning_rate=2e-4,
        bf16=True,
        completion_only_loss=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        model_init_kwargs=loading,
        **changes,
    )
    marks: list[tuple[int, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            torch.cuda.synchronize()
            marks.append((state.global_step, time.time()))

    targets = list(QV)
    trainer = SFTTrainer(
        model=str(base),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=targets),
        callbacks=[Clock()],
    )
    packs = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    trainer.train()
    trainer.model.save_pretrained(folder / "adapter")
    adapter = time.time() - began
    (_, start), (_, end) = marks[3], marks[-1]
    # An epoch's rows in TRL's order: what the first four updates had is not known, so by their share.
    tokens = sum(packs) * (len(marks) - 4) / len(marks)
    return {
        "tokens_per_second": tokens / (end - start),
        "milliseconds": 1000 * (end - start) / (len(marks) - 4),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_step_s": marks[0][1] - began,
        "adapter_s": adapter,
        "4 bits": four_bits,
    }


def rate() -> dict[str, Any]:
    """What an 8192³ product reaches."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    flops = 2 * 8192**3 / sorted(times)[len(times) // 2]
    limit = flops / (4 * PARAMETERS)
    return {"card": torch.cuda.get_device_name(), "tflops": flops / 1e12, "limit_tokens_per_second": limit}


def one(line: str, base: Path, scratch: Path) -> dict[str, Any]:
    """One line of the table, in this process."""
    folder = scratch / line.replace(" ", "-").replace("/", "-").replace("'", "").replace(",", "")
    if line == "rate":
        return rate()
    if line.startswith("TRL"):
        return trl(base, folder, best=line.endswith("best"))
    kind, precision, *rest = line.split(" ", 2)
    if kind == "profile":
        small = precision == "two"
        targets = ALL if rest == ["all"] else QV
        return profile(base, folder.with_suffix(".txt"), "bfloat16" if small else precision, targets, small=small)
    what = rest[0]
    if what.endswith((".yaml", "job")):
        return job(base, folder, Path(what) if what.endswith(".yaml") else None)
    if "GPU" in what:
        return ours(base, folder, precision, "q,v", gpus=1 if what.startswith("one") else 2)
    small = what.startswith("two")
    return ours(base, folder, precision, "q,v" if small else what, small=small)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    limit = results["rate"]["limit_tokens_per_second"] if "rate" in results else math.nan
    lines = [
        "| | tokens/s | of the 4N limit | peak GB | planned GB | first step s | start to adapter s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, got in results.items():
        if name == "rate" or name.startswith("profile"):
            continue

        def number(key: str, form: str, got: dict[str, Any] = got) -> str:
            return form.format(got[key]) if key in got else "–"

        share = f"{got['tokens_per_second'] / limit:.0%}" if "tokens_per_second" in got else "–"
        cells = [number("tokens_per_second", "{:,.0f}"), share, number("peak_gb", "{:.1f}")]
        cells += [number("planned_gb", "{:.1f}"), number("first_step_s", "{:.0f}"), number("adapter_s", "{:.0f}")]
        lines.append(f"| {name} | {' | '.join(cells)} |" if "error" not in got else f"| {name} | {got['error']} |")
    if "rate" in results:
        lines += ["", f"{results['rate']['card']}; 8192³ in bfloat16: {results['rate']['tflops']:.0f} TFLOP/s, "
                  f"so the 4N limit is {limit:,.0f} tokens/s."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/gemma2-9b-random"))
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer, of any decoder")
    parser.add_argument("--out", type=Path, default=Path("build/train_gpu"))
    parser.add_argument("--only", nargs="*", default=LINES, metavar="LINE", help=f"some of: {'; '.join(LINES)}")
    parser.add_argument("--limit", type=float, default=900, help="seconds that one line may take")
    parser.add_argument("--line", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.line == "base":
        make_base(options.base, options.tokenizer)
        return
    if options.line:
        print("RESULT " + json.dumps(one(options.line, options.base, options.out)))
        return
    own = [sys.executable, __file__, "--base", str(options.base), "--out", str(options.out)]
    subprocess.run([*own, "--tokenizer", str(options.tokenizer), "--line", "base"], check=True)
    results: dict[str, dict[str, Any]] = {}
    for line in options.only:
        print(f"== {line}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                [*own, "--line", line], stdout=subprocess.PIPE, text=True, check=False, timeout=options.limit
            )
            found = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
            results[line] = json.loads(found[-1][7:]) if found else {"error": f"failed (exit {done.returncode})"}
        except subprocess.TimeoutExpired:
            results[line] = {"error": f"not done after {options.limit:.0f} s"}
        print(json.dumps(results[line]), file=sys.stderr, flush=True)
        (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
