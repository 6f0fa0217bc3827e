"""A run some file of which is damaged: every verb that reads it says so in one message, with what to do.

python -m pytest tests/test_damaged_files.py -v
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from zygote import Commands

# Of a run's folder, or of the base beside it: the file, what its damage is told to be mended with, who reads it.
# `resume` is train, after a stop before its last word.
READ_BY = {
    "run/data/prepared.json": ("tuneship prepare", "prepare train"),
    "run/data/train.safetensors": ("tuneship prepare", "train"),
    "run/data/test.jsonl": ("tuneship prepare", "evaluate export"),
    "run/data/examples.jsonl": ("tuneship prepare", "evaluate"),
    "run/metrics.jsonl": ("tuneship train", "resume report"),
    "run/provenance.json": ("tuneship train", "resume report"),
    "run/evaluation.json": ("tuneship evaluate", "report publish"),
    "run/recipe.json": ("--fresh", "report serve ask"),
    "run/adapter/tuneship.json": ("tuneship train", "train evaluate export publish serve ask"),
    "run/adapter/adapter_config.json": ("tuneship train", "evaluate export serve ask"),
    "run/adapter/adapter_model.safetensors": ("tuneship train", "train evaluate export publish serve ask"),
    "base/config.json": ("restore", "resume evaluate export serve ask"),
    "base/tokenizer.json": ("restore", "resume evaluate export"),
    "base/model.safetensors": ("restore", "resume evaluate export serve ask"),
}


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def broken(content: bytes) -> bytes:
    """The second line is no JSON."""
    lines = content.splitlines(keepends=True)
    lines[1] = b'{"number": \x00}\n'
    return b"".join(lines)


def emptied(_: bytes) -> bytes:
    return b""


def listed(_: bytes) -> bytes:
    """JSON, but of something else."""
    return b"[1]\n"


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], ...]] = {
    ".safetensors": (truncated, emptied),
    ".json": (truncated, emptied, listed),
    ".jsonl": (broken, listed),
}
CASES = [
    pytest.param(name, damage, verb, fix, id=f"{name}-{damage.__name__}-{verb}")
    for name, (fix, verbs) in READ_BY.items()
    for damage in DAMAGES[Path(name).suffix]
    for verb in verbs.split()
]


@pytest.fixture
def place(trained: Path, tiny_base: Path, tmp_path: Path) -> Path:
    """A folder with a trained run and the base that it was trained on."""
    shutil.copytree(tiny_base, tmp_path / "base")
    trained.rename(tmp_path / "run")
    for name in ("recipe.json", "adapter/tuneship.json", "adapter/adapter_config.json"):
        file = tmp_path / "run" / name
        file.write_text(file.read_text().replace(str(tiny_base), str(tmp_path / "base")))
    return tmp_path


def argv(verb: str) -> list[str]:
    match verb:
        case "resume":
            return ["train", "run"]
        case "publish":
            return ["publish", "run", "--set", "publish.folder=out"]
        case "ask":
            return ["ask", "run", "how many?", "--context", "CREATE TABLE t (age INTEGER)"]
        case "serve":
            return ["serve", "run", "--port", "0"]
        case "evaluate":
            return ["evaluate", "run", "--set", "evaluate.few_shot=2"]
    return [verb, "run"]


@pytest.mark.parametrize(("name", "damage", "verb", "fix"), CASES)
def test_damage_is_told_in_one_message(
    commands: Commands, place: Path, name: str, damage: Callable[[bytes], bytes], verb: str, fix: str
) -> None:
    file = place / name
    file.write_bytes(damage(file.read_bytes()))
    if verb == "resume":
        shutil.rmtree(place / "run" / "adapter")
    finished = commands.run(argv(verb), cwd=place)
    assert finished.code == 2, finished.err
    assert "Traceback" not in finished.err
    assert finished.err.count("error: ") == 1
    message = finished.err[finished.err.index("error: ") :]
    _, where, mended = message.rstrip("\n").split("\n")
    assert where.startswith("  where: ") and file.name in where
    assert mended.startswith("  fix:   ") and fix in mended
