"""What a recipe may say: its sections, their keys, and which settings exclude each other.

Names are those of TRL and PEFT wherever one exists. The text under a key is its documentation: it
becomes docs/recipe.md and the JSON schema.
"""

from __future__ import annotations

import difflib
import os.path
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

# What a name may be where it becomes part of a path, a Kubernetes name or a Hub id.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
HubName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?$"),
]
# What may be a path. No shell has put the home folder for ~ in a recipe, nor in --set.
Place = Annotated[str, AfterValidator(os.path.expanduser)]
Column = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Model(_Section):
    """The base model."""

    model_name_or_path: Place
    """Hub id, local folder, local .gguf file, or `package:NAME` for weights that a Python package brings."""
    model_revision: str | None = None
    """Commit of a Hub model, or sha256 of a GGUF file. Hub models are pinned to it; a GGUF is checked against it."""
    precision: Literal["auto", "float32", "bfloat16", "fp8", "nf4"] = "auto"
    """Precision of the frozen base. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    accept_terms: bool = False
    """Set where the weights come under terms of their own (Gemma) and you have accepted them."""


class Columns(_Section):
    """Which column of the data holds which field of the template."""

    question: Column = "question"
    """Column of the question."""
    context: Column = "context"
    """Column of the context: for text-to-SQL, the CREATE TABLE statements."""
    answer: Column = "answer"
    """Column of the answer, which the model learns to write."""


class Data(_Section):
    """The rows, how they are split, and how a row becomes text."""

    dataset_name: Place
    """Hub id, a .jsonl, .csv or .parquet file, a gs:// URI of one, or `builtin:text-to-sql`."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset."""
    dataset_revision: str | None = None
    """Commit of a Hub dataset."""
    dataset_train_split: str = "train"
    """Split of a Hub dataset to read; held-out rows are cut from it by hash."""
    dataset_limit: Annotated[int, Field(ge=1)] | None = None
    """At most so many training rows (after the split)."""
    columns: Columns = Columns()
    """Which column holds which field."""
    split_by: Column | None = None
    """Column whose values stay together in one split; without it, question and context are hashed."""
    validation_fraction: Fraction = 0.02
    """Share of the hash range kept for choosing settings."""
    test_fraction: Fraction = 0.1
    """Share of the hash range kept for the evaluation."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error`: any bad row refuses the data. `skip`: bad rows go to rejects.jsonl, up to max_bad_fraction."""
    max_bad_fraction: Fraction = 0.01
    """With `on_bad_row: skip`, the share of bad rows above which the data is refused all the same."""
    template: str = "Question: {question}\nContext: {context}\nAnswer: {answer}"
    """Text of one row. It ends with {answer}; the end-of-sequence token follows."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ("\nQuestion:", "\nContext:")
    """Strings that end a completion where the model does not end it by itself."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.template.endswith("{answer}") or self.template.count("{answer}") != 1:
            raise ValueError("template must end with {answer}, and hold it once")
        if "{question}" not in self.template:
            raise ValueError("template must hold {question}")
        fields = list(Columns.model_fields)
        if unknown := [name for name in re.findall(r"\{(\w+)\}", self.template) if name not in fields]:
            near = difflib.get_close_matches(unknown[0], fields, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else f"the fields are {', '.join(fields)}"
            raise ValueError(f"template holds {{{unknown[0]}}}: {hint}")
        if self.columns.answer in (self.columns.question, self.columns.context):
            raise ValueError(f"columns.answer must be a column of its own, not {self.columns.answer} again")
        if "{context}" not in self.template and self.columns.context != "context":
            raise ValueError("columns.context has no effect: the template does not hold {context}")
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError("validation_fraction + test_fraction must stay below 1: no row would be left to train on")
        if self.on_bad_row == "error" and "max_bad_fraction" in self.model_fields_set and self.max_bad_fraction != 0.01:
            raise ValueError("max_bad_fraction has no effect with on_bad_row: error; set on_bad_row: skip or remove it")
        return self


class Lora(_Section):
    """The adapter, by PEFT's names."""

    r: Annotated[int, Field(ge=1, le=512)] = 8
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""
    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Indices of the layers that get an adapter; without it, all."""


class Train(_Section):
    """The optimisation, by TRL's names."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything: initial adapter, order of rows, dropout."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up; `constant` has a warm-up too."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Updates of linear warm-up; below 1, a share of all updates."""
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the rows; 1 where neither this nor max_steps is set."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Updates; instead of num_train_epochs."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Rows of a micro-batch without packing (8 if unset). With packing, tokens_per_batch says it."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-batches of one update, over all processes."""
    packing: bool = False
    """Fill each micro-batch with whole rows up to tokens_per_batch. Rows never see each other either way."""
    tokens_per_batch: Annotated[int, Field(ge=16)] = 4096
    """Tokens that one forward pass holds. Without packing, a larger micro-batch is cut; the update stays the same."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row, in tokens."""
    on_long_row: Literal["error", "skip"] = "error"
    """A longer row refuses the data, or is left out and told. It is never cut: a cut answer teaches not to end."""
    num_processes: Annotated[int, Field(ge=1)] = 1
    """GPUs of one machine that share an update's micro-batches. What is learned does not depend on it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Norm to which gradients are clipped; null for none."""
    logging_steps: Annotated[int, Field(ge=1)] = 10
    """Updates between two lines on a terminal that is not one; metrics.jsonl has every update."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Updates between two measurements of the validation loss; null for none."""
    save_steps: Annotated[int, Field(ge=1)] = 50
    """Updates between two checkpoints."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept. At least two, so that a damaged one has a valid one before it."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if value.get("max_steps") is None and value.get("num_train_epochs") is None:
            value["num_train_epochs"] = 1.0
        if not value.get("packing") and value.get("per_device_train_batch_size") is None:
            value["per_device_train_batch_size"] = 8
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("max_steps and num_train_epochs exclude each other; remove one")
        if self.packing and self.per_device_train_batch_size is not None:
            raise ValueError(
                "per_device_train_batch_size has no effect with packing: true; set tokens_per_batch instead"
            )
        if self.max_length > self.tokens_per_batch:
            raise ValueError(
                f"max_length {self.max_length} is more than tokens_per_batch {self.tokens_per_batch}: "
                "a row must fit into one forward pass"
            )
        return self


class Gate(_Section):
    """What the tuned model must reach before it is published."""

    min_score: Fraction = 0.0
    """Least value of the evaluation's metric."""
    min_gain: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Least gain over the base model, zero-shot or few-shot, whichever is better."""


class Evaluate(_Section):
    """How base and tuned are measured."""

    metric: Literal["execution_accuracy", "exact_match"] = "execution_accuracy"
    """The metric of the gate. execution_accuracy runs answers as SQL on SQLite; exact_match runs nothing."""
    split: Literal["test", "validation"] = "test"
    """Held-out rows to measure on. Choose settings on `validation`, report on `test`."""
    max_rows: Annotated[int, Field(ge=1)] = 200
    """At most so many rows, the first by hash."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows generated together."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longest answer, in tokens."""
    few_shot: Annotated[int, Field(ge=0, le=16)] = 3
    """Examples put before the base model's second measurement; 0 leaves it out."""
    by: tuple[str, ...] = ()
    """Columns of the data by which the scores are broken down."""
    gate: Gate = Gate()
    """What the tuned model must reach."""


class Publish(_Section):
    """Where the adapter goes. Nothing is published where nothing is named."""

    folder: Place | None = None
    """A folder or a gs:// URI."""
    hub_model_id: HubName | None = None
    """Hub repository, `user/name`."""
    hub_private_repo: bool = True
    """Whether a new repository is private."""
    merged: bool = False
    """Send the merged model instead of the adapter: gigabytes instead of megabytes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.hub_private_repo and self.hub_model_id is None:
            raise ValueError("hub_private_repo has no effect without hub_model_id")
        if self.merged and self.hub_model_id is None and self.folder is None:
            raise ValueError("merged has no effect without folder or hub_model_id")
        return self


class Serve(_Section):
    """How `tuneship serve` answers."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port; 0 takes a free one."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer of a request that does not say max_tokens."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 16
    """Requests generated together; with an engine elsewhere, requests that it is given at a time."""
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    """Longest prompt and answer together, in tokens; at most what the model was made for."""
    max_waiting: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait for their turn; one more is answered 429."""
    timeout_s: Annotated[float, Field(gt=0)] = 120
    """Seconds in which an answer must be complete, its wait included."""


class Cluster(_Section):
    """What the training pod asks for on GKE."""

    image: str | None = None
    """Image of the pods, by digest or exact tag; `tuneship image` builds one."""
    gpu: Annotated[int, Field(ge=0)] = 1
    """GPUs of the training pod."""
    accelerator: str = "nvidia-tesla-a100"
    """Value of the node label cloud.google.com/gke-accelerator."""
    accelerator_fallbacks: tuple[str, ...] = ()
    """Further values of that label, in the order of preference: any of them will do."""
    spot: bool = False
    """Train on a Spot node: cheaper, and taken away at times; the retry goes on from the last checkpoint."""
    cpu: Annotated[float, Field(gt=0)] = 4
    """CPU cores of the training pod."""
    memory_mb: Annotated[int, Field(ge=256)] = 32768
    """Memory of the training pod, in MB."""
    disk_mb: Annotated[int, Field(ge=256)] = 65536
    """Ephemeral disk of the training pod, in MB."""
    secrets: tuple[str, ...] = ()
    """Kubernetes secrets whose keys become environment variables of prepare, train and publish."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gpu == 0 and self.accelerator_fallbacks:
            raise ValueError("accelerator_fallbacks has no effect with gpu: 0")
        return self


class Recipe(_Section):
    """Everything about a run."""

    name: Name
    """Name of the run, the adapter and the served model; the file's name where it is not set."""
    model: Model
    """The base model."""
    data: Data
    """The rows."""
    lora: Lora = Lora()
    """The adapter."""
    train: Train = Train()
    """The optimisation."""
    evaluate: Evaluate = Evaluate()
    """The measurement and the gate."""
    publish: Publish = Publish()
    """Where the adapter goes."""
    serve: Serve = Serve()
    """How it answers."""
    cluster: Cluster = Cluster()
    """What the pods ask for on GKE."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        share = {"test": self.data.test_fraction, "validation": self.data.validation_fraction}
        if share[self.evaluate.split] == 0:
            raise ValueError(
                f"evaluate.split is {self.evaluate.split}, and data.{self.evaluate.split}_fraction 0 leaves it no rows"
            )
        if self.train.eval_steps is not None and share["validation"] == 0:
            raise ValueError("train.eval_steps has no effect with data.validation_fraction 0")
        return self
