"""Samples from several sources, and from rendered chats."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.quantizing.events import JobRefused
from requant.tasks.quantizing.packing import Length
from requant.tasks.quantizing.samples import (
    SampleSource,
    Supply,
    calibration_samples,
    divide,
    plan_samples,
    tokens_to_read,
)
from requant.tasks.texts.documents import Document


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def source(folder: Path, name: str, documents: Sequence[Document], **settings: Any) -> SampleSource:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(document.to_json() + "\n" for document in documents))
    rendered = any(document.chat for document in documents)
    return SampleSource(name=name, paths=[path], rendered=rendered, **settings)


def letters(samples: Sequence[Any]) -> Counter[str]:
    return Counter(chr(int(token)) for sample in samples for token in sample[0])


def chat(letter: str, length: int) -> Document:
    return Document(letter * length, (length,), chat=True)


def supply(name: str, tokens: int, weight: float | None = None) -> Supply:
    return Supply(name, weight, {"": [Length((tokens,), chat=False)]})


def counts(*supplies: Supply, nsamples: int) -> list[int]:
    return [sum(each.values()) for each in plan_samples(supplies, nsamples, 10, 0)]


DIVIDED: list[tuple[int, list[float | None], list[int]]] = [
    (8, [1, 1], [4, 4]), (10, [3, None], [8, 2]), (7, [1, 1, 1], [3, 2, 2]), (1, [1, 5], [0, 1]),
    (3, [0.1, 0.2], [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("nsamples", "weights", "expected"), DIVIDED)
def test_weights_divide_the_samples(nsamples: int, weights: list[float | None], expected: list[int]) -> None:
    assert divide(nsamples, weights) == expected and sum(expected) == nsamples


def test_without_weights_every_source_gives_the_same_and_the_others_fill_up_for_a_short_one() -> None:
    assert counts(supply("a", 1000), supply("b", 1000), nsamples=8) == [4, 4]
    assert counts(supply("a", 1000), supply("b", 25), nsamples=8) == [6, 2]
    assert counts(supply("a.txt", 1000), supply("a.txt", 25), nsamples=8) == [6, 2]  # of two folders
    told = r"has 75 tokens \(1\. a 50; 2\. b 25\), and 8 samples of 10 need 80; .* room for 7 "
    with pytest.raises(RecipeError, match=told):
        counts(supply("a", 50), supply("b", 25), nsamples=8)


def test_with_weights_a_short_source_is_an_error_that_says_what_is_missing_and_what_works() -> None:
    assert counts(supply("a", 1000, 3), supply("b", 25), nsamples=8) == [6, 2]
    with pytest.raises(RecipeError) as caught:
        counts(supply("a", 1000, 1), supply("b", 25, 1), nsamples=8)
    told = str(caught.value)
    assert told.startswith("b has 25 tokens and room for 2 of the 4 samples of 10 that are its share by weight: at ")
    assert "at least 20 tokens are missing; set quantize.nsamples to at most 5," in told
    assert counts(supply("a", 1000, 1), supply("b", 25, 1), nsamples=5) == [3, 2]
    with pytest.raises(RecipeError, match=r"^a\.txt \(source 2\) has 25 tokens"):
        counts(supply("a.txt", 1000, 1), supply("a.txt", 25, 1), nsamples=8)
    with pytest.raises(RecipeError, match=r"missing; lower quantize\.seqlen,"):
        counts(supply("a", 1000, 1), supply("b", 5, 100), nsamples=8)


def test_what_is_read_of_a_source_follows_its_share() -> None:
    assert tokens_to_read([None], 8, 10) == [320]  # four times what is needed, as ever
    assert tokens_to_read([3, 1], 8, 10) == [240, 80]
    assert tokens_to_read([None, None], 8, 10) == [160, 160]  # each could fill up for the other
    assert tokens_to_read([None] * 8, 8, 10) == [80] * 8
    assert tokens_to_read([1, 1000], 8, 10)[0] == 40


def test_samples_of_several_sources_are_spread_over_all_and_counted(tmp_path: Path) -> None:
    many = source(tmp_path, "many", [chat("m", 10)] * 30, weight=3.0)
    few = source(tmp_path, "few", [Document("f" * 100, (100,))], weight=1.0)
    samples, uses = calibration_samples(Letters(), [many, few], 8, 20)
    assert [chr(int(sample[0, 0])) for sample in samples] == [*"mmfmmmfm"]
    assert [(use.rows, use.tokens, sum(use.samples.values())) for use in uses] == [(30, 300, 6), (1, 100, 2)]
    again, _ = calibration_samples(Letters(), [many, few], 8, 20)
    assert [sample.tolist() for sample in samples] == [sample.tolist() for sample in again]


def test_chats_are_packed_and_a_long_one_goes_on_at_a_turn(tmp_path: Path) -> None:
    long = Document("a" * 15 + "b" * 15 + "c" * 15, (15, 15, 15), chat=True, turns=(15, 30))
    samples, _ = calibration_samples(Letters(), [source(tmp_path, "long", [long, chat("z", 5)])], 2, 20)
    texts = {"".join(chr(int(token)) for token in sample[0]) for sample in samples}
    assert texts == {"a" * 15 + "b" * 5, "c" * 15 + "z" * 5}


def test_domains_of_a_mixed_source_take_turns_and_only_chats_are_packed(tmp_path: Path) -> None:
    prose = [Document(f"{n:05d}", (5,), domain="prose") for n in range(100)]
    talk = [Document("x" * 7, (7,), domain="chat", chat=True) for _ in range(100)]
    mixed = source(tmp_path, "mixed", [*prose, *talk], mixed=True)
    samples, (use,) = calibration_samples(Letters(), [mixed], 10, 20, seed=1)
    assert use.samples == {"prose": 5, "chat": 5}
    assert letters(samples)["x"] == 100
    for sample in samples:
        text = "".join(chr(int(token)) for token in sample[0])
        assert "x" not in text or text == "x" * 20


def test_chats_too_few_to_pack_are_an_error_that_says_how_many_samples_work(tmp_path: Path) -> None:
    """Ten chats of 15 tokens hold 150 tokens, and ten samples of 15; but of 20 tokens five, as each takes two chats."""
    talk = source(tmp_path, "talk", [chat("x", 15)] * 10)
    with pytest.raises(JobRefused, match=r"has 150 tokens, and 7 samples of 20 need 140; there is room for 5 of "):
        calibration_samples(Letters(), [talk], 7, 20)
    assert len(calibration_samples(Letters(), [talk], 5, 20)[0]) == 5


@pytest.mark.parametrize(
    ("tokens", "expected"), [((15,), 15), ((50,), 20), ((15, 15, 15), 35), ((5, 5, 30), 20), ((20, 20), 40)]
)
def test_of_a_long_chat_samples_have_what_begins_at_its_turns(tokens: tuple[int, ...], expected: int) -> None:
    assert Document("x", tokens, chat=True).sample_tokens(20) == expected
    assert Document("x", tokens).sample_tokens(20) == sum(tokens)


def test_documents_survive_their_file(tmp_path: Path) -> None:
    document = Document("a\u2028é", (1, 2), domain="d", chat=True, turns=(1,))
    assert document.pieces == ["a", "\u2028é"]
    path = source(tmp_path, "one", [document]).paths[0]
    assert json.loads(path.read_text())["text"] == "a\u2028é"
