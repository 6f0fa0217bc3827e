"""The model that trains: transformers' with PEFT, or, for Gemma 2 on a GPU, our own layers.

Either way PEFT holds the adapter: its names, its files, its parameters. For our own layers the
transformers model stands on the meta device, an empty frame for PEFT; the frozen weights go from
their safetensors straight to the card, in the precision that the recipe names, and the arithmetic
is `tuneship.kernels.gemma2`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tuneship import base, memory
from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.errors import InputError
from tuneship.kernels import attention, gemma2, low, operations
from tuneship.kernels import lora as lora_kernel
from tuneship.kernels.attention import Documents, Layout
from tuneship.kernels.frozen import Fp8, Frozen, Joined, Nf4, Plain
from tuneship.kernels.gemma2 import Batch, Keep, Layer, Shape
from tuneship.kernels.low import Adapter
from tuneship.kernels.reference import Bounds
from tuneship.memory import Needs
from tuneship.model import LoadedModel
from tuneship.recipe import Lora

_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")
# Threads that read weights; one does not reach the disk's speed.
_READERS = 8


def load(
    files: BaseFiles,
    precision: str,
    lora: Lora,
    *,
    seed: int,
    tokens: int,
    longest: int,
    device: torch.device | None = None,
) -> LoadedModel:
    """A base with a fresh adapter, ready to train.

    Args:
        tokens: of a forward pass, at most; fewer where the card holds no more (`LoadedModel.tokens_per_pass`).
        longest: tokens of the longest row, which must fit.

    Raises:
        InputError: the architecture is not supported, the device lacks the precision, or the card is too
            small; before any weight is read.
    """
    models.check_architecture(files)
    device = device or models.pick_device()
    if device.type == "cuda":
        # Passes differ in length, and the blocks of one would not fit the next. Read at the first allocation.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        precision = "bfloat16" if precision == "auto" else precision
        check_card(precision, device)
    if device.type == "cuda" and files.config["model_type"] == "gemma2":
        free = torch.cuda.mem_get_info(device)[0]
        fit = memory.fit(Needs.of(files.config, lora, precision), tokens=tokens, longest=longest, free=free)
        model: LoadedModel = load_by_hand(files, precision, lora, seed=seed, device=device, keep=fit.keep)
        model.tokens_per_pass, model.planned_bytes = fit.tokens, fit.memory.total
        return model
    model = models.load(files, precision, device)
    models.add_lora(model, lora, seed=seed)
    if precision in ("fp8", "nf4"):
        lora_kernel.freeze(model.causal.model, lambda weight: _frozen(weight, precision))
    return model


def check_card(precision: str, device: torch.device) -> None:
    """Refuses a precision that the card has no arithmetic for.

    Raises:
        InputError: fp8 before compute capability 8.9, bfloat16 before 8.0, nf4 without bitsandbytes.
    """
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    least = {"fp8": (8, 9), "bfloat16": (8, 0), "nf4": (8, 0)}.get(precision, (0, 0))
    if capability < least:
        raise InputError(
            f"the {name} has no {'bfloat16' if precision == 'nf4' else precision} arithmetic "
            f"(compute capability {'.'.join(map(str, capability))}, {'.'.join(map(str, least))} is needed)",
            where="model.precision",
            fix="set model.precision: bfloat16" if capability >= (8, 0) else "take a newer card",
        )
    if precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("nf4 needs bitsandbytes", where="model.precision", fix="pip install 'tuneship[gpu]'")


def load_by_hand(
    files: BaseFiles, precision: str, lora: Lora, *, seed: int, device: torch.device, keep: Keep = "all"
) -> HandModel:
    """A Gemma 2 on our own layers, with a fresh adapter."""
    shape = Shape.of(files.config)
    dtype = torch.float32 if precision == "float32" or device.type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(files.folder), attn_implementation=attention.NAME
        )
    causal.requires_grad_(False)
    with _Weights(files, device, dtype) as weights:
        layers = _read_layers(weights, files.config, shape, precision, lora)
        model = HandModel(
            causal,
            base.load_tokenizer(files),
            files,
            device,
            shape=shape,
            layers=layers,
            embedding=weights["model.embed_tokens.weight"],
            last_norm=weights["model.norm.weight"],
            keep=keep,
        )
    models.add_lora(model, lora, seed=seed)
    model.materialise(seed)
    return model


@dataclass(kw_only=True)
class HandModel(LoadedModel):
    """A Gemma 2 whose layers are ours. `causal` is an empty frame that PEFT's parameters hang in."""

    shape: Shape
    layers: list[Layer]
    embedding: Tensor
    """(vocabulary, width); the head too."""
    last_norm: Tensor
    keep: Keep = "all"
    """What a layer keeps for the way back."""

    @property
    def head(self) -> Tensor:
        """(vocabulary, width)"""
        return self.embedding

    def materialise(self, seed: int) -> None:
        """Gives the adapter's parameters memory and PEFT's initial values: A uniform as nn.Linear's, B zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.causal.named_parameters()):
            if not parameter.requires_grad:
                continue
            values = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            owner, _, leaf = name.rpartition(".")
            self.causal.get_submodule(owner).register_parameter(leaf, nn.Parameter(values.to(self.device)))

    def states(self, ids: Tensor, positions: Tensor, layout: Layout, at: Tensor | None = None) -> Tensor:
        """See `LoadedModel.states`."""
        assert isinstance(layout, Documents)
        return self.run(ids, gemma2.batch(positions, Bounds.of(layout.bounds).to(self.device), self.shape), at)

    def run(self, ids: Tensor, of: Batch, at: Tensor | None = None) -> Tensor:
        """The last hidden states of (tokens,) int64 ids whose places are known: (tokens, width), or those `at`."""
        # The embedding's scale is rounded to the weights' type, as in the model that was trained.
        x = self.embedding[ids] * torch.tensor(self.shape.width**0.5, dtype=self.embedding.dtype)
        sides = low.sides(list(self._adapters()), [layer.products for layer in self.layers], x.dtype)
        for index, (layer, side) in enumerate(zip(self.layers, sides, strict=True), 1):
            x = gemma2.run_layer(x, layer, of, side, self.keep, at if index == len(self.layers) else None)
        return gemma2.run_norm(x, self.last_norm, self.shape.eps)

    def _adapters(self) -> Iterator[tuple[list[Adapter], list[Tensor]]]:
        """The adapters of each layer, and their A and B in turn."""
        training = self.causal.training
        for block in self.causal.model.layers:
            adapters: list[Adapter] = []
            weights: list[Tensor] = []
            for product, parts in self.shape.parts.items():
                for name, start, end in parts:
                    linear = getattr(block.self_attn if product in ("qkv", "o") else block.mlp, name)
                    if not hasattr(linear, "lora_A"):
                        continue
                    dropout = float(getattr(linear.lora_dropout["default"], "p", 0.0)) if training else 0.0
                    adapters.append(Adapter(name, product, start, end, float(linear.scaling["default"]), dropout))
                    weights += [linear.lora_A["default"].weight, linear.lora_B["default"].weight]
            yield adapters, weights


class _Weights:
    """The base's tensors by name, read from its safetensors onto a device."""

    def __init__(self, files: BaseFiles, device: torch.device, dtype: torch.dtype) -> None:
        self._files, self._device, self._dtype = files, device, dtype
        self._stack = ExitStack()
        self._of: dict[str, Any] = {}

    def __enter__(self) -> _Weights:
        for file in self._files.weight_files():
            shard = self._stack.enter_context(safe_open(file, framework="pt", device=str(self._device)))
            self._of.update(dict.fromkeys(shard.keys(), shard))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._of[name].get_tensor(name)
        return tensor.to(self._dtype)


def _read_layers(weights: _Weights, config: dict[str, Any], shape: Shape, precision: str, lora: Lora) -> list[Layer]:
    """Every layer's frozen weights; several layers are read at a time."""
    kinds = config.get("layer_types") or [
        "sliding_attention" if index % 2 == 0 else "full_attention" for index in range(config["num_hidden_layers"])
    ]

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}."
        products = {}
        for product, parts in shape.parts.items():
            place = "self_attn" if product in ("qkv", "o") else "mlp"
            whole = torch.cat([weights[f"{prefix}{place}.{name}.weight"] for name, _, _ in parts])
            named = [name for name, _, _ in parts if lora.target_modules == "all-linear" or name in lora.target_modules]
            products[product] = _frozen(whole, precision, lora.r * len(named), below=product in ("o", "down"))
        norms = {name: weights[f"{prefix}{name}_layernorm.weight"] for name in _NORMS}
        return Layer(shape, kinds[index] == "sliding_attention", products, norms)

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(layer, range(config["num_hidden_layers"])))


def _frozen(weight: Tensor, precision: str, room: int = 0, *, below: bool = False) -> Frozen:
    """A weight in its frozen form; where the form allows, with room for adapters of so many ranks in all."""
    if precision == "fp8":
        return Fp8(weight, operations(weight).quantise)
    if precision == "nf4":
        return Nf4(weight)
    # Products over a number of columns that is no multiple of 8 do not reach the card's speed.
    return Joined(weight, room, below=below) if room and room % 8 == 0 and room <= Joined.MOST else Plain(weight)
