"""Adapters beside one base: each token of a batch goes through its own request's adapter.

The base is loaded once, whatever the number of adapters; an adapter adds its two narrow matrices to
each linear layer that it was trained on. Requests for different adapters run in one batch: the
frozen product is made for all of their tokens together, the narrow ones for each adapter's tokens.

Not covered: adapters whose arithmetic is more than alpha/r · B·A (DoRA, trained biases). They are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tuneship.damage import guarded, read_json
from tuneship.errors import InputError
from tuneship.model import CONFIG, WEIGHTS, LoadedModel

_PREFIX = "base_model.model."
_REFUSED = ("alpha_pattern", "lora_bias", "modules_to_save", "rank_pattern", "use_dora", "use_rslora")


class Adapters:
    """The adapters of a model, by name. Before each pass, `route` says whose the tokens are."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._linears = {name: part for name, part in model.causal.named_modules() if isinstance(part, nn.Linear)}
        self._pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self._route: list[tuple[dict[str, tuple[Tensor, Tensor]], Tensor | None]] = []
        for name, linear in self._linears.items():
            linear.register_forward_hook(self._hook(name))

    def add(self, name: str, folder: Path) -> None:
        """Reads an adapter.

        Raises:
            InputError: it is one of another base, or of a kind that is not served here.
        """
        with guarded(folder / CONFIG):
            config: dict[str, Any] = read_json(folder / CONFIG)
            scale = config["lora_alpha"] / config["r"]
        if odd := [key for key in _REFUSED if config.get(key)]:
            raise InputError(
                f"an adapter with {odd[0]} is not served by the local engine",
                where=str(folder / CONFIG),
                fix="serve it with --engine vllm, or merge it with tuneship export",
            )
        tensors = load_file(folder / WEIGHTS)
        layers = {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors}
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in sorted(layers):
            down = tensors.pop(f"{_PREFIX}{layer}.lora_A.weight", None)
            up = tensors.pop(f"{_PREFIX}{layer}.lora_B.weight", None)
            linear = self._linears.get(layer)
            if down is None or up is None or linear is None or (*up.shape[:1], *down.shape[1:]) != linear.weight.shape:
                raise InputError(f"the adapter is one of another base or shape: {layer}", where=str(folder / WEIGHTS))
            pairs[layer] = down.t().to(linear.weight).contiguous(), (up * scale).t().to(linear.weight).contiguous()
        if tensors or not pairs:
            raise InputError(
                f"the adapter is not one of LoRA: {min(tensors, default='it is empty')}", where=str(folder / WEIGHTS)
            )
        self._pairs[name] = pairs

    def route(self, names: Sequence[str]) -> None:
        """Says which adapter each token of the next pass belongs to."""
        tokens: dict[str, list[int]] = {}
        for token, name in enumerate(names):
            tokens.setdefault(name, []).append(token)
        alone = len(tokens) == 1
        device = self._model.device
        self._route = [
            (self._pairs[name], None if alone else torch.tensor(mine, device=device)) for name, mine in tokens.items()
        ]

    def _hook(self, layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for pairs, mine in self._route:
                if layer in pairs:
                    down, up = pairs[layer]
                    # Packed: a batch of one, its tokens one behind the other.
                    x, y = inputs[0][0], output[0]
                    if mine is None:
                        y.addmm_(x @ down, up)
                    else:
                        y.index_add_(0, mine, (x[mine] @ down) @ up)

        return add
