"""Gemma 2 for LoRA: a decoder whose base is frozen, forward and backward written out.

Autograd would keep what it does not need, compute gradients nobody wants, and launch ten small
kernels where one will do. Here a layer is one function with a backward of its own: the queries,
keys and values are one product, gate and up are one, the norms, the gate and the rotary embedding
are fused with the quantisation that the next product needs, and attention visits only what a row
can see. What is kept for the way back is chosen (`keep`): everything, all but the feed-forward's
gate, or the layer's input alone.

The arithmetic is transformers' Gemma2ForCausalLM: soft-capped attention, alternating sliding
windows, four norms a layer with 1 + weight, tanh-gelu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tuneship.kernels import reference
from tuneship.kernels.frozen import Frozen
from tuneship.kernels.reference import Bounds, Rows

Keep = Literal["all", "most", "input"]


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


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear: adds scale · dropout(x)·Aᵀ·Bᵀ."""

    name: str
    product: str
    start: int
    end: int
    scale: float
    dropout: float


def batch(positions: Tensor, bounds: Bounds, shape: Shape) -> Batch:
    """The rotary angles of each token."""
    exponent = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angle = positions.float()[:, None] / shape.rope_theta**exponent
    return Batch(angle.cos(), angle.sin(), bounds)


def run_layer(
    x: Tensor, layer: Layer, of: Batch, adapters: Sequence[Adapter], weights: Sequence[Tensor], keep: Keep
) -> Tensor:
    """One layer: (tokens, width) to (tokens, width).

    Args:
        weights: A and B of each adapter in turn, (r, inputs) and (outputs, r), float32.
    """
    out: Tensor = _Layer.apply(x, layer, of, tuple(adapters), keep, *weights)  # type: ignore[no-untyped-call]
    return out


def run_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm after the last layer."""
    out: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def operations(x: Tensor) -> Any:
    """The module that computes on this device."""
    if not x.is_cuda:
        return reference
    from tuneship.kernels import fused

    return fused


class _Low:
    """The low-rank side of one layer: which adapters meet which product, and what they need to go back."""

    def __init__(self, adapters: Sequence[Adapter], weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.adapters = adapters
        self.a = [w.to(dtype) for w in weights[::2]]
        self.b = [(w * adapter.scale).to(dtype) for w, adapter in zip(weights[1::2], adapters, strict=True)]
        self.gradients: list[Tensor | None] = [None] * (2 * len(adapters))

    def of(self, product: str) -> list[int]:
        return [index for index, adapter in enumerate(self.adapters) if adapter.product == product]

    def masks(self, product: str, x: Tensor) -> dict[int, Tensor]:
        """Dropout's masks, drawn for each adapter on its own, as PEFT does."""
        return {
            index: torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.adapters[index].dropout)
            for index in self.of(product)
            if self.adapters[index].dropout
        }

    def dropped(self, index: int, x: Tensor, masks: dict[int, Tensor]) -> Tensor:
        return x * masks[index] / (1 - self.adapters[index].dropout) if index in masks else x

    def forward(self, product: str, x: Tensor, y: Tensor, masks: dict[int, Tensor]) -> None:
        """Adds the adapters' share to a product's output, in place."""
        here = self.of(product)
        if here and not masks:
            # One product with all A at once: the input is read once.
            inner = (x @ torch.cat([self.a[index] for index in here]).t()).split([len(self.a[index]) for index in here], -1)
        else:
            inner = tuple(self.dropped(index, x, masks) @ self.a[index].t() for index in here)
        for index, low in zip(here, inner, strict=True):
            adapter = self.adapters[index]
            y[:, adapter.start : adapter.end].addmm_(low, self.b[index].t())

    def backward(self, product: str, x: Callable[[], Tensor], dy: Tensor, dx: Tensor | None, masks: dict[int, Tensor]) -> None:
        """Notes the adapters' gradients, and adds their share to the input's, in place."""
        here = self.of(product)
        if not here:
            return
        source = x()
        for index in here:
            adapter, a, b = self.adapters[index], self.a[index], self.b[index]
            part = dy[:, adapter.start : adapter.end]
            dropped = self.dropped(index, source, masks)
            low, d_low = dropped @ a.t(), part @ b
            self.gradients[2 * index] = (d_low.t() @ dropped).float()
            self.gradients[2 * index + 1] = (part.t() @ low).float() * adapter.scale
            if dx is not None:
                if index in masks:
                    dx += self.dropped(index, d_low @ a, masks)
                else:
                    dx.addmm_(d_low, a)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, of: Batch, adapters: tuple[Adapter, ...], keep: Keep, *weights: Tensor) -> Tensor:
        low = _Low(adapters, weights, x.dtype)
        masks = {}
        if any(adapter.dropout for adapter in adapters):
            widths = {"qkv": layer.shape.width, "o": layer.shape.heads * layer.shape.head_dim,
                      "gate_up": layer.shape.width, "down": layer.shape.feed_forward}  # fmt: skip
            masks = {name: low.masks(name, x.new_empty(len(x), width)) for name, width in widths.items()}
        out, kept = _forward(x, layer, of, low, masks)
        if keep == "input":
            kept = {}
        elif keep == "most":
            kept = {name: tensor for name, tensor in kept.items() if name != "gate_up"}
        ctx.layer, ctx.of, ctx.adapters, ctx.masks = layer, of, adapters, masks
        ctx.names = list(kept)
        ctx.save_for_backward(x, *kept.values(), *weights)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        kept = dict(zip(ctx.names, rest, strict=False))
        low = _Low(ctx.adapters, rest[len(kept) :], x.dtype)
        if "qkv" not in kept:
            kept = _forward(x, ctx.layer, ctx.of, low, ctx.masks)[1]
        dx = _backward(gradients[0].contiguous(), x, kept, ctx.layer, ctx.of, low, ctx.masks, ctx.needs_input_grad[0])
        return dx, None, None, None, None, *low.gradients


def _forward(
    x: Tensor, layer: Layer, of: Batch, low: _Low, masks: dict[str, dict[int, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output, and what the way back needs."""
    ops, shape, products = operations(x), layer.shape, layer.products
    hidden, r_input = ops.norm(x, layer.norms["input"], shape.eps, products["qkv"].fp8)
    qkv = products["qkv"].forward(hidden)
    low.forward("qkv", hidden.plain, qkv, masks.get("qkv", {}))
    qkv = ops.rotate(qkv, of.cos, of.sin, shape.heads + shape.kv_heads).plain
    attended, lse = _attend(ops, qkv, layer, of)
    projected = products["o"].forward(_rows(ops, attended, products["o"]))
    low.forward("o", attended, projected, masks.get("o", {}))
    middle, r_attention = ops.add_norm(x, projected, layer.norms["post_attention"], shape.eps)
    gate_up, r_middle = _gate_up(ops, middle, layer, low, masks)
    active = ops.gelu(gate_up, products["down"].fp8)
    down = products["down"].forward(active)
    low.forward("down", active.plain, down, masks.get("down", {}))
    out, r_down = ops.add_norm(middle, down, layer.norms["post_feedforward"], shape.eps)
    return out, {
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


def _gate_up(
    ops: Any, middle: Tensor, layer: Layer, low: _Low, masks: dict[str, dict[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    product = layer.products["gate_up"]
    hidden, r_middle = ops.norm(middle, layer.norms["pre_feedforward"], layer.shape.eps, product.fp8)
    gate_up = product.forward(hidden)
    low.forward("gate_up", hidden.plain, gate_up, masks.get("gate_up", {}))
    return gate_up, r_middle


def _backward(
    d_out: Tensor,
    x: Tensor,
    kept: dict[str, Tensor],
    layer: Layer,
    of: Batch,
    low: _Low,
    masks: dict[str, dict[int, Tensor]],
    wanted: bool,
) -> Tensor | None:
    """The gradient of the layer's input, if wanted; the adapters' gradients are noted in `low`."""
    ops, shape, products, norms = operations(x), layer.shape, layer.products, layer.norms
    middle = kept["middle"]
    gate_up = kept["gate_up"] if "gate_up" in kept else _gate_up(ops, middle, layer, low, masks)[0]

    d_down = ops.norm_backward(
        d_out, kept["down"], norms["post_feedforward"], kept["r_down"], None, products["down"].fp8
    )
    d_active = products["down"].backward(d_down)
    low.backward("down", lambda: ops.gelu(gate_up, False).plain, d_down.plain, d_active, masks.get("down", {}))
    d_gate_up = ops.gelu_backward(d_active, gate_up, products["gate_up"].fp8)
    d_hidden = products["gate_up"].backward(d_gate_up)
    low.backward(
        "gate_up",
        lambda: ops.norm(middle, norms["pre_feedforward"], shape.eps, False)[0].plain,
        d_gate_up.plain,
        d_hidden,
        masks.get("gate_up", {}),
    )
    d_middle = ops.norm_backward(d_hidden, middle, norms["pre_feedforward"], kept["r_middle"], d_out, False).plain

    d_projected = ops.norm_backward(
        d_middle, kept["projected"], norms["post_attention"], kept["r_attention"], None, products["o"].fp8
    )
    d_attended = products["o"].backward(d_projected)
    low.backward("o", lambda: kept["attended"], d_projected.plain, d_attended, masks.get("o", {}))
    turned = ops.attend_backward(
        d_attended, kept["attended"], kept["lse"], kept["qkv"], of.bounds, *_attention_numbers(layer)
    )
    d_qkv = ops.rotate(
        turned, of.cos, of.sin, shape.heads + shape.kv_heads, back=True, fp8=products["qkv"].fp8 and wanted
    )
    d_first = products["qkv"].backward(d_qkv) if wanted else None
    low.backward(
        "qkv",
        lambda: ops.norm(x, norms["input"], shape.eps, False)[0].plain,
        d_qkv.plain,
        d_first,
        masks.get("qkv", {}),
    )
    if d_first is None:
        return None
    dx: Tensor = ops.norm_backward(d_first, x, norms["input"], kept["r_input"], d_middle, False).plain
    return dx


def _attend(ops: Any, qkv: Tensor, layer: Layer, of: Batch) -> tuple[Tensor, Tensor]:
    attended: tuple[Tensor, Tensor] = ops.attend(qkv, of.bounds, *_attention_numbers(layer))
    return attended


def _attention_numbers(layer: Layer) -> tuple[tuple[int, int, int], float, float | None, int | None]:
    shape = layer.shape
    return (
        (shape.heads, shape.kv_heads, shape.head_dim),
        shape.scale,
        shape.softcap,
        shape.window if layer.sliding else None,
    )


def _rows(ops: Any, x: Tensor, product: Frozen) -> Rows:
    return Rows(x, *ops.quantise(x)) if product.fp8 else Rows(x)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, r = operations(x).norm(x, weight, eps, False)
        ctx.save_for_backward(x, weight, r)
        plain: Tensor = normed.plain
        return plain

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        return operations(x).norm_backward(gradients[0].contiguous(), x, weight, r, None, False).plain, None, None
