"""Frozen weights: products against a dequantised weight's, and a decoder whose linears are all frozen forms.

python -m pytest tests/kernels/test_frozen.py -v
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

from tuneship import model as models
from tuneship import trainable
from tuneship.kernels import lora, reference
from tuneship.kernels.attention import Documents
from tuneship.kernels.frozen import Fp8, Frozen, Nf4, Plain
from tuneship.kernels.reference import FP8_MAX, Rows, Want
from tuneship.recipe import Lora

OUT, IN, TOKENS = 40, 64, 9
LENGTHS = (30, 1, 20)
BOTH = Want(fp8=True)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8(weight: Tensor) -> Fp8:
    return Fp8(weight, reference.quantise)


def share(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_plain_multiplies() -> None:
    weight, x, dy = random(OUT, IN, seed=0), random(TOKENS, IN, seed=1), random(TOKENS, OUT, seed=2)
    frozen = Plain(weight)
    assert not frozen.fp8
    assert torch.equal(frozen.forward(Rows(x)), x @ weight.t())
    assert torch.equal(frozen.backward(Rows(dy)), dy @ weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_the_product_of_what_it_holds(dtype: torch.dtype) -> None:
    weight = random(OUT, IN, seed=0).to(dtype)
    frozen = fp8(weight)
    assert frozen.fp8
    for rows, outwards, of in (
        (random(TOKENS, IN, seed=1), frozen.forward, weight),
        (random(TOKENS, OUT, seed=2), frozen.backward, weight.t()),
    ):
        there = reference.rows(rows.to(dtype), Want(plain=False, fp8=True))
        assert there.quantised is not None and there.scale is not None
        # By hand, a scale for each row of either operand.
        scale = of.float().abs().amax(1, keepdim=True) / FP8_MAX
        again = (of.float() / scale).to(torch.float8_e4m3fn).float() * scale
        expected = ((there.quantised.float() * there.scale) @ again.t()).to(dtype)
        ours = outwards(there)
        assert ours.dtype == dtype
        assert torch.equal(ours, expected)
        # Of random numbers: a rounding of at most 1/16 on either side, spread evenly.
        assert share(ours.float(), rows @ of.float().t()) < 0.06


def test_fp8_is_exact_where_the_numbers_are_fp8s() -> None:
    # Whole numbers to 15 have four bits; the largest of every row and column makes the scale a power of two.
    weight = torch.randint(-15, 16, (OUT, IN), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = weight[0] = FP8_MAX / 16
    x = torch.randint(-15, 16, (TOKENS, IN), generator=torch.Generator().manual_seed(1)).float()
    x[:, 0] = FP8_MAX / 4
    assert torch.equal(fp8(weight).forward(reference.rows(x, BOTH)), x @ weight.t())
    assert torch.equal(fp8(weight.t()).backward(reference.rows(x, BOTH)), x @ weight.t())


def test_fp8_keeps_small_rows_beside_large_ones() -> None:
    weight = random(OUT, IN, seed=0) * torch.logspace(-4, 4, OUT)[:, None]
    x = random(TOKENS, IN, seed=1) * torch.logspace(4, -4, TOKENS)[:, None]
    error = (fp8(weight).forward(reference.rows(x, BOTH)) - x @ weight.t()).abs()
    # One scale for the whole of either would round its small rows to nothing.
    assert (error < 0.05 * x.norm(dim=1)[:, None] * weight.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_is_the_product_of_what_it_holds(dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the gpu extra")
    weight, x, dy = (random(*s, seed=n).to(dtype) for n, s in enumerate([(OUT, IN), (TOKENS, IN), (TOKENS, OUT)]))
    frozen = Nf4(weight)
    assert not frozen.fp8
    held = frozen._weight()
    assert (held.shape, held.dtype) == (weight.shape, dtype)
    # At most sixteen values of each block of 64, and its largest number among them (block scales are 8 bits).
    for block, before in zip(held.float().view(-1, 64), weight.float().view(-1, 64), strict=True):
        assert len(block.unique()) <= 16
        assert float(block.abs().max()) == pytest.approx(float(before.abs().max()), rel=0.05)
    assert frozen.packed.nbytes == weight.numel() / 2
    assert share(held.float(), weight.float()) < 0.12
    assert torch.equal(frozen.forward(Rows(x)), x @ held.t())
    assert torch.equal(frozen.backward(Rows(dy)), dy @ held)


# --- a decoder --------------------------------------------------------------------------------


def states_and_gradients(model: models.LoadedModel) -> tuple[Tensor, Tensor]:
    rows = tiny.rows(LENGTHS)
    bounds = [0, 30, 31, 51]
    states = model.states(torch.cat(rows), torch.cat([torch.arange(n) for n in LENGTHS]), Documents(bounds))
    parameters = list(models.trainable(model).values())
    found = torch.autograd.grad((states * random(*states.shape, seed=5)).sum(), parameters)
    return states.detach(), torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")], ids=["all", "q,v"])
@pytest.mark.parametrize(("make", "at_most"), [(Plain, 1e-6), (fp8, 0.3)], ids=["plain", "fp8"])
def test_a_decoder_of_frozen_linears(
    make: Callable[[Tensor], Frozen], at_most: float, targets: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = tiny.make("llama", tmp_path_factory.mktemp("models") / "llama")
    adapter = Lora(r=4, lora_alpha=8, target_modules=targets)
    model = tiny.tuned(files, adapter)
    expected = states_and_gradients(model)
    linears = [m for m in model.causal.model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
    assert len(linears) == 3 * 7
    lora.freeze(model.causal.model, make)
    assert all(linear.weight.numel() == 0 and type(linear.frozen).__name__ for linear in linears)
    for ours, theirs in zip(states_and_gradients(model), expected, strict=True):
        assert share(ours, theirs) < at_most
        assert (share(ours, theirs) > 1e-3) == (make is fp8)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("down_proj",)], ids=["all", "q,v", "down"])
def test_gemma2_by_hand_in_fp8(targets: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    files = tiny.make("gemma2", tmp_path_factory.mktemp("models") / "gemma2")
    found = []
    for precision in ("float32", "fp8"):
        adapter = Lora(r=4, lora_alpha=8, target_modules=targets)
        model = trainable.load_by_hand(files, precision, adapter, seed=0, device=torch.device("cpu"))
        torch.manual_seed(1)
        for parameter in models.trainable(model).values():
            parameter.data = 0.1 * torch.randn_like(parameter)
        found.append(states_and_gradients(model))
    assert all(isinstance(product, Fp8) for layer in model.layers for product in layer.products.values())
    for theirs, ours in zip(*found, strict=True):
        assert 1e-3 < share(ours, theirs) < 0.35
