"""Recipes: what is read, what is refused, and how well the refusal is told.

python -m pytest tests/test_recipe.py -v
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tuneship import recipe as recipes
from tuneship.errors import InputError
from tuneship.recipe import MAX_RECIPE_BYTES, Recipe, Train

LEAST = "model:\n  model_name_or_path: google/gemma-2-9b\ndata:\n  dataset_name: b-mc2/sql-create-context\n"


def written(folder: Path, text: str | bytes, name: str = "my.yaml") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def refusal(file: Path, *overrides: str, environ: dict[str, str] | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        recipes.load(file, overrides=overrides, environ=environ)
    return caught.value


def tree(**sections: Any) -> dict[str, Any]:
    """The least recipe as plain values, with sections changed."""
    plain: dict[str, Any] = {"name": "t", "model": {"model_name_or_path": "a/b"}, "data": {"dataset_name": "c/d"}}
    for name, changes in sections.items():
        plain[name] = {**plain.get(name, {}), **changes}
    return plain


def value_of(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model.model_name_or_path", "data.dataset_name", "publish.folder"])
def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = recipes.load(written(tmp_path, LEAST), overrides=[f"{key}=~/x"])
    assert value_of(recipe, key) == "/home/me/x"


def test_the_least_recipe_names_a_base_and_rows(tmp_path: Path) -> None:
    recipe = recipes.load(written(tmp_path, LEAST, "My Recipe.yaml"))
    assert recipe.name == "my-recipe"
    assert recipe.train.num_train_epochs == 1.0
    assert recipe.train.per_device_train_batch_size == 8


@pytest.mark.parametrize("name", ["x" * 100 + ".yaml", "---.yaml", "2026-11-24.yaml", "Ünïcode.yaml"])
def test_any_file_name_gives_a_run_name(tmp_path: Path, name: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,62}", recipes.load(written(tmp_path, LEAST, name)).name)


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_load(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    # `tuneship init` shows the first line.
    assert recipes.shipped()[name].read_text(encoding="utf-8").startswith("# ")


def test_the_tutorials_recipe_keeps_its_settings() -> None:
    recipe = recipes.load("gemma2-9b-a100")
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (8, 16, 0.1)
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert (recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps) == (1, 2)
    assert (recipe.train.learning_rate, recipe.train.max_length, recipe.data.dataset_limit) == (2e-4, 512, 1000)


@pytest.mark.parametrize(
    ("written_as", "value"),
    [("2e-4", 2e-4), ("2E-4", 2e-4), ("1e+0", 1.0), ("2.e-4", 2e-4), ("0.0002", 2e-4), ("1", 1.0)],
)
def test_numbers_as_people_write_them(tmp_path: Path, written_as: str, value: float) -> None:
    file = written(tmp_path, f"{LEAST}train:\n  learning_rate: {written_as}\n")
    assert recipes.load(file).train.learning_rate == value
    assert recipes.load(file, overrides=[f"train.learning_rate={written_as}"]).train.learning_rate == value


@pytest.mark.parametrize(
    "text", ["\ufeff" + LEAST, LEAST.replace("\n", "\r\n"), "---\n" + LEAST, LEAST + "lora:\n  # r: 4\n"]
)
def test_files_as_editors_leave_them(tmp_path: Path, text: str) -> None:
    assert recipes.load(written(tmp_path, text)).model.model_name_or_path == "google/gemma-2-9b"


def test_a_run_may_be_named_after_a_day(tmp_path: Path) -> None:
    assert recipes.load(written(tmp_path, LEAST + "name: 2026-11-24\n")).name == "2026-11-24"


# --- precedence -------------------------------------------------------------------------------


def test_defaults_then_file_then_environment_then_set(tmp_path: Path) -> None:
    file, environ = written(tmp_path, LEAST + "lora:\n  r: 4\n"), {"LORA_R": "16"}
    assert recipes.load(written(tmp_path, LEAST, "plain.yaml")).lora.r == 8
    assert recipes.load(file).lora.r == 4
    assert recipes.load(file, environ=environ).lora.r == 16
    assert recipes.load(file, environ=environ, overrides=["lora.r=32", "lora.r=64"]).lora.r == 64


# Each of the tutorial's names with a value that is nobody's default.
TUTORIAL = {
    "MODEL_NAME": ("google/gemma-2-2b", "google/gemma-2-2b"),
    "LORA_R": ("5", 5),
    "LORA_ALPHA": ("7", 7.0),
    "TRAIN_BATCH_SIZE": ("3", 3),
    "EVAL_BATCH_SIZE": ("6", 6),
    "GRADIENT_ACCUMULATION_STEPS": ("9", 9),
    "DATASET_LIMIT": ("11", 11),
    "MAX_SEQ_LENGTH": ("77", 77),
    "LOGGING_STEPS": ("13", 13),
}


def test_the_tutorials_names_are_all_known() -> None:
    assert set(recipes.ENVIRONMENT) == set(TUTORIAL)


@pytest.mark.parametrize("name", TUTORIAL)
def test_each_of_the_tutorials_names_takes_effect(tmp_path: Path, name: str) -> None:
    text, value = TUTORIAL[name]
    key = recipes.ENVIRONMENT[name]
    file = written(tmp_path, LEAST + "lora:\n")
    assert value_of(recipes.load(file), key) != value
    assert value_of(recipes.load(file, environ={name: text}), key) == value
    # Only where they are asked for: a library call does not read the process's environment.
    assert value_of(recipes.load(file, environ={}), key) != value


def test_a_wrong_environment_value_names_the_variable(tmp_path: Path) -> None:
    error = refusal(written(tmp_path, LEAST), environ={"LORA_R": "many"})
    assert "lora.r" in error.what
    assert "'many'" in error.what
    assert error.where == "environment variable LORA_R"


def test_an_override_may_be_a_list_or_a_section(tmp_path: Path) -> None:
    recipe = recipes.load(
        written(tmp_path, LEAST), overrides=["lora.target_modules=[q_proj, v_proj]", "train={max_steps: 3, seed: 7}"]
    )
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert (recipe.train.max_steps, recipe.train.seed) == (3, 7)


@pytest.mark.parametrize(
    ("override", "message", "where"),
    [
        ("train.seed", "section.key=value", "--set"),
        ("name.x=1", "name is not a section", "--set name.x"),
        ("train.sed=1", "did you mean seed?", "--set train.sed"),
        ("train.seed=[1", "not a YAML value", "--set train.seed"),
        ("train.seed=" + "[" * 5000, "nested too deeply", "--set train.seed"),
        ("train.seed=\x00", "not a YAML value", "--set train.seed"),
        ("=1", "unknown key", "--set"),
        ("train.seed=x", "valid integer", "--set train.seed"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, message: str, where: str) -> None:
    error = refusal(written(tmp_path, LEAST), override)
    assert message in error.what
    assert error.where.strip() == where


# --- C1: unknown keys, wrong types, impossible combinations -------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "near", "line"),
    [
        ("train:\n  seed: 1\n  lerning_rate: 1e-3\n", "train.lerning_rate", "learning_rate", 7),
        ("train:\n  learning-rate: 1e-3\n", "train.learning-rate", "learning_rate", 6),
        ("tarin:\n  seed: 1\n", "tarin", "train", 5),
        ("evaluate:\n  gate:\n    min_scor: 1\n", "evaluate.gate.min_scor", "min_score", 7),
        ("learning_rate: 1e-3\n", "learning_rate", "train.learning_rate", 5),
        ("train:\n  r: 8\n", "train.r", "lora.r", 6),
        ("train.seed: 1\n", "train.seed", "train", 5),
        ("1: 2\n", "1", "", 5),
        ("null: 2\n", "null", "", 5),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(
    tmp_path: Path, text: str, key: str, near: str, line: int
) -> None:
    file = written(tmp_path, LEAST + text)
    error = refusal(file)
    assert error.what == f"unknown key {key}" + (f": did you mean {near}?" if near else "")
    assert error.where == f"{file}:{line}"
    assert "the keys here are" in error.fix


@pytest.mark.parametrize(
    ("text", "key", "expected", "got"),
    [
        ("train:\n  seed: one\n", "train.seed", "valid integer", "'one'"),
        ("train:\n  seed: 1.5\n", "train.seed", "valid integer", "1.5"),
        ("train:\n  seed: '1'\n", "train.seed", "valid integer", "'1'"),
        ("train:\n  seed: 4294967296\n", "train.seed", "less than 4294967296", "4294967296"),
        ("train:\n  seed: true\n", "train.seed", "valid integer", "True"),
        ("train:\n  packing: 1\n", "train.packing", "valid boolean", "1"),
        ("train:\n  learning_rate: fast\n", "train.learning_rate", "valid number", "'fast'"),
        ("train:\n  learning_rate: .inf\n", "train.learning_rate", "finite", "inf"),
        ("train:\n  learning_rate: .nan\n", "train.learning_rate", "finite", "nan"),
        (
            "train:\n  lr_scheduler_type: cosin\n",
            "train.lr_scheduler_type",
            "'cosine', 'linear' or 'constant'",
            "'cosin'",
        ),
        ("train: fast\n", "train", "object", "'fast'"),
        ("lora:\n  target_modules: q_proj\n", "lora.target_modules", "valid array or 'all-linear'", "'q_proj'"),
        ("lora:\n  target_modules: []\n", "lora.target_modules", "at least 1 item", "[]"),
        ("lora:\n  layers_to_transform: []\n", "lora.layers_to_transform", "at least 1 item", "[]"),
        ("lora:\n  layers_to_transform: [0, -1]\n", "lora.layers_to_transform.1", "greater than or equal to 0", "-1"),
        ("evaluate:\n  gate:\n    min_score: 70\n", "evaluate.gate.min_score", "less than or equal to 1", "70"),
        ("name: My Run\n", "name", "lower-case letters", "'My Run'"),
        ("publish:\n  hub_model_id: adapter\n", "publish.hub_model_id", "user/name", "'adapter'"),
        ("publish:\n  hub_model_id: ../adapter\n", "publish.hub_model_id", "user/name", "'../adapter'"),
    ],
)
def test_a_wrong_value_is_told_with_key_line_and_what_is_expected(
    tmp_path: Path, text: str, key: str, expected: str, got: str
) -> None:
    file = written(tmp_path, LEAST + text)
    error = refusal(file)
    assert error.what.startswith(f"{key}: ")
    assert expected in error.what
    assert error.what.endswith(f"got {got}")
    assert re.fullmatch(rf"{re.escape(str(file))}:\d+", error.where)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.dataset_name is missing"):
        recipes.validate({"name": "x", "model": {"model_name_or_path": "a/b"}, "data": {}}, where="x")


def test_further_errors_are_counted(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, LEAST + "train:\n  sed: 1\nlora:\n  r: x\n  s: 1\n")).what.endswith("(2 more)")


TEMPLATE = "{question} {context} {answer}"
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "steps and epochs": ({"train": {"max_steps": 5, "num_train_epochs": 2.0}}, "exclude each other"),
    "rows a batch with packing": ({"train": {"packing": True, "per_device_train_batch_size": 2}}, "has no effect"),
    "a row longer than a pass": ({"train": {"max_length": 5000}}, "must fit into one forward pass"),
    "everything held out": ({"data": {"test_fraction": 0.5, "validation_fraction": 0.5}}, "must stay below 1"),
    "a share of no effect": ({"data": {"max_bad_fraction": 0.5}}, "has no effect with on_bad_row: error"),
    "template without answer": ({"data": {"template": "{question}"}}, "must end with {answer}"),
    "template with the answer first": ({"data": {"template": "{answer} {question}"}}, "must end with {answer}"),
    "template with two answers": ({"data": {"template": "{answer} {question} {answer}"}}, "hold it once"),
    "template without question": ({"data": {"template": "{context} {answer}"}}, "must hold {question}"),
    "template with a misspelt field": ({"data": {"template": "{qestion} " + TEMPLATE}}, "did you mean {question}?"),
    "template with another field": ({"data": {"template": "{schema} " + TEMPLATE}}, "the fields are question,"),
    "answer in the prompt": ({"data": {"columns": {"question": "a", "answer": "a"}}}, "a column of its own"),
    "context that no template holds": (
        {"data": {"template": "{question} {answer}", "columns": {"context": "schema"}}},
        "columns.context has no effect",
    ),
    "a column without a name": ({"data": {"columns": {"question": ""}}}, "data.columns.question: string should have"),
    "a split by nothing": ({"data": {"split_by": ""}}, "at least 1 character"),
    "an empty stop": ({"data": {"stop": [""]}}, "at least 1 character"),
    "no rows to measure on": ({"data": {"test_fraction": 0.0}}, "leaves it no rows"),
    "no validation to measure on": (
        {"data": {"validation_fraction": 0.0}, "evaluate": {"split": "validation"}},
        "leaves it no rows",
    ),
    "validation loss of no rows": ({"data": {"validation_fraction": 0.0}, "train": {"eval_steps": 5}}, "has no effect"),
    "visibility of no repository": ({"publish": {"hub_private_repo": False}}, "has no effect"),
    "merged to nowhere": ({"publish": {"merged": True}}, "has no effect"),
    "one checkpoint": ({"train": {"save_total_limit": 1}}, "greater than or equal to 2"),
    "rank 0": ({"lora": {"r": 0}}, "greater than or equal to 1"),
    "a port beyond": ({"serve": {"port": 70000}}, "less than or equal to 65535"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_combinations_are_refused(case: str) -> None:
    sections, message = IMPOSSIBLE[case]
    with pytest.raises(InputError, match=re.escape(message)):
        recipes.validate(tree(**sections), where="test")


def test_code_from_a_repository_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="unknown key"):
        recipes.validate(tree(model={"trust_remote_code": True}), where="test")


# --- files that are no recipes (S7) ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: 1\nb: *a\n", "aliases are not allowed", 2),
        ("a: &x [1]\nb: &y [*x, *x]\n", "aliases are not allowed", 2),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' twice", 3),
        ("train:\n  seed: 1\n  seed: 2\n", "the key 'seed' twice", 3),
        ("? [a, b]\n: 1\n", "a key that is no text", 1),
        ("{{a: 1}: 2}\n", "a key that is no text", 1),
        ("a: [1\n", "expected", 2),
        ("a: b: c\n", "mapping values are not allowed", 1),
        ("a: 1\n---\nb: 2\n", "another document", 2),
        ("a: !!python/object/apply:os.system [id]\n", "could not determine a constructor", 1),
        ("a: !!python/name:os.system\n", "could not determine a constructor", 1),
        ("<<: {a: 1}\n", "could not determine a constructor", 1),
        ("a: 1\nb: \x07\n", "special characters are not allowed", None),
        ("a: \x00\n", "special characters are not allowed", None),
        ("[" * 20000, "nested too deeply", None),
        ("- 1\n", "a recipe is a mapping", None),
        ("just text\n", "a recipe is a mapping", None),
        ("", "a recipe is a mapping", None),
        ("# nothing\n", "a recipe is a mapping", None),
        ("a: !!timestamp 2026-13-45\n", "not a YAML recipe", None),
        ("train: {seed: !!binary aGVsbG8=}\n" + LEAST, "a value that is not plain", None),
        ("train: {seed: !!set {1}}\n" + LEAST, "a value that is not plain", None),
    ],
)
def test_a_file_that_is_no_recipe_is_told_with_its_line(
    tmp_path: Path, text: str, message: str, line: int | None
) -> None:
    file = written(tmp_path, text)
    error = refusal(file)
    assert message in error.what
    assert error.where == (f"{file}:{line}" if line else str(file))


def test_bytes_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    assert "not UTF-8" in refusal(written(tmp_path, b"name: caf\xe9\n")).what


def test_a_recipe_has_a_largest_size(tmp_path: Path) -> None:
    assert "at most" in refusal(written(tmp_path, LEAST + "#" * MAX_RECIPE_BYTES)).what


def test_a_recipe_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean tiny") as caught:
        recipes.load("tinny")
    assert "gemma2-9b-a100" in caught.value.fix


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        recipes.load(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(), st.text("a:{}[]-&*!|>'\"#%@? \n\t0x"), st.binary().map(lambda b: b.decode("latin-1"))))
def test_no_text_crashes_the_reader(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, text.encode("utf-8", "replace"))
    with pytest.raises(InputError):
        recipes.load(file)


# --- secrets (S2) ---------------------------------------------------------------------------------

CANARY = "hf_" + "CANARYabcdefgh12345678"


@pytest.mark.parametrize(
    ("text", "overrides", "environ", "where"),
    [
        (LEAST + f"hf_token: {CANARY}\n", (), {}, "hf_token"),
        (LEAST + "train:\n  password: hunter2-CANARY\n", (), {}, "train.password"),
        (LEAST.replace("google/gemma-2-9b", CANARY), (), {}, "model.model_name_or_path"),
        (LEAST + f"cluster:\n  secrets: [{CANARY}]\n", (), {}, "cluster.secrets[0]"),
        (LEAST + f"{CANARY}: 1\n", (), {}, ""),
        (LEAST, (f"model.token={CANARY}",), {}, "model.token"),
        (LEAST, (f"model.model_name_or_path={CANARY}",), {}, "model.model_name_or_path"),
        (LEAST, (f"name.x={CANARY}",), {}, "--set name.x"),
        (LEAST, (CANARY,), {}, "--set"),
        (LEAST, (f"train.seed=[{CANARY}",), {}, "--set train.seed"),
        (LEAST, (), {"MODEL_NAME": CANARY}, "model.model_name_or_path"),
    ],
)
def test_a_secret_is_refused_and_never_repeated(
    tmp_path: Path, text: str, overrides: tuple[str, ...], environ: dict[str, str], where: str
) -> None:
    error = refusal(written(tmp_path, text), *overrides, environ=environ)
    assert error.where == where
    assert "CANARY" not in str(error)
    assert error.__context__ is None or error.__suppress_context__


# --- C2: a recipe written is the recipe that was read -------------------------------------------------


def texts(**limits: int) -> st.SearchStrategy[str]:
    """Any text that UTF-8 can hold, and such as YAML would take for something else."""
    awkward = st.sampled_from(
        ["2e-4", "1e5", "yes", "null", "~", "2026-11-24", "0x1F", "1:30", "- a", "a: b", "#", "'", "\n"]
    )
    return st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), awkward)


names = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", fullmatch=True), st.sampled_from(["1e5", "no", "1.5"])
)
small = st.floats(min_value=1e-12, max_value=1e12)
shares = st.floats(min_value=0.001, max_value=0.49)


@st.composite
def good_recipes(draw: st.DrawFn) -> Recipe:
    def some(**fields: st.SearchStrategy[Any]) -> dict[str, Any]:
        return {name: draw(strategy) for name, strategy in fields.items() if draw(st.booleans())}

    plain: dict[str, Any] = {
        "name": draw(names),
        "model": {"model_name_or_path": draw(texts()), **some(model_revision=texts(), accept_terms=st.booleans())},
        "data": {
            "dataset_name": draw(texts()),
            **some(
                dataset_config=texts(),
                dataset_limit=st.integers(1, 10**9),
                test_fraction=shares,
                validation_fraction=shares,
                stop=st.lists(texts(), max_size=3),
                template=texts()
                .filter(lambda t: "{" not in t)
                .map(lambda t: f"{t}{{question}}{t}{{context}}{t}{{answer}}"),
                columns=st.just({"question": "Frage", "answer": "1e3"}),
            ),
        },
        "lora": some(
            r=st.integers(1, 512),
            lora_alpha=small,
            lora_dropout=st.floats(0, 0.99),
            target_modules=st.one_of(st.just("all-linear"), st.lists(texts(), min_size=1, max_size=3)),
            layers_to_transform=st.lists(st.integers(0, 99), min_size=1, max_size=4),
        ),
        "train": {
            **some(
                learning_rate=small, adam_epsilon=small, seed=st.integers(0, 2**32 - 1), max_grad_norm=st.none() | small
            ),
            **draw(st.sampled_from([{}, {"max_steps": 3}, {"num_train_epochs": 0.5}, {"packing": True}])),
        },
        "evaluate": some(by=st.lists(texts(), max_size=3), few_shot=st.integers(0, 16)),
        "publish": some(folder=texts()),
    }
    return recipes.validate(plain, where="test")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=good_recipes())
def test_a_dumped_recipe_loads_as_itself(tmp_path: Path, recipe: Recipe) -> None:
    assert recipes.load(written(tmp_path, recipes.dump(recipe))) == recipe
    # A run's recipe.json is read by the same function.
    assert recipes.load(written(tmp_path, recipe.model_dump_json(), "recipe.json")) == recipe


@pytest.mark.parametrize(
    "text",
    ["\x7f", "\x85", "\u2028", "\ufeff", "\U0001f6a2", "a\r\nb", " trailing \n", "\t", "two  blanks, and : # " * 30],
)
def test_awkward_characters_survive_a_dump(tmp_path: Path, text: str) -> None:
    recipe = recipes.validate(tree(data={"template": f"{{question}}{text}{{answer}}"}), where="test")
    assert recipes.load(written(tmp_path, recipes.dump(recipe))) == recipe
    assert recipes.load(written(tmp_path, recipe.model_dump_json(), "recipe.json")) == recipe


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 20000, '{"model": 1e999999}'])
def test_a_damaged_recipe_json_is_told(tmp_path: Path, text: str) -> None:
    assert refusal(written(tmp_path, text, "recipe.json")).where.startswith(str(tmp_path))


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_dumped_shipped_recipe_loads_as_itself(tmp_path: Path, name: str) -> None:
    recipe = recipes.load(name)
    assert recipes.load(written(tmp_path, recipes.dump(recipe))) == recipe


# --- what is said about each key ---------------------------------------------------------------------


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


@pytest.mark.parametrize(("key", "description"), list(fields(Recipe)))
def test_every_key_is_described(key: str, description: str | None) -> None:
    assert description is not None
    assert description.endswith(".")


def test_the_json_schema_builds() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Train"]["properties"]["seed"]["description"].startswith("Seed of everything")
    assert set(Train.model_fields) == set(schema["$defs"]["Train"]["properties"])
