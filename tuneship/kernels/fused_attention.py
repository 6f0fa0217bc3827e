"""Attention over packed rows on a GPU, in Triton. `reference` says what it computes.

Only the blocks of keys that a row can see are visited: rows of a hundred tokens need no more than
three. The heads that share a key stand in one block: its lines are queries times such heads, so that
keys and values are read once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneship.kernels.reference import Bounds

# Less than any logit, and finite: a difference of two of them is 0, not NaN.
LOW: tl.constexpr = tl.constexpr(-1e30)
# Compiled once for every number of tokens, and not again for one that 16 does not divide.
_jit = triton.jit(do_not_specialize=["tokens"])


@triton.jit
def tanh(x):
    """Exact at both ends: exp of a negative number cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _lines(block, kv, tokens, heads, kv_heads, QUERIES: tl.constexpr, SHARED: tl.constexpr):
    """The lines of a block: their places in it, their heads, and whether they are there."""
    line = tl.arange(0, QUERIES * SHARED)
    group = heads // kv_heads
    place, member = line % QUERIES, line // QUERIES
    return place, kv * group + member, (block * QUERIES + place < tokens) & (member < group)


@triton.jit
def _seen(q_at, k_at, first, there, WINDOW: tl.constexpr):
    seen = (k_at[None, :] <= q_at[:, None]) & (k_at[None, :] >= first[:, None]) & there[:, None]
    if WINDOW > 0:
        seen = seen & (k_at[None, :] > q_at[:, None] - WINDOW)
    return seen


@_jit
def _attend(
    qkv, out, lse, firsts, tokens, row, heads, kv_heads, scale, cap,
    DIM: tl.constexpr, QUERIES: tl.constexpr, SHARED: tl.constexpr, KEYS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    block, kv = tl.program_id(0), tl.program_id(1)
    place, head, there = _lines(block, kv, tokens, heads, kv_heads, QUERIES, SHARED)
    q_at = block * QUERIES + place
    dim = tl.arange(0, DIM)
    first_token = (block * QUERIES).to(tl.int64)
    line = qkv + first_token * row + (place * row + head * DIM)[:, None] + dim[None, :]
    q = tl.load(line, mask=there[:, None], other=0.0)
    first = tl.load(firsts + q_at, mask=there, other=tokens)
    # Rows stand in order: the block's first query sees farthest back.
    start = tl.load(firsts + block * QUERIES)
    if WINDOW > 0:
        start = tl.maximum(start, block * QUERIES - WINDOW + 1)
    end = tl.minimum(block * QUERIES + QUERIES, tokens)

    m = tl.full([QUERIES * SHARED], LOW, tl.float32)
    total = tl.zeros([QUERIES * SHARED], tl.float32)
    acc = tl.zeros([QUERIES * SHARED, DIM], tl.float32)
    key = tl.arange(0, KEYS)[:, None] * row + dim[None, :]
    for k_from in range(start // KEYS * KEYS, end, KEYS):
        k_at = k_from + tl.arange(0, KEYS)
        k_there = k_at < tokens
        base = qkv + tl.cast(k_from, tl.int64) * row + (heads + kv) * DIM
        k = tl.load(base + key, mask=k_there[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        if CAPPED:
            s = cap * tanh(s / cap)
        s = tl.where(_seen(q_at, k_at, first, there, WINDOW), s, LOW)
        m_new = tl.maximum(m, tl.max(s, 1))
        # A block that a query does not see at all leaves its sums as they are.
        p = tl.where(s > 0.1 * LOW, tl.exp(s - m_new[:, None]), 0.0)
        fade = tl.exp(m - m_new)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(base + kv_heads * DIM + key, mask=k_there[:, None], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v)
        m = m_new
    total = tl.where(total > 0, total, 1.0)
    line = out + first_token * heads * DIM + ((place * heads + head) * DIM)[:, None] + dim[None, :]
    tl.store(line, acc / total[:, None], mask=there[:, None])
    tl.store(lse + head * tokens + q_at, m + tl.log(total), mask=there)


@triton.jit
def _gradient_of_scores(q, k, v, do, lse, delta, seen, scale, cap, CAPPED: tl.constexpr):
    """The weights and the gradient of q·k of one block, float32."""
    s = tl.dot(q, tl.trans(k)) * scale
    slope = tl.full(s.shape, 1.0, tl.float32)
    if CAPPED:
        bend = tanh(s / cap)
        s = cap * bend
        slope = 1.0 - bend * bend
    p = tl.where(seen, tl.exp(s - lse[:, None]), 0.0)
    ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None]) * slope * scale
    return p, ds


@triton.jit
def _store_turned_back(
    gradient, to, line, first_token, place, cos, sin, there, LINES: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Writes the gradient of what the rotary embedding was given, each line at its offset from `to`."""
    half = tl.arange(0, DIM // 2)[None, :]
    a, b = tl.split(tl.permute(tl.reshape(gradient, [LINES, 2, DIM // 2]), (0, 2, 1)))
    angle = place[:, None] * (DIM // 2) + half
    c = tl.load(cos + first_token * (DIM // 2) + angle, mask=there[:, None], other=0.0)
    s = tl.load(sin + first_token * (DIM // 2) + angle, mask=there[:, None], other=0.0)
    tl.store(to + line[:, None] + half, a * c + b * s, mask=there[:, None])
    tl.store(to + DIM // 2 + line[:, None] + half, b * c - a * s, mask=there[:, None])


@_jit
def _attend_backward_q(
    qkv, do, out, lse, delta, dqkv, cos, sin, firsts, tokens, row, heads, kv_heads, scale, cap,
    DIM: tl.constexpr, QUERIES: tl.constexpr, SHARED: tl.constexpr, KEYS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    block, kv = tl.program_id(0), tl.program_id(1)
    place, head, there = _lines(block, kv, tokens, heads, kv_heads, QUERIES, SHARED)
    q_at = block * QUERIES + place
    dim = tl.arange(0, DIM)
    first_token = (block * QUERIES).to(tl.int64)
    line = place * row + head * DIM
    o_line = ((place * heads + head) * DIM)[:, None] + dim[None, :]
    q = tl.load(qkv + first_token * row + line[:, None] + dim[None, :], mask=there[:, None], other=0.0)
    g = tl.load(do + first_token * heads * DIM + o_line, mask=there[:, None], other=0.0)
    o = tl.load(out + first_token * heads * DIM + o_line, mask=there[:, None], other=0.0)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + head * tokens + q_at, d, mask=there)
    norm = tl.load(lse + head * tokens + q_at, mask=there, other=0.0)
    first = tl.load(firsts + q_at, mask=there, other=tokens)
    # Rows stand in order: the block's first query sees farthest back.
    start = tl.load(firsts + block * QUERIES)
    if WINDOW > 0:
        start = tl.maximum(start, block * QUERIES - WINDOW + 1)
    dq = tl.zeros([QUERIES * SHARED, DIM], tl.float32)
    key = tl.arange(0, KEYS)[:, None] * row + dim[None, :]
    for k_from in range(start // KEYS * KEYS, tl.minimum(block * QUERIES + QUERIES, tokens), KEYS):
        k_at = k_from + tl.arange(0, KEYS)
        k_there = k_at < tokens
        base = qkv + tl.cast(k_from, tl.int64) * row + (heads + kv) * DIM
        k = tl.load(base + key, mask=k_there[:, None], other=0.0)
        v = tl.load(base + kv_heads * DIM + key, mask=k_there[:, None], other=0.0)
        seen = _seen(q_at, k_at, first, there, WINDOW)
        _, ds = _gradient_of_scores(q, k, v, g, norm, d, seen, scale, cap, CAPPED)
        dq += tl.dot(ds.to(k.dtype), k)
    _store_turned_back(dq, dqkv + first_token * row, line, first_token, place, cos, sin, there, QUERIES * SHARED, DIM)


@_jit
def _attend_backward_kv(
    qkv, do, lse, delta, dqkv, cos, sin, firsts, lasts, tokens, row, heads, kv_heads, scale, cap,
    DIM: tl.constexpr, QUERIES: tl.constexpr, SHARED: tl.constexpr, KEYS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    block, kv = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, KEYS)
    k_at = block * KEYS + place
    dim = tl.arange(0, DIM)
    k_there = k_at < tokens
    first_key = (block * KEYS).to(tl.int64)
    k_base = first_key * row + (heads + kv) * DIM
    v_base = k_base + kv_heads * DIM
    key = (place * row)[:, None] + dim[None, :]
    k = tl.load(qkv + k_base + key, mask=k_there[:, None], other=0.0)
    v = tl.load(qkv + v_base + key, mask=k_there[:, None], other=0.0)
    # The last key's row ends last; queries beyond it see none of these keys.
    end = tl.load(lasts + tl.minimum(block * KEYS + KEYS, tokens) - 1)
    if WINDOW > 0:
        end = tl.minimum(end, block * KEYS + KEYS + WINDOW - 1)
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)
    for q_block in range(block * KEYS // QUERIES, tl.cdiv(end, QUERIES)):
        q_place, head, there = _lines(q_block, kv, tokens, heads, kv_heads, QUERIES, SHARED)
        q_at = q_block * QUERIES + q_place
        first_query = tl.cast(q_block * QUERIES, tl.int64)
        line = (q_place * row + head * DIM)[:, None] + dim[None, :]
        o_line = ((q_place * heads + head) * DIM)[:, None] + dim[None, :]
        q = tl.load(qkv + first_query * row + line, mask=there[:, None], other=0.0)
        g = tl.load(do + first_query * heads * DIM + o_line, mask=there[:, None], other=0.0)
        norm = tl.load(lse + head * tokens + q_at, mask=there, other=0.0)
        d = tl.load(delta + head * tokens + q_at, mask=there, other=0.0)
        first = tl.load(firsts + q_at, mask=there, other=tokens)
        seen = _seen(q_at, k_at, first, there, WINDOW)
        p, ds = _gradient_of_scores(q, k, v, g, norm, d, seen, scale, cap, CAPPED)
        dv += tl.dot(tl.trans(p.to(g.dtype)), g)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
    tl.store(dqkv + v_base + key, dv, mask=k_there[:, None])
    _store_turned_back(dk, dqkv + k_base, place * row, first_key, place, cos, sin, k_there, KEYS, DIM)


def attend(
    qkv: Tensor, bounds: Bounds, shape: tuple[int, int, int], scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `reference.attend`."""
    heads, kv_heads, dim = shape
    tokens, row = qkv.shape
    out = torch.empty(tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    shared, (queries, keys), _, _ = _tiles(qkv, heads // kv_heads)
    _attend[(triton.cdiv(tokens, queries), kv_heads)](
        qkv, out, lse, bounds.first, tokens, row, heads, kv_heads, scale, softcap or 1.0,
        dim, queries, shared, keys, softcap is not None, window or 0, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse


def attend_backward(
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
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
    shared, _, for_queries, for_keys = _tiles(qkv, heads // kv_heads)
    numbers = (tokens, row, heads, kv_heads, scale, softcap or 1.0)
    rest = (softcap is not None, window or 0)
    # First the queries: they leave each line's delta, sum(do · out), for the keys.
    queries, keys = for_queries
    _attend_backward_q[(triton.cdiv(tokens, queries), kv_heads)](
        qkv, do, out, lse, delta, dqkv, cos, sin, bounds.first, *numbers,
        dim, queries, shared, keys, *rest, num_warps=4, num_stages=2,
    )  # fmt: skip
    queries, keys = for_keys
    _attend_backward_kv[(triton.cdiv(tokens, keys), kv_heads)](
        qkv, do, lse, delta, dqkv, cos, sin, bounds.first, bounds.last, *numbers,
        dim, queries, shared, keys, *rest, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dqkv


# Passes below this many tokens do not fill the card; then more programs, each with less to do, are faster.
_FEW_TOKENS = 2048


def _tiles(qkv: Tensor, group: int) -> tuple[int, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Heads that share a key, and the queries and keys of a block: forward, for queries, for keys.

    The fastest of 36 on an H100, for rows of a hundred tokens and heads of 256.
    """
    shared = triton.next_power_of_2(group)
    if qkv.element_size() == 4:
        tiles = ((16, 16), (16, 16), (16, 16))
    elif len(qkv) < _FEW_TOKENS:
        tiles = ((64, 32), (32, 32), (64, 16))
    else:
        tiles = ((64, 32), (64, 16), (32, 32))
    there, for_queries, for_keys = ((max(1, lines // shared), keys) for lines, keys in tiles)
    return shared, there, for_queries, for_keys
