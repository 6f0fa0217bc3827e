"""The loss at the labels, without ever holding all logits.

The head of a frozen model needs no gradient, and a position without a label needs no logits: so
the head runs only where a label stands, in chunks, and the gradient of the hidden state is made
in the same pass. Memory: one chunk of logits instead of tokens × vocabulary (Gemma 2: 256,000).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tuneship.kernels import operations

# Of logits at a time. On a GPU, products of a thousand rows and more reach the card's speed.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
# Rows of a block of a product: a chunk that ends within one pays for all of it.
BLOCK = 128


def chunk(device: str, row: int) -> int:
    """Rows of logits at a time, of `row` bytes each: what CHUNK_BYTES hold, up to the end of a block."""
    size = max(1, CHUNK_BYTES[device] // row)
    return size if size < BLOCK else -(-size // BLOCK) * BLOCK


def label_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None, shares: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropies at the labelled positions, float32.

    Args:
        hidden: (labels, width), the states whose next token is labelled.
        weight: (vocabulary, width), the frozen head.
        labels: (labels,), int64.
        softcap: cap·tanh(logit / cap) where the model has one.
        shares: (labels,), float32: what each label counts; 1 each without it.

    Returns:
        A scalar; 0 where there is no label. Its gradient reaches `hidden` only.
    """
    loss: Tensor = _LabelLoss.apply(hidden, weight, labels, softcap, shares)  # type: ignore[no-untyped-call]
    return loss


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, shares: Tensor | None
    ) -> Tensor:
        ops = operations(hidden)
        size = chunk(hidden.device.type, weight.element_size() * weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for at in range(0, len(labels), size):
            logits = hidden[at : at + size] @ weight.t()
            losses = ops.label_gradient(logits, labels[at : at + size], softcap)
            # The logits are their own gradient now.
            torch.mm(logits, weight, out=gradient[at : at + size])
            if shares is not None:
                losses = losses * shares[at : at + size]
                gradient[at : at + size] *= shares[at : at + size, None].to(gradient.dtype)
            total += losses.sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None
