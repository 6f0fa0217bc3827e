"""prepare: rows in, checked, split, tokenised, written; twice is once.

python -m pytest tests/test_prepare.py -v
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import sql_rows, write_rows

from tuneship import journal, prompt
from tuneship.data import heldout
from tuneship.data.packing import Tokens, pack
from tuneship.errors import InputError
from tuneship.journal import Run, sha256_file
from tuneship.prepare import EXAMPLES, prepare, validate
from tuneship.prompt import Prompt
from tuneship.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def opened(recipe: Recipe, folder: Path) -> tuple[Run, dict[str, Any]]:
    with journal.open_run(folder, recipe) as run:
        return run, prepare(run)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


# --- what it writes -------------------------------------------------------------------------------


def test_rows_become_tokens_with_labels_on_answers_alone(
    make_recipe: MakeRecipe, rows_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    run, prepared = opened(make_recipe(), tmp_path / "run")
    tokens = Tokens.load(run.data / "train.safetensors")
    held = {row.number for name in ("validation", "test") for row in heldout.read(run.data / f"{name}.jsonl", 99)}
    trained = [row for number, row in enumerate(lines(rows_file), 1) if number not in held]
    assert len(tokens) == len(trained) == prepared["splits"]["train"]
    contract = Prompt(run.recipe.data.template, run.recipe.data.stop)
    for index, row in enumerate(trained):
        made = pack(tokens, [index])
        assert tokenizer.decode(made.labels[:-1]) == f" {row['answer']}"
        assert made.labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(made.ids[1 : made.labelled[0] + 1]) == contract.render(row)
        assert made.ids[0] == tokenizer.bos_token_id
    assert prepared["tokens"] == len(tokens.ids)
    assert prepared["labels"] == sum(len(pack(tokens, [index]).labels) for index in range(len(tokens)))
    assert prepared["longest"] == max(tokens.lengths)


def test_every_row_is_somewhere_once(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run, prepared = opened(make_recipe(), tmp_path / "run")
    test, validation = (heldout.read(run.data / f"{name}.jsonl", 99) for name in ("test", "validation"))
    assert prepared["splits"] == {
        "train": 60 - len(test) - len(validation),
        "test": len(test),
        "validation": len(validation),
    }
    assert not {row.question for row in test} & {row.question for row in validation}
    assert test
    assert validation
    # The first rows of a file are a sample: they stand in the order of their hashes, not of the source.
    assert [row.number for row in test] != sorted(row.number for row in test)
    assert test[0].columns["domain"].startswith("domain-")


def test_the_order_of_the_source_decides_nothing_that_is_held_out(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = sql_rows(60)
    texts = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        run, _ = opened(
            make_recipe(data={"dataset_name": str(write_rows(tmp_path / f"{name}.jsonl", order))}), tmp_path / name
        )
        texts.append(
            [
                [row.question for row in heldout.read(run.data / f, 99)]
                for f in ("test.jsonl", "validation.jsonl", "examples.jsonl")
            ]
        )
    assert texts[0] == texts[1]


def test_examples_are_training_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", sql_rows(300))
    run, _ = opened(make_recipe(data={"dataset_name": str(rows)}), tmp_path / "run")
    examples = heldout.read(run.data / "examples.jsonl", 99)
    held = {row.question for name in ("validation", "test") for row in heldout.read(run.data / f"{name}.jsonl", 999)}
    assert len(examples) == len({row.question for row in examples}) == EXAMPLES
    assert not {row.question for row in examples} & held


def test_few_rows_are_all_examples(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", sql_rows(9))
    run, prepared = opened(make_recipe(data={"dataset_name": str(rows)}), tmp_path / "run")
    assert len(heldout.read(run.data / "examples.jsonl", 99)) == prepared["splits"]["train"]


def test_where_it_came_from_is_written(
    make_recipe: MakeRecipe, rows_file: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run, prepared = opened(make_recipe(), tmp_path / "run")
    assert prepared["source"] == {"name": str(rows_file), "sha256": sha256_file(rows_file)}
    assert prepared["train_sha256"] == sha256_file(run.data / "train.safetensors")
    assert prepared["base"]["name"] == str(tiny_base)
    assert run.provenance()["base"] == prepared["base"]
    assert run.provenance()["data"]["source"] == prepared["source"]


def test_awkward_columns_do_no_harm(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [
        {
            **row,
            "half": "\ud800",
            "h\udc00": 1,
            "nan": math.nan,
            "long": "x" * 101,
            "list": [1],
            "none": None,
            "good": "ü",
        }
        for row in sql_rows(60)
    ]
    run, _ = opened(
        make_recipe(data={"dataset_name": str(write_rows(tmp_path / "rows.jsonl", rows))}), tmp_path / "run"
    )
    text = (run.data / "test.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    (first, *_) = heldout.read(run.data / "test.jsonl", 1)
    assert first.columns["good"] == "ü"
    assert set(first.columns) == {"question", "context", "answer", "domain", "good"}


# --- twice is once ---------------------------------------------------------------------------------


def test_a_prepared_run_is_left_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run, prepared = opened(make_recipe(), tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run.data.iterdir()}
    assert opened(make_recipe(), tmp_path / "run")[1] == prepared
    assert {file: file.stat().st_mtime_ns for file in run.data.iterdir()} == before


def test_two_runs_of_the_same_rows_are_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one, two = (opened(make_recipe(), tmp_path / name)[0] for name in ("one", "two"))
    assert files(one.data) == files(two.data)


@pytest.mark.parametrize("name", ["train.safetensors", "test.jsonl", "rejects.jsonl"])
def test_a_preparation_that_was_cut_off_is_done_again(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    run, prepared = opened(make_recipe(), tmp_path / "run")
    whole = files(run.data)
    # prepared.json comes last: without it, whatever else is there counts for nothing.
    (run.data / journal.PREPARED).unlink()
    (run.data / name).write_bytes(b"half")
    assert opened(make_recipe(), tmp_path / "run")[1] == prepared
    assert files(run.data) == whole


def test_data_that_changed_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", sql_rows(60))
    recipe = make_recipe(data={"dataset_name": str(rows)})
    run, _ = opened(recipe, tmp_path / "run")
    before = files(run.data)
    write_rows(rows, sql_rows(61))
    with pytest.raises(InputError, match="the data changed"):
        opened(recipe, tmp_path / "run")
    assert files(run.data) == before
    write_rows(rows, sql_rows(60))
    opened(recipe, tmp_path / "run")


# --- rows that do not fit (D2) ----------------------------------------------------------------------


def long_rows(folder: Path) -> Path:
    rows = sql_rows(60)
    for index in (3, 7, 20, 21, 22, 40, 41):
        rows[index] = {
            **rows[index],
            "context": "CREATE TABLE t (" + ", ".join(f"c{i} INTEGER" for i in range(90)) + f") -- {index}",
        }
    return write_rows(folder / "rows.jsonl", rows)


def test_long_rows_are_refused_by_number_and_length(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"longer than train.max_length 256 \(row \d+: \d+ tokens, ") as caught:
        opened(make_recipe(data={"dataset_name": str(long_rows(tmp_path))}), tmp_path / "run")
    named = [int(part.split(":")[0]) for part in caught.value.what.split("row ")[1:]]
    assert set(named) <= {4, 8, 21, 22, 23, 41, 42}
    assert 1 <= len(named) <= 5
    assert "on_long_row: skip" in caught.value.fix
    assert not (tmp_path / "run" / "data" / journal.PREPARED).exists()


def test_skipped_long_rows_are_counted_and_never_cut(make_recipe: MakeRecipe, tmp_path: Path, tokenizer: Any) -> None:
    recipe = make_recipe(data={"dataset_name": str(long_rows(tmp_path))}, train={"on_long_row": "skip"})
    run, prepared = opened(recipe, tmp_path / "run")
    tokens = Tokens.load(run.data / "train.safetensors")
    assert prepared["long"] >= 1
    assert prepared["long"] + len(tokens) == prepared["splits"]["train"]
    assert max(tokens.lengths) <= 256
    assert all(pack(tokens, [index]).labels[-1] == tokenizer.eos_token_id for index in range(len(tokens)))


def test_a_row_of_just_max_length_fits(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    _, prepared = opened(make_recipe(), tmp_path / "run")
    exact = {"max_length": prepared["longest"], "tokens_per_batch": 256}
    assert opened(make_recipe(train=exact), tmp_path / "exact")[1]["long"] == 0
    with pytest.raises(InputError, match=f"{prepared['longest']} tokens"):
        opened(make_recipe(train={**exact, "max_length": prepared["longest"] - 1}), tmp_path / "less")


def test_only_long_rows_are_no_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"longer than train\.max_length 8"):
        opened(make_recipe(train={"max_length": 8, "on_long_row": "skip"}), tmp_path / "run")


# --- bad rows -----------------------------------------------------------------------------------------


def test_rejects_say_which_row_and_why(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [*sql_rows(60), {**sql_rows(1)[0], "answer": None, "odd": "\ud800"}])
    with file.open("ab") as out:
        out.write(b'{"torn\n')
    recipe = make_recipe(data={"dataset_name": str(file), "on_bad_row": "skip", "max_bad_fraction": 0.05})
    run, prepared = opened(recipe, tmp_path / "run")
    first, second = lines(run.data / "rejects.jsonl")
    assert (first["row"], first["reason"], first["raw"]["odd"]) == (61, "answer is null", "\ud800")
    assert (second["row"], second["raw"]) == (62, None)
    assert prepared["bad"] == 2
    assert "left out 2 bad rows" in capsys.readouterr().err


def test_without_bad_rows_there_is_no_file_of_them(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run, _ = opened(make_recipe(data={"on_bad_row": "skip"}), tmp_path / "run")
    assert not (run.data / "rejects.jsonl").exists()


# C3: whatever is wrong with the rows is said before a base is looked for.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"answer": "sql"}}, "sql is missing"),
        ({"split_by": "domian"}, "domian is missing; set data.split_by: domain?"),
        ({"dataset_name": "missing.jsonl"}, "no such file"),
        ({"dataset_config": "x"}, "has an effect on a Hub data set only"),
        ({"test_fraction": 0.9, "validation_fraction": 0.0999}, "none of the 60 rows"),
    ],
)
def test_bad_rows_are_told_before_a_base_is_looked_for(
    make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(model={"model_name_or_path": "nobody/has-this-model"}, data=changes)
    with pytest.raises(InputError, match=message):
        opened(recipe, tmp_path / "run")
    with pytest.raises(InputError, match=message):
        validate(recipe)


@pytest.mark.parametrize("missing", ["tokenizer.json", "eos", "settings"])
def test_a_base_without_a_whole_tokenizer_is_told(
    make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path, missing: str
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    if missing == "tokenizer.json":
        (folder / missing).unlink()
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["eos_token"]
        # Without any, it is taken for another model's, whose special tokens this vocabulary lacks.
        (folder / "tokenizer_config.json").write_text(json.dumps(config if missing == "eos" else {}))
    with pytest.raises(InputError, match="tokenizer"):
        opened(make_recipe(model={"model_name_or_path": str(folder)}), tmp_path / "run")


# --- validate -------------------------------------------------------------------------------------------


def test_validate_counts_as_prepare_does(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    counts = validate(make_recipe())
    _, prepared = opened(make_recipe(), tmp_path / "run")
    assert counts == {key: prepared[key] for key in counts}
    assert counts["rows"] == 60


def test_validate_loads_no_model_library(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from tuneship import recipe as recipes

    (tmp_path / "my.yaml").write_text(recipes.dump(make_recipe()), encoding="utf-8")
    script = (
        "import sys\nsys.argv = ['tuneship', 'validate', sys.argv[1]]\nfrom tuneship.cli import main\nmain()\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'metaflow', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "my.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "the recipe and its data are good" in done.stdout


def test_held_out_rows_are_tokenised_as_training_rows_are(
    make_recipe: MakeRecipe, tmp_path: Path, tokenizer: Any
) -> None:
    run, _ = opened(make_recipe(), tmp_path / "run")
    contract = Prompt(run.recipe.data.template, run.recipe.data.stop)
    rows = heldout.read(run.data / "test.jsonl", 3)
    assert len(rows) == 3
    tokens = heldout.tokenise(rows, contract, tokenizer)
    expected = prompt.encode_rows(tokenizer, contract, [row.fields for row in rows])
    assert tokens.ids.tolist() == [token for before, after in expected for token in before + after]
