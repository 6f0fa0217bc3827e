"""Tiny random models of each supported architecture, and transformers' own arithmetic to hold ours against.

Each has what makes its architecture special: sliding windows shorter than the rows, grouped heads,
biases, norms of queries and keys, two kinds of positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from samples import make_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tuneship import model as models
from tuneship.base import BaseFiles
from tuneship.model import LoadedModel
from tuneship.recipe import Lora

WINDOW = 16
LORA = Lora(r=4, lora_alpha=8)

_COMMON: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
_OWN: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": _TURNS,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": _TURNS, "query_pre_attn_scalar": 8},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _TURNS},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _TURNS, "attention_bias": True},
}


def make(kind: str, folder: Path, **changes: Any) -> BaseFiles:
    """A random base of an architecture, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(_COMMON | _OWN[kind] | changes)))
    with torch.no_grad():
        for name, parameter in causal.named_parameters():
            # Biases and the gains of norms begin as constants: a forgotten one must show. The rest is
            # large enough that attention is sharp, and its gradients more than rounding.
            constant = name.endswith("bias") or "norm" in name
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter)) if constant else parameter.mul_(10.0)
    causal.save_pretrained(folder)
    return BaseFiles(str(folder), folder, "local")


def tuned(files: BaseFiles, lora: Lora = LORA) -> LoadedModel:
    """Our model with an adapter that does something: PEFT's fresh one is zero."""
    model = models.load(files, "float32")
    models.add_lora(model, lora, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in models.trainable(model).values():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def reference(model: LoadedModel, lora: Lora = LORA) -> PeftModel:
    """The same model and adapter in transformers' eager attention and PEFT's own layers."""
    causal = AutoModelForCausalLM.from_pretrained(
        model.files.folder, attn_implementation="eager", dtype=torch.float32
    ).requires_grad_(False)
    assert model.peft is not None
    config = model.peft.peft_config["default"]
    with warnings.catch_warnings():
        # PEFT calls transformers by a name that is to go.
        warnings.simplefilter("ignore")
        peft = get_peft_model(
            causal,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=config.target_modules,
                layers_to_transform=config.layers_to_transform,
                task_type="CAUSAL_LM",
            ),
        )
    set_peft_model_state_dict(peft, model.adapter_tensors())
    return peft.train(model.causal.training)


def rows(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Random token ids that are no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 400, (length,), generator=generator) for length in lengths]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
