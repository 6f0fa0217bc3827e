"""What the tests are about: a tiny random Gemma 2 with its own tokenizer, a few rows, a recipe for both.

The model has what makes Gemma 2 special: soft-capped attention and logits, alternating sliding
windows (shorter than the rows, so that they matter), grouped heads, a <bos> that the tokenizer puts
first. Its weights are random; nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuneship import recipe as recipes
from tuneship.recipe import Recipe

WORDS = (
    "Question: Context: Answer: SELECT FROM WHERE COUNT(*) AND CREATE TABLE VARCHAR INTEGER name age city price "
    "what is the of each how many show list all with more than in attendees kubecon 'EU' \"EU\" > 30 , ( ) ;"
)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with Gemma's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_gemma2(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Gemma 2 of four layers, with its tokenizer."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    settings = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(Gemma2Config(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that caps and masks show in the output.
            parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def sql_rows(count: int) -> list[dict[str, str]]:
    """Rows in sql-create-context's shape, every answer runs; `domain` groups them."""
    rows = []
    for index in range(count):
        table, column = f"table_{index % 7}", ("age", "price", "city")[index % 3]
        rows.append(
            {
                "question": f"How many rows of {table} have {column} more than {index}?",
                "context": f"CREATE TABLE {table} (name VARCHAR, {column} INTEGER)",
                "answer": f"SELECT COUNT(*) FROM {table} WHERE {column} > {index}",
                "domain": f"domain-{index % 11}",
            }
        )
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tiny_recipe(base: Path, rows: Path, **sections: Any) -> Recipe:
    """The recipe of a tiny run, with sections changed: `tiny_recipe(…, train={"seed": 1})`."""
    tree: dict[str, Any] = {
        "name": "tiny-test",
        "model": {"model_name_or_path": str(base), "precision": "float32"},
        "data": {"dataset_name": str(rows), "test_fraction": 0.2, "validation_fraction": 0.1},
        "lora": {"r": 4, "lora_alpha": 8},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": 6,
            "packing": True,
            "tokens_per_batch": 256,
            "max_length": 256,
            "save_steps": 2,
        },
        "evaluate": {
            "max_rows": 6,
            "max_new_tokens": 8,
            "few_shot": 2,
            "gate": {"min_score": 0.0, "min_gain": -1.0},
        },
    }
    for section, changes in sections.items():
        tree[section] = {**tree.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return recipes.validate(tree, where="test")
