"""The GPU's kernels against their definitions: run by `test_fused.py` in a process of its own.

On a machine without a GPU it is Triton's interpreter that runs them; TRITON_INTERPRET=1 must be set
before triton is imported, and would slow and change whatever else runs in the process.

TRITON_INTERPRET=1 python -m pytest tests/kernels/fused_checks.py -v
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tuneship.kernels import fused, fused_attention, reference
from tuneship.kernels.reference import PLAIN, Bounds, Rows, Want

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-6
WANTS = {"plain": PLAIN, "both": Want(fp8=True), "fp8": Want(plain=False, fp8=True)}
# A GPU's products of float32 are in TF32: ten bits of mantissa.
SAME = 1e-6 if INTERPRETED else 1e-5
CLOSE = {torch.float32: SAME if INTERPRETED else 2e-3, torch.bfloat16: 1e-2}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
wants = pytest.mark.parametrize("want", WANTS.values(), ids=WANTS.keys())


@pytest.fixture(autouse=True, scope="module")
def right_arithmetic() -> Any:
    """Puts right what Triton's interpreter (3.9) computes otherwise than a GPU.

    Its casts to bfloat16 cut off, its casts to fp8 lose a carry into the exponent, and its products
    of bfloat16 multiply the bit patterns as integers.
    """
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    kinds = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    builder = interpreter.InterpreterBuilder
    theirs, their_dot = interpreter._convert_float, builder.create_dot

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source not in kinds or target not in kinds:
            return theirs(data, source, target, mode)
        raw = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        cast = raw.view(kinds[source]).to(kinds[target]).view(torch.uint8).numpy()
        return cast.view(f"uint{8 * kinds[target].itemsize}").reshape(data.shape)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return their_dot(self, *wide, *rest)

    interpreter._convert_float, builder.create_dot = convert, dot
    yield
    interpreter._convert_float, builder.create_dot = theirs, their_dot


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 1.0) -> Tensor:
    values = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def a_step(dtype: torch.dtype) -> float:
    """How far apart what was rounded after other sums may be: of bfloat16, one step."""
    return SAME if dtype == torch.float32 else 2**-8


def close(ours: Tensor, theirs: Tensor | None, at_most: float) -> None:
    assert theirs is not None
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert float((ours.float() - theirs.float()).abs().max()) <= at_most * float(theirs.float().abs().max())


def same_rows(ours: Rows, theirs: Rows, want: Want, dtype: torch.dtype) -> None:
    """The plain form is close; the fp8 form is the plain one's, to the bit."""
    forms = (ours.plain is not None, ours.quantised is not None, ours.scale is not None)
    assert forms == (want.plain, want.fp8, want.fp8)
    if ours.plain is not None and theirs.plain is not None:
        assert ours.whole is not None and ours.whole.shape[1] == ours.plain.shape[1] + want.room
        assert ours.whole.data_ptr() == ours.plain.data_ptr()
        # One step of bfloat16: the sum before it was made in another order.
        close(ours.plain, theirs.plain, a_step(dtype))
    if ours.quantised is None:
        return
    assert ours.scale is not None and theirs.scale is not None and theirs.quantised is not None
    if ours.plain is not None:
        quantised, scale = reference.quantise(ours.plain)
        exact(ours.quantised, ours.scale, quantised, scale)
    # Rows that differ by a step may fall to either side of an edge of fp8: one step there.
    assert ((ours.scale - theirs.scale).abs() <= 2**-7 * theirs.scale).all()
    step = (ours.quantised.view(torch.uint8).int() - theirs.quantised.view(torch.uint8).int()).abs()
    assert int((step * (theirs.quantised.float().abs() > 2**-6)).max()) <= 1


def exact(quantised: Tensor, scale: Tensor, expected: Tensor, expected_scale: Tensor) -> None:
    if INTERPRETED:
        assert torch.equal(scale, expected_scale)
        assert torch.equal(quantised.view(torch.uint8), expected.view(torch.uint8))
    else:
        # A GPU's fast division is not correctly rounded: a tie may fall to the other side.
        close(scale, expected_scale, SAME)
        assert float((quantised.view(torch.uint8) != expected.view(torch.uint8)).float().mean()) < 1e-3


@wants
@dtypes
# As wide as a block, one more, less than any.
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (5, 65), (3, 24)], ids=str)
@pytest.mark.parametrize("room", [0, 3])
def test_norm(tokens: int, width: int, room: int, dtype: torch.dtype, want: Want) -> None:
    """What is written may stand in a wider matrix, and so may what the way back reads."""
    want = replace(want, room=room)
    x = random(tokens, width + room, dtype=dtype, size=2.0)[:, :width]
    weight = random(width, dtype=dtype, seed=1, size=0.3)
    dy, add = random(tokens, width + room, dtype=dtype, seed=2)[:, :width], random(tokens, width, dtype=dtype, seed=3)
    ours, r = fused.norm(x.contiguous(), weight, EPS, want)
    theirs, expected = reference.norm(x, weight, EPS, want)
    same_rows(ours, theirs, want, dtype)
    close(r, expected, SAME)
    for other in (None, add):
        arguments = (dy, x, weight, expected, other, want)
        same_rows(fused.norm_backward(*arguments), reference.norm_backward(*arguments), want, dtype)
    again = torch.empty(tokens, width, dtype=dtype, device=DEVICE)
    rows = fused.norm_backward(dy, x.contiguous(), weight, r, add, want, again)
    same_rows(rows, reference.norm_backward(dy, x, weight, r, add, want), want, dtype)
    close(again, fused.norm(x.contiguous(), weight, EPS)[0].plain, a_step(dtype))


@wants
@dtypes
@pytest.mark.parametrize("room", [0, 3])
def test_two_norms(room: int, dtype: torch.dtype, want: Want) -> None:
    """One after the other, forward and back."""
    want = replace(want, room=room)
    x, dy = random(5, 70, dtype=dtype)[:, :65], random(5, 68, dtype=dtype, seed=4)[:, :65]
    residual, add = random(5, 65, dtype=dtype, seed=1), random(5, 65, dtype=dtype, seed=3)
    weight, then = random(65, dtype=dtype, size=0.3), random(65, dtype=dtype, seed=2, size=0.3)
    out, r = fused.add_norm(residual, x, weight, EPS)
    expected, expected_r = reference.add_norm(residual, x, weight, EPS)
    close(out, expected, a_step(dtype))
    close(r, expected_r, SAME)

    again, r_again, rows, r_then = fused.add_norm_norm(residual, x, weight, then, EPS, want)
    close(again, out, a_step(dtype))
    close(r_again, r, SAME)
    # Of our own sum: what is a step apart there may be more than a step apart here.
    theirs, their_r = reference.norm(again, then, EPS, want)
    same_rows(rows, theirs, want, dtype)
    close(r_then, their_r, SAME)

    hidden = torch.empty_like(out)
    d_out, d_rows = fused.norm_norm_backward(dy, out, then, r_then, add, x, weight, r, want, hidden)
    close(hidden, fused.norm(out, then, EPS)[0].plain, a_step(dtype))
    other, _ = fused.norm_norm_backward(dy, out, then, r_then, add, x, weight, r, want)
    close(other, d_out, a_step(dtype))
    close(d_out, reference.norm_backward(dy, out, then, r_then, add).plain, a_step(dtype))
    same_rows(d_rows, reference.norm_backward(d_out, x, weight, r, None, want), want, dtype)


@wants
@dtypes
# Narrower than a block of 2,048; wider than the way back's of 8,192; wider than what is held whole.
@pytest.mark.parametrize(("tokens", "width"), [(3, 56), (2, 8200), (1, 16400)], ids=str)
def test_gelu(tokens: int, width: int, dtype: torch.dtype, want: Want) -> None:
    gate_up, dy = random(tokens, 2 * width, dtype=dtype, size=3.0), random(tokens, width, dtype=dtype, seed=1)
    same_rows(fused.gelu(gate_up, want), reference.gelu(gate_up, want), want, dtype)
    for active in (False, True):
        ours, again = fused.gelu_backward(dy, gate_up, want, active)
        theirs, expected = reference.gelu_backward(dy, gate_up, want, active)
        same_rows(ours, theirs, want, dtype)
        assert (again is None) == (not active)
        if again is not None and expected is not None:
            close(again, expected, a_step(dtype))


@dtypes
def test_rotate(dtype: torch.dtype) -> None:
    # Seven heads, of which five turn: no power of two.
    qkv, angle = random(6, 7 * 16, dtype=dtype), random(6, 8, size=9.0)
    ours, theirs = (of.rotate(qkv.clone(), angle.cos(), angle.sin(), 5) for of in (fused, reference))
    close(ours, theirs, a_step(dtype))
    assert torch.equal(ours[:, 5 * 16 :], qkv[:, 5 * 16 :])


@dtypes
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (5.0, None), (5.0, 20), (None, 1)])
# Of one token at either end and in the middle; over several blocks; ending on a block's edge.
@pytest.mark.parametrize("lengths", [(1, 10, 33, 1, 37, 1), (64,), (1,)], ids=str)
# A key each; one for two heads; one for three, which is no power of two. In the blocks of short and of long passes.
@pytest.mark.parametrize(("heads", "few"), [(2, True), (4, True), (4, False), (6, False)])
def test_attention(
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    heads: int,
    few: bool,
    softcap: float | None,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(fused_attention, "_FEW_TOKENS", 10**6 if few else 0)
    kv_heads, dim = 2, 16
    bounds = Bounds.of([0, *itertools.accumulate(lengths)]).to(torch.device(DEVICE))
    tokens = sum(lengths)
    qkv, do = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype), random(tokens, heads * dim, dtype=dtype)
    angle = random(tokens, dim // 2, size=9.0)
    numbers = (bounds, (heads, kv_heads, dim), 0.3, softcap, window)
    # The definition in float32: in bfloat16 it rounds more than the kernel does.
    out, lse = reference.attend(qkv.float(), *numbers)
    ours, our_lse = fused.attend(qkv, *numbers)
    close(ours, out.to(dtype), CLOSE[dtype])
    close(our_lse, lse, CLOSE[torch.float32])
    turn = (angle.cos(), angle.sin())
    expected = reference.attend_backward(do.float(), out, lse, qkv.float(), *turn, *numbers).to(dtype)
    close(fused.attend_backward(do, ours, our_lse, qkv, *turn, *numbers), expected, CLOSE[dtype])


@dtypes
# Narrower than a block of 4,096, and over two of them.
@pytest.mark.parametrize("width", [40, 4100])
def test_quantise(width: int, dtype: torch.dtype) -> None:
    x = random(3, width, dtype=dtype)
    x[1] = 0
    exact(*fused.quantise(x), *reference.quantise(x))
    # A matrix that stands transposed.
    exact(*fused.quantise(x[:, :5].t()), *reference.quantise(x[:, :5].t().contiguous()))


@dtypes
@pytest.mark.parametrize("softcap", [None, 3.0])
# Narrower than a block of 2,048, and over two of them.
@pytest.mark.parametrize("width", [40, 2050])
def test_label_gradient(width: int, softcap: float | None, dtype: torch.dtype) -> None:
    logits = random(4, width, dtype=dtype, size=4.0)
    labels = torch.tensor([0, width - 1, 7, 7], device=DEVICE)
    ours, theirs = logits.clone(), logits.clone()
    losses = fused.label_gradient(ours, labels, softcap)
    close(losses, reference.label_gradient(theirs, labels, softcap), SAME)
    close(ours, theirs, a_step(dtype))


def test_no_labels() -> None:
    assert fused.label_gradient(random(0, 40), torch.zeros(0, dtype=torch.int64, device=DEVICE), None).shape == (0,)
