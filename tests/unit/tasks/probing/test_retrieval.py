"""Values in long texts: how texts are made, and how answers are judged."""

from __future__ import annotations

import re

import pytest

from requant.tasks.probing.question import Prompt, Reply
from requant.tasks.probing.retrieval import NEEDLES, Haystack, judge_reply, lengths, make_haystack


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return make_haystack(8192, 0, 30_000)


def reply(text: str) -> Reply:
    return Reply((), text, True, Prompt((), "", 8192))


def test_lengths_are_the_powers_of_two_that_fit() -> None:
    assert list(lengths(20_000)) == [4096, 8192, 16384]
    assert list(lengths(10**9))[-1] == 131_072
    assert list(lengths(4000)) == []


def test_values_are_spread_over_the_text_and_each_has_a_near_distractor(haystack: Haystack) -> None:
    assert abs(len(haystack.text) - 30_000) < 300
    depths = [haystack.text.index(needle.sentence) / len(haystack.text) for needle in haystack.asked]
    assert len(depths) == NEEDLES and all(
        number / NEEDLES - 0.1 < depth < (number + 1) / NEEDLES + 0.1 for number, depth in enumerate(depths)
    )
    for needle, other in zip(haystack.asked, haystack.others, strict=True):
        assert other.sentence in haystack.text
        assert needle.key != other.key and needle.key.split(" of ")[0] == other.key.split(" of ")[0]
    values = re.findall(r"\d{6}", "".join(needle.value for needle in (*haystack.asked, *haystack.others)))
    assert len(set(values)) == 2 * NEEDLES


def test_no_paragraph_is_there_twice_and_texts_differ(haystack: Haystack) -> None:
    paragraphs = make_haystack(131_072, 0, 150_000).text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert make_haystack(8192, 0, 30_000) == haystack
    other = make_haystack(8192, 1, 30_000)
    assert other.text[:500] != haystack.text[:500] and other.asked != haystack.asked


def test_a_text_can_be_longer_than_all_paragraphs_together() -> None:
    text = make_haystack(131_072, 0, 2_000_000).text
    assert len(text) > 1_900_000


def test_the_first_number_of_an_answer_counts(haystack: Haystack) -> None:
    needle, other = haystack.asked[0], haystack.others[0]
    right = f"The code of the {needle.key} is **{needle.value[:3]},{needle.value[3:]}**."
    for answer, reason in (
        (needle.value, ""),
        (right, ""),
        (f"<think>{other.value}?</think>{needle.value}", ""),
        (f"{other.value}, not {needle.value}", "another value of the text"),
        (f"{needle.value}0", "no value of the text"),
        ("I do not know.", "no value of the text"),
    ):
        outcome = judge_reply(haystack, needle, reply(answer))
        assert (outcome.reason, outcome.measures["retrieval"]) == (reason, not reason), answer


def test_a_model_without_a_chat_template_continues_the_sentence(haystack: Haystack) -> None:
    needle = haystack.asked[0]
    plain, chat = haystack.question(needle, chat=False), haystack.question(needle, chat=True)
    assert not plain.messages and plain.text.endswith(f"The access code of the {needle.key} is")
    assert not chat.text and needle.key in chat.messages[0]["content"] and plain.name == chat.name
