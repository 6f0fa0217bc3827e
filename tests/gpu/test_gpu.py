"""What only a GPU can show: its kernels, bfloat16 and fp8 on it, captured passes, a killed run that goes on.

python -m pytest tests/gpu -v                with tuneship installed
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from samples import make_gemma2
from torch import Tensor
from zygote import until

from tuneship import model as models
from tuneship import replay, trainable
from tuneship.base import BaseFiles
from tuneship.data.packing import Tokens, pack
from tuneship.errors import InputError
from tuneship.loss import answer_loss
from tuneship.recipe import Lora
from tuneship.trainable import HandModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CHECKS = Path(__file__).parents[1] / "kernels" / "fused_checks.py"
LORA = Lora(r=4, lora_alpha=8)
# Tensor cores multiply blocks of sixteen.
SHAPE = {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma2(tmp_path_factory.mktemp("models") / "gemma2", **SHAPE)


@pytest.fixture(scope="module")
def files(folder: Path) -> BaseFiles:
    return BaseFiles(str(folder), folder, "local")


def loaded(files: BaseFiles, precision: str, **settings: Any) -> HandModel:
    """On the card, with an adapter that does something."""
    model = trainable.load(files, precision, LORA, seed=0, tokens=4096, longest=256, **settings)
    assert isinstance(model, HandModel)
    torch.manual_seed(1)
    for parameter in models.trainable(model).values():
        parameter.data = (0.05 * torch.randn(parameter.shape)).to(model.device)
    return model


def some_rows(lengths: tuple[int, ...] = (30, 70, 22, 41, 90)) -> Tokens:
    return Tokens.build([(row[:-20].tolist(), row[-20:].tolist()) for row in tiny.rows(lengths)])


def loss_and_gradients(model: HandModel) -> tuple[float, dict[str, Tensor]]:
    parameters = models.trainable(model)
    loss = answer_loss(model, pack(some_rows(), range(5)))
    found = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, found, strict=True))


def eager(model: HandModel, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """One row at a time in transformers' eager attention and PEFT's own layers."""
    peft = tiny.reference(model, LORA).to(model.device)
    for parameter in peft.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    tokens, total = some_rows(), torch.zeros((), device=model.device)
    for row in range(len(tokens)):
        ids = torch.from_numpy(tokens.ids[tokens.bounds[row] : tokens.bounds[row + 1]]).long().to(model.device)
        logits = peft(input_ids=ids[None]).logits[0].float()
        total = total + torch.nn.functional.cross_entropy(logits[-21:-1], ids[-20:], reduction="sum")
    total.backward()
    gradients = {name: p.grad for name, p in peft.base_model.model.named_parameters() if p.grad is not None}
    return float(total.detach()), gradients


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten().float() for name in sorted(gradients)])


def share(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_every_kernel_computes_what_its_definition_says() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", CHECKS, "-q", "-p", "no:cacheprovider"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_packed_bfloat16_equals_eager(files: BaseFiles) -> None:
    model = loaded(files, "bfloat16")
    loss, gradients = loss_and_gradients(model)
    exact_loss, exact = eager(model, torch.float32)
    rounded_loss, rounded = eager(model, torch.bfloat16)
    assert gradients.keys() == exact.keys()
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert loss == pytest.approx(rounded_loss, rel=1e-2)
    ours, theirs = flat(gradients), flat(exact)
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-2)
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.999
    # No further from float32 than eager bfloat16 itself, or a little.
    assert share(ours, theirs) < 1.5 * share(flat(rounded), theirs)


@pytest.mark.parametrize(("precision", "at_most"), [("float32", 1e-2), ("fp8", 0.3), ("nf4", 0.6)])
def test_other_precisions_are_as_far_as_their_bits(files: BaseFiles, precision: str, at_most: float) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    try:
        model = loaded(files, precision)
    except InputError as refusal:
        pytest.skip(refusal.what)
    loss, gradients = loss_and_gradients(model)
    exact_loss, exact = eager(model, torch.float32)
    assert loss == pytest.approx(exact_loss, rel=at_most / 3)
    assert share(flat(gradients), flat(exact)) < at_most


@pytest.mark.parametrize("keep", ["most", "some", "input"])
def test_what_a_layer_keeps_changes_nothing(files: BaseFiles, keep: Any) -> None:
    model = loaded(files, "bfloat16")
    loss, gradients = loss_and_gradients(model)
    model.keep = keep
    again, others = loss_and_gradients(model)
    assert again == loss
    for name, gradient in gradients.items():
        # What is computed by one kernel on the way forward and by another on the way back may round otherwise.
        same = (
            share(others[name], gradient) < 1e-3 if "down_proj.lora_A" in name else torch.equal(others[name], gradient)
        )
        assert same, name


def test_a_captured_pass_is_the_pass(files: BaseFiles) -> None:
    model = loaded(files, "bfloat16")
    parameters = models.trainable(model)
    captured = replay.Replay(model)
    # Two lengths, each twice with other rows: captured once, replayed then.
    for seed, lengths in enumerate([(30, 34), (100,), (40, 22), (50, 30, 25)]):
        rows = tiny.rows(lengths, seed=seed)
        packed = pack(Tokens.build([(row[:-20].tolist(), row[-20:].tolist()) for row in rows]), range(len(rows)))
        loss = 0.1 * answer_loss(model, packed)
        expected, expected_loss = torch.autograd.grad(loss, list(parameters.values())), float(loss.detach())
        # Its graph would tie the parameters to this stream; a capture has one of its own.
        del loss
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.zero_()
        assert float(captured.backward(packed, 0.1)) == pytest.approx(expected_loss, rel=1e-4)
        for parameter, gradient in zip(parameters.values(), expected, strict=True):
            assert parameter.grad is not None
            assert share(parameter.grad, gradient) < 1e-2
    assert sorted(captured._captured) == [64, 128]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_run_goes_on(folder: Path, rows_file: Path, tmp_path: Path, dropout: float) -> None:
    recipe = {
        "name": "killed",
        "model": {"model_name_or_path": str(folder), "precision": "bfloat16"},
        "data": {"dataset_name": str(rows_file), "test_fraction": 0.2, "validation_fraction": 0.1},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": dropout},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": 40,
            "packing": True,
            "tokens_per_batch": 256,
            "max_length": 256,
            "save_steps": 5,
        },
    }
    # JSON is YAML.
    (tmp_path / "killed.yaml").write_text(json.dumps(recipe))

    def losses(run: Path) -> list[float]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 41))
        return [line["loss"] for line in lines]

    # Not by `zygote`: bitsandbytes, when imported, looks at the card, and then no fork can use it.
    def start(run: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tuneship", "train", "killed.yaml", "--run", run]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    with start("whole") as whole:
        said = whole.communicate()[1]
    assert whole.returncode == 0, said
    with start("killed") as killed:
        until((tmp_path / "killed" / "checkpoints" / "step-10").is_dir)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    with start("killed") as again:
        said = again.communicate()[1]
    assert again.returncode == 0, said
    assert "going on after update" in said
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    provenance = json.loads((tmp_path / "killed" / "provenance.json").read_text())
    assert 0 < provenance["peak_memory_bytes"] <= provenance["planned_memory_bytes"]


@pytest.mark.parametrize(("precision", "capability"), [("fp8", (8, 0)), ("bfloat16", (7, 5)), ("nf4", (7, 5))])
def test_an_old_card_is_refused(
    files: BaseFiles, monkeypatch: pytest.MonkeyPatch, precision: str, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(InputError, match="arithmetic") as refusal:
        loaded(files, precision)
    assert refusal.value.where == "model.precision"
