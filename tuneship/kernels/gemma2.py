"""Gemma 2 for LoRA: a decoder whose base is frozen, forward and backward written out.

Autograd would keep what it does not need, compute gradients nobody wants, and launch ten small
kernels where one will do. Here a layer is one function with a backward of its own: the queries,
keys and values are one product, gate and up are one, the norms, the gate and the rotary embedding
are fused with the quantisation that the next product needs, and attention visits only what a row
can see. What is kept for the way back is chosen (`keep`): everything, all but the active values that
an adapter of the down projection reads, all but the feed-forward's gate too, or the layer's input alone.

The arithmetic is transformers' Gemma2ForCausalLM: soft-capped attention, alternating sliding
windows, four norms a layer with 1 + weight, tanh-gelu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from tuneship.kernels import operations
from tuneship.kernels.frozen import Frozen
from tuneship.kernels.low import Low, Side
from tuneship.kernels.reference import PLAIN, Bounds, Rows, Want

Keep = Literal["all", "most", "some", "input"]
# What each leaves out, to be made again on the way back.
_LEFT_OUT: dict[Keep, tuple[str, ...]] = {"all": (), "most": ("active",), "some": ("active", "gate_up")}


@dataclass(frozen=True)
class Shape:
    """The numbers of a Gemma 2."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    scale: float
    """Of q·k: query_pre_attn_scalar^-½."""
    softcap: float | None
    window: int
    eps: float
    rope_theta: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        """From a Gemma 2's config.json."""
        rope = config.get("rope_parameters") or {}
        return cls(
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            feed_forward=config["intermediate_size"],
            scale=config["query_pre_attn_scalar"] ** -0.5,
            softcap=config.get("attn_logit_softcapping"),
            window=config["sliding_window"],
            eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        )

    @property
    def parts(self) -> dict[str, list[tuple[str, int, int]]]:
        """Fused product → its linears: (name, first output, last output + 1)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": [("q_proj", 0, q), ("k_proj", q, q + kv), ("v_proj", q + kv, q + 2 * kv)],
            "o": [("o_proj", 0, self.width)],
            "gate_up": [("gate_proj", 0, self.feed_forward), ("up_proj", self.feed_forward, 2 * self.feed_forward)],
            "down": [("down_proj", 0, self.width)],
        }

    @property
    def inputs(self) -> dict[str, int]:
        """Fused product → the width of what it multiplies."""
        return {
            "qkv": self.width,
            "o": self.heads * self.head_dim,
            "gate_up": self.width,
            "down": self.feed_forward,
        }


@dataclass
class Layer:
    """One layer's frozen weights."""

    shape: Shape
    sliding: bool
    products: dict[str, Frozen]
    """qkv, o, gate_up, down."""
    norms: dict[str, Tensor]
    """input, post_attention, pre_feedforward, post_feedforward."""


@dataclass(frozen=True)
class Batch:
    """Packed rows, as a layer needs them."""

    cos: Tensor
    sin: Tensor
    bounds: Bounds


def batch(positions: Tensor, bounds: Bounds, shape: Shape) -> Batch:
    """The rotary angles of each token."""
    exponent = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angle = positions.float()[:, None] / shape.rope_theta**exponent
    return Batch(angle.cos(), angle.sin(), bounds)


def run_layer(x: Tensor, layer: Layer, of: Batch, side: Side, keep: Keep, at: Tensor | None = None) -> Tensor:
    """One layer with its adapters: (tokens, width) to (tokens, width).

    Args:
        at: (places,), int64, no place twice: the output there only, (places, width). Nothing but its keys and
            values is computed of the other tokens, nor on the way back.
    """
    out: Tensor = _Layer.apply(x, layer, of, side, keep, at, *side.parameters)  # type: ignore[no-untyped-call]
    return out


def run_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm after the last layer."""
    out: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Layer, of: Batch, side: Side, keep: Keep, at: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        low = Low(side)
        masks = {}
        if any(adapter.dropout for adapter in side.adapters):
            sizes = {name: len(x) if at is None or name == "qkv" else len(at) for name in layer.shape.inputs}
            masks = {n: low.masks(n, x.new_empty(sizes[n], width)) for n, width in layer.shape.inputs.items()}
        out, kept = _forward(x, layer, of, low, masks, at)
        kept |= {f"inner {product}": tensor for product, tensor in low.inner.items()}
        kept = {} if keep == "input" else {name: t for name, t in kept.items() if name not in _LEFT_OUT[keep]}
        ctx.layer, ctx.of, ctx.low, ctx.masks, ctx.at = layer, of, low, masks, at
        # Saved below, or made again.
        low.inner = {}
        ctx.names = list(kept)
        ctx.save_for_backward(x, *kept.values())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        kept = dict(zip(ctx.names, rest, strict=True))
        low: Low = ctx.low
        if kept:
            low.inner = {product: kept[f"inner {product}"] for product in low.side.a}
        else:
            kept = _forward(x, ctx.layer, ctx.of, low, ctx.masks, ctx.at)[1]
        d_out, wanted = gradients[0].contiguous(), ctx.needs_input_grad[0]
        dx = _backward(d_out, x, kept, ctx.layer, ctx.of, low, ctx.masks, ctx.at, wanted)
        return dx, None, None, None, None, None, *low.gradients()


def _forward(
    x: Tensor, layer: Layer, of: Batch, low: Low, masks: dict[str, dict[int, Tensor]], at: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output, and what the way back needs."""
    ops, shape, products = operations(x), layer.shape, layer.products
    hidden, r_input = ops.norm(x, layer.norms["input"], shape.eps, _want(layer, low, "qkv", room=True))
    qkv = low.forward("qkv", products["qkv"], hidden, masks.get("qkv", {}))
    qkv = ops.rotate(qkv, of.cos, of.sin, shape.heads + shape.kv_heads)
    attended, lse = ops.attend(qkv, of.bounds, *_attention_numbers(layer, of.bounds))
    chosen = attended if at is None else attended.index_select(0, at)
    rows = Rows(chosen, *(ops.quantise(chosen) if products["o"].fp8 else ()))
    projected = low.forward("o", products["o"], rows, masks.get("o", {}))
    middle, r_attention, hidden, r_middle = ops.add_norm_norm(
        x if at is None else x.index_select(0, at),
        projected,
        layer.norms["post_attention"],
        layer.norms["pre_feedforward"],
        shape.eps,
        _want(layer, low, "gate_up", room=True),
    )
    gate_up = low.forward("gate_up", products["gate_up"], hidden, masks.get("gate_up", {}))
    active = ops.gelu(gate_up, _want(layer, low, "down"))
    down = low.forward("down", products["down"], active, masks.get("down", {}))
    out, r_down = ops.add_norm(middle, down, layer.norms["post_feedforward"], shape.eps)
    return out, {
        **({"active": active.plain} if low.of("down") else {}),
        "r_input": r_input,
        "qkv": qkv,
        "attended": attended,
        "lse": lse,
        "projected": projected,
        "r_attention": r_attention,
        "middle": middle,
        "r_middle": r_middle,
        "gate_up": gate_up,
        "down": down,
        "r_down": r_down,
    }


def _want(layer: Layer, low: Low, product: str, *, needed: bool = True, room: bool = False) -> Want:
    """The forms in which a product and its adapters read a matrix, its input or its output's gradient."""
    frozen, a = layer.products[product], low.side.a.get(product)
    fp8 = frozen.fp8 and needed
    joined = frozen.beside is not None or frozen.below is not None
    columns = len(a) if room and joined and a is not None else 0
    return Want(plain=not fp8 or a is not None, fp8=fp8, room=columns)


def _backward(
    d_out: Tensor,
    x: Tensor,
    kept: dict[str, Tensor],
    layer: Layer,
    of: Batch,
    low: Low,
    masks: dict[str, dict[int, Tensor]],
    at: Tensor | None,
    wanted: bool,
) -> Tensor | None:
    """The gradient of the layer's input, if wanted; the adapters' gradients are noted in `low`."""
    ops, shape, products, norms = operations(x), layer.shape, layer.products, layer.norms
    middle = kept["middle"]
    gate_up = kept.get("gate_up")
    if gate_up is None:
        hidden = ops.norm(middle, norms["pre_feedforward"], shape.eps, _want(layer, low, "gate_up", room=True))[0]
        gate_up = low.forward("gate_up", products["gate_up"], hidden, masks.get("gate_up", {}))

    d_down = ops.norm_backward(
        d_out, kept["down"], norms["post_feedforward"], kept["r_down"], None, _want(layer, low, "down", room=True)
    )
    d_active = low.backward("down", products["down"], d_down, masks.get("down", {}))
    active = kept.get("active")
    missing = active is None and bool(low.of("down"))
    d_gate_up, again = ops.gelu_backward(d_active, gate_up, _want(layer, low, "gate_up"), missing)
    low.note("down", again if missing else active, d_down.plain, masks.get("down", {}))
    d_hidden = low.backward("gate_up", products["gate_up"], d_gate_up, masks.get("gate_up", {}))
    hidden = torch.empty_like(middle) if low.of("gate_up") else None
    d_middle, d_projected = ops.norm_norm_backward(
        d_hidden,
        middle,
        norms["pre_feedforward"],
        kept["r_middle"],
        d_out,
        kept["projected"],
        norms["post_attention"],
        kept["r_attention"],
        _want(layer, low, "o", room=True),
        hidden,
    )
    low.note("gate_up", hidden, d_gate_up.plain, masks.get("gate_up", {}))
    d_attended = low.backward("o", products["o"], d_projected, masks.get("o", {}))
    assert d_attended is not None
    attended = kept["attended"]
    low.note("o", attended if at is None else attended.index_select(0, at), d_projected.plain, masks.get("o", {}))
    if at is not None:
        # The layer's other places have no gradient of their own; only what looked back at them.
        d_attended, d_middle = (t.new_zeros(len(x), t.shape[1]).index_copy_(0, at, t) for t in (d_attended, d_middle))
    turned = ops.attend_backward(
        d_attended, attended, kept["lse"], kept["qkv"], of.cos, of.sin, of.bounds, *_attention_numbers(layer, of.bounds)
    )
    d_qkv = Rows(turned, *(ops.quantise(turned) if products["qkv"].fp8 and wanted else ()))
    d_first = low.backward("qkv", products["qkv"], d_qkv, masks.get("qkv", {}), wanted)
    hidden, dx = torch.empty_like(x) if low.of("qkv") else None, None
    if d_first is not None:
        dx = ops.norm_backward(d_first, x, norms["input"], kept["r_input"], d_middle, PLAIN, hidden).plain
    elif hidden is not None:
        hidden = ops.norm(x, norms["input"], shape.eps, PLAIN)[0].plain
    low.note("qkv", hidden, d_qkv.plain, masks.get("qkv", {}))
    return dx


def _attention_numbers(layer: Layer, bounds: Bounds) -> tuple[tuple[int, int, int], float, float | None, int | None]:
    shape = layer.shape
    # Rows that a window holds are seen whole, by the kernel that the other layers have compiled already.
    window = shape.window if layer.sliding and bounds.longest > shape.window else None
    return (shape.heads, shape.kv_heads, shape.head_dim), shape.scale, shape.softcap, window


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, r = operations(x).norm(x, weight, eps, PLAIN)
        ctx.save_for_backward(x, weight, r)
        plain: Tensor = normed.plain
        return plain

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        return operations(x).norm_backward(gradients[0].contiguous(), x, weight, r, None, PLAIN).plain, None, None
