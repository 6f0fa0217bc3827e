"""A training pass of Gemma 2 9B, its kernels compiled for cards that are not here.

Nothing runs: the tensors have shapes and no memory, and a launch compiles its kernel as it would be launched.
What a card's compiler refuses, or a block that shares more memory than the card has, would otherwise be seen
there, after the weights are loaded.

python -m pytest tests/kernels/test_cards.py -v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tuneship import trainable
from tuneship.kernels import fused, gemma2, head, low
from tuneship.kernels.frozen import Frozen
from tuneship.kernels.gemma2 import Layer, Shape
from tuneship.kernels.low import Adapter
from tuneship.kernels.reference import Bounds

# Shared memory of one block at most, in KB, by compute capability: A100, L4, H100.
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MOST_KB = {80: 163, 89: 99, 90: 227}
META = torch.device("meta")
# google/gemma-2-9b's config.json.
NINE = Shape(
    width=3584,
    heads=16,
    kv_heads=8,
    head_dim=256,
    feed_forward=14336,
    scale=256**-0.5,
    softcap=50.0,
    window=4096,
    eps=1e-6,
    rope_theta=10000.0,
)
VOCABULARY = 256000
RANK = 8
QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Card:
    """What Triton asks of a driver before it compiles, and what it compiled."""

    capability: int
    shared: dict[str, int] = field(default_factory=dict)
    """Kernel, by its name and its code's digest → bytes that a block of it shares."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def insert(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Card]:
    """Puts a card in."""
    theirs = JITFunction.run

    def inserted(capability: int) -> Card:
        card = Card(capability)

        def compiled(self: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
            made = theirs(self, *arguments, warmup=True, **options)
            card.shared[f"{self.__name__} {made.hash}"] = made.metadata.shared

        # Triton's own way back from `set_active` looks for a card.
        monkeypatch.setattr(driver, "_active", card)
        monkeypatch.setattr(JITFunction, "run", compiled)
        return card

    for module in (gemma2, head):
        monkeypatch.setattr(module, "operations", lambda _: fused)
    monkeypatch.setitem(head.CHUNK_BYTES, "meta", head.CHUNK_BYTES["cuda"])
    return inserted


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, learns: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=learns)


def train(tokens: int, fp8: bool, targets: tuple[str, ...], row: int = 100) -> None:
    """A pass through two layers, the last at its labels only, and the loss, forward and back; rows of `row` tokens."""
    products: dict[str, Frozen] = {}
    adapters, weights = [], []
    for product, parts in NINE.parts.items():
        named = [part for part in parts if part[0] in targets]
        inputs, below = NINE.inputs[product], product in ("o", "down")
        weight = empty(parts[-1][2], inputs)
        products[product] = trainable._frozen(weight, "fp8" if fp8 else "bfloat16", RANK * len(named), below=below)
        for name, start, end in named:
            adapters.append(Adapter(name, product, start, end, 2.0, 0.0))
            weights += [
                empty(*a_or_b, dtype=torch.float32, learns=True) for a_or_b in ((RANK, inputs), (end - start, RANK))
            ]
    names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    layer = Layer(NINE, True, products, {name: empty(NINE.width) for name in names})
    (side,) = low.sides([(adapters, weights)], [products], torch.bfloat16)

    bounds = Bounds.of([*range(0, tokens, row), tokens]).to(META)
    of = gemma2.batch(empty(tokens, dtype=torch.int64), bounds, NINE)
    labels = empty(tokens // 2, dtype=torch.int64)
    x = gemma2.run_layer(empty(tokens, NINE.width, learns=True), layer, of, side, "all")
    x = gemma2.run_layer(x, layer, of, side, "input", labels)
    x = gemma2.run_norm(x, empty(NINE.width), NINE.eps)
    head.label_loss(x, empty(VOCABULARY, NINE.width), labels, 30.0).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("targets", [QV, ALL], ids=["q,v", "all seven"])
@pytest.mark.parametrize(("capability", "fp8"), [(80, False), (89, False), (89, True), (90, False), (90, True)])
def test_every_kernel_of_a_pass_fits_the_card(
    insert: Callable[[int], Card], capability: int, fp8: bool, targets: tuple[str, ...]
) -> None:
    card = insert(capability)
    for tokens, row in ((8192, 100), (8192, NINE.window + 1), (256, 100)):
        train(tokens, fp8, targets, row)
    assert {name.split()[0] for name in card.shared} == {
        *("_norm", "_add_norm", "_norm_backward", "_norm_norm_backward", "_rotate", "_label_gradient"),
        *("_attend", "_attend_backward_q", "_attend_backward_kv"),
        *(("_gelu_whole", "_gelu_backward_whole", "_quantise") if fp8 else ("_gelu", "_gelu_backward")),
    }
    assert {name: size for name, size in card.shared.items() if size > MOST_KB[capability] * 1024} == {}


@pytest.mark.parametrize("fp8", [False, True])
def test_another_number_of_tokens_compiles_nothing_again(insert: Callable[[int], Card], fp8: bool) -> None:
    """Eight seconds of a training's start, where a pack is not of a multiple of 16."""
    card = insert(90)
    train(8192, fp8, ALL)
    before = set(card.shared)
    for tokens in (8191, 8190, 4003):
        train(tokens, fp8, ALL)
    assert set(card.shared) == before
