"""Data parallelism over the GPUs of one host: one process each, the adapters' gradients summed.

    start(worker, arguments, processes=2)      in the parent; worker(gang, *arguments) runs in each
        gang.mine(passes)                      its share of an update's passes
        gang.sum(parameters, loss)             one all-reduce an update

An update has the same rows whatever the number of processes: the recipe says what is learned, the
number of GPUs only how fast. NCCL on GPUs, Gloo on CPUs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException

from tuneship.errors import TuneshipError, from_dict
from tuneship.signals import caught

Pass = TypeVar("Pass")
_ERROR = "error-{}.json"


@dataclass(frozen=True)
class Gang:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the log, the checkpoints and the adapter."""
        return self.rank == 0

    def mine(self, passes: Sequence[Pass]) -> Sequence[Pass]:
        """This process's share of an update's passes."""
        return passes[self.rank :: self.count]

    def sum(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        """Sums the gradients, in place, over all processes; and some numbers, which it returns."""
        if self.count == 1:
            return numbers
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), numbers])
        dist.all_reduce(flat)
        *parts, sums = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(numbers)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        total: Tensor = sums
        return total


def start(worker: Callable[..., None], arguments: tuple[Any, ...], *, processes: int) -> None:
    """Runs `worker(gang, *arguments)` in so many processes, and waits. A signal to end is passed on to them.

    Raises:
        TuneshipError: the error that ended the first of them that failed, of its own kind.
    """
    with tempfile.TemporaryDirectory() as scratch:
        context = start_processes(  # type: ignore[no-untyped-call]
            _run, (worker, arguments, processes, scratch), nprocs=processes, join=False, start_method="spawn"
        )

        def stop(_: str) -> None:
            for process in context.processes:
                process.terminate()

        try:
            with caught(stop):
                while not context.join():
                    pass
        except ProcessExitedException:
            errors = sorted(Path(scratch).glob(_ERROR.format("*")))
            if not errors:
                raise
            raise from_dict(json.loads(errors[0].read_text(encoding="utf-8"))) from None


def _run(rank: int, worker: Callable[..., None], arguments: tuple[Any, ...], count: int, scratch: str) -> None:
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        init_method=f"file://{scratch}/rendezvous",
        rank=rank,
        world_size=count,
        device_id=device,
    )
    try:
        worker(Gang(rank, count), *arguments)
    except TuneshipError as error:
        (Path(scratch) / _ERROR.format(rank)).write_text(json.dumps(error.to_dict()), encoding="utf-8")
        sys.exit(error.exit_code)
    finally:
        dist.destroy_process_group()
