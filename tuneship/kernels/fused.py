"""The fused operations of a Gemma 2 layer on a GPU, in Triton. `reference` says what they compute.

Each reads its inputs once and writes its outputs once; where the next product is in fp8, the
quantised rows are written in the same pass. A program works on one token, or on 64 of them in
attention, where only the blocks of keys that a row can see are visited: rows of a hundred tokens
need no more than three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneship.kernels.reference import FP8, FP8_MAX, Bounds, Rows

MAX: tl.constexpr = tl.constexpr(FP8_MAX)


@triton.jit
def _put_rows(value, plain, quantised, scale, token, width, columns, inside, FP8_TOO: tl.constexpr):
    """Writes a row, and its fp8 form with its scale."""
    tl.store(plain + token * width + columns, value, mask=inside)
    if FP8_TOO:
        # Of what is stored, not of the float32 before it: the same as quantising the stored row.
        stored = value.to(plain.dtype.element_ty).to(tl.float32)
        s = tl.maximum(tl.max(tl.abs(stored), 0), 1e-12) / MAX
        tl.store(scale + token, s)
        tl.store(quantised + token * width + columns, (stored / s).to(quantised.dtype.element_ty), mask=inside)


def _outputs(tokens: int, width: int, like: Tensor, fp8: bool) -> tuple[Rows, tuple[Tensor, Tensor, Tensor]]:
    """Room for rows, and the three pointers that a kernel takes (dummies where there is no fp8)."""
    plain = torch.empty(tokens, width, dtype=like.dtype, device=like.device)
    if not fp8:
        return Rows(plain), (plain, plain, plain)
    quantised = torch.empty(tokens, width, dtype=FP8, device=like.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=like.device)
    return Rows(plain, quantised, scale), (plain, quantised, scale)


def _block(width: int) -> tuple[int, int]:
    """Block size and warps for a row of `width`."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(4, block // 1024))


# --- norms ------------------------------------------------------------------------------------


@triton.jit
def _norm(x, weight, plain, quantised, scale, r_out, width, eps, BLOCK: tl.constexpr, FP8_TOO: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / width + eps)
    tl.store(r_out + token, r)
    _put_rows(v * r * (1.0 + w), plain, quantised, scale, token, width, columns, inside, FP8_TOO)


def norm(x: Tensor, weight: Tensor, eps: float, fp8: bool) -> tuple[Rows, Tensor]:
    """See `reference.norm`."""
    tokens, width = x.shape
    out, pointers = _outputs(tokens, width, x, fp8)
    r = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, warps = _block(width)
    _norm[(tokens,)](x, weight, *pointers, r, width, eps, block, fp8, num_warps=warps)
    return out, r


@triton.jit
def _add_norm(residual, x, weight, out, r_out, width, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / width + eps)
    tl.store(r_out + token, r)
    # The norm is rounded before it is added, as in the model that was trained.
    normed = (v * r * (1.0 + w)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * width + columns, before + normed, mask=inside)


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_norm`."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    r = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, warps = _block(width)
    _add_norm[(tokens,)](residual, x, weight, out, r, width, eps, block, num_warps=warps)
    return out, r


@triton.jit
def _norm_backward(
    dy, x, weight, r_in, add, plain, quantised, scale, width,
    BLOCK: tl.constexpr, ADD: tl.constexpr, FP8_TOO: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(dy + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_in + token)
    g = g * (1.0 + w)
    unit = v * r
    dx = r * (g - unit * (tl.sum(g * unit, 0) / width))
    if ADD:
        dx += tl.load(add + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    _put_rows(dx, plain, quantised, scale, token, width, columns, inside, FP8_TOO)


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, add: Tensor | None, fp8: bool) -> Rows:
    """See `reference.norm_backward`."""
    tokens, width = x.shape
    out, pointers = _outputs(tokens, width, x, fp8)
    block, warps = _block(width)
    _norm_backward[(tokens,)](
        dy, x, weight, r, x if add is None else add, *pointers, width, block, add is not None, fp8, num_warps=warps
    )
    return out


# --- the feed-forward's gate ------------------------------------------------------------------


@triton.jit
def _tanh(x):
    # Exact at both ends: exp of a negative number cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _gelu(gate_up, plain, quantised, scale, width, BLOCK: tl.constexpr, FP8_TOO: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + token * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    t = _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    _put_rows(0.5 * gate * (1.0 + t) * up, plain, quantised, scale, token, width, columns, inside, FP8_TOO)


def gelu(gate_up: Tensor, fp8: bool) -> Rows:
    """See `reference.gelu`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, pointers = _outputs(tokens, width, gate_up, fp8)
    block, warps = _block(width)
    _gelu[(tokens,)](gate_up, *pointers, width, block, fp8, num_warps=warps)
    return out


@triton.jit
def _gelu_backward(dy, gate_up, plain, quantised, scale, width, BLOCK: tl.constexpr, FP8_TOO: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(dy + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + token * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    t = _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
    dgate = (g * up * slope).to(plain.dtype.element_ty)
    dup = (g * 0.5 * gate * (1.0 + t)).to(plain.dtype.element_ty)
    at = token * 2 * width + columns
    tl.store(plain + at, dgate, mask=inside)
    tl.store(plain + at + width, dup, mask=inside)
    if FP8_TOO:
        a, b = dgate.to(tl.float32), dup.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
        s = tl.maximum(largest, 1e-12) / MAX
        tl.store(scale + token, s)
        tl.store(quantised + at, (a / s).to(quantised.dtype.element_ty), mask=inside)
        tl.store(quantised + at + width, (b / s).to(quantised.dtype.element_ty), mask=inside)


def gelu_backward(dy: Tensor, gate_up: Tensor, fp8: bool) -> Rows:
    """See `reference.gelu_backward`."""
    tokens, width = dy.shape
    out, pointers = _outputs(tokens, 2 * width, gate_up, fp8)
    block, warps = _block(width)
    _gelu_backward[(tokens,)](dy, gate_up, *pointers, width, block, fp8, num_warps=warps)
    return out


# --- rotary embedding -------------------------------------------------------------------------


@triton.jit
def _rotate(
    qkv, cos, sin, plain, quantised, scale, all_heads, heads, sign,
    HALF: tl.constexpr, HEADS: tl.constexpr, FP8_TOO: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    at = token * all_heads * 2 * HALF + head * 2 * HALF + column
    inside = (head < all_heads) & (column < HALF)
    a = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + HALF, mask=inside, other=0.0).to(tl.float32)
    turned = head < heads
    c = tl.where(turned, tl.load(cos + token * HALF + column), 1.0)
    s = tl.where(turned, tl.load(sin + token * HALF + column) * sign, 0.0)
    first = (a * c - b * s).to(plain.dtype.element_ty)
    second = (b * c + a * s).to(plain.dtype.element_ty)
    tl.store(plain + at, first, mask=inside)
    tl.store(plain + at + HALF, second, mask=inside)
    if FP8_TOO:
        x, y = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), tl.max(tl.max(tl.abs(y), 1), 0))
        q = tl.maximum(largest, 1e-12) / MAX
        tl.store(scale + token, q)
        tl.store(quantised + at, (x / q).to(quantised.dtype.element_ty), mask=inside)
        tl.store(quantised + at + HALF, (y / q).to(quantised.dtype.element_ty), mask=inside)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, *, back: bool = False, fp8: bool = False) -> Rows:
    """See `reference.rotate`."""
    tokens, width = qkv.shape
    half = cos.shape[-1]
    all_heads = width // (2 * half)
    out, pointers = _outputs(tokens, width, qkv, fp8)
    sign = -1.0 if back else 1.0
    _rotate[(tokens,)](
        qkv, cos, sin, *pointers, all_heads, heads, sign, half, triton.next_power_of_2(all_heads), fp8, num_warps=8
    )
    return out


# --- attention --------------------------------------------------------------------------------


@triton.jit
def _seen(q_at, k_at, first, tokens, WINDOW: tl.constexpr):
    seen = (k_at[None, :] <= q_at[:, None]) & (k_at[None, :] >= first[:, None]) & (q_at[:, None] < tokens)
    if WINDOW > 0:
        seen = seen & (k_at[None, :] > q_at[:, None] - WINDOW)
    return seen


@triton.jit
def _attend(
    qkv, out, lse, firsts, tokens, row, heads, kv_heads, scale, cap,
    DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    kv = head // (heads // kv_heads)
    q_at = block * M + tl.arange(0, M)
    dim = tl.arange(0, DIM)
    there = q_at < tokens
    at = q_at.to(tl.int64)[:, None] * row + dim[None, :]
    q = tl.load(qkv + at + head * DIM, mask=there[:, None], other=0.0)
    first = tl.load(firsts + q_at, mask=there, other=tokens)
    # Rows stand in order: the block's first query sees farthest back.
    start = tl.load(firsts + block * M)
    if WINDOW > 0:
        start = tl.maximum(start, block * M - WINDOW + 1)
    end = tl.minimum(block * M + M, tokens)

    m = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    for k_from in range(start // N * N, end, N):
        k_at = k_from + tl.arange(0, N)
        k_there = k_at < tokens
        base = k_at.to(tl.int64)[:, None] * row + dim[None, :]
        k = tl.load(qkv + base + (heads + kv) * DIM, mask=k_there[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        if CAPPED:
            s = cap * _tanh(s / cap)
        s = tl.where(_seen(q_at, k_at, first, tokens, WINDOW), s, -1e30)
        m_new = tl.maximum(m, tl.max(s, 1))
        # A block that a query does not see at all leaves its sums as they are.
        p = tl.where(s > -1e29, tl.exp(s - m_new[:, None]), 0.0)
        fade = tl.exp(m - m_new)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(qkv + base + (heads + kv_heads + kv) * DIM, mask=k_there[:, None], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v)
        m = m_new
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    o_at = q_at.to(tl.int64)[:, None] * (heads * DIM) + head * DIM + dim[None, :]
    tl.store(out + o_at, acc, mask=there[:, None])
    tl.store(lse + head * tokens + q_at, m + tl.log(tl.where(total > 0, total, 1.0)), mask=there)


def attend(
    qkv: Tensor, bounds: Bounds, shape: tuple[int, int, int], scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `reference.attend`."""
    heads, kv_heads, dim = shape
    tokens, row = qkv.shape
    out = torch.empty(tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    _attend[(triton.cdiv(tokens, 64), heads)](
        qkv, out, lse, bounds.first, tokens, row, heads, kv_heads, scale, softcap or 1.0,
        dim, 64, 32, softcap is not None, window or 0, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse


@triton.jit
def _delta(do, out, delta, tokens, heads, DIM: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    at = token * heads * DIM + head[:, None] * DIM + tl.arange(0, DIM)[None, :]
    inside = (head < heads)[:, None]
    a = tl.load(do + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + head * tokens + token, tl.sum(a * b, 1), mask=head < heads)


@triton.jit
def _gradient_of_scores(q, k, v, do, lse, delta, seen, scale, cap, CAPPED: tl.constexpr):
    """The weights and the gradient of q·k of one block, float32."""
    s = tl.dot(q, tl.trans(k)) * scale
    slope = tl.full(s.shape, 1.0, tl.float32)
    if CAPPED:
        bend = _tanh(s / cap)
        s = cap * bend
        slope = 1.0 - bend * bend
    p = tl.where(seen, tl.exp(s - lse[:, None]), 0.0)
    ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None]) * slope * scale
    return p, ds


@triton.jit
def _attend_backward_q(
    qkv, do, lse, delta, dqkv, firsts, tokens, row, heads, kv_heads, scale, cap,
    DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    kv = head // (heads // kv_heads)
    q_at = block * M + tl.arange(0, M)
    dim = tl.arange(0, DIM)
    there = q_at < tokens
    at = q_at.to(tl.int64)[:, None] * row + dim[None, :]
    o_at = q_at.to(tl.int64)[:, None] * (heads * DIM) + head * DIM + dim[None, :]
    q = tl.load(qkv + at + head * DIM, mask=there[:, None], other=0.0)
    g = tl.load(do + o_at, mask=there[:, None], other=0.0)
    norm = tl.load(lse + head * tokens + q_at, mask=there, other=0.0)
    d = tl.load(delta + head * tokens + q_at, mask=there, other=0.0)
    first = tl.load(firsts + q_at, mask=there, other=tokens)
    # Rows stand in order: the block's first query sees farthest back.
    start = tl.load(firsts + block * M)
    if WINDOW > 0:
        start = tl.maximum(start, block * M - WINDOW + 1)
    dq = tl.zeros([M, DIM], tl.float32)
    for k_from in range(start // N * N, tl.minimum(block * M + M, tokens), N):
        k_at = k_from + tl.arange(0, N)
        k_there = k_at < tokens
        base = k_at.to(tl.int64)[:, None] * row + dim[None, :]
        k = tl.load(qkv + base + (heads + kv) * DIM, mask=k_there[:, None], other=0.0)
        v = tl.load(qkv + base + (heads + kv_heads + kv) * DIM, mask=k_there[:, None], other=0.0)
        seen = _seen(q_at, k_at, first, tokens, WINDOW)
        _, ds = _gradient_of_scores(q, k, v, g, norm, d, seen, scale, cap, CAPPED)
        dq += tl.dot(ds.to(k.dtype), k)
    tl.store(dqkv + at + head * DIM, dq, mask=there[:, None])


@triton.jit
def _attend_backward_kv(
    qkv, do, lse, delta, dqkv, firsts, lasts, tokens, row, heads, kv_heads, scale, cap,
    DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    block, kv = tl.program_id(0), tl.program_id(1)
    k_at = block * N + tl.arange(0, N)
    dim = tl.arange(0, DIM)
    k_there = k_at < tokens
    base = k_at.to(tl.int64)[:, None] * row + dim[None, :]
    k = tl.load(qkv + base + (heads + kv) * DIM, mask=k_there[:, None], other=0.0)
    v = tl.load(qkv + base + (heads + kv_heads + kv) * DIM, mask=k_there[:, None], other=0.0)
    # The last key's row ends last; queries beyond it see none of these keys.
    end = tl.load(lasts + tl.minimum(block * N + N, tokens) - 1)
    if WINDOW > 0:
        end = tl.minimum(end, block * N + N + WINDOW - 1)
    dk = tl.zeros([N, DIM], tl.float32)
    dv = tl.zeros([N, DIM], tl.float32)
    group = heads // kv_heads
    for member in range(group):
        head = kv * group + member
        for q_from in range(block * N // M * M, end, M):
            q_at = q_from + tl.arange(0, M)
            there = q_at < tokens
            o_at = q_at.to(tl.int64)[:, None] * (heads * DIM) + head * DIM + dim[None, :]
            at = q_at.to(tl.int64)[:, None] * row + head * DIM + dim[None, :]
            q = tl.load(qkv + at, mask=there[:, None], other=0.0)
            g = tl.load(do + o_at, mask=there[:, None], other=0.0)
            norm = tl.load(lse + head * tokens + q_at, mask=there, other=0.0)
            d = tl.load(delta + head * tokens + q_at, mask=there, other=0.0)
            first = tl.load(firsts + q_at, mask=there, other=tokens)
            seen = _seen(q_at, k_at, first, tokens, WINDOW)
            p, ds = _gradient_of_scores(q, k, v, g, norm, d, seen, scale, cap, CAPPED)
            dv += tl.dot(tl.trans(p.to(g.dtype)), g)
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
    tl.store(dqkv + base + (heads + kv) * DIM, dk, mask=k_there[:, None])
    tl.store(dqkv + base + (heads + kv_heads + kv) * DIM, dv, mask=k_there[:, None])


def attend_backward(
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    bounds: Bounds,
    shape: tuple[int, int, int],
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """See `reference.attend_backward`."""
    heads, kv_heads, dim = shape
    tokens, row = qkv.shape
    delta = torch.empty_like(lse)
    dqkv = torch.empty_like(qkv)
    _delta[(tokens,)](do, out, delta, tokens, heads, dim, triton.next_power_of_2(heads), num_warps=4)
    common = (scale, softcap or 1.0, dim, 64, 32, softcap is not None, window or 0)
    _attend_backward_q[(triton.cdiv(tokens, 64), heads)](
        qkv, do, lse, delta, dqkv, bounds.first, tokens, row, heads, kv_heads, *common, num_warps=4, num_stages=2
    )
    _attend_backward_kv[(triton.cdiv(tokens, 32), kv_heads)](
        qkv, do, lse, delta, dqkv, bounds.first, bounds.last, tokens, row, heads, kv_heads, *common,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return dqkv


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
