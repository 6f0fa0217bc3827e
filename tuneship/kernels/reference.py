"""The fused operations of a Gemma 2 layer, written out in plain torch.

They say what `fused` computes, run where there is no GPU, and are what the GPU's kernels are tested
against. Every function takes and gives tensors of packed tokens: (tokens, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tuneship.kernels import to_device

FP8 = torch.float8_e4m3fn

# Largest number of e4m3 (OCP 8-bit floating point specification, table 1).
FP8_MAX = 448.0


@dataclass(frozen=True)
class Rows:
    """A matrix whose rows meet a frozen weight: as it is, and in fp8 where the weight is fp8."""

    plain: Tensor | None
    """None where nobody needs it: the product is in fp8, and no adapter meets it."""
    quantised: Tensor | None = None
    scale: Tensor | None = None
    """(rows, 1), float32: plain ≈ quantised · scale."""
    whole: Tensor | None = None
    """plain, and behind each row the room that was wanted."""


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in e4m3 with one scale a row."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x / scale).to(FP8), scale


@dataclass(frozen=True)
class Want:
    """Which forms of a matrix its readers need."""

    plain: bool = True
    fp8: bool = False
    room: int = 0
    """Columns to leave free behind each row of the plain form."""


PLAIN = Want()


def aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """An empty matrix whose rows begin at multiples of 128 bytes: an H100 multiplies others up to 7 % slower."""
    step = 128 // like.element_size()
    return like.new_empty(rows, -(-columns // step) * step)[:, :columns]


def rows(x: Tensor, want: Want) -> Rows:
    """A matrix in the forms that are wanted."""
    values, scale = quantise(x) if want.fp8 else (None, None)
    if not want.plain:
        return Rows(None, values, scale)
    whole = torch.nn.functional.pad(x, (0, want.room)) if want.room else x
    return Rows(whole[:, : x.shape[1]] if want.room else x, values, scale, whole)


def norm(x: Tensor, weight: Tensor, eps: float, want: Want = PLAIN) -> tuple[Rows, Tensor]:
    """Gemma's RMS norm, x / rms(x) · (1 + weight); and 1 / rms(x), (tokens,)."""
    r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return rows((x.float() * r * (1.0 + weight.float())).to(x.dtype), want), r[:, 0]


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + norm(x); and 1 / rms(x)."""
    normed, r = norm(x, weight, eps)
    assert normed.plain is not None
    return residual + normed.plain, r


def add_norm_norm(
    residual: Tensor, x: Tensor, weight: Tensor, then: Tensor, eps: float, want: Want = PLAIN
) -> tuple[Tensor, Tensor, Rows, Tensor]:
    """`add_norm`, and the norm of its sum with the weight `then`."""
    out, r = add_norm(residual, x, weight, eps)
    return out, r, *norm(out, then, eps, want)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    add: Tensor | None = None,
    want: Want = PLAIN,
    again: Tensor | None = None,
) -> Rows:
    """Gradient of the norm's input, plus `add`; the norm itself is written into `again`."""
    if again is not None:
        again.copy_(x.float() * r[:, None] * (1.0 + weight.float()))
    g = dy.float() * (1.0 + weight.float())
    unit = x.float() * r[:, None]
    dx = r[:, None] * (g - unit * (g * unit).mean(-1, keepdim=True))
    if add is not None:
        dx = dx + add.float()
    return rows(dx.to(x.dtype), want)


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
    """The way back through `add_norm_norm`: the gradient of its residual, and that of what it added to it."""
    dx = norm_backward(dy, x, weight, r, add, PLAIN, again).plain
    assert dx is not None
    return dx, norm_backward(dx, before, before_weight, before_r, None, want)


def gelu(gate_up: Tensor, want: Want = PLAIN) -> Rows:
    """gelu(gate) · up, with the tanh form of gelu, of (tokens, 2 · width)."""
    gate, up = gate_up.float().chunk(2, -1)
    return rows((torch.nn.functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype), want)


def gelu_backward(dy: Tensor, gate_up: Tensor, want: Want = PLAIN, active: bool = False) -> tuple[Rows, Tensor | None]:
    """Gradient of (gate, up), (tokens, 2 · width); and gelu(gate) · up again, if `active`."""
    gate, up = gate_up.float().chunk(2, -1)
    inner = 0.7978845608028654 * (gate + 0.044715 * gate.pow(3))
    t = torch.tanh(inner)
    slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * gate.pow(2))
    half = 0.5 * gate * (1 + t)
    gradient = torch.cat([dy.float() * up * slope, dy.float() * half], -1).to(gate_up.dtype)
    return rows(gradient, want), gelu(gate_up).plain if active else None


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary embedding of the first `heads` heads of (tokens, all heads · head_dim), in place of what was given.

    Args:
        cos, sin: (tokens, head_dim / 2), float32.
    """
    half = cos.shape[-1]
    turned = qkv[:, : heads * 2 * half].view(len(qkv), heads, 2, half)
    a, b = turned.float().unbind(2)
    c, s = cos[:, None], sin[:, None]
    turned.copy_(torch.stack([a * c - b * s, b * c + a * s], 2))
    return qkv


@dataclass(frozen=True)
class Bounds:
    """Where the row of each token begins and ends."""

    first: Tensor
    """(tokens,), int32: the first token of its row."""
    last: Tensor
    """(tokens,), int32: one past the last."""
    longest: int
    """No row has more tokens."""

    @classmethod
    def of(cls, edges: Sequence[int]) -> Self:
        """Of rows one behind the other, on the CPU: row i is tokens edges[i] to edges[i + 1]."""
        at = torch.tensor(edges, dtype=torch.int32)
        lengths = at.diff()
        return cls(at[:-1].repeat_interleave(lengths), at[1:].repeat_interleave(lengths), int(lengths.max()))

    def to(self, device: torch.device) -> Self:
        """On a device; to a GPU without waiting for what it is doing."""
        return replace(self, first=to_device(self.first, device), last=to_device(self.last, device))


def attend(
    qkv: Tensor, bounds: Bounds, shape: tuple[int, int, int], scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each row.

    Args:
        qkv: (tokens, (heads + 2 · kv_heads) · head_dim), rotated.
        shape: (heads, kv_heads, head_dim).

    Returns:
        (tokens, heads · head_dim), and the log of each softmax's denominator, (heads, tokens).
    """
    q, k, v = _heads(qkv, shape)
    scores = _scores(q, k, bounds, scale, softcap, window)[0]
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    return out.transpose(0, 1).reshape(len(qkv), -1), lse


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
    """Gradient of what `rotate` was given to make qkv: the rotation is undone before it is rounded."""
    heads, kv_heads, head_dim = shape
    q, k, v = _heads(qkv, shape)
    scores, slope = _scores(q, k, bounds, scale, softcap, window)
    p = (scores - lse[..., None]).exp()
    do_heads = do.view(len(do), heads, head_dim).transpose(0, 1).float()
    out_heads = out.view(len(out), heads, head_dim).transpose(0, 1).float()
    delta = (do_heads * out_heads).sum(-1, keepdim=True)
    ds = p * (do_heads @ v.float().transpose(-1, -2) - delta) * slope * scale
    dq = ds @ k.float()
    dk = (ds.transpose(-1, -2) @ q.float()).view(kv_heads, -1, *q.shape[1:]).sum(1)
    dv = (p.transpose(-1, -2) @ do_heads).view(kv_heads, -1, *q.shape[1:]).sum(1)
    gradient = torch.cat([x.transpose(0, 1).reshape(len(qkv), -1) for x in (dq, dk, dv)], -1)
    return rotate(gradient, cos, -sin, heads + kv_heads).to(qkv.dtype)


def _heads(qkv: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(heads, tokens, head_dim) each, keys and values repeated for their heads."""
    heads, kv_heads, head_dim = shape
    parts = torch.split(qkv.view(len(qkv), -1, head_dim).transpose(0, 1), [heads, kv_heads, kv_heads])
    q, k, v = parts
    return q, k.repeat_interleave(heads // kv_heads, 0), v.repeat_interleave(heads // kv_heads, 0)


def _scores(
    q: Tensor, k: Tensor, bounds: Bounds, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Masked scores, and the slope of the cap."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    slope = torch.ones_like(scores)
    if softcap is not None:
        bend = torch.tanh(scores / softcap)
        scores, slope = softcap * bend, 1 - bend * bend
    at = torch.arange(q.shape[1], device=q.device)
    seen = (at[None] <= at[:, None]) & (at[None] >= bounds.first[:, None])
    if window is not None:
        seen &= at[None] > at[:, None] - window
    return scores.masked_fill(~seen, float("-inf")), slope


def label_gradient(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Replaces logits by the gradient of their summed cross-entropy; returns each row's loss, float32.

    Args:
        logits: (labels, vocabulary), before the cap; overwritten.
        labels: (labels,), int64.
    """
    capped = logits.float()
    slope = capped.new_ones(())
    if softcap is not None:
        bend = torch.tanh(capped / softcap)
        capped, slope = softcap * bend, 1 - bend * bend
    norm = capped.logsumexp(-1, keepdim=True)
    losses = norm - capped.gather(1, labels[:, None])
    # d loss / d logits = softmax - one-hot, through the cap's slope 1 - tanh².
    gradient = capped.sub_(norm).exp_().scatter_add_(1, labels[:, None], -torch.ones_like(norm))
    logits.copy_(gradient.mul_(slope))
    return losses[:, 0]
