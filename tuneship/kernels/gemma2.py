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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from tuneship.kernels import operations
from tuneship.kernels.frozen import Frozen
from tuneship.kernels.reference import PLAIN, Bounds, Rows, Want

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


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def _parts(x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
    return list(torch.split(x, sizes, dim))


class _Low:
    """The low-rank side of one layer: which adapters meet which product, and what they need to go back.

    Adapters that stand side by side in a fused product are one pair of matrices here, B block-diagonal:
    the product's output is read and written once for all of them.
    """

    def __init__(self, adapters: Sequence[Adapter], weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.adapters = adapters
        self.a = [w.to(dtype) for w in weights[::2]]
        self.b = [(w * adapter.scale).to(dtype) for w, adapter in zip(weights[1::2], adapters, strict=True)]
        self.inner: dict[int, Tensor] = {}
        """x·Aᵀ of each adapter, from the way forward."""
        self.d_inner: dict[int, Tensor] = {}
        self.gradients: list[Tensor | None] = [None] * (2 * len(adapters))

    def of(self, product: str) -> list[int]:
        """The adapters of a product, in the order of its outputs."""
        return [index for index, adapter in enumerate(self.adapters) if adapter.product == product]

    def _runs(self, product: str) -> list[list[int]]:
        """The same, parted where outputs without an adapter lie between."""
        runs: list[list[int]] = []
        for index in self.of(product):
            if runs and self.adapters[runs[-1][-1]].end == self.adapters[index].start:
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs

    def _span(self, run: list[int]) -> slice:
        return slice(self.adapters[run[0]].start, self.adapters[run[-1]].end)

    def masks(self, product: str, x: Tensor) -> dict[int, Tensor]:
        """Dropout's masks, drawn for each adapter on its own, as PEFT does."""
        return {
            index: torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.adapters[index].dropout)
            for index in self.of(product)
            if self.adapters[index].dropout
        }

    def _dropped(self, index: int, x: Tensor, masks: dict[int, Tensor]) -> Tensor:
        return x * masks[index] / (1 - self.adapters[index].dropout) if index in masks else x

    def add(self, product: str, x: Tensor | None, y: Tensor, masks: dict[int, Tensor]) -> None:
        """Adds the adapters' share to a product's output, in place."""
        here = self.of(product)
        if not here:
            return
        assert x is not None
        if masks:
            inner = [self._dropped(index, x, masks) @ self.a[index].t() for index in here]
        else:
            both = x @ torch.cat([self.a[index] for index in here]).t()
            inner = _parts(both, [len(self.a[index]) for index in here], -1)
        self.inner.update(zip(here, inner, strict=True))
        for run in self._runs(product):
            low = torch.cat([self.inner[index] for index in run], -1)
            y[:, self._span(run)].addmm_(low, _block_diagonal([self.b[index] for index in run]).t())

    def add_back(self, product: str, dy: Tensor | None, dx: Tensor | None, masks: dict[int, Tensor]) -> None:
        """Adds the adapters' share to the gradient of a product's input, in place."""
        here = self.of(product)
        if not here:
            return
        assert dy is not None
        for run in self._runs(product):
            both = dy[:, self._span(run)] @ _block_diagonal([self.b[index] for index in run])
            self.d_inner.update(zip(run, _parts(both, [len(self.a[index]) for index in run], -1), strict=True))
        if dx is None:
            return
        if masks:
            for index in here:
                dx += self._dropped(index, self.d_inner[index] @ self.a[index], masks)
        else:
            dx.addmm_(torch.cat([self.d_inner[i] for i in here], -1), torch.cat([self.a[index] for index in here]))

    def note(self, product: str, x: Tensor | None, dy: Tensor | None, masks: dict[int, Tensor]) -> None:
        """Notes the gradients of the adapters' weights."""
        here = self.of(product)
        if not here:
            return
        assert x is not None and dy is not None
        if masks:
            d_a = [self.d_inner[index].t() @ self._dropped(index, x, masks) for index in here]
        else:
            both = torch.cat([self.d_inner[index] for index in here], -1).t() @ x
            d_a = _parts(both, [len(self.a[index]) for index in here], 0)
        for index, gradient in zip(here, d_a, strict=True):
            self.gradients[2 * index] = gradient.float()
        for run in self._runs(product):
            whole = dy[:, self._span(run)].t() @ torch.cat([self.inner[index] for index in run], -1)
            row = column = 0
            for index in run:
                adapter, rank = self.adapters[index], len(self.a[index])
                height = adapter.end - adapter.start
                block = whole[row : row + height, column : column + rank]
                self.gradients[2 * index + 1] = block.float() * adapter.scale
                row, column = row + height, column + rank


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Layer, of: Batch, adapters: tuple[Adapter, ...], keep: Keep, *weights: Tensor
    ) -> Tensor:
        low = _Low(adapters, weights, x.dtype)
        masks = {}
        if any(adapter.dropout for adapter in adapters):
            masks = {name: low.masks(name, x.new_empty(len(x), width)) for name, width in layer.shape.inputs.items()}
        out, kept = _forward(x, layer, of, low, masks)
        kept |= {f"inner {index}": tensor for index, tensor in low.inner.items()}
        if keep == "input":
            kept = {}
        elif keep == "most":
            kept = {name: tensor for name, tensor in kept.items() if name != "gate_up"}
        ctx.layer, ctx.of, ctx.low, ctx.masks = layer, of, low, masks
        # Saved below, or made again: the low-rank side itself is only weights in the layer's precision.
        low.inner = {}
        ctx.names = list(kept)
        ctx.save_for_backward(x, *kept.values())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        kept = dict(zip(ctx.names, rest, strict=True))
        low: _Low = ctx.low
        if kept:
            low.inner = {index: kept[f"inner {index}"] for index in range(len(low.adapters))}
        else:
            kept = _forward(x, ctx.layer, ctx.of, low, ctx.masks)[1]
        dx = _backward(gradients[0].contiguous(), x, kept, ctx.layer, ctx.of, low, ctx.masks, ctx.needs_input_grad[0])
        return dx, None, None, None, None, *low.gradients


def _forward(
    x: Tensor, layer: Layer, of: Batch, low: _Low, masks: dict[str, dict[int, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output, and what the way back needs."""
    ops, shape, products = operations(x), layer.shape, layer.products
    hidden, r_input = ops.norm(x, layer.norms["input"], shape.eps, _want(layer, low, "qkv"))
    qkv = products["qkv"].forward(hidden)
    low.add("qkv", hidden.plain, qkv, masks.get("qkv", {}))
    qkv = ops.rotate(qkv, of.cos, of.sin, shape.heads + shape.kv_heads).plain
    attended, lse = ops.attend(qkv, of.bounds, *_attention_numbers(layer))
    projected = products["o"].forward(Rows(attended, *(ops.quantise(attended) if products["o"].fp8 else ())))
    low.add("o", attended, projected, masks.get("o", {}))
    middle, r_attention = ops.add_norm(x, projected, layer.norms["post_attention"], shape.eps)
    gate_up, r_middle = _gate_up(ops, middle, layer, low, masks)
    active = ops.gelu(gate_up, _want(layer, low, "down"))
    down = products["down"].forward(active)
    low.add("down", active.plain, down, masks.get("down", {}))
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


def _want(layer: Layer, low: _Low, product: str, *, needed: bool = True) -> Want:
    """The forms in which a product and its adapters read a matrix."""
    fp8 = layer.products[product].fp8 and needed
    return Want(plain=not fp8 or bool(low.of(product)), fp8=fp8)


def _gate_up(
    ops: Any, middle: Tensor, layer: Layer, low: _Low, masks: dict[str, dict[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    hidden, r_middle = ops.norm(middle, layer.norms["pre_feedforward"], layer.shape.eps, _want(layer, low, "gate_up"))
    gate_up = layer.products["gate_up"].forward(hidden)
    low.add("gate_up", hidden.plain, gate_up, masks.get("gate_up", {}))
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
        d_out, kept["down"], norms["post_feedforward"], kept["r_down"], None, _want(layer, low, "down")
    )
    d_active = products["down"].backward(d_down)
    low.add_back("down", d_down.plain, d_active, masks.get("down", {}))
    d_gate_up, active = ops.gelu_backward(d_active, gate_up, _want(layer, low, "gate_up"), bool(low.of("down")))
    low.note("down", active, d_down.plain, masks.get("down", {}))
    d_hidden = products["gate_up"].backward(d_gate_up)
    low.add_back("gate_up", d_gate_up.plain, d_hidden, masks.get("gate_up", {}))
    if low.of("gate_up"):
        hidden = ops.norm(middle, norms["pre_feedforward"], shape.eps, PLAIN)[0].plain
        low.note("gate_up", hidden, d_gate_up.plain, masks.get("gate_up", {}))
    d_middle = ops.norm_backward(d_hidden, middle, norms["pre_feedforward"], kept["r_middle"], d_out, PLAIN).plain

    d_projected = ops.norm_backward(
        d_middle, kept["projected"], norms["post_attention"], kept["r_attention"], None, _want(layer, low, "o")
    )
    d_attended = products["o"].backward(d_projected)
    low.add_back("o", d_projected.plain, d_attended, masks.get("o", {}))
    low.note("o", kept["attended"], d_projected.plain, masks.get("o", {}))
    turned = ops.attend_backward(
        d_attended, kept["attended"], kept["lse"], kept["qkv"], of.bounds, *_attention_numbers(layer)
    )
    d_qkv = ops.rotate(
        turned,
        of.cos,
        of.sin,
        shape.heads + shape.kv_heads,
        back=True,
        want=_want(layer, low, "qkv", needed=wanted),
    )
    d_first = products["qkv"].backward(d_qkv) if wanted else None
    low.add_back("qkv", d_qkv.plain, d_first, masks.get("qkv", {}))
    if low.of("qkv"):
        hidden = ops.norm(x, norms["input"], shape.eps, PLAIN)[0].plain
        low.note("qkv", hidden, d_qkv.plain, masks.get("qkv", {}))
    if d_first is None:
        return None
    dx: Tensor = ops.norm_backward(d_first, x, norms["input"], kept["r_input"], d_middle, PLAIN).plain
    return dx


def _attention_numbers(layer: Layer) -> tuple[tuple[int, int, int], float, float | None, int | None]:
    shape = layer.shape
    return (
        (shape.heads, shape.kv_heads, shape.head_dim),
        shape.scale,
        shape.softcap,
        shape.window if layer.sliding else None,
    )


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
