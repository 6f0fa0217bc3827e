"""What a training step needs of a card's memory, before the card is touched.

    fit(Needs.of(config, lora, "bfloat16"), tokens=8192, free=80 * 10**9)

For Gemma 2 on our own layers the count is exact but for what is alive for a moment, which is taken
at its largest. The tokens of a forward pass and what a layer keeps follow from it; neither changes
what is learned: an update's gradients are summed over as many passes as it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from tuneship.errors import InputError
from tuneship.kernels.gemma2 import Keep, Shape
from tuneship.kernels.head import chunk
from tuneship.recipe import Lora, Recipe

# Bytes of a frozen weight. fp8 holds it twice, for the way forward and back; nf4 with its block scales.
_WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 2.0, "nf4": 0.5 + 1 / 64 * 1.01}
# AdamW on float32: the weight, its gradient, two moments.
_ADAPTER_BYTES = 16
# Of CUDA itself, before the first tensor.
CONTEXT_BYTES = 600 * 2**20
# Memory of a card by the value of GKE's node label cloud.google.com/gke-accelerator, in bytes.
CARDS = {
    "nvidia-tesla-t4": 16 * 10**9,
    "nvidia-l4": 24 * 10**9,
    "nvidia-tesla-a100": 40 * 2**30,
    "nvidia-a100-80gb": 80 * 2**30,
    "nvidia-h100-80gb": 80 * 2**30,
    "nvidia-h100-mega-80gb": 80 * 2**30,
    "nvidia-h200-141gb": 141 * 10**9,
}
# A pass below this many tokens leaves the card waiting for its memory; then a layer keeps less instead.
_FEW_TOKENS = 4096
_LESS: tuple[Keep, ...] = ("most", "some", "input")
# What the allocator cannot use because of its shape, and other processes' small change.
_MARGIN = 0.95
# Of the pod's disk: rows, tokens, logs, compiled kernels.
_REST_BYTES = 4 * 10**9
# Of the pod's memory, a process beside weights: Python, torch, CUDA, rows and tokens. Taken, as what the pod that
# prepares the rows gets; without CUDA it is 0.3 GB.
_PROCESS_BYTES = 4 * 10**9
# More than any card will have.
_MOST_GB = 1e6


def card(accelerator: str, gb: float | None = None) -> int:
    """Bytes on a card: of a size, or by its name.

    Raises:
        InputError: nobody knows the name, or no card has that size.
    """
    if gb is None:
        if accelerator not in CARDS:
            raise InputError(
                "no card known by that name", where=f"cluster.accelerator: {accelerator}", fix="say --card-gb"
            )
        return CARDS[accelerator]
    if not 0 < gb <= _MOST_GB:
        raise InputError("no card has that size", where=f"--card-gb {gb:g}", fix="say its gigabytes, as --card-gb 24")
    return int(gb * 1e9)


@dataclass(frozen=True)
class Memory:
    """Bytes on the card, at the peak of a step."""

    weights: int
    adapter: int
    kept: int
    """From the way forward for the way back, all layers."""
    working: int
    """Alive for a moment: a layer's gradients, or a chunk of logits."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.kept + self.working


@dataclass(frozen=True)
class Fit:
    """How a step is run on a card."""

    tokens: int
    """Of one forward pass, at most."""
    keep: Keep
    memory: Memory


@dataclass(frozen=True)
class Needs:
    """The numbers of a model and adapter that decide."""

    shape: Shape
    layers: int
    vocabulary: int
    precision: str
    adapter_weights: int
    adapters: int
    """Adapters in one layer, at most."""
    rank: int
    down: bool
    """Whether one of them is the down projection's."""
    mask_bytes: int
    """Of dropout's masks in one layer, a token: kept whatever else is."""

    @classmethod
    def of(cls, config: dict[str, Any], lora: Lora, precision: str) -> Self:
        """From a Gemma 2's config.json and a recipe."""
        shape = Shape.of(config)
        layers = int(config["num_hidden_layers"])
        linears = {
            name: (end - start, shape.inputs[product])
            for product, parts in shape.parts.items()
            for name, start, end in parts
            if lora.target_modules == "all-linear" or name in lora.target_modules
        }
        tuned = layers if lora.layers_to_transform is None else len(lora.layers_to_transform)
        each = sum(lora.r * (outputs + width) for outputs, width in linears.values())
        masks = sum(width for _, width in linears.values()) if lora.lora_dropout else 0
        down = "down_proj" in linears
        return cls(shape, layers, int(config["vocab_size"]), precision, tuned * each, len(linears), lora.r, down, masks)

    @property
    def weights(self) -> int:
        """Of the frozen base: its linears, its embedding (the head too), its norms."""
        shape = self.shape
        attention = shape.width * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
        linears = self.layers * (attention + 3 * shape.width * shape.feed_forward)
        scales = 8 * self.layers * (sum(end for parts in shape.parts.values() for _, _, end in parts[-1:]))
        plain = 4 if self.precision == "float32" else 2
        rest = self.vocabulary * shape.width + self.layers * 4 * shape.width + shape.width
        return int(linears * _WEIGHT_BYTES[self.precision]) + rest * plain + (scales if self.precision == "fp8" else 0)

    def memory(self, tokens: int, keep: Keep) -> Memory:
        """At the peak of a pass of so many tokens."""
        shape = self.shape
        element = 4 if self.precision == "float32" else 2
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        numbers = 4 * 4 + 4 * shape.heads  # of the norms and of attention, float32
        layer_input = element * shape.width
        gate_up = element * 2 * shape.feed_forward
        inner = element * self.rank * self.adapters
        active = element * shape.feed_forward if self.down else 0
        some = element * (3 * shape.width + 2 * queries + 2 * keys) + numbers + inner
        kept = layer_input + {"all": some + gate_up + active, "most": some + gate_up, "some": some, "input": 0}[keep]
        # gelu's gradient: of the gate's output, of gate and up, the active values, gate and up again.
        layer = element * (6 * shape.feed_forward + 6 * shape.width) + (0 if keep in ("all", "most") else gate_up)
        if keep == "input":
            layer += some
        if self.precision == "fp8":
            layer += 2 * shape.feed_forward + shape.width
        unpacked = element * 2 * shape.feed_forward * shape.width if self.precision == "nf4" else 0
        logits = element * self.vocabulary
        head = logits * chunk("cuda", logits) + 3 * element * shape.width * tokens
        return Memory(
            self.weights,
            _ADAPTER_BYTES * self.adapter_weights,
            self.layers * (kept + self.mask_bytes) * tokens,
            max(layer * tokens + unpacked, head),
        )


def fit(needs: Needs, *, tokens: int, longest: int, free: int) -> Fit:
    """How a pass of at most `tokens` runs in `free` bytes: as much kept as there is room for.

    All is kept where the whole pass holds it. A layer keeps less before a pass becomes short; below that,
    passes become as short as the longest row.

    Raises:
        InputError: even a pass of the longest row does not fit; it says what would.
    """
    room = int(free * _MARGIN)
    if (whole := needs.memory(tokens, "all")).total <= room:
        return Fit(tokens, "all", whole)
    for least in (min(tokens, max(longest, _FEW_TOKENS)), longest):
        for keep in _LESS:
            if (held := _tokens(needs, keep, tokens, room)) >= least:
                return Fit(held, keep, needs.memory(held, keep))
    raise InputError(
        f"the card is too small: {needs.memory(longest, 'input').total / 1e9:.1f} GB are needed in "
        f"{needs.precision}, {free / 1e9:.1f} GB are free",
        where="model.precision",
        fix=_remedy(needs, longest, room),
    )


def _tokens(needs: Needs, keep: Keep, most: int, room: int) -> int:
    """The most tokens that a pass can hold: the need grows with them in a straight line, but for the head."""
    if needs.memory(most, keep).total <= room:
        return most
    low, high = 0, most
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (middle, high) if needs.memory(middle, keep).total <= room else (low, middle)
    return low


def _remedy(needs: Needs, longest: int, room: int) -> str:
    nf4 = Needs(**{**vars(needs), "precision": "nf4"}).memory(longest, "input").total
    if needs.precision != "nf4" and nf4 <= room:
        return f"set model.precision: nf4 (needs {nf4 / 1e9:.1f} GB), or take a larger card"
    return f"take a card of {min(needs.memory(longest, 'input').total, nf4) / _MARGIN / 1e9:.0f} GB or more"


def plan(recipe: Recipe, config: dict[str, Any], *, card: int, shards: int = 1) -> dict[str, Any]:
    """What training will take of a card: plain values, bytes and tokens.

    Args:
        card: its memory, in bytes.
        shards: files that the base's weights are split into.

    Raises:
        InputError: the base is no Gemma 2, whose need is not known beforehand; or the card, or the disk or
            the memory of a pod, is too small.
    """
    if config["model_type"] != "gemma2":
        raise InputError(
            f"what a {config['model_type']} needs is not known before it runs; it is for Gemma 2",
            where="model.model_name_or_path",
            fix="train a few updates (--set train.max_steps=3); provenance.json has the peak",
        )
    precision = "bfloat16" if recipe.model.precision == "auto" else recipe.model.precision
    needs = Needs.of(config, recipe.lora, precision)
    pod = {"disk": _disk(recipe, config, needs), "memory": _host(recipe, config, needs, shards)}
    for part, needed in pod.items():
        there = getattr(recipe.cluster, f"{part}_mb")
        if recipe.cluster.image is not None and needed > there * 10**6:
            raise InputError(
                f"the training pod's {part} is too small: {needed / 1e9:.0f} GB are needed",
                where=f"cluster.{part}_mb: {there}",
                fix=f"set cluster.{part}_mb: {-(-needed // 10**6)}",
            )
    train = recipe.train
    rows = train.tokens_per_batch
    if not train.packing:
        rows = min(rows, train.max_length * train.per_device_train_batch_size * train.gradient_accumulation_steps)  # type: ignore[operator]
    chosen = fit(needs, tokens=rows, longest=train.max_length, free=card - CONTEXT_BYTES)
    return {
        "precision": precision,
        "card_bytes": card,
        "tokens_per_pass": chosen.tokens,
        "keep": chosen.keep,
        "adapter_weights": needs.adapter_weights,
        "weights_bytes": chosen.memory.weights,
        "adapter_bytes": chosen.memory.adapter,
        "kept_bytes": chosen.memory.kept,
        "working_bytes": chosen.memory.working,
        "peak_bytes": chosen.memory.total,
        "disk_bytes": pod["disk"],
        "memory_bytes": pod["memory"],
    }


def _disk(recipe: Recipe, config: dict[str, Any], needs: Needs) -> int:
    """What the training pod writes, in bytes: the base as the Hub has it, checkpoints, a merged model if asked for."""
    weights, stored = _stored(config, needs)
    # A checkpoint holds the adapter and two moments, in float32; a new one is written before the oldest goes.
    checkpoints = (recipe.train.save_total_limit + 1) * 12 * needs.adapter_weights
    merged = 2 * weights if recipe.publish.merged else 0
    return stored * weights + merged + checkpoints + _REST_BYTES


def _host(recipe: Recipe, config: dict[str, Any], needs: Needs, shards: int) -> int:
    """What the training pod holds in its own memory, in bytes, at most.

    Training reads each weight from its mapped file straight to the card (`trainable.load_by_hand`); what is
    mapped is the page cache's, and can be let go. Evaluating loads through transformers (`model.load`): the whole
    base in its type, on the CPU first, unless the files have that type, which are mapped. Merging holds a shard in
    bfloat16 and a target in float32, three times (`export.merge`); its proof loads the merged model. One process
    does one after the other, and glibc gives nothing back (`cpu.keep_memory`), so that they add up: measured on a
    CPU, with 0.6 billion weights in float32, in one file and in six.
    """
    weights, stored = _stored(config, needs)
    element = 4 if recipe.model.precision == "float32" else 2
    held = element * weights if element != stored else 0
    if recipe.publish.merged:
        target = needs.shape.feed_forward * needs.shape.width
        # A file ends where the next tensor would pass the limit: all but the last lack less than a tensor of it.
        shard = 2 * weights
        if shards > 1:
            shard = min(shard, shard // (shards - 1) + 2 * needs.vocabulary * needs.shape.width)
        held += shard + 3 * 4 * target + (element * weights if element != 2 else 0)
    processes = recipe.train.num_processes
    training = _PROCESS_BYTES * (processes + 1 if processes > 1 else 1)
    return max(training, _PROCESS_BYTES + held)


def _stored(config: dict[str, Any], needs: Needs) -> tuple[int, int]:
    """How many weights the base has, and the bytes of one as the Hub has it."""
    weights = Needs(**{**vars(needs), "precision": "float32"}).weights // 4
    return weights, 4 if config.get("dtype", config.get("torch_dtype", "float32")) == "float32" else 2
