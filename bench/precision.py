"""What fp8 costs in quality: the laptop's model, 300 updates in bfloat16 and in fp8, same seed and rows.

    python bench/precision.py

Prints the held-out loss of both. On a GPU the products run in fp8; on a CPU the same e4m3 values and
scales are multiplied in float32, which rounds no more than the GPU's float32 accumulation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tuneship import journal, recipe, train, trainable
from tuneship.kernels import lora, operations
from tuneship.kernels.frozen import Fp8
from tuneship.prepare import prepare

UPDATES = 300


def held_out(precision: str, folder: Path) -> float:
    """The validation loss after the last update."""
    on_gpu = torch.cuda.is_available()
    settings = recipe.load(
        "tiny",
        overrides=[
            f"model.precision={precision if on_gpu else 'bfloat16'}",
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
    print(f"{precision:9} held-out loss " + " → ".join(f"{loss:.4f}" for loss in losses), flush=True)
    return float(losses[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        plain = held_out("bfloat16", Path(scratch) / "bfloat16")
        fp8 = held_out("fp8", Path(scratch) / "fp8")
    print(f"fp8 / bfloat16: {fp8 / plain:.4f} after {UPDATES} updates")


if __name__ == "__main__":
    main()
