"""The linear layer with an adapter, as one operation.

PEFT's own forward makes four temporaries as large as the output and multiplies in float32. Here the
frozen product and the adapter's are accumulated in place, in the base's precision; the adapter's
weights stay float32 for the optimiser. PEFT keeps the parameters, their names and the files.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from tuneship.kernels import operations
from tuneship.kernels.frozen import Frozen, Plain
from tuneship.kernels.reference import Rows

ADAPTER = "default"


def fuse(model: nn.Module) -> None:
    """Replaces the forward of every PEFT linear layer in a model."""
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.forward = MethodType(_forward, module)


def freeze(model: nn.Module, make: Callable[[Tensor], Frozen]) -> None:
    """Replaces the weight of every linear layer of a decoder by a frozen form of it, as fp8.

    The layers keep their names; a weight as such is no longer there, so the model cannot be saved.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            of: Any = module  # What hangs on a module is not typed.
            of.frozen = make(module.weight.detach())
            of.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
            of.forward = MethodType(_frozen_forward, module)


def _frozen_forward(self: nn.Linear, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(flat, flat, self.frozen, self.bias, None, None, 0.0)  # type: ignore[no-untyped-call]
    return y.reshape(*x.shape[:-1], -1)


def _forward(self: PeftLinear, x: Tensor, *_: Any, **__: Any) -> Tensor:
    base, dropout = self.base_layer, self.lora_dropout[ADAPTER]
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        flat,
        dropout(flat),
        getattr(base, "frozen", None) or Plain(base.weight),
        base.bias,
        self.lora_A[ADAPTER].weight,
        self.lora_B[ADAPTER].weight,
        self.scaling[ADAPTER],
    )
    return y.reshape(*x.shape[:-1], -1)


def _rows(x: Tensor, frozen: Frozen) -> Rows:
    return Rows(x, *(operations(x).quantise(x) if frozen.fp8 else ()))


class _LoraLinear(torch.autograd.Function):
    """y = x·Wᵀ + s·(d·Aᵀ)·Bᵀ, with d the input after dropout (x itself where there is none)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        frozen: Frozen,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.frozen, ctx.scale, ctx.same = frozen, scale, dropped is x
        y = frozen.forward(_rows(x, frozen))
        if bias is not None:
            y += bias
        if a is None or b is None:
            ctx.save_for_backward()
            return y
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        inner = dropped @ a.t()
        ctx.save_for_backward(dropped, inner, a, b)
        return y.addmm_(inner, b.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy = gradients[0].contiguous()
        d_x = d_dropped = d_a = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = ctx.frozen.backward(_rows(dy, ctx.frozen))
        if ctx.saved_tensors:
            dropped, inner, a, b = ctx.saved_tensors
            d_inner = dy @ b
            d_a = (d_inner.t() @ dropped).float()
            d_b = (dy.t() @ inner).float() * ctx.scale
            if ctx.same and d_x is not None:
                d_x.addmm_(d_inner, a)
            elif ctx.needs_input_grad[1]:
                d_dropped = d_inner @ a
        return d_x, d_dropped, None, None, d_a, d_b, None
