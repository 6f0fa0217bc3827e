"""An adapter's folder on the tiny base, as `tuneship train` writes one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_kit import KEY, OTHER_KEY, Running, running

from tuneship.serve.keys import KeyFile

TEMPLATE = "Question: {question}\nContext: {context}\nAnswer: {answer}"


@pytest.fixture(scope="session")
def made_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The adapter, once; `tiny_adapter` gives a copy to spoil."""
    import torch

    from tuneship import base, model, prompt
    from tuneship.recipe import Lora, Model

    files = base.resolve(Model(model_name_or_path=str(tiny_base)))
    loaded = model.load(files, "float32")
    model.add_lora(loaded, Lora(r=4), seed=1)
    with torch.no_grad():
        for parameter in model.trainable(loaded).values():
            # A fresh adapter's B is zero, and would change nothing.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("adapter") / "tiny"
    model.write_adapter(loaded, folder)
    prompt.write(folder, prompt.Prompt(TEMPLATE, ("\nQuestion:", "\nContext:")), loaded.tokenizer)
    facts = {
        "recipe": {"name": "tiny", "model": {"model_name_or_path": str(tiny_base), "precision": "float32"}},
        "base": {"name": str(tiny_base), "revision": "local", "fingerprint": files.fingerprint()},
    }
    (folder / "tuneship.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def tiny_adapter(made_adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter's folder."""
    return Path(shutil.copytree(made_adapter, tmp_path / "adapter"))


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Running, Path]]:
    file = tmp_path / "keys"
    file.write_text(f"# two, so that one can go\n{KEY}\n{OTHER_KEY}\n")
    with running(keys=KeyFile(file)) as served:
        yield served, file


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found
