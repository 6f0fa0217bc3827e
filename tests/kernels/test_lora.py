"""The fused linear layer with an adapter against PEFT's own."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from tuneship.kernels import lora

IN, OUT = 24, 40


def layer(*, bias: bool, dropout: float) -> Linear:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    made = Linear(base, lora.ADAPTER, LoraConfig(lora_dropout=dropout, init_lora_weights=False), r=4, lora_alpha=12)
    return made.train()


def run(module: Linear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    # Dropout draws the same mask for both.
    torch.manual_seed(7)
    y = module(x)
    (y * torch.linspace(-1, 1, OUT)).square().sum().backward()
    gradients = [x.grad, module.lora_A[lora.ADAPTER].weight.grad, module.lora_B[lora.ADAPTER].weight.grad]
    return y.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
def test_equals_pefts_own(*, bias: bool, dropout: float, training: bool, needs_input: bool) -> None:
    theirs = layer(bias=bias, dropout=dropout).train(training)
    ours = copy.deepcopy(theirs)
    lora.fuse(nn.Sequential(ours))
    assert ours.forward.__func__ is lora._forward
    x = torch.randn(2, 5, IN)

    y, gradients = run(ours, x.clone().requires_grad_(needs_input))
    expected_y, expected = run(theirs, x.clone().requires_grad_(needs_input))
    assert tiny.distance(y, expected_y) < 1e-6
    assert len(gradients) == len(expected) == 2 + needs_input
    for mine, theirs_ in zip(gradients, expected, strict=True):
        assert tiny.distance(mine, theirs_) < 1e-5


def test_dropout_does_something() -> None:
    module = layer(bias=False, dropout=0.4)
    lora.fuse(nn.Sequential(module))
    x = torch.randn(3, IN)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_bfloat16_base_keeps_float32_gradients() -> None:
    module = layer(bias=True, dropout=0.0)
    exact = copy.deepcopy(module)
    module.base_layer.bfloat16()
    lora.fuse(nn.Sequential(module))
    x = torch.randn(6, IN)
    y, gradients = run(module, x.bfloat16().requires_grad_())
    expected_y, expected = run(exact, x.bfloat16().float().requires_grad_())
    assert y.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    assert tiny.distance(y.float(), expected_y) < 0.02
    for mine, theirs in zip(gradients, expected, strict=True):
        assert tiny.distance(mine.float(), theirs) < 0.05
