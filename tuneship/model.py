"""The model on a device: frozen base, adapter on top.

    model = load(resolve(recipe.model), recipe.model.precision)
    add_lora(model, recipe.lora, seed=recipe.train.seed)
    states = model.states(ids, positions, Documents([0, 92, 180]))

Supported are the decoders whose head is one plain matrix and whose attention goes through
transformers' attention interface; `ARCHITECTURES` names those whose arithmetic is tested against
transformers' own.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tuneship import base
from tuneship.base import BaseFiles
from tuneship.damage import guarded
from tuneship.errors import InputError
from tuneship.kernels import attention, cpu
from tuneship.kernels import lora as lora_kernel
from tuneship.kernels.attention import Layout
from tuneship.recipe import Lora

ARCHITECTURES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass
class LoadedModel:
    """A causal language model, its tokenizer, and where they came from."""

    causal: PreTrainedModel
    tokenizer: Any
    files: BaseFiles
    device: torch.device
    peft: PeftModel | None = None
    tokens_per_pass: int | None = None
    """What the device holds of a forward and backward pass, where that is known."""
    planned_bytes: int | None = None
    """What such a pass takes of it."""

    @property
    def head(self) -> Tensor:
        """(vocabulary, width)"""
        weight: Tensor = self.causal.lm_head.weight
        return weight

    @property
    def softcap(self) -> float | None:
        """The cap on the head's logits (Gemma 2: 30)."""
        return getattr(self.causal.config, "final_logit_softcapping", None)

    @property
    def context_length(self) -> int:
        """Longest text that the model was made for, in tokens."""
        return int(self.causal.config.max_position_embeddings)

    def states(self, ids: Tensor, positions: Tensor, layout: Layout, at: Tensor | None = None) -> Tensor:
        """The last hidden states of packed tokens.

        Args:
            ids, positions: (tokens,), int64.
            at: (places,), int64, no place twice: those states only.

        Returns:
            (tokens, width), or (places, width).
        """
        out = self.causal.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
        states: Tensor = out.last_hidden_state[0]
        return states if at is None else states.index_select(0, at)

    def logits(self, states: Tensor) -> Tensor:
        """(tokens, vocabulary), float32, of (tokens, width)."""
        logits = (states @ self.head.t()).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's weights by PEFT's names, on the CPU."""
        assert self.peft is not None
        return {name: t.detach().cpu().contiguous() for name, t in _tensors(self.peft).items()}


def pick_device() -> torch.device:
    """This process's GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_architecture(files: BaseFiles) -> None:
    """Refuses a base that this package's arithmetic is not right for, before its weights are read.

    Raises:
        InputError: naming the architectures that are.
    """
    config = files.config
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"the architecture {kind} is not supported",
            where=str(files.folder / "config.json"),
            fix=f"take one of: {', '.join(ARCHITECTURES)}",
        )


def load(files: BaseFiles, precision: str = "auto", device: torch.device | None = None) -> LoadedModel:
    """Loads a base, frozen.

    Raises:
        InputError: the architecture is not supported, or this device lacks the precision.
    """
    check_architecture(files)
    device = device or pick_device()
    dtype = _dtype(precision, device)
    transformers_logging.disable_progress_bar()
    causal = AutoModelForCausalLM.from_pretrained(
        files.folder, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True, use_safetensors=True
    )
    causal.requires_grad_(False)
    causal.eval().to(device)
    return LoadedModel(causal, base.load_tokenizer(files), files, device)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" or cpu.has_bfloat16() else "float32"
    if precision in ("fp8", "nf4") and device.type == "cpu":
        raise InputError(
            f"precision {precision} needs a CUDA GPU", where="model.precision", fix="set model.precision: auto"
        )
    return torch.float32 if precision == "float32" else torch.bfloat16


def check_lora(files: BaseFiles, lora: Lora) -> None:
    """Refuses targets that the base does not have, before its weights are read.

    Raises:
        InputError: naming the linear layers, or the number of layers, that there are.
    """
    config = files.config
    layers = int(config["num_hidden_layers"])
    if lora.layers_to_transform is not None and (beyond := [n for n in lora.layers_to_transform if n >= layers]):
        raise InputError(
            f"the base has layers 0 to {layers - 1}, not {beyond[0]}",
            where="lora.layers_to_transform",
            fix="leave it out",
        )
    linears = _linears(files)
    if lora.target_modules != "all-linear" and (unknown := [n for n in lora.target_modules if n not in linears]):
        raise InputError(
            f"the base has no linear layer {unknown[0]}",
            where="lora.target_modules",
            fix=f"take some of: {', '.join(linears)}, or all-linear",
        )
    chosen = linears if lora.target_modules == "all-linear" else {n: linears[n] for n in lora.target_modules}
    for name, (outputs, inputs) in chosen.items():
        if lora.r > min(outputs, inputs):
            raise InputError(
                f"rank {lora.r} is more than {name} has ({outputs} × {inputs})",
                where="lora.r",
                fix=f"at most {min(outputs, inputs)}",
            )


def _linears(files: BaseFiles) -> dict[str, tuple[int, int]]:
    """The decoder's linear layers: name → (outputs, inputs), from the configuration alone."""
    from transformers import AutoConfig

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.folder))
    return {
        name.rpartition(".")[2]: (module.out_features, module.in_features)
        for name, module in causal.model.layers[0].named_modules()
        if isinstance(module, nn.Linear)
    }


def add_lora(model: LoadedModel, lora: Lora, *, seed: int) -> None:
    """Puts a fresh adapter on the base; its initial weights depend on the seed alone."""
    # By name: PEFT takes "all-linear" only without layers_to_transform, and a reader sees what was meant.
    targets = list(_linears(model.files) if lora.target_modules == "all-linear" else lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        layers_to_transform=list(lora.layers_to_transform) if lora.layers_to_transform is not None else None,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.files.name,
        revision=None if model.files.revision == "local" else model.files.revision,
    )
    torch.manual_seed(seed)
    _attach(model, config)
    # get_peft_model writes the base's local folder here; the adapter names the base as the recipe does.
    config.base_model_name_or_path = model.files.name


def _attach(model: LoadedModel, config: LoraConfig) -> None:
    with warnings.catch_warnings():
        # PEFT warns of the base's name, which we restore, and calls transformers by a name that is to go.
        warnings.simplefilter("ignore")
        model.peft = get_peft_model(model.causal, config)
    lora_kernel.fuse(model.causal)


def trainable(model: LoadedModel) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in a fixed order."""
    return {name: p for name, p in sorted(model.causal.named_parameters()) if p.requires_grad}


def load_adapter(model: LoadedModel, folder: Path) -> None:
    """Puts a saved adapter on the base, for evaluation and serving.

    Raises:
        InputError: the folder holds no adapter, or one of another base.
    """
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise InputError("no adapter here", where=str(folder), fix="run tuneship train first")
    with guarded(folder / CONFIG):
        config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    _attach(model, config)
    with guarded(folder / WEIGHTS):
        tensors = load_file(folder / WEIGHTS)
    set_adapter_tensors(model, tensors)
    model.causal.eval()


def set_adapter_tensors(model: LoadedModel, tensors: dict[str, Tensor]) -> None:
    """Fills the adapter.

    Raises:
        InputError: the tensors are not those of this base and adapter.
    """
    assert model.peft is not None
    expected = {name: t.shape for name, t in _tensors(model.peft).items()}
    given = {name: t.shape for name, t in tensors.items()}
    if expected != given:
        wrong = sorted(set(expected.items()) ^ set(given.items()))[0]
        raise InputError(
            f"the adapter is one of another base or shape: {wrong[0]} {tuple(wrong[1])}", where=model.files.name
        )
    set_peft_model_state_dict(model.peft, tensors)


def _tensors(peft: PeftModel) -> dict[str, Tensor]:
    # Without embeddings: PEFT would look for the base on the Hub to see whether its vocabulary grew; ours never does.
    tensors: dict[str, Tensor] = get_peft_model_state_dict(peft, save_embedding_layers=False)
    return tensors


def write_adapter(model: LoadedModel, folder: Path) -> None:
    """Writes what PEFT writes: weights, configuration, and the base's tokenizer beside them."""
    assert model.peft is not None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.adapter_tensors(), folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft.peft_config["default"])
    config.inference_mode = True
    # A set in PEFT: its order would change from process to process, and the file with it.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    for file in model.files.folder.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copyfile(file, folder / file.name)
