"""The adapters of a decoder layer: what they add on the way forward, and their gradients on the way back.

The parameters stay float32 for the optimiser. `sides` copies those of all layers into the layers'
precision at once, the A of one fused product side by side: a pass of two hundred tokens would
otherwise spend more time on launching such copies than on its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear: adds scale · dropout(x)·Aᵀ·Bᵀ."""

    name: str
    product: str
    start: int
    end: int
    scale: float
    dropout: float


@dataclass(frozen=True)
class Side:
    """One layer's adapters."""

    adapters: tuple[Adapter, ...]
    parameters: tuple[Tensor, ...]
    """A and B of each adapter in turn, (r, inputs) and (outputs, r), float32."""
    a: dict[str, Tensor]
    """Fused product → the A of its adapters one below the other, (sum of r, inputs), in the layer's precision."""
    b: tuple[Tensor, ...]
    """scale · B of each adapter, likewise."""


def sides(layers: Sequence[tuple[Sequence[Adapter], Sequence[Tensor]]], dtype: torch.dtype) -> list[Side]:
    """All layers' adapters, with copies of their parameters in `dtype`.

    Args:
        layers: a layer's adapters, those of one product together, and their A and B in turn.
    """
    tensors = [tensor.detach() for _, weights in layers for tensor in weights]
    scales = [adapter.scale for adapters, _ in layers for adapter in adapters]
    if not tensors:
        return [Side((), (), {}, ()) for _ in layers]
    scaled = torch._foreach_mul(tensors[1::2], scales)
    flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=tensors[0].device)
    copies: list[Tensor] = []
    made: list[Side] = []
    at = 0

    def take(rows: int, columns: int) -> Tensor:
        nonlocal at
        at += rows * columns
        return flat[at - rows * columns : at].view(rows, columns)

    for adapters, weights in layers:
        a: dict[str, Tensor] = {}
        for product in dict.fromkeys(adapter.product for adapter in adapters):
            shapes = [w.shape for w, adapter in zip(weights[::2], adapters, strict=True) if adapter.product == product]
            ranks = [rows for rows, _ in shapes]
            a[product] = take(sum(ranks), shapes[0][1])
            copies += torch.split(a[product], ranks)
        b = tuple(take(*weight.shape) for weight in weights[1::2])
        made.append(Side(tuple(adapters), tuple(weights), a, b))
    # The A of a layer stand in its adapters' order, since those of one product are together.
    torch._foreach_copy_(copies, tensors[::2])
    torch._foreach_copy_([tensor for side in made for tensor in side.b], scaled)
    return made


class Low:
    """One pass through one layer's adapters: what they need to go back, and the gradients."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.inner: dict[str, Tensor] = {}
        """Product → x·Aᵀ of its adapters side by side, from the way forward."""
        self.d_inner: dict[str, Tensor] = {}
        self.gradients: list[Tensor | None] = [None] * len(side.parameters)

    def of(self, product: str) -> list[int]:
        """The adapters of a product, in the order of its outputs."""
        return [index for index, adapter in enumerate(self.side.adapters) if adapter.product == product]

    def _parts(self, product: str, both: Tensor, dim: int) -> list[tuple[int, Tensor]]:
        """A tensor of all of a product's adapters, parted among them."""
        here = self.of(product)
        ranks = [self.side.b[index].shape[1] for index in here]
        return list(zip(here, torch.split(both, ranks, dim), strict=True))

    def _outputs(self, index: int, y: Tensor) -> Tensor:
        """An adapter's columns of its product's output."""
        return y[:, self.side.adapters[index].start : self.side.adapters[index].end]

    def masks(self, product: str, x: Tensor) -> dict[int, Tensor]:
        """Dropout's masks, drawn for each adapter on its own, as PEFT does."""
        adapters = self.side.adapters
        return {
            index: torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - adapters[index].dropout)
            for index in self.of(product)
            if adapters[index].dropout
        }

    def _dropped(self, index: int, x: Tensor, masks: dict[int, Tensor]) -> Tensor:
        return x * masks[index] / (1 - self.side.adapters[index].dropout) if index in masks else x

    def add(self, product: str, x: Tensor | None, y: Tensor, masks: dict[int, Tensor]) -> None:
        """Adds the adapters' share to a product's output, in place."""
        if product not in self.side.a:
            return
        assert x is not None
        a = self.side.a[product]
        if masks:
            parts = [self._dropped(index, x, masks) @ part.t() for index, part in self._parts(product, a, 0)]
            self.inner[product] = torch.cat(parts, -1)
        else:
            self.inner[product] = x @ a.t()
        for index, inner in self._parts(product, self.inner[product], -1):
            self._outputs(index, y).addmm_(inner, self.side.b[index].t())

    def add_back(self, product: str, dy: Tensor | None, dx: Tensor | None, masks: dict[int, Tensor]) -> None:
        """Adds the adapters' share to the gradient of a product's input, in place."""
        if product not in self.side.a:
            return
        assert dy is not None
        a = self.side.a[product]
        both = self.d_inner[product] = dy.new_empty(len(dy), len(a))
        for index, part in self._parts(product, both, -1):
            torch.mm(self._outputs(index, dy), self.side.b[index], out=part)
        if dx is None:
            return
        if masks:
            for (index, d_inner), (_, part) in zip(
                self._parts(product, both, -1), self._parts(product, a, 0), strict=True
            ):
                dx += self._dropped(index, d_inner @ part, masks)
        else:
            dx.addmm_(both, a)

    def note(self, product: str, x: Tensor | None, dy: Tensor | None, masks: dict[int, Tensor]) -> None:
        """Notes the gradients of the adapters' parameters."""
        if product not in self.side.a:
            return
        assert x is not None and dy is not None
        both = self.d_inner[product].t()
        if masks:
            d_a = [
                (index, _product(part, self._dropped(index, x, masks))) for index, part in self._parts(product, both, 0)
            ]
        else:
            d_a = self._parts(product, _product(both, x), 0)
        for index, gradient in d_a:
            self.gradients[2 * index] = gradient
        for index, inner in self._parts(product, self.inner[product], -1):
            d_b = _product(self._outputs(index, dy).t(), inner)
            self.gradients[2 * index + 1] = d_b.mul_(self.side.adapters[index].scale)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32; on a GPU it is summed so and never rounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()
