"""The loss of packed rows: on their answers and end of sequence only."""

from __future__ import annotations

import torch
from torch import Tensor

from tuneship.data.packing import Pack, Tokens, pack
from tuneship.kernels import to_device
from tuneship.kernels.attention import Documents
from tuneship.kernels.head import label_loss
from tuneship.model import LoadedModel


def answer_loss(model: LoadedModel, packed: Pack) -> Tensor:
    """Sum of the cross-entropies over the labels of a pack: a scalar, float32."""
    arrays = (packed.ids, packed.positions, packed.labelled, packed.labels)
    ids, positions, labelled, labels = (to_device(torch.from_numpy(array), model.device) for array in arrays)
    states = model.states(ids, positions, Documents(packed.bounds), labelled)
    return label_loss(states, model.head, labels, model.softcap)


@torch.no_grad()
def held_out_loss(model: LoadedModel, tokens: Tokens, *, tokens_per_batch: int) -> float:
    """Mean cross-entropy a label over rows that were not trained on."""
    was_training = model.causal.training
    model.causal.eval()
    total, count, size = 0.0, 0, 0
    rows: list[int] = []
    for row, length in enumerate([*tokens.lengths.tolist(), 0]):
        if rows and (size + length > tokens_per_batch or length == 0):
            packed = pack(tokens, rows)
            total += float(answer_loss(model, packed))
            count += len(packed.labels)
            rows, size = [], 0
        rows.append(row)
        size += length
    model.causal.train(was_training)
    return total / max(1, count)
