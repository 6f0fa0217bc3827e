"""Frozen weight matrices: how a row meets one on the way forward, and its gradient on the way back.

`Plain` multiplies in the weight's own type. `Fp8` holds e4m3 with a scale a row, once as it stands
and once transposed, because a product with row-wise scales needs both operands' scales along the
outer edges: 2 bytes a weight, as bfloat16 has, at twice the arithmetic. `Joined` has room for the adapters
that meet the weight, so that one product gives their share too. `Nf4` holds four bits a
weight (QLoRA, arXiv:2305.14314) and unpacks the matrix for each product: for cards that do not hold
more.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tuneship.kernels.reference import Rows, aligned


class Frozen(Protocol):
    """y = x·Wᵀ forward, dx = dy·W back, for a weight W of (outputs, inputs)."""

    fp8: bool
    """Whether rows are wanted quantised."""
    beside: Tensor | None
    """The weight with its adapters' B beside it, where there is room for them."""
    below: Tensor | None
    """The weight with their A below it, likewise."""

    def forward(self, rows: Rows) -> Tensor:
        """(tokens, outputs)"""
        ...

    def backward(self, rows: Rows) -> Tensor:
        """(tokens, inputs)"""
        ...


class Plain:
    """A weight in float32 or bfloat16."""

    fp8 = False
    beside: Tensor | None = None
    below: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def forward(self, rows: Rows) -> Tensor:
        """See `Frozen`."""
        assert rows.plain is not None
        return rows.plain @ self.weight.t()

    def backward(self, rows: Rows) -> Tensor:
        """See `Frozen`."""
        assert rows.plain is not None
        return rows.plain @ self.weight


class Joined(Plain):
    """A weight in float32 or bfloat16, with room for the adapters of its linears (`tuneship.kernels.low`).

    B stands beside the weight, y = [x x·Aᵀ]·[W B]ᵀ and dy·[W B] = [dy·W dy·B], or A below it, x·[W; A]ᵀ =
    [x·Wᵀ x·Aᵀ] and dx = [dy dy·B]·[W; A]. The first saves a pass over the output and its gradient, the second
    one over the input and its gradient: take the wider.
    """

    MOST = 128
    """Room for more ranks costs more arithmetic than it saves."""

    def __init__(self, weight: Tensor, room: int, *, below: bool) -> None:
        outputs, inputs = weight.shape
        whole = aligned(*((outputs + room, inputs) if below else (outputs, inputs + room)), weight).zero_()
        self.beside, self.below = (None, whole) if below else (whole, None)
        super().__init__(whole[:outputs, :inputs])
        self.weight.copy_(weight)


class Fp8:
    """A weight in e4m3, quantised from (outputs, inputs) by `quantise` (rows in, values and scales out)."""

    fp8 = True
    beside: Tensor | None = None
    below: Tensor | None = None

    def __init__(self, weight: Tensor, quantise: Any) -> None:
        self.dtype = weight.dtype
        self.there = quantise(weight)
        self.back = quantise(weight.t().contiguous())

    def forward(self, rows: Rows) -> Tensor:
        """See `Frozen`."""
        return self._product(rows, *self.there)

    def backward(self, rows: Rows) -> Tensor:
        """See `Frozen`."""
        return self._product(rows, *self.back)

    def _product(self, rows: Rows, weight: Tensor, scale: Tensor) -> Tensor:
        assert rows.quantised is not None and rows.scale is not None
        if not weight.is_cuda:
            return ((rows.quantised.float() * rows.scale) @ (weight.float() * scale).t()).to(self.dtype)
        return torch._scaled_mm(
            rows.quantised,
            weight.t(),
            scale_a=rows.scale,
            scale_b=scale.t(),
            out_dtype=self.dtype,
            use_fast_accum=True,
        )


class Nf4:
    """A weight in NF4 blocks of 64, by bitsandbytes."""

    fp8 = False
    beside: Tensor | None = None
    below: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        from bitsandbytes import functional

        self.packed, self.state = functional.quantize_4bit(
            weight.contiguous(), quant_type="nf4", compress_statistics=True
        )

    def _weight(self) -> Tensor:
        from bitsandbytes import functional

        weight: Tensor = functional.dequantize_4bit(self.packed, self.state)
        return weight

    def forward(self, rows: Rows) -> Tensor:
        """See `Frozen`."""
        assert rows.plain is not None
        return rows.plain @ self._weight().t()

    def backward(self, rows: Rows) -> Tensor:
        """See `Frozen`."""
        assert rows.plain is not None
        return rows.plain @ self._weight()
