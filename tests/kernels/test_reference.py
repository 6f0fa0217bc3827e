"""The operations' definitions in torch: their gradients against autograd's, their sums against torch's own.

python -m pytest tests/kernels/test_reference.py -v
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuneship.kernels import reference
from tuneship.kernels.reference import FP8, FP8_MAX, Bounds, Want

TOKENS, WIDTH = 37, 56
EPS = 1e-6


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None and theirs is not None
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def bounds(lengths: tuple[int, ...]) -> Bounds:
    return Bounds.of([0, *itertools.accumulate(lengths)])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), 1 + weight, EPS)


@pytest.mark.parametrize("added", [False, True])
def test_norm(added: bool) -> None:
    x, weight = random(TOKENS, WIDTH).requires_grad_(), random(WIDTH, seed=1)
    dy, add = random(TOKENS, WIDTH, seed=2), random(TOKENS, WIDTH, seed=3) if added else None
    expected = norm(x, weight)
    expected.backward(dy)
    ours, r = reference.norm(x.detach(), weight, EPS)
    close(ours.plain, expected.detach())
    again = torch.empty(TOKENS, WIDTH)
    gradient = reference.norm_backward(dy, x.detach(), weight, r, add, again=again).plain
    close(again, expected.detach())
    assert x.grad is not None
    close(gradient, x.grad if add is None else x.grad + add)


def test_add_norm() -> None:
    residual, x, weight = random(TOKENS, WIDTH), random(TOKENS, WIDTH, seed=1), random(WIDTH, seed=2)
    ours, r = reference.add_norm(residual, x, weight, EPS)
    close(ours, residual + norm(x, weight))
    close(r, (x.square().mean(-1) + EPS).rsqrt())


def test_gelu() -> None:
    gate_up = random(TOKENS, 2 * WIDTH, size=3.0).requires_grad_()
    dy = random(TOKENS, WIDTH, seed=1)
    gate, up = gate_up.chunk(2, -1)
    expected = functional.gelu(gate, approximate="tanh") * up
    expected.backward(dy)
    close(reference.gelu(gate_up.detach()).plain, expected.detach())
    gradient, active = reference.gelu_backward(dy, gate_up.detach(), active=True)
    close(gradient.plain, gate_up.grad)
    close(active, expected.detach())
    assert reference.gelu_backward(dy, gate_up.detach())[1] is None


def test_rotate() -> None:
    heads, others, half = 3, 2, 4
    angle = random(TOKENS, half, size=9.0)
    qkv = random(TOKENS, (heads + others) * 2 * half, seed=1)
    # Pairs (i, i + half) of a head are complex numbers, turned by the angle; the other heads stay.
    pairs = qkv.clone().view(TOKENS, heads + others, 2, half)
    turned = torch.complex(pairs[:, :, 0], pairs[:, :, 1])
    turned[:, :heads] *= torch.polar(torch.ones_like(angle), angle)[:, None]
    ours = reference.rotate(qkv, angle.cos(), angle.sin(), heads)
    assert ours is qkv
    close(ours, torch.stack([turned.real, turned.imag], 2).view_as(qkv))


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
def test_attention(heads: tuple[int, int], softcap: float | None, window: int | None) -> None:
    lengths, dim, scale = (11, 1, 25), 8, 0.4
    count, shared = heads
    tokens = sum(lengths)
    qkv = random(tokens, (count + 2 * shared) * dim).requires_grad_()
    do = random(tokens, count * dim, seed=1)

    # One row at a time, one head at a time.
    rows = []
    for row in qkv.split(lengths):
        q, k, v = row.view(len(row), -1, dim).split([count, shared, shared], 1)
        outs = []
        for head in range(count):
            other = head // (count // shared)
            scores = scale * q[:, head] @ k[:, other].t()
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            seen = torch.ones(len(row), len(row)).tril().bool()
            if window is not None:
                seen &= ~torch.ones(len(row), len(row)).tril(-window).bool()
            outs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, other])
        rows.append(torch.cat(outs, -1))
    expected = torch.cat(rows)
    expected.backward(do)

    numbers = (bounds(lengths), (count, shared, dim), scale, softcap, window)
    out, lse = reference.attend(qkv.detach(), *numbers)
    close(out, expected.detach())
    # qkv as made by a rotation: what was turned before has that gradient turned back.
    angle = random(len(qkv), dim // 2, seed=3, size=9.0)
    assert qkv.grad is not None
    gradient = reference.rotate(qkv.grad, angle.cos(), -angle.sin(), count + shared)
    close(reference.attend_backward(do, out, lse, qkv.detach(), angle.cos(), angle.sin(), *numbers), gradient)


def test_two_norms() -> None:
    residual, x = random(TOKENS, WIDTH).requires_grad_(), random(TOKENS, WIDTH, seed=1).requires_grad_()
    weight, then = random(WIDTH, seed=2), random(WIDTH, seed=3)
    dy, add = random(TOKENS, WIDTH, seed=4), random(TOKENS, WIDTH, seed=5)
    middle = residual + norm(x, weight)
    expected = norm(middle, then)
    torch.autograd.backward([expected, middle], [dy, add])
    out, r, rows, r_then = reference.add_norm_norm(residual.detach(), x.detach(), weight, then, EPS)
    close(out, middle.detach())
    close(rows.plain, expected.detach())
    d_residual, d_x = reference.norm_norm_backward(dy, out, then, r_then, add, x.detach(), weight, r)
    close(d_residual, residual.grad)
    close(d_x.plain, x.grad)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_label_gradient(softcap: float | None) -> None:
    logits, labels = random(6, 50, size=4.0).requires_grad_(), torch.tensor([0, 49, 7, 7, 20, 1])
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = functional.cross_entropy(capped, labels, reduction="none")
    expected.sum().backward()
    ours = logits.detach().clone()
    close(reference.label_gradient(ours, labels, softcap), expected.detach())
    close(ours, logits.grad)


def test_fp8_has_a_scale_a_row() -> None:
    x = random(TOKENS, WIDTH) * torch.logspace(-6, 6, TOKENS)[:, None]
    x[3] = 0
    quantised, scale = reference.quantise(x)
    assert (quantised.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (TOKENS, 1))
    assert torch.isfinite(quantised.float()).all()
    again = quantised.float() * scale
    # Three bits of mantissa: half a step is a sixteenth. Below 2⁻⁶ of a scale the steps are even, 2⁻⁹.
    assert ((again - x).abs() <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.00001).all()
    largest = quantised.float().abs().amax(-1)
    assert (largest[torch.arange(TOKENS) != 3] == FP8_MAX).all()
    assert largest[3] == 0


def test_only_the_wanted_forms_are_made() -> None:
    x = random(TOKENS, WIDTH)
    plain, both, fp8 = (reference.rows(x, want) for want in (Want(), Want(fp8=True), Want(plain=False, fp8=True)))
    assert plain.plain is x and plain.quantised is None and plain.scale is None
    assert both.plain is x and both.quantised is not None and both.scale is not None
    assert fp8.plain is None and fp8.quantised is not None
