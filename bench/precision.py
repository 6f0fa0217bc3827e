"""What fp8 costs in quality: the laptop's model, 300 updates in bfloat16 and in fp8, same seed and rows.

    python bench/precision.py                        one seed
    python bench/precision.py --seeds 1 2 3 4 5 6 7 8 --control

Prints the held-out losses, and fp8's share of bfloat16's for each seed and in the geometric mean. The
control trains in float32: what rounding alone does to a run, with no fp8 in it. On a GPU the products
run in fp8; on a CPU the same e4m3 values and scales are multiplied in float32, which rounds no more
than the GPU's float32 accumulation.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from tuneship import journal, recipe, train, trainable
from tuneship.kernels import lora, operations
from tuneship.kernels.frozen import Fp8
from tuneship.prepare import prepare

UPDATES = 300


def held_out(precision: str, seed: int, folder: Path) -> float:
    """The validation loss after the last update."""
    on_gpu = torch.cuda.is_available()
    settings = recipe.load(
        "tiny",
        overrides=[
            f"model.precision={'bfloat16' if precision == 'fp8' and not on_gpu else precision}",
            f"train.seed={seed}",
            f"train.max_steps={UPDATES}",
            "train.eval_steps=100",
            "train.save_steps=1000",
        ],
    )
    load = trainable.load

    def load_in_fp8(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        lora.freeze(model.causal.model, lambda weight: Fp8(weight, operations(weight).quantise))
        return model

    if precision == "fp8" and not on_gpu:
        trainable.load = load_in_fp8
    try:
        with journal.open_run(folder, settings) as run:
            prepare(run)
            train.train(run)
            losses = [line["validation_loss"] for line in run.metrics() if "validation_loss" in line]
    finally:
        trainable.load = load
    print(f"seed {seed} {precision:9} held-out loss " + " → ".join(f"{loss:.4f}" for loss in losses), flush=True)
    return float(losses[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--control", action="store_true", help="train in float32 too")
    options = parser.parse_args()
    others = ["fp8", *(["float32"] if options.control else [])]
    shares: dict[str, list[float]] = {precision: [] for precision in others}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            plain = held_out("bfloat16", seed, Path(scratch) / f"bfloat16-{seed}")
            for precision in others:
                shares[precision].append(held_out(precision, seed, Path(scratch) / f"{precision}-{seed}") / plain)
    for precision, found in shares.items():
        logs = [math.log(share) for share in found]
        mean = math.exp(statistics.fmean(logs))
        line = f"{precision} / bfloat16 after {UPDATES} updates: " + ", ".join(f"{share:.4f}" for share in found)
        if len(found) > 1:
            line += f"; mean {mean:.4f} ± {mean * statistics.stdev(logs) / math.sqrt(len(found)):.4f}"
        print(line)


if __name__ == "__main__":
    main()
