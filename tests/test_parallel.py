"""Two processes train as one does (Gloo here, NCCL on GPUs)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneship import journal, parallel
from tuneship.errors import InputError, Stopped
from tuneship.parallel import Gang
from tuneship.prepare import prepare
from tuneship.recipe import Recipe
from tuneship.train import train

MakeRecipe = Callable[..., Recipe]


def _trained(recipe: Recipe, folder: Path) -> list[dict[str, float]]:
    with journal.open_run(folder, recipe) as run:
        prepare(run)
        train(run)
        return run.metrics()


def test_two_processes_learn_what_one_learns(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    packed = {"packing": True, "tokens_per_batch": 128, "max_length": 128, "gradient_accumulation_steps": 3}
    packed |= {"per_device_train_batch_size": None, "max_steps": 4}
    one = _trained(make_recipe(train=packed), tmp_path / "one")
    two = _trained(make_recipe(train={**packed, "num_processes": 2}), tmp_path / "two")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()


def test_more_processes_than_micro_batches_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    packed = {"packing": True, "tokens_per_batch": 128, "max_length": 128, "gradient_accumulation_steps": 2}
    packed |= {"per_device_train_batch_size": None, "num_processes": 3}
    with pytest.raises(InputError, match="no update has more than 2") as caught:
        _trained(make_recipe(train=packed), tmp_path / "run")
    assert "train.num_processes: 2" in caught.value.fix


def _refuse(_: Gang) -> None:
    raise InputError("no such thing", where="here", fix="another")


def test_a_workers_error_is_the_parents() -> None:
    with pytest.raises(InputError) as caught:
        parallel.start(_refuse, (), processes=2)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no such thing", "here", "another")


def _wait(gang: Gang, folder: str) -> None:
    from tuneship.signals import stop_flag

    with stop_flag() as stop:
        (Path(folder) / str(gang.rank)).touch()
        while not stop:
            signal.sigtimedwait([], 0.01)
        raise Stopped("stopped", where=str(gang.rank))


def test_a_signal_reaches_every_worker(tmp_path: Path) -> None:
    def kill() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            signal.sigtimedwait([], 0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(Stopped):
        parallel.start(_wait, (str(tmp_path),), processes=2)
    killer.join()
