"""The passes of an update, forward and backward; a short one as one CUDA graph.

A pass of two hundred tokens is over a thousand small kernels: launching them takes the CPU longer
than running them takes the card. Here a pass is captured once for each length, in steps of 64
tokens, and replayed with other rows. What fills a pass up to its length is a row of its own that
carries no label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tuneship.data.packing import Pack, Plan, Tokens, cut, pack
from tuneship.errors import TuneshipError
from tuneship.kernels import gemma2, to_device
from tuneship.kernels.head import label_loss
from tuneship.kernels.reference import Bounds
from tuneship.loss import answer_loss
from tuneship.model import LoadedModel, trainable
from tuneship.recipe import Train
from tuneship.trainable import HandModel

STEP = 64
# Longer passes keep the card busy by themselves.
MOST = 1024
# Capturing costs about as much as this many passes.
FEW_UPDATES = 20


class Backward:
    """The passes of an update: as long as the device holds, captured where they are short."""

    def __init__(self, model: LoadedModel, tokens: Tokens, todo: Plan, train: Train) -> None:
        self._model, self._tokens, self._todo, self._train = model, tokens, todo, train
        # Where a capture can be worth it, the device's room is known, and no pass is longer.
        most = model.tokens_per_pass
        self._replay = Replay(model) if most is not None and worth(model, most, todo) else None

    def packs(self, step: int) -> list[Pack]:
        """The passes of an update."""
        update, most = self._todo.updates[step - 1], self._model.tokens_per_pass
        if most is not None:
            update = [rows for whole in update for rows in cut(whole, self._tokens.lengths, most)]
        return [pack(self._tokens, rows) for rows in update]

    def __call__(self, packed: Pack, share: float) -> Tensor:
        """Adds the gradients of `share` times the pack's summed loss; returns that product, a scalar on the device.

        Raises:
            TuneshipError: the device's memory does not hold the pass.
        """
        try:
            if self._replay is not None:
                return self._replay.backward(packed, share)
            loss = answer_loss(self._model, packed) * share
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        except torch.OutOfMemoryError as error:
            raise TuneshipError(
                f"the device's memory does not hold a forward and backward pass of {len(packed.ids)} tokens",
                where=f"train.tokens_per_batch: {self._train.tokens_per_batch}",
                fix="lower train.tokens_per_batch; then train.max_length, if rows are long",
            ) from error

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Clears the gradients; captured passes need theirs to stay where they are."""
        optimizer.zero_grad(set_to_none=self._replay is None)


def worth(model: LoadedModel, longest: int, todo: Plan) -> bool:
    """Whether passes of at most `longest` tokens, so many times, are worth capturing."""
    return isinstance(model, HandModel) and model.device.type == "cuda" and longest <= MOST and len(todo) >= FEW_UPDATES


@dataclass(frozen=True)
class Launched:
    """An update that the device may still be working on."""

    step: int
    rate: float
    tokens: int
    numbers: Tensor
    """Loss, whether a process was told to stop, the gradient's norm; on the CPU once the device is so far."""
    there: torch.cuda.Event | None

    @classmethod
    def now(cls, step: int, rate: float, tokens: int, numbers: Tensor) -> Launched:
        """An update whose last operation was given to the device just now."""
        if not numbers.is_cuda:
            return cls(step, rate, tokens, numbers, None)
        # The copy stands in the device's queue behind this update. Asked for later, it would stand behind the next.
        host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record()
        return cls(step, rate, tokens, host, there)

    def read(self) -> list[float]:
        """Waits for the update, and for nothing launched since."""
        if self.there is not None:
            self.there.synchronize()
        numbers: list[float] = self.numbers.tolist()
        return numbers


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor


class Replay:
    """The passes of a model, captured as they come.

    The adapter's gradients must keep their memory: clear them with `set_to_none=False`.
    """

    def __init__(self, model: LoadedModel) -> None:
        assert isinstance(model, HandModel)
        self.model = model
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        for parameter in trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)

    def backward(self, packed: Pack, share: float) -> Tensor:
        """Adds the gradients of `share` times the pack's summed loss; returns that product, a scalar on the card."""
        size = -(-len(packed.ids) // STEP) * STEP
        filled = fill(packed, size, share)
        if size not in self._captured:
            self._captured[size] = self._capture({name: t.to(self.model.device) for name, t in filled.items()})
        captured = self._captured[size]
        for name, tensor in filled.items():
            captured.inputs[name].copy_(to_device(tensor, self.model.device))
        captured.graph.replay()
        return captured.loss

    def _capture(self, inputs: dict[str, Tensor]) -> _Captured:
        gradients = [parameter.grad for parameter in trainable(self.model).values()]
        before = [gradient.clone() for gradient in gradients if gradient is not None]
        chance = torch.cuda.get_rng_state(self.model.device)
        # Once as it is: kernels are compiled and libraries make their plans, which a capture must not.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run(self.model, inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = run(self.model, inputs)
        for gradient, old in zip(gradients, before, strict=True):
            assert gradient is not None
            gradient.copy_(old)
        # A pass that is captured drops out what it would have dropped when replayed: a resumed run captures anew.
        torch.cuda.set_rng_state(chance, self.model.device)
        return _Captured(graph, inputs, loss)


def fill(packed: Pack, size: int, share: float) -> dict[str, Tensor]:
    """A pack filled up to `size` tokens and as many labels, as tensors of fixed shapes; added labels count 0."""
    used, labels = len(packed.ids), len(packed.labels)
    bounds = Bounds.of([*packed.bounds, *([size] if used < size else [])])
    ids, positions = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    ids[:used], positions[:used] = torch.from_numpy(packed.ids), torch.from_numpy(packed.positions)
    positions[used:] = torch.arange(size - used)
    labelled, wanted = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    labelled[:labels], wanted[:labels] = torch.from_numpy(packed.labelled), torch.from_numpy(packed.labels)
    shares = torch.zeros(size)
    shares[:labels] = share
    return {
        "ids": ids,
        "positions": positions,
        "first": bounds.first,
        "last": bounds.last,
        "labelled": labelled,
        "labels": wanted,
        "shares": shares,
    }


def run(model: HandModel, inputs: dict[str, Tensor]) -> Tensor:
    """The pass itself, of what `fill` made: its loss; its gradients are added to those that are there."""
    of = gemma2.batch(inputs["positions"], Bounds(inputs["first"], inputs["last"], len(inputs["ids"])), model.shape)
    states = model.run(inputs["ids"], of).index_select(0, inputs["labelled"])
    loss = label_loss(states, model.head, inputs["labels"], model.softcap, inputs["shares"])
    # Added all at once: one launch for each parameter is most of what lies between a short pass's products.
    parameters = list(trainable(model).values())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_add_(gradients, list(torch.autograd.grad(loss, parameters)))
    return loss.detach()
