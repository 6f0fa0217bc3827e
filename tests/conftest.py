"""What the tests share: the samples (`samples.py`) as fixtures, a trained run, and the command line (`zygote.py`)."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO

# Before torch is imported. The models are tiny: a second thread brings nothing, and where the machine is
# busy, threads that wait for each other in place make a test a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# As from a terminal, though the tests themselves may run under nohup.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

import fake_hub
import pytest
from samples import make_gemma2, make_tokenizer, sql_rows, tiny_recipe, write_rows
from zygote import Commands

from tuneship.recipe import Recipe

__all__ = ["make_gemma2", "make_tokenizer", "sql_rows", "tiny_recipe", "write_rows"]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny random Gemma 2."""
    return make_gemma2(tmp_path_factory.mktemp("base") / "tiny-gemma2")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 60 good rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", sql_rows(60))


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A stream whose reader is gone."""
    reads, writes = os.pipe()
    os.close(reads)
    # What it still holds, it tries to write when it is closed.
    with suppress(BrokenPipeError), os.fdopen(writes, "w") as stream:
        yield stream


@pytest.fixture
def make_recipe(tiny_base: Path, rows_file: Path) -> Callable[..., Recipe]:
    """A function that gives the recipe of a tiny run, with sections changed: `make_recipe(train={"seed": 1})`."""
    return partial(tiny_recipe, tiny_base, rows_file)


@pytest.fixture(scope="session")
def trained_once(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained and evaluated tiny run; tests copy it (`trained`)."""
    from tuneship import journal
    from tuneship.evaluate import evaluate
    from tuneship.prepare import prepare
    from tuneship.train import train

    folder = tmp_path_factory.mktemp("runs") / "trained"
    recipe = tiny_recipe(tiny_base, rows_file, evaluate={"by": ["domain"]}, train={"eval_steps": 3})
    with journal.open_run(folder, recipe) as run:
        prepare(run)
        train(run)
        evaluate(run)
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """The folder of a trained and evaluated tiny run, to do with as one likes."""
    return shutil.copytree(trained_once, tmp_path / "trained")


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Starts `tuneship …` as processes of their own."""
    started = Commands()
    yield started
    started.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.Hub]:
    """A Hugging Face Hub on this machine, which this process uses with a token."""
    from huggingface_hub import close_session, constants

    with fake_hub.serving() as served:
        for name, value in served.constants(tmp_path / "hub-cache").items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        monkeypatch.delenv("HF_TOKEN_FILE", raising=False)
        close_session()
        yield served
        close_session()
