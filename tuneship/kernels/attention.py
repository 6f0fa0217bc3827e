"""Attention that knows where rows begin and end.

Registered with transformers under the name `tuneship`. The model's layers hand their queries,
keys and values over as they are; a *layout* given to the model's forward (`layout=…`) says which
token may see which. `Documents` is the layout of packed training: rows stand one behind the other
and none sees another. Generation brings its own, with a cache (`tuneship.generation`).

Soft-capping (Gemma 2) and sliding windows are honoured, unlike in transformers' `sdpa`, which
drops the cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

NAME = "tuneship"

# Up to so many queries the products are written out: on a CPU, torch's fused attention takes four
# times as long for the backward pass of rows of a hundred tokens.
SHORT = 512


class Layout(Protocol):
    """Which token sees which."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: (heads, tokens, head_dim).
            key, value: (kv_heads, tokens, head_dim).
            softcap: cap·tanh(score / cap) where the model has one.
            window: how many tokens back a token sees, itself included; None for all.

        Returns:
            (tokens, heads, head_dim)
        """
        ...


class Documents:
    """Rows packed one behind the other.

    Args:
        bounds: row i is tokens bounds[i] to bounds[i + 1].
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = list(bounds)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """See `Layout`. One product a row: a mask over all of them would be almost empty."""
        rows = [
            causal(query[:, a:b], key[:, a:b], value[:, a:b], scale, softcap, window)
            for a, b in zip(self.bounds[:-1], self.bounds[1:], strict=True)
        ]
        return torch.cat(rows, dim=1).transpose(0, 1)


def causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Causal attention of the last tokens of one row.

    Args:
        query: (heads, n, head_dim), the row's last n tokens.
        key, value: (kv_heads, m, head_dim), all of its m ≥ n tokens.

    Returns:
        (heads, n, head_dim)
    """
    n, m = query.shape[1], key.shape[1]
    if window is not None and m <= window:
        window = None
    if n == m and softcap is None and window is None and n > SHORT:
        out: Tensor = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0]
    at = torch.arange(m - n, m, device=query.device)[:, None]
    past = torch.arange(m, device=query.device)[None, :]
    seen = past <= at
    if window is not None:
        seen &= past > at - window
    return masked(query, key, value, seen, scale, softcap)


def masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention under a boolean mask, with grouped heads and soft-capping.

    Args:
        query: (…, heads, n, head_dim).
        key, value: (…, kv_heads, m, head_dim).
        seen: broadcastable to (…, heads, n, m); True where a key is seen.

    Returns:
        (…, heads, n, head_dim)
    """
    if softcap is None and query.shape[-2] > SHORT:
        out: Tensor = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
        )
        return out
    # The heads that share a key stand as rows of one product: no key is copied.
    *batch, heads, n, width = query.shape
    shared = key.shape[-3]
    grouped = query.reshape(*batch, shared, heads // shared * n, width)
    scores = (grouped @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.reshape(*batch, heads, n, -1).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1).to(value.dtype).reshape(*batch, shared, heads // shared * n, -1)
    return (weights @ value).reshape(query.shape)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, head_dim) in, (1, tokens, heads, head_dim) out."""
    index: int = module.layer_idx  # type: ignore[assignment]
    out = layout.attend(index, query[0], key[0], value[0], scaling, softcap, sliding_window)
    return out[None], None


AttentionInterface.register(NAME, _attention)
