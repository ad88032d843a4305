"""From streamed answers to figures: tokens counted, and the time between them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from requant.tasks.serving.client import Answer, _share_tokens
from requant.tasks.serving.events import StreamEvent
from requant.tasks.serving.measure import _quantile
from requant.tasks.serving.prompts import digest_of_prompts, has_chat_template, load_prompts, python_prompts


def test_tokens_that_come_in_one_piece_share_the_wait_for_it() -> None:
    answer = Answer(5, 1.0, ((1.5, 1), (1.7, 2), (1.8, 1), (2.1, 1)))
    assert answer.first_token_s == 0.5
    assert answer.gaps_s == pytest.approx([0.1, 0.1, 0.1, 0.3])


def test_tokens_are_counted_by_usage_and_not_by_pieces() -> None:
    assert StreamEvent.from_json('{"usage": {"completion_tokens": 7}}').completion_tokens == 7
    for usage in (
        None,
        5,
        [],
        {},
        {"completion_tokens": "9"},
        {"completion_tokens": -1},
        {"completion_tokens": 10**30},
    ):
        assert StreamEvent.from_json(json.dumps({"usage": usage})).completion_tokens is None


def test_a_server_that_counts_at_the_end_only_has_its_total_shared_out() -> None:
    assert _share_tokens([(1.0, 0), (2.0, 0), (3.0, 0), (3.1, 6)], 6) == ((1.0, 2), (2.0, 2), (3.0, 2))
    assert _share_tokens([(1.0, 4)], 4) == ((1.0, 4),)
    assert _share_tokens([(1.0, 1), (2.0, 2)], 3) == ((1.0, 1), (2.0, 2))


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
    assert StreamEvent.from_json(json.dumps(event)).has_text is has


def test_quantiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (_quantile(values, 0.5), _quantile(values, 0.99), _quantile([3.0], 0.99)) == (51.0, 100.0, 3.0)
    assert _quantile([], 0.5) is None


def test_prompt_sets_are_fixed_and_named_by_what_they_hold() -> None:
    card = load_prompts(["card"])
    assert len(card) == 4 and len({prompt.name for prompt in card}) == 4 and all(prompt.chat for prompt in card)
    everything = load_prompts(["card", "code", "prose", "chat", "card"])
    assert len(everything) == 20 and len({(p.set, p.name) for p in everything}) == 20
    assert digest_of_prompts(card) != digest_of_prompts(everything)
    assert {p.tokens for p in load_prompts(["code", "card"], 50)} == {50}
    assert digest_of_prompts(load_prompts(["card"], 50)) != digest_of_prompts(card)
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
