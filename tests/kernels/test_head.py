"""The loss at the labels against torch's cross-entropy of all logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tuneship.kernels import head
from tuneship.kernels.head import label_loss

VOCABULARY, WIDTH = 50, 8


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = hidden @ weight.t()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("labels", [0, 1, 6, 7, 8, 30])
def test_equals_cross_entropy_of_full_logits(
    labels: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven labels a chunk: fewer, as many, one more, and several chunks with a rest.
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 7 * 4 * VOCABULARY)
    torch.manual_seed(labels)
    weight, targets = torch.randn(VOCABULARY, WIDTH), torch.randint(VOCABULARY, (labels,))
    ours = torch.randn(labels, WIDTH, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()

    loss = label_loss(ours, weight, targets, softcap)
    expected = functional.cross_entropy(logits_of(theirs, weight, softcap), targets, reduction="sum")
    (2.5 * loss).backward()
    (2.5 * expected).backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_handmade_logits() -> None:
    # An identity head: the states are the logits.
    loss = label_loss(torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]), torch.eye(2), torch.tensor([1, 0]))
    assert float(loss) == pytest.approx(-math.log(0.75) - math.log(0.5))


def test_the_chunk_is_at_least_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    hidden, weight = torch.randn(3, WIDTH), torch.randn(VOCABULARY, WIDTH)
    expected = functional.cross_entropy(hidden @ weight.t(), torch.tensor([4, 0, 49]), reduction="sum")
    torch.testing.assert_close(label_loss(hidden, weight, torch.tensor([4, 0, 49])), expected)


def test_bfloat16_loses_no_more_than_its_own_rounding() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, WIDTH).bfloat16().requires_grad_(), torch.randn(VOCABULARY, WIDTH).bfloat16()
    targets = torch.randint(VOCABULARY, (40,))
    loss = label_loss(hidden, weight, targets)
    loss.backward()
    exact = hidden.detach().float().requires_grad_()
    expected = functional.cross_entropy(exact @ weight.float().t(), targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float(), exact.grad, rtol=0, atol=0.05)


@pytest.mark.parametrize(("row", "size"), [(2 * 256_000, 2176), (2**30, 1), (2**24, 64), (2**23, 128), (2**22, 256)])
def test_a_chunk_ends_where_a_block_does(row: int, size: int) -> None:
    """2,097 rows of Gemma 2's logits are 1 GB; a pack of 8,192 tokens has some 4,140 labels: two chunks, not three."""
    assert head.chunk("cuda", row) == size
