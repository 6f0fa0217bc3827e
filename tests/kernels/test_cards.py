"""The attention kernels, compiled for cards that are not here: their blocks must fit what a card shares among them.

A block that needs more is refused at its launch, after the weights are loaded.

python -m pytest tests/kernels/test_cards.py -v
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tuneship.kernels import fused_attention

# Shared memory of one block at most, in KB, by compute capability: A100, L4, H100.
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MOST_KB = {80: 163, 89: 99, 90: 227}
TYPES = {
    **dict.fromkeys(("qkv", "out", "do", "dqkv"), "*bf16"),
    **dict.fromkeys(("lse", "delta", "cos", "sin"), "*fp32"),
    **dict.fromkeys(("firsts", "lasts"), "*i32"),
    **dict.fromkeys(("scale", "cap"), "fp32"),
}


def shared_bytes(kernel: Any, capability: int, **constants: Any) -> int:
    """Of a block of a kernel, compiled for a card."""
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    # As at a launch: tensors begin at multiples of 16 bytes, and so do their rows.
    even = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name == "row" or kinds[name].startswith("*")
    }
    source = ASTSource(kernel, kinds, fixed, even)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    return int(made.metadata.shared)


KERNELS = (fused_attention._attend, fused_attention._attend_backward_q, fused_attention._attend_backward_kv)


@pytest.mark.parametrize("tokens", [256, 8192])
@pytest.mark.parametrize("capability", MOST_KB)
def test_a_block_of_attention_fits_the_card(capability: int, tokens: int) -> None:
    """Of Gemma 2's heads of 256, two to a key."""
    qkv = torch.empty(tokens, 8192, dtype=torch.bfloat16, device="meta")
    shared, *tiles = fused_attention._tiles(qkv, 2)
    for kernel, (queries, keys) in zip(KERNELS, tiles, strict=True):
        form = {"DIM": 256, "QUERIES": queries, "SHARED": shared, "KEYS": keys, "CAPPED": True, "WINDOW": 4096}
        assert shared_bytes(kernel, capability, **form) <= MOST_KB[capability] * 1024, kernel.__name__


def test_another_number_of_tokens_compiles_nothing_again() -> None:
    """Eight seconds of a training's start, where a pack is not of a multiple of 16."""
    for kernel in KERNELS:
        assert {at.name for at in kernel.params if at.do_not_specialize} == {"tokens"}, kernel.__name__
