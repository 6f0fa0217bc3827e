"""The adapters of a decoder layer: what they add on the way forward, and their gradients on the way back.

The parameters stay float32 for the optimiser. `sides` copies those of all layers into the layers'
precision at once, the A of one fused product side by side: a pass of two hundred tokens would
otherwise spend more time on launching such copies than on its arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuneship.kernels.frozen import Frozen
from tuneship.kernels.reference import Rows, aligned


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


def sides(
    layers: Sequence[tuple[Sequence[Adapter], Sequence[Tensor]]],
    products: Sequence[Mapping[str, Frozen]],
    dtype: torch.dtype,
) -> list[Side]:
    """All layers' adapters, with copies of their parameters in `dtype`.

    The copies stand with the frozen weight where it has room for them.

    Args:
        layers: a layer's adapters, those of one product together, and their A and B in turn.
        products: each layer's frozen weights.
    """
    tensors = [tensor.detach() for _, weights in layers for tensor in weights]
    scales = [adapter.scale for adapters, _ in layers for adapter in adapters]
    if not tensors:
        return [Side((), (), {}, ()) for _ in layers]
    flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=tensors[0].device)
    at = 0

    def take(shape: tuple[int, int]) -> Tensor:
        nonlocal at
        at += shape[0] * shape[1]
        return flat[at - shape[0] * shape[1] : at].view(shape)

    made: list[Side] = []
    a_copies: list[Tensor] = []
    for (adapters, weights), frozen in zip(layers, products, strict=True):
        a: dict[str, Tensor] = {}
        b: list[Tensor] = []
        for product in dict.fromkeys(adapter.product for adapter in adapters):
            here = [index for index, adapter in enumerate(adapters) if adapter.product == product]
            ranks, inputs = [len(weights[2 * index]) for index in here], weights[2 * here[0]].shape[1]
            beside, below = frozen[product].beside, frozen[product].below
            a[product] = take((sum(ranks), inputs)) if below is None else below[-sum(ranks) :]
            a_copies += torch.split(a[product], ranks)
            column = inputs
            for index, rank in zip(here, ranks, strict=True):
                outputs = slice(adapters[index].start, adapters[index].end)
                if beside is None:
                    b.append(take((outputs.stop - outputs.start, rank)))
                else:
                    b.append(beside[outputs, column : column + rank])
                column += rank
        made.append(Side(tuple(adapters), tuple(weights), a, tuple(b)))
    # Few launches for those that lie together; one each for those between a weight's rows.
    torch._foreach_copy_(a_copies, tensors[::2])
    scaled = torch._foreach_mul(tensors[1::2], scales)
    pairs = list(zip((tensor for side in made for tensor in side.b), scaled, strict=True))
    dense = [(ours, theirs) for ours, theirs in pairs if ours.is_contiguous()]
    if dense:
        torch._foreach_copy_([ours for ours, _ in dense], [theirs for _, theirs in dense])
    for ours, theirs in pairs:
        if not ours.is_contiguous():
            ours.copy_(theirs)
    return made


class Low:
    """One pass through one layer's adapters: what they need to go back, and the gradients."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.inner: dict[str, Tensor] = {}
        """Product → x·Aᵀ of its adapters side by side, from the way forward."""
        self.d_inner: dict[str, Tensor] = {}
        self._noted: dict[int, Tensor] = {}
        """Parameter's index → its gradient, B's before the scale."""

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

    def forward(self, product: str, frozen: Frozen, rows: Rows, masks: dict[int, Tensor]) -> Tensor:
        """x·Wᵀ of a product with its adapters' share; `rows` have room for x·Aᵀ where B stands beside the weight."""
        if product not in self.side.a:
            return frozen.forward(rows)
        x, a = rows.plain, self.side.a[product]
        assert x is not None
        if frozen.below is not None and not masks:
            y, self.inner[product] = torch.split(x @ frozen.below.t(), [len(frozen.below) - len(a), len(a)], -1)
        elif masks:
            parts = [self._dropped(index, x, masks) @ part.t() for index, part in self._parts(product, a, 0)]
            self.inner[product] = torch.cat(parts, -1)
        else:
            self.inner[product] = x @ a.t()
        if frozen.beside is not None:
            assert rows.whole is not None
            rows.whole[:, x.shape[1] :].copy_(self.inner[product])
            return rows.whole @ frozen.beside.t()
        if frozen.below is None or masks:
            y = frozen.forward(rows)
        for index, inner in self._parts(product, self.inner[product], -1):
            self._outputs(index, y).addmm_(inner, self.side.b[index].t())
        return y

    def backward(
        self, product: str, frozen: Frozen, rows: Rows, masks: dict[int, Tensor], wanted: bool = True
    ) -> Tensor | None:
        """dy·W of a product with its adapters' share; `rows` have room for dy·B where A stands below the weight.

        Where the input's gradient is not wanted, only what the parameters' gradients need is computed.
        """
        if product not in self.side.a:
            return frozen.backward(rows) if wanted else None
        dy, a = rows.plain, self.side.a[product]
        assert dy is not None
        if frozen.beside is not None:
            inputs = a.shape[1]
            if not wanted:
                self.d_inner[product] = dy @ frozen.beside[:, inputs:]
                return None
            both = torch.mm(dy, frozen.beside, out=aligned(len(dy), inputs + len(a), dy))
            dx, self.d_inner[product] = torch.split(both, [inputs, len(a)], -1)
        else:
            joined = frozen.below is not None and wanted and not masks
            both = rows.whole[:, dy.shape[1] :] if joined and rows.whole is not None else dy.new_empty(len(dy), len(a))
            self.d_inner[product] = both
            for index, part in self._parts(product, both, -1):
                torch.mm(self._outputs(index, dy), self.side.b[index], out=part)
            if not wanted:
                return None
            if joined:
                assert rows.whole is not None and frozen.below is not None
                return rows.whole @ frozen.below
            dx = frozen.backward(rows)
        if masks:
            for (index, d_inner), (_, part) in zip(
                self._parts(product, self.d_inner[product], -1), self._parts(product, a, 0), strict=True
            ):
                dx += self._dropped(index, d_inner @ part, masks)
        else:
            dx.addmm_(self.d_inner[product], a)
        return dx

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
            self._noted[2 * index] = gradient
        for index, inner in self._parts(product, self.inner[product], -1):
            self._noted[2 * index + 1] = _product(self._outputs(index, dy).t(), inner)

    def gradients(self) -> list[Tensor]:
        """Of all parameters, in their order; once, after every product's are noted."""
        # Handed over, not shown: autograd copies a gradient that somebody else holds too.
        found = [self._noted.pop(index) for index in range(len(self.side.parameters))]
        if found:
            torch._foreach_mul_(found[1::2], [adapter.scale for adapter in self.side.adapters])
        return found


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32; on a GPU it is summed so and never rounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()
