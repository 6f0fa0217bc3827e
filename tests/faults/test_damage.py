"""F4: a damaged checkpoint is named, and the one before it is taken; never a silent fresh start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from interrupted import Case, checkpoints, log

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "grow":
        file.write_bytes(content + b"\0")
    else:
        content[len(content) // 3] ^= 0x10
        file.write_bytes(content)


def newest(case: Case) -> Path:
    return case.run / "checkpoints" / "step-11"


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FILES for how in ("delete", "truncate", "empty", "grow", "flip")][:-1],
)
def test_f4_damage_is_seen_and_the_one_before_is_taken(
    halfway: Case, name: str, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from tuneship import checkpoint

    assert checkpoints(halfway.run) == ["step-11", "step-9"]
    damage(newest(halfway) / name, how)
    found = checkpoint.latest(halfway.run / "checkpoints")
    said = capfd.readouterr().err
    assert found is not None and found.step == 9
    assert "checkpoint step-11 is damaged" in said
    assert name in said
    assert "taking the one before it" in said


def test_f4_a_flipped_bit_anywhere_in_the_manifest_does_no_harm(halfway: Case) -> None:
    from tuneship import checkpoint

    file = newest(halfway) / "MANIFEST.json"
    content = file.read_bytes()
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x02]) + content[at + 1 :])
        found = checkpoint.latest(halfway.run / "checkpoints")
        assert found is not None
        # A flip in a file's size or a blank leaves every byte that is loaded proven.
        assert found.step in (9, 11)
        assert found.state["step"] == found.step


@pytest.mark.parametrize("how", ["empty folder", "flip"])
def test_f4_the_run_goes_on_from_the_one_before(halfway: Case, how: str) -> None:
    if how == "flip":
        damage(newest(halfway) / "optimizer.safetensors", "flip")
    else:
        shutil.rmtree(newest(halfway))
        newest(halfway).mkdir()
    finished = halfway.goes_on_to_the_same_end()
    assert "checkpoint step-11 is damaged" in finished.err
    assert "going on after update 9" in finished.err


def test_f4_all_damaged_is_an_error_and_not_a_fresh_start(halfway: Case) -> None:
    for folder in (halfway.run / "checkpoints").iterdir():
        damage(folder / "adapter.safetensors", "flip")
    before = log(halfway.run)
    finished = halfway.train()
    assert finished.code == 1
    assert "error: all 2 checkpoints are damaged" in finished.err
    assert "--fresh (the old run is kept beside it)" in finished.err
    assert "Traceback" not in finished.err
    assert log(halfway.run) == before
    assert not (halfway.run / "adapter").exists()
    # What the message offers works.
    assert halfway.train("--fresh", "--set", "train.max_steps=2").code == 0
    kept = list(halfway.run.parent.glob("halfway.old-*"))
    assert len(kept) == 1
    assert log(kept[0]) == before


def test_f4_a_torn_last_line_of_the_log_is_no_update(halfway: Case) -> None:
    with (halfway.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    halfway.goes_on_to_the_same_end()
