"""From streamed answers to figures: tokens counted, time between them, summaries."""

from __future__ import annotations

from typing import Any

import pytest

from requant.tasks.serving.client import Answer, _completion_tokens, _has_text, _told_apart
from requant.tasks.serving.measure import _quantile, summarized, summary
from requant.tasks.serving.prompts import digest_of_prompts, has_chat_template, prompts_of, python_prompts


def test_tokens_that_come_in_one_piece_share_the_wait_for_it() -> None:
    answer = Answer(5, 1.0, ((1.5, 1), (1.7, 2), (1.8, 1), (2.1, 1)))
    assert answer.first == 0.5
    assert answer.gaps == pytest.approx([0.1, 0.1, 0.1, 0.3])


def test_tokens_are_counted_by_usage_and_not_by_pieces() -> None:
    assert _completion_tokens({"usage": {"completion_tokens": 7}}, 3) == 7
    for usage in (
        None,
        5,
        [],
        {},
        {"completion_tokens": "9"},
        {"completion_tokens": -1},
        {"completion_tokens": 10**30},
    ):
        assert _completion_tokens({"usage": usage}, 3) == 3


def test_a_server_that_counts_at_the_end_only_has_its_total_shared_out() -> None:
    assert _told_apart([(1.0, 0), (2.0, 0), (3.0, 0), (3.1, 6)], 6) == ((1.0, 2), (2.0, 2), (3.0, 2))
    assert _told_apart([(1.0, 4)], 4) == ((1.0, 4),)
    assert _told_apart([(1.0, 1), (2.0, 2)], 3) == ((1.0, 1), (2.0, 2))


@pytest.mark.parametrize(
    ("event", "has"),
    [
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [{"delta": {"content": "a"}}]}, True),
        ({"choices": [{"delta": {"reasoning": "a"}}]}, True),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, False),
        ({"choices": []}, False),
        ({"choices": [5]}, False),
        ({}, False),
    ],
)
def test_a_piece_has_text_or_none(event: dict[str, Any], has: bool) -> None:
    assert _has_text(event) is has


def test_quantiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (_quantile(values, 0.5), _quantile(values, 0.99), _quantile([3.0], 0.99)) == (51.0, 100.0, 3.0)
    assert _quantile([], 0.5) is None


def row(**changes: Any) -> dict[str, Any]:
    return {
        "mtp": False, "sampling": "greedy", "concurrency": 1, "tokens": 100, "tokens_per_second": 100.0,
        "first_token_seconds": 0.1, "inter_token_seconds": {"median": 0.01, "p99": 0.02}, "acceptance": None,
        **changes,
    }  # fmt: skip


def test_speeds_are_summed_up_as_all_tokens_over_all_time() -> None:
    rows = [row(), row(tokens=300, tokens_per_second=50.0), row(concurrency=4, tokens_per_second=900.0)]
    found = summary(rows, mtp=False)
    assert found is not None and found["tokens_per_second"] == round(400 / 7, 3)
    assert summary(rows, mtp=True) is None


def test_the_top_is_with_mtp_where_there_was_one() -> None:
    on = row(mtp=True, tokens_per_second=150.0, drafted_tokens=50, accepted_tokens=45, acceptance=0.9)
    document = summarized([row(), on])
    assert (document["tokens_per_second"], document["acceptance"], document["mtp"]["speedup"]) == (150.0, 0.9, 1.5)
    alone = summarized([row()])
    assert (alone["tokens_per_second"], alone["acceptance"], alone["mtp"]["speedup"]) == (100.0, None, None)


def test_prompt_sets_are_fixed_and_named_by_what_they_hold() -> None:
    card = prompts_of(["card"])
    assert len(card) == 4 and len({prompt.name for prompt in card}) == 4 and all(prompt.chat for prompt in card)
    everything = prompts_of(["card", "code", "prose", "chat", "card"])
    assert len(everything) == 20 and len({(p.set, p.name) for p in everything}) == 20
    assert digest_of_prompts(card) != digest_of_prompts(everything)
    assert {p.tokens for p in prompts_of(["code", "card"], 50)} == {50}
    assert digest_of_prompts(prompts_of(["card"], 50)) != digest_of_prompts(card)
    assert len(set(python_prompts(52))) == 52


@pytest.mark.parametrize(
    ("files", "has"),
    [
        ({"chat_template.jinja": b""}, True),
        ({"tokenizer_config.json": b'{"chat_template": "x"}'}, True),
        ({"tokenizer_config.json": b"{}"}, False),
        ({"tokenizer_config.json": b"[]"}, False),
        ({"tokenizer_config.json": b"\xff"}, False),
        ({}, False),
    ],
)
def test_a_chat_template_is_found_in_either_file(files: dict[str, bytes], has: bool) -> None:
    assert has_chat_template(files, files.__getitem__) is has
