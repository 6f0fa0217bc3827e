"""A run on another machine each time: what travels, what a kill leaves half sent, and a training that goes on.

Here the bucket is a folder; tests/e2e/test_argo.py does the same through Google Cloud Storage's own protocol.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tuneship import checkpoint, journal, storage
from tuneship.checkpoint import Checkpoint
from tuneship.cluster import kept
from tuneship.cluster.kept import Kept
from tuneship.errors import InputError
from tuneship.journal import open_run, read_json
from tuneship.prepare import prepare
from tuneship.recipe import Recipe
from tuneship.train import train


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def at(tmp_path: Path) -> Kept:
    return Kept(str(tmp_path / "bucket" / "runs"), str(tmp_path / "bucket" / "checkpoints"))


def test_a_run_arrives_as_it_left(trained: Path, tmp_path: Path) -> None:
    kept.bring_back(trained, at(tmp_path))
    kept.take(at(tmp_path), tmp_path / "other")
    arrived = files(tmp_path / "other")
    assert {"recipe.json", "metrics.jsonl", "evaluation.json", "data/prepared.json"} <= arrived.keys()
    there = {
        name: content for name, content in files(trained).items() if not name.startswith(("checkpoints/", ".lock"))
    }
    assert arrived == there


def test_nothing_half_sent_is_taken_for_whole(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file that the alphabet would put after the mark.
    (trained / "adapter" / "vocab.json").write_text("{}")
    whole, send = files(trained), storage.put
    prepared = shutil.copytree(
        trained, tmp_path / "prepared", ignore=shutil.ignore_patterns("adapter", "metrics.jsonl")
    )
    for allowed in range(len(whole)):
        sent = 0

        def cut_off(file: Path, uri: str, allowed: int = allowed) -> int:
            nonlocal sent
            sent += 1
            if sent > allowed:
                raise KeyboardInterrupt
            return send(file, uri)

        place, folder = Kept(str(tmp_path / f"bucket-{allowed}"), ""), tmp_path / f"pod-{allowed}"
        # Every other time, prepare has brought its part before.
        if allowed % 2:
            monkeypatch.setattr(storage, "put", send)
            kept.bring_back(prepared, place)
        monkeypatch.setattr(storage, "put", cut_off)
        try:
            kept.bring_back(trained, place)
        except KeyboardInterrupt:
            kept.take(place, folder)
            arrived = files(folder) if folder.exists() else {}
            assert bool(arrived) == ("recipe.json" in arrived)
            for part, mark in (("data/", "data/prepared.json"), ("adapter/", "adapter/tuneship.json")):
                if mark in arrived:
                    assert {n for n in arrived if n.startswith(part)} == {n for n in whole if n.startswith(part)}


def test_another_machine_goes_on_from_the_mirror(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(train={"save_total_limit": 4})
    mirror = str(tmp_path / "mirror")
    with open_run(tmp_path / "one", recipe) as run:
        prepare(run)
        shutil.copytree(run.data, tmp_path / "prepared")
        train(run, mirror=mirror)
        losses = [(line["step"], line["loss"]) for line in run.metrics()]
    # As a kill would leave it after update 4: its log has come further than its last checkpoint.
    shutil.rmtree(tmp_path / "mirror" / "step-4")
    shutil.rmtree(tmp_path / "mirror" / "step-6")

    with open_run(tmp_path / "two", recipe) as run:
        shutil.copytree(tmp_path / "prepared", run.data, dirs_exist_ok=True)
        train(run, mirror=mirror)
        assert [(line["step"], line["loss"]) for line in run.metrics()] == losses
    assert (tmp_path / "one/adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "two/adapter/adapter_model.safetensors"
    ).read_bytes()


def test_nothing_half_fetched_is_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, fetch = tmp_path / "mirror", storage.get
    for step in (2, 4):
        saved = Checkpoint(step, {"a": torch.ones(3)}, {"step": torch.ones(())}, {"loss": 1.0})
        checkpoint.save(tmp_path / "here", saved, keep=2, mirror=str(mirror))
    for allowed in range(2 * (len(checkpoint.FILES) + 1)):
        fetched = 0

        def cut_off(uri: str, file: Path, allowed: int = allowed) -> None:
            nonlocal fetched
            fetched += 1
            if fetched > allowed:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"half")
                raise KeyboardInterrupt
            fetch(uri, file)

        folder = tmp_path / f"there-{allowed}"
        monkeypatch.setattr(storage, "get", cut_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.latest(folder, mirror=str(mirror))
        for step in checkpoint.steps(folder):
            assert files(folder / f"step-{step}") == files(mirror / f"step-{step}")
        monkeypatch.setattr(storage, "get", fetch)
        again = checkpoint.latest(folder, mirror=str(mirror))
        assert again is not None and again.step == 4


def test_prepared_without_weights_the_training_notes_them(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make_recipe()) as run:
        assert prepare(run, weights=False)["base"]["fingerprint"] is None
        train(run)
        noted = read_json(run.adapter / "tuneship.json")["base"]
        assert len(noted["fingerprint"]) == 64 and run.provenance()["base"] == noted


def test_another_revision_than_the_rows_were_prepared_for(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make_recipe()) as run:
        prepared = prepare(run, weights=False)
        journal.write_json(run.data / "prepared.json", prepared | {"base": prepared["base"] | {"revision": "0" * 40}})
        with pytest.raises(InputError, match="the rows were prepared for 0000") as caught:
            train(run)
        assert "model.model_revision" in caught.value.fix


def test_one_file_there_and_back(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert storage.put(tmp_path / "a", str(tmp_path / "b" / "a")) == 1
    assert storage.put(tmp_path / "a", str(tmp_path / "b" / "a")) == 0
    storage.get(str(tmp_path / "b" / "a"), tmp_path / "c" / "a")
    assert (tmp_path / "c" / "a").read_text() == "x"
    with pytest.raises(InputError, match="no such file"):
        storage.get(str(tmp_path / "nowhere"), tmp_path / "d")
