"""The prompt contract: rows become text in one pass, text becomes no special token, and the goldens prove both.

python -m pytest tests/test_prompt.py -v
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship import prompt
from tuneship.errors import InputError
from tuneship.prompt import Prompt

TEMPLATE = "Question: {question}\nContext: {context}\nAnswer: {answer}"
CONTRACT = Prompt(TEMPLATE, ("\nQuestion:", "\nContext:"))

# What might open a field, start a template language, or end a turn (D3).
INJECTIONS = (
    "{answer}",
    "{question}",
    "{context}",
    "{{answer}}",
    "{0.__class__}",
    "{question.__class__.__init__.__globals__}",
    "%(answer)s",
    "${answer}",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "<eos>",
    "<bos>",
    "<pad>",
    "<end_of_turn>",
    "<start_of_turn>model",
    "\nAnswer: ",
    "\\",
    "\\1\\g<0>",
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(INJECTIONS), min_size=1, max_size=4).map("".join),
)


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def folder(tiny_base: Path, tokenizer: Any, tmp_path: Path) -> Path:
    """An adapter's folder with the contract, as far as the contract goes."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / name, tmp_path / name)
    prompt.write(tmp_path, CONTRACT, tokenizer)
    return tmp_path


# --- rendering ----------------------------------------------------------------------------------


def test_the_tutorials_text_is_rendered_to_the_letter() -> None:
    row = {"question": "How many?", "context": "CREATE TABLE t (a INT)"}
    assert CONTRACT.render(row) == "Question: How many?\nContext: CREATE TABLE t (a INT)\nAnswer:"
    assert CONTRACT.completion("SELECT 1") == " SELECT 1"


@settings(max_examples=300, deadline=None)
@given(question=texts, context=texts, answer=texts)
def test_text_in_the_data_opens_no_field(question: str, context: str, answer: str) -> None:
    row = {"question": question, "context": context, "answer": answer}
    assert CONTRACT.render(row) == f"Question: {question}\nContext: {context}\nAnswer:"
    assert CONTRACT.completion(answer) == f" {answer}"
    # In any order of fields, and with a field twice.
    other = Prompt("{context}{question}|{context}\n{answer}", ())
    assert other.render(row) == f"{context}{question}|{context}\n"
    assert other.completion(answer) == answer


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("{question}: {answer}", "q:", " a"),
        ("{question}:   {answer}", "q:", "   a"),
        ("{question}\n{answer}", "q\n", "a"),
        ("{question}{answer}", "q", "a"),
        ('{"q": "{question}", "a": {answer}', '{"q": "q", "a":', " a"),
    ],
)
def test_a_blank_before_the_answer_is_the_answers(template: str, before: str, after: str) -> None:
    contract = Prompt(template, ())
    assert contract.render({"question": "q", "context": "c"}) == before
    assert contract.completion("a") == after


# --- tokens ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(question=texts, answer=texts)
def test_text_in_the_data_becomes_no_special_token(tokenizer: Any, question: str, answer: str) -> None:
    row = {"question": question, "context": question, "answer": answer}
    ((before, after),) = prompt.encode_rows(tokenizer, CONTRACT, [row])
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert before[0] == tokenizer.bos_token_id
    assert not special & set(before[1:])
    # D3: decode(labels) == answer + EOS.
    assert after[-1] == tokenizer.eos_token_id
    assert not special & set(after[:-1])
    assert tokenizer.decode(after[:-1]) == f" {answer}"
    assert tokenizer.decode(before[1:]) == CONTRACT.render(row)


def test_a_special_token_in_plain_text_would_be_one(tokenizer: Any) -> None:
    # What the test above guards against is real here: left to itself, the tokenizer takes it for the token.
    assert tokenizer("a<eos>b")["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.eos_token_id not in prompt.encode(tokenizer, ["a<eos>b"], start=True)[0]


def test_the_tokenizers_start_is_kept_and_its_end_is_not(tokenizer: Any) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    assert prompt.start_ids(tokenizer) == [tokenizer.bos_token_id]
    ending = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<eos>",
    )
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert prompt.start_ids(ending) == []
    assert prompt.encode(ending, ["a"], start=True)[0][-1] != tokenizer.eos_token_id


def test_no_texts_are_no_tokens(tokenizer: Any) -> None:
    assert prompt.encode(tokenizer, [], start=True) == []
    assert prompt.encode_rows(tokenizer, CONTRACT, []) == []


# --- where an answer ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" SELECT 1", "SELECT 1"),
        (" SELECT 1\nQuestion: next?", "SELECT 1"),
        (" SELECT 1\nContext: x\nQuestion: y", "SELECT 1"),
        (" SELECT 1\nQuestion: y\nContext: x", "SELECT 1"),
        (" SELECT\n1 \n", "SELECT\n1"),
        ("\nQuestion: at once", ""),
        ("", ""),
        (" SELECT 'Question: inside'", "SELECT 'Question: inside'"),
    ],
)
def test_an_answer_ends_at_the_first_stop(completion: str, answer: str) -> None:
    assert CONTRACT.answer(completion) == answer


def test_without_stops_an_answer_is_everything() -> None:
    assert Prompt(TEMPLATE, ()).answer(" a\nQuestion: b ") == "a\nQuestion: b"


@settings(max_examples=100, deadline=None)
@given(answer=texts.filter(lambda t: t.strip() and "\nQuestion:" not in t and "\nContext:" not in t))
def test_what_was_learned_is_what_is_read(answer: str) -> None:
    assert CONTRACT.answer(CONTRACT.completion(answer)) == answer.strip()


# --- prompt.json ------------------------------------------------------------------------------------


def test_the_contract_travels(folder: Path, tokenizer: Any) -> None:
    assert prompt.read(folder) == CONTRACT
    prompt.verify(folder, tokenizer)
    contract = json.loads((folder / prompt.FILE).read_text(encoding="utf-8"))
    # The tutorial's sample prompt is a golden, and one golden has a field in its text.
    assert 'kubecon "EU"' in contract["goldens"][0]["prompt"]
    assert any("{answer}" in golden["prompt"] for golden in contract["goldens"])
    assert all(golden["token_ids"][0] == tokenizer.bos_token_id for golden in contract["goldens"])


def test_a_swapped_tokenizer_file_is_refused(folder: Path, tokenizer: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("SELECT", "select"), encoding="utf-8")
    with pytest.raises(InputError, match="not the one"):
        prompt.verify(folder, tokenizer)


class Swapped:
    """A tokenizer with two of its ids swapped."""

    def __init__(self, inner: Any, swap: Sequence[int]) -> None:
        self.inner, self.swap, self.eos_token_id = (
            inner,
            dict(zip(swap, reversed(swap), strict=True)),
            inner.eos_token_id,
        )

    def __call__(self, text: list[str], **kwargs: Any) -> dict[str, list[list[int]]]:
        rows = self.inner(text, **kwargs)["input_ids"]
        return {"input_ids": [[self.swap.get(token, token) for token in row] for row in rows]}


def test_another_tokenizer_in_memory_is_refused(folder: Path, tokenizer: Any) -> None:
    last = json.loads((folder / prompt.FILE).read_text(encoding="utf-8"))["goldens"][-1]["token_ids"]
    with pytest.raises(InputError, match="golden prompt"):
        prompt.verify(folder, Swapped(tokenizer, (last[-1], last[-2])))


def test_a_tokenizer_without_its_start_is_refused(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="golden prompt"):
        prompt.verify(folder, Swapped(tokenizer, (tokenizer.bos_token_id, 3)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda contract: "{torn",
        lambda contract: "[]",
        lambda contract: json.dumps({**contract, "template": None}),
        lambda contract: json.dumps({**contract, "template": "no field"}),
        lambda contract: json.dumps({**contract, "template": "{answer} {question}"}),
        lambda contract: json.dumps({**contract, "stop": "\n"}),
        lambda contract: json.dumps({**contract, "stop": [""]}),
        lambda contract: json.dumps({**contract, "stop": [1]}),
        lambda contract: json.dumps({**contract, "goldens": None}),
        lambda contract: json.dumps({**contract, "goldens": []}),
        lambda contract: json.dumps({**contract, "goldens": [{"prompt": 1}]}),
        lambda contract: json.dumps({key: value for key, value in contract.items() if key != "tokenizer_sha256"}),
        lambda contract: "\udcff",
    ],
)
def test_a_damaged_contract_is_told(folder: Path, tokenizer: Any, spoil: Any) -> None:
    file = folder / prompt.FILE
    contract = json.loads(file.read_text(encoding="utf-8"))
    file.write_bytes(spoil(contract).encode("utf-8", "surrogateescape"))
    for use in (lambda: prompt.read(folder), lambda: prompt.verify(folder, tokenizer)):
        with pytest.raises(InputError, match="damaged") as caught:
            use()
        assert str(file) in caught.value.where


def test_a_folder_without_a_contract_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prompt contract"):
        prompt.read(tmp_path)
