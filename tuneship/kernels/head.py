"""The loss at the labels, without ever holding all logits.

The head of a frozen model needs no gradient, and a position without a label needs no logits: so
the head runs only where a label stands, in chunks, and the gradient of the hidden state is made
in the same pass. Memory: one chunk of logits instead of tokens × vocabulary (Gemma 2: 256,000).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 128 * 2**20


def label_loss(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Sum of the cross-entropies at the labelled positions, float32.

    Args:
        hidden: (labels, width), the states whose next token is labelled.
        weight: (vocabulary, width), the frozen head.
        labels: (labels,), int64.
        softcap: cap·tanh(logit / cap) where the model has one.

    Returns:
        A scalar; 0 where there is no label. Its gradient reaches `hidden` only.
    """
    loss: Tensor = _LabelLoss.apply(hidden, weight, labels, softcap)  # type: ignore[no-untyped-call]
    return loss


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for at in range(0, len(labels), size):
            states, targets = hidden[at : at + size], labels[at : at + size, None]
            logits = (states @ weight.t()).float()
            if softcap is not None:
                bend = torch.tanh(logits / softcap)
                logits = softcap * bend
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, targets)).sum()
            # d loss / d logits = softmax - one-hot, through the cap's slope 1 - tanh².
            slope = logits.sub_(norm).exp_().scatter_add_(1, targets, -torch.ones_like(norm))
            if softcap is not None:
                slope *= 1 - bend * bend
            gradient[at : at + size] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None
