"""The fused operations of a Gemma 2 layer on a GPU, in Triton. `reference` says what they compute.

Each reads its inputs once and writes its outputs once; where the next product is in fp8, the
quantised rows are written in the same pass. A program works on one token. Attention is in
`fused_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneship.kernels.fused_attention import LOW, attend, attend_backward, tanh
from tuneship.kernels.reference import FP8, FP8_MAX, PLAIN, Rows, Want, aligned

__all__ = [
    "add_norm",
    "add_norm_norm",
    "attend",
    "attend_backward",
    "gelu",
    "gelu_backward",
    "label_gradient",
    "norm",
    "norm_backward",
    "norm_norm_backward",
    "quantise",
    "rotate",
]

MAX: tl.constexpr = tl.constexpr(FP8_MAX)
# Numbers of a row that a program can hold in registers, and so read once.
WHOLE = 16384


@triton.jit
def _put_rows(
    value, plain, quantised, scale, token, width, stride, columns, inside, LIKE,
    IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    """Writes a row in the forms that are wanted."""
    stored = value.to(LIKE)
    if IN_PLAIN:
        tl.store(plain + token * stride + columns, stored, mask=inside)
    if IN_FP8:
        # Of the rounded row, not of the float32 before it: the same as quantising the stored row.
        rounded = stored.to(tl.float32)
        s = tl.maximum(tl.max(tl.abs(rounded), 0), 1e-12) / MAX
        tl.store(scale + token, s)
        tl.store(quantised + token * width + columns, (rounded / s).to(quantised.dtype.element_ty), mask=inside)


def _outputs(tokens: int, width: int, like: Tensor, want: Want) -> tuple[Rows, tuple[Tensor, Tensor, Tensor], int]:
    """Room for rows, the three pointers that a kernel takes (`like` where a form is not wanted), the plain stride."""
    whole = None
    if want.plain:
        whole = aligned(tokens, width + want.room, like) if want.room else like.new_empty(tokens, width)
    plain = whole if whole is None or not want.room else whole[:, :width]
    quantised = torch.empty(tokens, width, dtype=FP8, device=like.device) if want.fp8 else None
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=like.device) if want.fp8 else None
    pointers = (
        like if plain is None else plain,
        like if quantised is None else quantised,
        like if scale is None else scale,
    )
    return Rows(plain, quantised, scale, whole), pointers, width if plain is None else plain.stride(0)


def _block(width: int) -> tuple[int, int]:
    """Block size and warps for a row of `width`."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(4, block // 512))


# --- norms ------------------------------------------------------------------------------------


@triton.jit
def _norm(
    x, weight, plain, quantised, scale, r_out, width, stride, eps,
    BLOCK: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / width + eps)
    tl.store(r_out + token, r)
    _put_rows(
        v * r * (1.0 + w), plain, quantised, scale, token, width, stride, columns, inside, x.dtype.element_ty,
        IN_PLAIN, IN_FP8,
    )  # fmt: skip


def norm(x: Tensor, weight: Tensor, eps: float, want: Want = PLAIN) -> tuple[Rows, Tensor]:
    """See `reference.norm`."""
    tokens, width = x.shape
    out, pointers, stride = _outputs(tokens, width, x, want)
    r = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, warps = _block(width)
    _norm[(tokens,)](x, weight, *pointers, r, width, stride, eps, block, want.plain, want.fp8, num_warps=warps)
    return out, r


@triton.jit
def _add_norm(
    residual, x, weight, then, out, r_out, plain, quantised, scale, r_then, width, x_stride, stride, eps,
    BLOCK: tl.constexpr, THEN: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    like = out.dtype.element_ty
    v = tl.load(x + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / width + eps)
    tl.store(r_out + token, r)
    # The norm is rounded before it is added, as in the model that was trained.
    normed = (v * r * (1.0 + w)).to(like).to(tl.float32)
    summed = (before + normed).to(like)
    tl.store(out + token * width + columns, summed, mask=inside)
    if THEN:
        v = summed.to(tl.float32)
        w = tl.load(then + columns, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / width + eps)
        tl.store(r_then + token, r)
        _put_rows(
            v * r * (1.0 + w), plain, quantised, scale, token, width, stride, columns, inside, like, IN_PLAIN, IN_FP8
        )


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_norm`."""
    tokens, width = x.shape
    out = torch.empty_like(residual)
    r = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, warps = _block(width)
    _add_norm[(tokens,)](
        residual, x, weight, weight, out, r, x, x, x, r, width, x.stride(0), width, eps, block, False, False, False,
        num_warps=warps,
    )  # fmt: skip
    return out, r


def add_norm_norm(
    residual: Tensor, x: Tensor, weight: Tensor, then: Tensor, eps: float, want: Want = PLAIN
) -> tuple[Tensor, Tensor, Rows, Tensor]:
    """See `reference.add_norm_norm`."""
    tokens, width = x.shape
    out = torch.empty_like(residual)
    rows, pointers, stride = _outputs(tokens, width, residual, want)
    # Two tensors: the second half of one would begin at a multiple of 16 bytes for every fourth number of tokens
    # only, and each such number compiles its kernels anew.
    r, r_then = (torch.empty(tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    block, warps = _block(width)
    _add_norm[(tokens,)](
        residual, x, weight, then, out, r, *pointers, r_then, width, x.stride(0), stride, eps,
        block, True, want.plain, want.fp8, num_warps=warps,
    )  # fmt: skip
    return out, r, rows, r_then


@triton.jit
def _norm_backward(
    dy, x, weight, r_in, add, plain, quantised, scale, again, width, dy_stride, x_stride, stride,
    BLOCK: tl.constexpr, ADD: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(dy + token * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_in + token)
    g = g * (1.0 + w)
    unit = v * r
    if AGAIN:
        tl.store(again + token * width + columns, unit * (1.0 + w), mask=inside)
    dx = r * (g - unit * (tl.sum(g * unit, 0) / width))
    if ADD:
        dx += tl.load(add + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    _put_rows(dx, plain, quantised, scale, token, width, stride, columns, inside, x.dtype.element_ty, IN_PLAIN, IN_FP8)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    add: Tensor | None = None,
    want: Want = PLAIN,
    again: Tensor | None = None,
) -> Rows:
    """See `reference.norm_backward`."""
    tokens, width = x.shape
    out, pointers, stride = _outputs(tokens, width, x, want)
    block, warps = _block(width)
    _norm_backward[(tokens,)](
        dy, x, weight, r, x if add is None else add, *pointers, x if again is None else again,
        width, dy.stride(0), x.stride(0), stride,
        block, add is not None, want.plain, want.fp8, again is not None, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _norm_norm_backward(
    dy, x, weight, r_in, add, before, before_weight, before_r, dx_out, plain, quantised, scale, again,
    width, dy_stride, before_stride, stride,
    BLOCK: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    like = x.dtype.element_ty
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + token * dy_stride + columns, mask=inside, other=0.0).to(tl.float32) * (1.0 + w)
    r = tl.load(r_in + token)
    unit = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32) * r
    if AGAIN:
        tl.store(again + token * width + columns, unit * (1.0 + w), mask=inside)
    dx = r * (g - unit * (tl.sum(g * unit, 0) / width))
    dx += tl.load(add + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = dx.to(like)
    tl.store(dx_out + token * width + columns, rounded, mask=inside)
    w = tl.load(before_weight + columns, mask=inside, other=0.0).to(tl.float32)
    g = rounded.to(tl.float32) * (1.0 + w)
    r = tl.load(before_r + token)
    unit = tl.load(before + token * before_stride + columns, mask=inside, other=0.0).to(tl.float32) * r
    dx = r * (g - unit * (tl.sum(g * unit, 0) / width))
    _put_rows(dx, plain, quantised, scale, token, width, stride, columns, inside, like, IN_PLAIN, IN_FP8)


def norm_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    add: Tensor,
    before: Tensor,
    before_weight: Tensor,
    before_r: Tensor,
    want: Want = PLAIN,
    again: Tensor | None = None,
) -> tuple[Tensor, Rows]:
    """See `reference.norm_norm_backward`."""
    tokens, width = x.shape
    dx = torch.empty_like(x)
    rows, pointers, stride = _outputs(tokens, width, x, want)
    block, warps = _block(width)
    _norm_norm_backward[(tokens,)](
        dy, x, weight, r, add, before, before_weight, before_r, dx, *pointers, x if again is None else again,
        width, dy.stride(0), before.stride(0), stride,
        block, want.plain, want.fp8, again is not None, num_warps=warps,
    )  # fmt: skip
    return dx, rows


# --- the feed-forward's gate ------------------------------------------------------------------


@triton.jit
def _gelu_piece(gate_up, at, width, inside):
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    t = tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    return (0.5 * gate * (1.0 + t) * up).to(gate_up.dtype.element_ty)


@triton.jit
def _gelu(
    gate_up, plain, quantised, scale, width,
    BLOCK: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    # For fp8 a row is walked twice: for its largest number, and to write it.
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    if IN_FP8:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            value = _gelu_piece(gate_up, token * 2 * width + columns, width, columns < width)
            largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
        s = tl.maximum(tl.max(largest, 0), 1e-12) / MAX
        tl.store(scale + token, s)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = _gelu_piece(gate_up, token * 2 * width + columns, width, inside)
        if IN_PLAIN:
            tl.store(plain + token * width + columns, value, mask=inside)
        if IN_FP8:
            q = (value.to(tl.float32) / s).to(quantised.dtype.element_ty)
            tl.store(quantised + token * width + columns, q, mask=inside)


@triton.jit
def _gelu_whole(
    gate_up, plain, quantised, scale, width,
    BLOCK: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = _gelu_piece(gate_up, token * 2 * width + columns, width, inside)
    like = gate_up.dtype.element_ty
    _put_rows(value, plain, quantised, scale, token, width, width, columns, inside, like, IN_PLAIN, IN_FP8)


def gelu(gate_up: Tensor, want: Want = PLAIN) -> Rows:
    """See `reference.gelu`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, pointers, _ = _outputs(tokens, width, gate_up, want)
    if want.fp8 and (block := triton.next_power_of_2(width)) <= WHOLE:
        kernel, warps = _gelu_whole, max(4, block // 512)
    else:
        kernel, block, warps = _gelu, 2048, 16 if want.fp8 else 8
    kernel[(tokens,)](gate_up, *pointers, width, block, want.plain, want.fp8, num_warps=warps)
    return out


@triton.jit
def _gelu_backward_piece(dy, gate_up, token, columns, width, inside):
    g = tl.load(dy + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + token * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    t = tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
    like = gate_up.dtype.element_ty
    half = 0.5 * gate * (1.0 + t)
    return (g * up * slope).to(like), (g * half).to(like), (half * up).to(like)


@triton.jit
def _gelu_backward(
    dy, gate_up, plain, quantised, scale, active, width,
    BLOCK: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    if IN_FP8:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            a, b, _ = _gelu_backward_piece(dy, gate_up, token, columns, width, columns < width)
            largest = tl.maximum(largest, tl.maximum(tl.abs(a.to(tl.float32)), tl.abs(b.to(tl.float32))))
        s = tl.maximum(tl.max(largest, 0), 1e-12) / MAX
        tl.store(scale + token, s)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        at = token * 2 * width + columns
        a, b, again = _gelu_backward_piece(dy, gate_up, token, columns, width, inside)
        if ACTIVE:
            tl.store(active + token * width + columns, again, mask=inside)
        if IN_PLAIN:
            tl.store(plain + at, a, mask=inside)
            tl.store(plain + at + width, b, mask=inside)
        if IN_FP8:
            tl.store(quantised + at, (a.to(tl.float32) / s).to(quantised.dtype.element_ty), mask=inside)
            tl.store(quantised + at + width, (b.to(tl.float32) / s).to(quantised.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward_whole(
    dy, gate_up, plain, quantised, scale, active, width,
    BLOCK: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = token * 2 * width + columns
    a, b, again = _gelu_backward_piece(dy, gate_up, token, columns, width, inside)
    if ACTIVE:
        tl.store(active + token * width + columns, again, mask=inside)
    if IN_PLAIN:
        tl.store(plain + at, a, mask=inside)
        tl.store(plain + at + width, b, mask=inside)
    if IN_FP8:
        x, y = a.to(tl.float32), b.to(tl.float32)
        s = tl.maximum(tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 0), 1e-12) / MAX
        tl.store(scale + token, s)
        tl.store(quantised + at, (x / s).to(quantised.dtype.element_ty), mask=inside)
        tl.store(quantised + at + width, (y / s).to(quantised.dtype.element_ty), mask=inside)


def gelu_backward(dy: Tensor, gate_up: Tensor, want: Want = PLAIN, active: bool = False) -> tuple[Rows, Tensor | None]:
    """See `reference.gelu_backward`."""
    tokens, width = dy.shape
    out, pointers, _ = _outputs(tokens, 2 * width, gate_up, want)
    again = torch.empty_like(dy) if active else None
    if want.fp8 and (block := triton.next_power_of_2(width)) <= WHOLE:
        kernel, warps = _gelu_backward_whole, max(4, block // 512)
    else:
        kernel, block, warps = _gelu_backward, 8192, 16 if want.fp8 else 8
    kernel[(tokens,)](
        dy, gate_up, *pointers, dy if again is None else again, width,
        block, want.plain, want.fp8, active, num_warps=warps,
    )  # fmt: skip
    return out, again


# --- rotary embedding -------------------------------------------------------------------------


@triton.jit
def _rotate(qkv, cos, sin, row, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    at = qkv + token * row + head * 2 * HALF + column
    inside = (head < heads) & (column < HALF)
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + column)
    s = tl.load(sin + token * HALF + column)
    tl.store(at, a * c - b * s, mask=inside)
    tl.store(at + HALF, b * c + a * s, mask=inside)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """See `reference.rotate`."""
    tokens, row = qkv.shape
    _rotate[(tokens,)](qkv, cos, sin, row, heads, cos.shape[-1], triton.next_power_of_2(heads), num_warps=8)
    return qkv


# --- quantising -------------------------------------------------------------------------------


@triton.jit
def _quantise(x, quantised, scale, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        v = tl.load(x + token * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(v))
    s = tl.maximum(tl.max(largest, 0), 1e-12) / MAX
    tl.store(scale + token, s)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        v = tl.load(x + token * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(quantised + token * width + columns, (v / s).to(quantised.dtype.element_ty), mask=columns < width)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantise`."""
    x = x.contiguous()
    quantised = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    _quantise[(x.shape[0],)](x, quantised, scale, x.shape[1], 4096, num_warps=8)
    return quantised, scale


# --- the head ---------------------------------------------------------------------------------


@triton.jit
def _capped(logits, at, inside, cap, CAPPED: tl.constexpr):
    """Capped logits, and the cap's slope."""
    z = tl.load(logits + at, mask=inside, other=LOW).to(tl.float32)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAPPED:
        bend = tanh(z / cap)
        z = tl.where(inside, cap * bend, LOW)
        slope = 1.0 - bend * bend
    return z, slope


@triton.jit
def _label_gradient(logits, labels, losses, width, cap, BLOCK: tl.constexpr, CAPPED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    m = tl.full([BLOCK], LOW, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, _ = _capped(logits, row * width + columns, columns < width, cap, CAPPED)
        m_new = tl.maximum(m, z)
        total = total * tl.exp(m - m_new) + tl.exp(z - m_new)
        m = m_new
    top = tl.max(m, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(m - top), 0))
    chosen = tl.load(logits + row * width + label).to(tl.float32)
    if CAPPED:
        chosen = cap * tanh(chosen / cap)
    tl.store(losses + row, norm - chosen)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z, slope = _capped(logits, row * width + columns, inside, cap, CAPPED)
        gradient = (tl.exp(z - norm) - tl.where(columns == label, 1.0, 0.0)) * slope
        tl.store(logits + row * width + columns, gradient, mask=inside)


def label_gradient(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """See `reference.label_gradient`."""
    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    if len(labels):
        _label_gradient[(len(labels),)](
            logits, labels, losses, logits.shape[1], softcap or 1.0, 2048, softcap is not None, num_warps=8
        )
    return losses
