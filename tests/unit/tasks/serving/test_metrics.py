"""Counters of speculative decoding: read from an engine's text, whatever else is in it."""

from __future__ import annotations

import pytest

from requant.tasks.serving.metrics import DraftCounters, parse_counters

TEXT = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 6.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.795616859683431e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 12.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 3.0
vllm:num_requests_running{engine="0"} 1.0
"""


def test_the_counters_are_read() -> None:
    found = parse_counters(TEXT)
    assert found == DraftCounters(6.0, 12.0, 8.0, {0: 5.0, 1: 3.0})
    assert found.acceptance == round(8 / 12, 4) and found.acceptance_by_position == [round(5 / 6, 4), 0.5]


def test_engines_are_added_up() -> None:
    assert parse_counters(TEXT + TEXT.replace('engine="0"', 'engine="1"')).drafted == 24.0


def test_what_happened_between_two_moments_is_the_difference() -> None:
    later = parse_counters(TEXT.replace(" 6.0", " 10.0").replace(" 12.0", " 16.0").replace(" 5.0", " 8.0"))
    assert later.since(parse_counters(TEXT)) == DraftCounters(4.0, 4.0, 0.0, {0: 3.0, 1: 0.0})
    assert parse_counters(TEXT).since(DraftCounters()) == parse_counters(TEXT)


def test_nothing_drafted_is_no_acceptance() -> None:
    assert (DraftCounters().acceptance, DraftCounters().acceptance_by_position) == (None, [])


HOSTILE = [
    "",
    "<html>not found</html>",
    "\0" * 1000,
    "vllm:spec_decode_num_drafts_total NaN",
    "vllm:spec_decode_num_drafts_total +Inf",
    "vllm:spec_decode_num_drafts_total 1e400",
    "vllm:spec_decode_num_drafts_total -5",
    "vllm:spec_decode_num_drafts_total 1.2.3",
    "vllm:spec_decode_num_drafts_total " + "9" * 10_000,
    "vllm:spec_decode_num_drafts_total{" + 'a="b",' * 100_000 + "} 1",
    "vllm:spec_decode_num_drafts_total{{{ 1",
    'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="99999999999"} 1',
    'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="-1"} 1',
    'vllm:spec_decode_num_accepted_tokens_per_pos_total{xposition="0"} 1',
    "vllm:spec_decode_num_drafts_created 17",
    " vllm:spec_decode_num_drafts_total 17",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_such_counter_is_passed_over(text: str) -> None:
    assert parse_counters(text) == DraftCounters()
    assert parse_counters(f"{text}\n{TEXT}") == parse_counters(TEXT)
