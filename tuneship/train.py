"""train: the loop, readable top to bottom.

    for each update: forward and backward over its packs, clip, step, log, perhaps save

The same command continues a run that was killed, from its newest whole checkpoint. On a CPU the
continued run is the uninterrupted one bit for bit: which rows an update sees is a function of its
number (`packing.plan`), the random numbers of its dropout are seeded by its number, and the rest
is in the checkpoint.

Covered: SIGKILL at any instant, SIGTERM (checkpoint at the end of the update, exit 75), a full
disk, a damaged checkpoint, a loss that is not a number.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneship import base, checkpoint, parallel, prompt, replay, storage, trainable
from tuneship import model as models
from tuneship.checkpoint import Checkpoint
from tuneship.console import progress, say
from tuneship.damage import guarded, read_json, remake
from tuneship.data import heldout
from tuneship.data.packing import Plan, Tokens, plan
from tuneship.errors import InputError, OutsideError, Stopped, TuneshipError
from tuneship.journal import PROVENANCE, Run, code_facts, put_in_place, read_run, write_json
from tuneship.kernels import cpu
from tuneship.loss import held_out_loss
from tuneship.model import LoadedModel
from tuneship.parallel import Gang
from tuneship.prompt import Prompt
from tuneship.recipe import Train
from tuneship.signals import stop_flag

VALIDATION_ROWS = 100


@dataclass(frozen=True)
class Trained:
    """What train hands on: plain values."""

    adapter: str
    updates: int
    loss: float
    """Of the last update."""
    tokens_per_second: float
    """Since this process began training; 0 where it had nothing left to do."""


def train(run: Run, *, mirror: str | None = None) -> Trained:
    """Trains the adapter of a prepared run, or goes on doing so.

    Args:
        mirror: a URI to which checkpoints and the log are copied, and from which they are taken where
            the run's folder has none (another machine's retry).

    Raises:
        InputError: the run is not prepared, or the recipe does not fit the base.
        OutsideError: the disk is full, the base cannot be reached.
        Stopped: a signal came; the run is saved.
        TuneshipError: the loss is not a number, or the device's memory is too small.
    """
    recipe = run.recipe
    tokens, prepared = _prepared(run)
    todo = plan(tokens.lengths, recipe.train)
    if finished := _finished(run, todo):
        say(f"already trained: {run.adapter}")
        return finished

    count = recipe.train.num_processes
    _check_processes(count, todo)
    files = base.resolve(recipe.model)
    _same_base(files, prepared["base"])
    models.check_architecture(files)
    models.check_lora(files, recipe.lora)
    _check_length(files, recipe.train)
    job = _Job(files, tokens, prepared, todo, mirror)
    if count == 1:
        return _train(run, job, Gang())
    parallel.start(_worker, (run.path, job), processes=count)
    finished = _finished(run, todo)
    assert finished is not None
    return finished


@dataclass(frozen=True)
class _Job:
    """What has been read and checked before any process trains."""

    files: base.BaseFiles
    tokens: Tokens
    prepared: dict[str, Any]
    todo: Plan
    mirror: str | None


def _worker(gang: Gang, folder: Path, job: _Job) -> None:
    """One of several processes; the one that started them holds the run's lock."""
    with ExitStack() as stack:
        if not gang.first:
            # What it would say, the first says.
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(Path(os.devnull).open("w"))))
        _train(read_run(folder), job, gang)


def _train(run: Run, job: _Job, gang: Gang) -> Trained:
    recipe, train, tokens, todo, mirror = run.recipe, run.recipe.train, job.tokens, job.todo, job.mirror
    cpu.keep_memory()
    model = trainable.load(
        job.files,
        recipe.model.precision,
        recipe.lora,
        seed=train.seed,
        tokens=todo.longest(tokens.lengths),
        longest=int(tokens.lengths.max()),
    )
    optimizer = _optimizer(model, train)
    _check_room(run.path, model)

    done = _resume(run, model, optimizer, mirror, gang)
    validation = _validation(run, model) if train.eval_steps and gang.first else None
    parameters = list(models.trainable(model).values())
    backward = replay.Backward(model, tokens, todo, train)
    model.causal.train()
    seen, began, loss, stopping = 0, time.monotonic(), math.nan, False
    # Several processes must agree on the update after which they stop; one need not ask.
    alone = gang.count == 1
    # A GPU works on the next update while this process reads the last one's numbers.
    ahead = 1 if model.device.type == "cuda" else 0
    launched: deque[replay.Launched] = deque()
    with stop_flag() as stop, run.log() as log, progress("updates", len(todo), every=train.logging_steps) as shown:
        shown.advance(done)
        told = began
        for step in range(done + 1, len(todo) + 1):
            # Dropout depends on the update's number, not on what happened before it.
            torch.manual_seed(train.seed * 1_000_003 + step)
            rate = learning_rate(step, len(todo), train)
            for group in optimizer.param_groups:
                group["lr"] = rate

            packs = backward.packs(step)
            labels = sum(len(packed.labels) for packed in packs)
            summed = torch.zeros(2, device=model.device)
            for packed in gang.mine(packs):
                summed[0] += backward(packed, 1 / labels)
            if not alone:
                # A fill is a kernel; an assignment would copy from the CPU, and wait for all that was launched.
                summed[1].fill_(bool(stop))
            summed = gang.sum(parameters, summed)
            norm = torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm or math.inf)
            optimizer.step()
            backward.clear(optimizer)

            size = sum(len(packed.ids) for packed in packs)
            launched.append(replay.Launched.now(step, rate, size, torch.cat([summed, norm.reshape(1)])))
            last, saves = step == len(todo), step % train.save_steps == 0
            measures = train.eval_steps is not None and (last or step % train.eval_steps == 0)
            stopping = stopping or (alone and bool(stop))
            while launched and (len(launched) > ahead or last or saves or measures or stopping):
                update = launched.popleft()
                loss, stopped, gradient = update.read()
                stopping = stopping or stopped > 0
                if not (math.isfinite(loss) and math.isfinite(gradient)):
                    raise _not_a_number(update.step, loss, gradient, todo, run)
                seen += update.tokens
                if gang.first:
                    line = {"step": update.step, "loss": loss, "grad_norm": gradient, "lr": update.rate}
                    if validation is not None and measures and not launched:
                        line["validation_loss"] = held_out_loss(
                            model, validation, tokens_per_batch=train.tokens_per_batch
                        )
                    now = time.monotonic()
                    log.write(**line, tokens=update.tokens, seconds=round(now - told, 4))
                    told = now
                    shown.advance(1, f"loss {loss:.3f}  {seen / (now - began):,.0f} tokens/s")

            stopping = stopping or (alone and bool(stop))
            saves = saves or last or stopping
            if gang.first and saves:
                log.sync()
                if mirror is not None:
                    # Before the checkpoint: a retry finds a log that reaches as far, and cuts what is more.
                    storage.put(run.metrics_file, f"{mirror}/{run.metrics_file.name}")
                state = Checkpoint(step, model.adapter_tensors(), _moments(model, optimizer), {"loss": loss})
                checkpoint.save(run.checkpoints, state, keep=train.save_total_limit, mirror=mirror)
            if saves and not last and (stopping or (alone and stop)):
                raise Stopped(
                    f"stopped by {stop.signal or 'a signal'} after update {step} of {len(todo)}; it is saved",
                    where=str(run.path),
                    fix="run the same command again to go on",
                )
    speed = seen / (time.monotonic() - began) if seen else 0.0
    if not gang.first:
        return Trained(str(run.adapter), len(todo), loss, speed)
    return _finish(run, model, job.prepared, todo, loss, speed)


def learning_rate(step: int, total: int, train: Train) -> float:
    """The rate of an update (from 1), as transformers' schedules give it.

    Linear from 0 over the warm-up, then cosine or linear to 0, or constant. The first update of a
    warm-up of w has rate 0/w, as there.
    """
    warmup = int(train.warmup_steps) if train.warmup_steps >= 1 else math.ceil(train.warmup_steps * total)
    at = step - 1
    if at < warmup:
        return train.learning_rate * at / max(1.0, warmup)
    share = (at - warmup) / max(1.0, total - warmup)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
    return train.learning_rate * (1.0 - share if train.lr_scheduler_type == "linear" else 1.0)


def _prepared(run: Run) -> tuple[Tokens, dict[str, Any]]:
    prepared = run.prepared()
    return Tokens.load(run.data / "train.safetensors"), prepared


def _same_base(files: base.BaseFiles, prepared: dict[str, Any]) -> None:
    """Refuses another base than the rows were tokenised for; notes its weights where only its tokenizer was there."""
    if prepared["fingerprint"] is not None:
        files.expect(prepared["fingerprint"], "this run was prepared")
    elif files.revision == prepared["revision"]:
        prepared["fingerprint"] = files.fingerprint()
    else:
        raise InputError(
            f"the base is at revision {files.revision}, the rows were prepared for {prepared['revision']}",
            where=files.name,
            fix="pin it: model.model_revision in the recipe",
        )


def _finished(run: Run, todo: Plan) -> Trained | None:
    if not (run.adapter / PROVENANCE).exists():
        return None
    with guarded(run.adapter / PROVENANCE):
        loss = float(read_json(run.adapter / PROVENANCE)["loss"])
    base.check_weights(run.adapter, fix=remake(run.adapter / PROVENANCE))
    return Trained(str(run.adapter), len(todo), loss, 0.0)


def _check_processes(count: int, todo: Plan) -> None:
    if count > (most := max(map(len, todo.updates))):
        raise InputError(
            f"{count} processes share an update's micro-batches, and no update has more than {most}",
            where="train.num_processes",
            fix=f"set train.num_processes: {most}, or raise train.gradient_accumulation_steps",
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise InputError(
            f"the recipe trains on {count} GPUs, this machine has {torch.cuda.device_count()}",
            where="train.num_processes",
            fix=f"set train.num_processes: {torch.cuda.device_count()}; what is learned stays the same",
        )


def _check_length(files: base.BaseFiles, train: Train) -> None:
    length = files.length
    if train.max_length > length:
        raise InputError(
            f"train.max_length {train.max_length} is more than the base's context of {length} tokens",
            where="train.max_length",
            fix=f"at most {length}",
        )


def _check_room(folder: Path, model: LoadedModel) -> None:
    """Refuses to start where the checkpoints will not fit: two of weights and both moments, and the adapter."""
    size = sum(p.nbytes for p in models.trainable(model).values())
    needed, free = 10 * size, shutil.disk_usage(folder).free
    if needed > free:
        raise OutsideError(
            f"checkpoints need {needed} bytes, {free} are free",
            where=str(folder),
            fix="free some room, or name another --run",
        )


def _optimizer(model: LoadedModel, train: Train) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        models.trainable(model).values(),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
        fused=True,
    )


def _not_a_number(step: int, loss: float, norm: float, todo: Plan, run: Run) -> TuneshipError:
    rows = [row for rows in todo.updates[step - 1] for row in rows]
    last = checkpoint.steps(run.checkpoints)
    return TuneshipError(
        f"update {step}: the loss is {loss}, the gradient's norm {norm}; rows {rows[:20]} of data/train.safetensors",
        where=str(run.path),
        fix="lower train.learning_rate or set train.max_grad_norm; "
        + (f"checkpoint step-{last[-1]} is kept" if last else "there was no checkpoint yet"),
    )


def _resume(run: Run, model: LoadedModel, optimizer: torch.optim.AdamW, mirror: str | None, gang: Gang) -> int:
    """Puts the newest whole checkpoint into model and optimiser; returns its update, or 0."""
    saved = checkpoint.latest(run.checkpoints, mirror=mirror)
    if saved is not None and mirror is not None and not run.metrics_file.exists():
        storage.get(f"{mirror}/{run.metrics_file.name}", run.metrics_file)
    if saved is None:
        if run.metrics():
            say("no checkpoint was saved before the stop; starting with update 1 again")
        if gang.first:
            run.rewind(0)
        return 0
    models.set_adapter_tensors(model, saved.adapter)
    for name, parameter in models.trainable(model).items():
        moments = {key: saved.optimizer[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {
            "step": saved.optimizer["step"].clone().to(parameter.device),
            **{key: tensor.to(parameter.device) for key, tensor in moments.items()},
        }
    if gang.first:
        run.rewind(saved.step)
    say(f"going on after update {saved.step}")
    return saved.step


def _moments(model: LoadedModel, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name; `step` is the same for all."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in models.trainable(model).items():
        state = optimizer.state[parameter]
        tensors["step"] = state["step"].detach().cpu().reshape(()).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{key}"] = state[key].detach().cpu().contiguous()
    return tensors


def _validation(run: Run, model: LoadedModel) -> Tokens | None:
    rows = heldout.read(run.data / "validation.jsonl", VALIDATION_ROWS)
    if not rows:
        return None
    return heldout.tokenise(rows, Prompt(run.recipe.data.template, run.recipe.data.stop), model.tokenizer)


def _finish(run: Run, model: LoadedModel, prepared: dict[str, Any], todo: Plan, loss: float, speed: float) -> Trained:
    """Writes the adapter folder, moved to its place by one rename."""
    if math.isnan(loss):
        loss = run.metrics()[-1]["loss"]
    partial = run.path / ".adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    models.write_adapter(model, partial)
    prompt.write(partial, Prompt(run.recipe.data.template, run.recipe.data.stop), model.tokenizer)
    code = code_facts()
    weights = run.recipe.model_dump(mode="json", include={"name", "model", "data", "lora", "train"})
    write_json(
        partial / PROVENANCE,
        {
            "recipe": weights,
            "base": prepared["base"],
            "data": {key: prepared[key] for key in ("source", "train_sha256", "splits")},
            "code": code,
            "device": _device_name(model.device),
            "updates": len(todo),
            "loss": loss,
        },
    )
    put_in_place(partial, run.adapter)
    run.record(
        base=prepared["base"],
        code=code,
        device=_device_name(model.device),
        tokens_per_second=round(speed, 1),
        **_memory(model),
    )
    return Trained(str(run.adapter), len(todo), loss, speed)


def _memory(model: LoadedModel) -> dict[str, int]:
    """Peak bytes on the card, and what the memory model had said."""
    if model.device.type != "cuda":
        return {}
    peak, planned = torch.cuda.max_memory_allocated(model.device), model.planned_bytes
    say(f"peak memory {peak / 1e9:.1f} GB" + (f", {planned / 1e9:.1f} GB planned" if planned else ""))
    return {"peak_memory_bytes": peak} | ({"planned_memory_bytes": planned} if planned else {})


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
