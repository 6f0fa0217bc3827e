"""The linear layer with an adapter, as one operation.

PEFT's own forward makes four temporaries as large as the output and multiplies in float32. Here the
frozen product and the adapter's are accumulated in place, in the base's precision; the adapter's
weights stay float32 for the optimiser. PEFT keeps the parameters, their names and the files.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

ADAPTER = "default"


def fuse(model: nn.Module) -> None:
    """Replaces the forward of every PEFT linear layer in a model."""
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.forward = MethodType(_forward, module)


def _forward(self: PeftLinear, x: Tensor, *_: Any, **__: Any) -> Tensor:
    base, dropout = self.base_layer, self.lora_dropout[ADAPTER]
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        flat,
        dropout(flat),
        base.weight,
        base.bias,
        self.lora_A[ADAPTER].weight,
        self.lora_B[ADAPTER].weight,
        self.scaling[ADAPTER],
    )
    return y.reshape(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """y = x·Wᵀ + s·(d·Aᵀ)·Bᵀ, with d the input after dropout (x itself where there is none)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        inner = dropped @ a.t()
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        ctx.same = dropped is x
        ctx.scale = scale
        ctx.save_for_backward(dropped, inner, weight, a, b)
        return y.addmm_(inner, b.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dropped, inner, weight, a, b = ctx.saved_tensors
        dy = gradients[0]
        d_inner = dy @ b
        d_a = (d_inner.t() @ dropped).float()
        d_b = (dy.t() @ inner).float() * ctx.scale
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = dy @ weight
            if ctx.same:
                d_x.addmm_(d_inner, a)
        if ctx.needs_input_grad[1] and not ctx.same:
            d_dropped = d_inner @ a
        return d_x, d_dropped, None, None, d_a, d_b, None
