"""Generation with continuous batching against transformers' own generate, one prompt at a time.

python -m pytest tests/test_generation.py -v
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tuneship.base import BaseFiles
from tuneship.errors import InputError
from tuneship.generation import Completion, Event, Generator, Request, TextStream, _sample, complete
from tuneship.model import ARCHITECTURES, LoadedModel

NEW = 24


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> LoadedModel:
    return tiny.tuned(BaseFiles(str(tiny_base), tiny_base, "local"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    # Around the sliding window of 16, and further.
    return [row.tolist() for row in tiny.rows([3, 15, 16, 17, 50, 90, 7], seed=5)]


def alone(model: LoadedModel, prompt: list[int], **settings: Any) -> Completion:
    """What a prompt gets when nothing else runs."""
    request = Request(prompt, **{"max_new_tokens": NEW, **settings})
    generator = Generator(model, slots=1, length=len(prompt) + request.max_new_tokens)
    return next(complete(generator, [request]))[1]


def together(generator: Generator, requests: list[Request]) -> list[Completion]:
    done = dict(complete(generator, requests))
    return [done[index] for index in range(len(requests))]


def drain(generator: Generator, each: Callable[[int], None] = lambda step: None) -> list[Event]:
    events: list[Event] = []
    step = 0
    while generator.busy:
        events += generator.step()
        step += 1
        each(step)
    return events


def tokens_of(events: list[Event], request: Request) -> list[int | None]:
    return [event.token for event in events if event.request is request]


# --- against transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_transformers_token_by_token(kind: str, prompts: list[list[int]], tmp_path: Path) -> None:
    model = tiny.tuned(tiny.make(kind, tmp_path / kind))
    peft = tiny.reference(model).eval()
    # Seven prompts through three slots: requests wait, end, and are moved.
    ours = together(Generator(model, slots=3, length=150), [Request(ids, NEW + n) for n, ids in enumerate(prompts)])
    for n, (ids, completion) in enumerate(zip(prompts, ours, strict=True)):
        with torch.no_grad(), warnings.catch_warnings():
            # transformers announces changes of its own interface.
            warnings.simplefilter("ignore")
            whole = peft.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW + n,
                do_sample=False,
            )[0].tolist()
        theirs = whole[len(ids) :]
        assert completion.tokens == [token for token in theirs if token != 1]
        assert completion.ended_itself == (theirs[-1] == 1)
        assert completion.text == model.tokenizer.decode(completion.tokens, skip_special_tokens=True)


# --- continuous batching ----------------------------------------------------------------------


def test_requests_that_end_at_different_times_do_not_disturb_each_other(
    model: LoadedModel, prompts: list[list[int]]
) -> None:
    lengths = [1, 30, 4, 9, 2, 17, 12]
    requests = [Request(ids, length) for ids, length in zip(prompts, lengths, strict=True)]
    expected = [alone(model, ids, max_new_tokens=length) for ids, length in zip(prompts, lengths, strict=True)]
    assert together(Generator(model, slots=3, length=120), requests) == expected
    assert [len(completion.tokens) for completion in expected] == lengths


def test_a_request_may_come_while_others_run(model: LoadedModel, prompts: list[list[int]]) -> None:
    generator = Generator(model, slots=4, length=120)
    requests = [Request(ids, NEW) for ids in prompts[:4]]
    generator.submit(requests[0])

    def come(step: int) -> None:
        if step in (2, 5, 11):
            generator.submit(requests[(2, 5, 11).index(step) + 1])

    events = drain(generator, come)
    for request, ids in zip(requests, prompts, strict=False):
        assert tokens_of(events, request) == alone(model, ids).tokens


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_cancelled_request_leaves_the_others_alone(model: LoadedModel, prompts: list[list[int]], slot: int) -> None:
    generator = Generator(model, slots=3, length=120)
    requests = [Request(ids, NEW) for ids in prompts[:6]]
    for request in requests:
        generator.submit(request)
    cancelled = [requests[slot], requests[4]]

    def cancel(step: int) -> None:
        if step == 3:
            assert (generator.running, generator.waiting) == (3, 3)
            for request in cancelled:
                generator.cancel(request)
            assert (generator.running, generator.waiting) == (2, 2)

    events = drain(generator, cancel)
    # One that has ended, one that is unknown: nothing happens.
    generator.cancel(requests[1])
    generator.cancel(Request([5], 1))
    for request in requests:
        expected = alone(model, request.prompt).tokens
        if request in cancelled:
            assert tokens_of(events, request) == expected[: 3 if request is requests[slot] else 0]
        else:
            assert tokens_of(events, request) == expected


def test_the_batch_stays_full(model: LoadedModel, prompts: list[list[int]]) -> None:
    generator = Generator(model, slots=3, length=120)
    for ids in prompts:
        generator.submit(Request(ids, 5))
    counts = []
    drain(generator, lambda step: counts.append((generator.running, generator.waiting)))
    # A slot is never empty while someone waits; who ends makes room in the same step.
    assert all(running == 3 or not waiting for running, waiting in counts)
    assert len(counts) == 13


def test_a_prefix_equals_the_prefix_in_each_prompt(model: LoadedModel, prompts: list[list[int]]) -> None:
    prefix = tiny.rows([40], seed=9)[0].tolist()
    shared = Generator(model, slots=2, length=200, prefix=prefix)
    ours = together(shared, [Request(ids, NEW) for ids in prompts])
    assert ours == [alone(model, prefix + ids) for ids in prompts]
    # A second batch on the same generator finds the prefix untouched.
    assert together(shared, [Request(ids, NEW) for ids in prompts[:3]]) == ours[:3]


def test_a_text_may_grow_past_the_caches_first_room(tmp_path: Path) -> None:
    model = tiny.tuned(tiny.make("gemma2", tmp_path / "base"))
    peft = tiny.reference(model).eval()
    ids = tiny.rows([250], seed=3)[0].tolist()
    ours = together(Generator(model, slots=2, length=600), [Request(ids, 40), Request(ids[:20], 300)])
    for completion, prompt in zip(ours, (ids, ids[:20]), strict=True):
        row = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            choices = peft(input_ids=row).logits[0].argmax(-1).tolist()
        assert completion.tokens == choices[len(prompt) - 1 : len(prompt) - 1 + len(completion.tokens)]
    assert [len(completion.tokens) for completion in ours] == [40, 300]


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (Request([5] * 90, 11), "need 111 tokens, there is room for 110"),
        (Request([], 5), "the prompt is empty"),
        (Request([5], 0), "at least one token"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(model: LoadedModel, request_: Request, what: str) -> None:
    generator = Generator(model, slots=1, length=110, prefix=[6] * 10)
    with pytest.raises(InputError, match=what):
        generator.submit(request_)
    assert not generator.busy
    longest = Request([5] * 90, 10)
    generator.submit(longest)
    assert len(tokens_of(drain(generator), longest)) == 10


# --- where a completion ends ------------------------------------------------------------------


def test_the_model_ends_it(model: LoadedModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    free = alone(model, prompts[4])
    last = free.tokens[7]
    first = free.tokens.index(last)
    # The generation config may name further tokens that end a text.
    monkeypatch.setattr(model.causal.generation_config, "eos_token_id", [1, last])
    ended = alone(model, prompts[4])
    assert (ended.tokens, ended.finished, ended.ended_itself) == (free.tokens[:first], "stop", True)
    assert ended.text == model.tokenizer.decode(free.tokens[:first], skip_special_tokens=True)
    assert alone(model, prompts[4], ignore_eos=True).tokens == free.tokens
    assert (free.finished, free.ended_itself) == ("length", False)


def test_a_stop_string_ends_it_across_token_borders(model: LoadedModel, prompts: list[list[int]]) -> None:
    free = alone(model, prompts[5])
    pieces = [model.tokenizer.decode([token]) for token in free.tokens]
    start = sum(map(len, pieces[:6])) - 1
    stop = free.text[start : start + 3]
    assert not any(stop in piece for piece in pieces)
    stopped = alone(model, prompts[5], stop=("not there", stop))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finished, stopped.ended_itself) == ("stop", False)
    assert len(stopped.tokens) < len(free.tokens)


def test_texts_come_as_they_become_certain(model: LoadedModel, prompts: list[list[int]]) -> None:
    generator = Generator(model, slots=1, length=120)
    generator.submit(Request(prompts[5], NEW))
    events = drain(generator)
    assert sum(bool(event.text) for event in events) > NEW // 2
    assert "".join(event.text for event in events) == alone(model, prompts[5]).text
    assert [event.finished for event in events] == [None] * (NEW - 1) + ["length"]


# --- text from tokens -------------------------------------------------------------------------


def byte_level(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def byte_fallback() -> Any:
    """Blanks as ▁ and unknown characters as bytes: how Gemma's and Llama's tokenizers write text."""
    words = [
        "<pad>",
        "<eos>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdeSELECT:Qu\n",
        "▁ab",
        "ab",
    ]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(
        token_models.BPE(vocabulary, [("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizers(tiny_base: Path) -> dict[str, Any]:
    return {"byte level": byte_level(tiny_base), "byte fallback": byte_fallback()}


def streamed(tokenizer: Any, ids: list[int], stop: list[str]) -> tuple[str, list[int], bool]:
    """The texts joined, the tokens taken, and whether a stop ended it."""
    stream = TextStream(tokenizer, stop)
    texts = []
    for taken, token in enumerate(ids, start=1):
        texts.append(stream.push(token))
        if stream.stopped:
            return "".join(texts), ids[:taken], True
    return "".join([*texts, stream.flush()]), ids, False


def whole(tokenizer: Any, ids: list[int], stop: list[str]) -> tuple[str, bool]:
    """The decode of all tokens, cut at the first stop."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


STOPS = st.lists(
    st.sampled_from(["\nQuestion:", "\nContext:", "ab", "aab", ":", "é", "🚢x", " ", "SELECT"]), max_size=3
)


@given(text=st.text(st.sampled_from("ab:é数🚢xQSELECT \n\u0301"), max_size=40), stop=STOPS)
@example(text="🚢🚢", stop=["🚢x"])
@example(text="SELECT 1\nQuestion: what", stop=["\nQuestion:"])
@settings(deadline=None, max_examples=150)
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_texts_joined_are_the_whole_cut_at_the_first_stop(
    tokenizers: dict[str, Any], kind: str, text: str, stop: list[str]
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    joined, taken, stopped = streamed(tokenizer, ids, stop)
    assert (joined, stopped) == whole(tokenizer, taken, stop)
    assert stopped == whole(tokenizer, ids, stop)[1]


@given(ids=st.lists(st.integers(0, 399), max_size=30), stop=STOPS)
@settings(deadline=None, max_examples=300)
def test_any_tokens_joined_are_the_whole_cut_at_the_first_stop(
    tokenizers: dict[str, Any], ids: list[int], stop: list[str]
) -> None:
    """Broken characters and special tokens too: a random model writes anything."""
    tokenizer = tokenizers["byte level"]
    joined, taken, stopped = streamed(tokenizer, ids, stop)
    assert (joined, stopped) == whole(tokenizer, taken, stop)


def test_half_a_character_waits_for_its_rest(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte level"]
    ids = tokenizer("a🚢", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer, [])
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "🚢"]


def test_what_may_become_a_stop_waits(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte fallback"]
    stream = TextStream(tokenizer, ["abab", "Q:"])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("c", "a", "b", "c", "Q", "a", "b", "ab")]
    assert [stream.push(token) for token in ids] == ["c", "", "", "abc", "", "Q", "", ""]
    assert stream.stopped


# --- sampling ---------------------------------------------------------------------------------


def test_sampling_is_seeded(model: LoadedModel, prompts: list[list[int]]) -> None:
    warm = {"temperature": 1.5, "top_p": 0.95}
    first = alone(model, prompts[3], seed=1, **warm)
    assert first == alone(model, prompts[3], seed=1, **warm)
    assert first != alone(model, prompts[3], seed=2, **warm)
    assert first != alone(model, prompts[3])
    assert alone(model, prompts[3], **warm) != alone(model, prompts[3], **warm)
    # The seed is the request's own: what else runs does not matter.
    requests = [Request(ids, NEW, seed=1, **warm) for ids in prompts]
    assert together(Generator(model, slots=4, length=120), requests)[3] == first


def draws(logits: list[float], **settings: float) -> list[int]:
    random = torch.Generator().manual_seed(0)
    request = Request([5], 1, **{"temperature": 1.0, **settings})  # type: ignore[arg-type]
    return [_sample(torch.tensor(logits), request, random) for _ in range(2000)]


def test_top_p_leaves_the_tail_out() -> None:
    # Probabilities 0.05, 0.5, 0.3, 0.15.
    logits = torch.tensor([0.05, 0.5, 0.3, 0.15]).log().tolist()
    assert set(draws(logits)) == {0, 1, 2, 3}
    assert set(draws(logits, top_p=0.9)) == {1, 2, 3}
    assert set(draws(logits, top_p=0.75)) == {1, 2}
    assert set(draws(logits, top_p=0.5)) == {1}
    assert set(draws(logits, top_p=1e-6)) == {1}
    assert set(draws(logits, top_p=0.0)) == {1}


def test_temperature_sharpens_and_flattens() -> None:
    logits = torch.tensor([0.05, 0.5, 0.3, 0.15]).log().tolist()
    shares = [draws(logits, temperature=temperature).count(1) / 2000 for temperature in (0.3, 1.0, 5.0)]
    expected = [float((torch.tensor(logits) / t).softmax(-1)[1]) for t in (0.3, 1.0, 5.0)]
    assert shares == pytest.approx(expected, abs=0.03)
