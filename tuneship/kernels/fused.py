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

from tuneship.kernels.reference import FP8, FP8_MAX, PLAIN, Bounds, Rows, Want

MAX: tl.constexpr = tl.constexpr(FP8_MAX)
# Less than any logit, and finite: a difference of two of them is 0, not NaN.
LOW: tl.constexpr = tl.constexpr(-1e30)


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


def _outputs(tokens: int, width: int, like: Tensor, want: Want) -> tuple[Rows, tuple[Tensor, Tensor, Tensor]]:
    """Room for rows, and the three pointers that a kernel takes (`like` where a form is not wanted)."""
    whole = torch.empty(tokens, width + want.room, dtype=like.dtype, device=like.device) if want.plain else None
    plain = whole if whole is None or not want.room else whole[:, :width]
    quantised = torch.empty(tokens, width, dtype=FP8, device=like.device) if want.fp8 else None
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=like.device) if want.fp8 else None
    return Rows(plain, quantised, scale, whole), tuple(like if t is None else t for t in (plain, quantised, scale))  # type: ignore[return-value]


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
    out, pointers = _outputs(tokens, width, x, want)
    r = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, warps = _block(width)
    _norm[(tokens,)](
        x, weight, *pointers, r, width, width + want.room, eps, block, want.plain, want.fp8, num_warps=warps
    )
    return out, r


@triton.jit
def _add_norm(residual, x, weight, out, r_out, width, stride, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(x + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
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
    out = torch.empty_like(residual)
    r = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, warps = _block(width)
    _add_norm[(tokens,)](residual, x, weight, out, r, width, x.stride(0), eps, block, num_warps=warps)
    return out, r


@triton.jit
def _norm_backward(
    dy, x, weight, r_in, add, plain, quantised, scale, width, dy_stride, x_stride, stride,
    BLOCK: tl.constexpr, ADD: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
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
    dx = r * (g - unit * (tl.sum(g * unit, 0) / width))
    if ADD:
        dx += tl.load(add + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    _put_rows(dx, plain, quantised, scale, token, width, stride, columns, inside, x.dtype.element_ty, IN_PLAIN, IN_FP8)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, add: Tensor | None = None, want: Want = PLAIN
) -> Rows:
    """See `reference.norm_backward`."""
    tokens, width = x.shape
    out, pointers = _outputs(tokens, width, x, want)
    block, warps = _block(width)
    _norm_backward[(tokens,)](
        dy,
        x,
        weight,
        r,
        x if add is None else add,
        *pointers,
        width,
        dy.stride(0),
        x.stride(0),
        width + want.room,
        block,
        add is not None,
        want.plain,
        want.fp8,
        num_warps=warps,
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
def _gelu_piece(gate_up, at, width, inside):
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    t = _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    return (0.5 * gate * (1.0 + t) * up).to(gate_up.dtype.element_ty)


@triton.jit
def _gelu(
    gate_up, plain, quantised, scale, width,
    BLOCK: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    # A row is walked twice: for its largest number, and to write it. The second walk finds it in the
    # cache; holding a row of 14,336 in registers would spill.
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


def gelu(gate_up: Tensor, want: Want = PLAIN) -> Rows:
    """See `reference.gelu`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, pointers = _outputs(tokens, width, gate_up, want)
    _gelu[(tokens,)](gate_up, *pointers, width, 2048, want.plain, want.fp8, num_warps=16 if want.fp8 else 8)
    return out


@triton.jit
def _gelu_backward_piece(dy, gate_up, token, columns, width, inside):
    g = tl.load(dy + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + token * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    t = _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
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


def gelu_backward(dy: Tensor, gate_up: Tensor, want: Want = PLAIN, active: bool = False) -> tuple[Rows, Tensor | None]:
    """See `reference.gelu_backward`."""
    tokens, width = dy.shape
    out, pointers = _outputs(tokens, 2 * width, gate_up, want)
    again = torch.empty_like(dy) if active else None
    _gelu_backward[(tokens,)](
        dy,
        gate_up,
        *pointers,
        dy if again is None else again,
        width,
        8192,
        want.plain,
        want.fp8,
        active,
        num_warps=16 if want.fp8 else 8,
    )
    return out, again


# --- rotary embedding -------------------------------------------------------------------------


@triton.jit
def _rotate(
    qkv, cos, sin, plain, quantised, scale, all_heads, heads, sign,
    HALF: tl.constexpr, HEADS: tl.constexpr, IN_PLAIN: tl.constexpr, IN_FP8: tl.constexpr,
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
    first = (a * c - b * s).to(qkv.dtype.element_ty)
    second = (b * c + a * s).to(qkv.dtype.element_ty)
    if IN_PLAIN:
        tl.store(plain + at, first, mask=inside)
        tl.store(plain + at + HALF, second, mask=inside)
    if IN_FP8:
        x, y = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), tl.max(tl.max(tl.abs(y), 1), 0))
        q = tl.maximum(largest, 1e-12) / MAX
        tl.store(scale + token, q)
        tl.store(quantised + at, (x / q).to(quantised.dtype.element_ty), mask=inside)
        tl.store(quantised + at + HALF, (y / q).to(quantised.dtype.element_ty), mask=inside)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, *, back: bool = False, want: Want = PLAIN) -> Rows:
    """See `reference.rotate`."""
    tokens, width = qkv.shape
    half = cos.shape[-1]
    all_heads = width // (2 * half)
    out, pointers = _outputs(tokens, width, qkv, want)
    sign = -1.0 if back else 1.0
    _rotate[(tokens,)](
        qkv, cos, sin, *pointers, all_heads, heads, sign,
        half, triton.next_power_of_2(all_heads), want.plain, want.fp8, num_warps=8,
    )  # fmt: skip
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


def _tile(qkv: Tensor) -> tuple[int, int]:
    """Queries and keys of one block on the way back: what was fastest on rows of a hundred tokens, heads of 256."""
    return (32, 32) if qkv.element_size() == 2 else (16, 16)


def attend(
    qkv: Tensor, bounds: Bounds, shape: tuple[int, int, int], scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `reference.attend`."""
    heads, kv_heads, dim = shape
    tokens, row = qkv.shape
    out = torch.empty(tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    m, n = (64, 32) if qkv.element_size() == 2 else (16, 16)
    _attend[(triton.cdiv(tokens, m), heads)](
        qkv, out, lse, bounds.first, tokens, row, heads, kv_heads, scale, softcap or 1.0,
        dim, m, n, softcap is not None, window or 0, num_warps=4, num_stages=2,
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
    m, n = _tile(qkv)
    common = (scale, softcap or 1.0, dim, m, n, softcap is not None, window or 0)
    _attend_backward_q[(triton.cdiv(tokens, m), heads)](
        qkv, do, lse, delta, dqkv, bounds.first, tokens, row, heads, kv_heads, *common, num_warps=4, num_stages=2
    )
    _attend_backward_kv[(triton.cdiv(tokens, n), kv_heads)](
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


# --- the head ---------------------------------------------------------------------------------


@triton.jit
def _capped(logits, at, inside, cap, CAPPED: tl.constexpr):
    """Capped logits, and the cap's slope."""
    z = tl.load(logits + at, mask=inside, other=LOW).to(tl.float32)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAPPED:
        bend = _tanh(z / cap)
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
        chosen = cap * _tanh(chosen / cap)
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
