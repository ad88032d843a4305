"""Chats packed into samples: whole where that can be, from turn to turn, and no token twice."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.tasks.quantizing.packing import Length, Segment, pack

DOCUMENTS = st.lists(
    st.builds(Length, st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple), st.booleans()), max_size=12
)


def chats(*tokens: int) -> list[Length]:
    return [Length((count,), chat=True) for count in tokens]


def starts(length: Length) -> set[int]:
    return {0, *itertools.accumulate(length.pieces[:-1])}


@given(DOCUMENTS, st.integers(1, 60), st.integers(0, 5))
def test_samples_are_full_use_no_token_twice_and_begin_where_a_document_or_a_turn_does(
    lengths: list[Length], seqlen: int, seed: int
) -> None:
    samples = pack(lengths, seqlen, seed)
    assert samples == pack(lengths, seqlen, seed)
    used = Counter((part.document, token) for sample in samples for part in sample for token in range(*part[1:]))
    assert not used or max(used.values()) == 1
    for sample in samples:
        assert sum(part.end - part.begin for part in sample) == seqlen
        for part in sample:
            length = lengths[part.document]
            assert part.begin < part.end <= length.tokens
            if length.chat:
                assert part.begin in starts(length)
                assert part.begin == 0 or length.tokens > seqlen  # only a long chat goes on in another sample
        for part in sample[:-1]:  # only the last turn of a sample is cut
            assert part.end == lengths[part.document].tokens


@given(st.lists(st.integers(1, 30), max_size=15), st.integers(1, 40), st.integers(0, 3))
def test_a_chat_is_cut_only_where_no_other_one_fits(tokens: list[int], seqlen: int, seed: int) -> None:
    samples = pack(chats(*tokens), seqlen, seed)
    unused = set(range(len(tokens)))
    for sample in samples:
        last = sample[-1]
        rest = last.end - last.begin
        unused -= {part.document for part in sample[:-1]}
        if last.end < tokens[last.document] and len(sample) > 1:
            assert all(tokens[number] > rest for number in unused)
        unused -= {last.document}


def test_a_chat_that_fits_the_rest_comes_before_one_that_does_not() -> None:
    for seed in range(5):
        (sample,) = (one for one in pack(chats(60, 50, 40), 100, seed) if len(one) > 1)
        assert sorted(part.end - part.begin for part in sample) in ([40, 60], [10, 40, 50])
    assert [*map(len, pack(chats(60, 40, 60, 40, 60, 40), 100, 1))] == [2, 2, 2]


def test_a_chat_longer_than_a_sample_goes_on_at_its_next_turn() -> None:
    long = Length((30, 30, 30, 30), chat=True)
    assert pack([long], 50, 0) == [[Segment(0, 0, 50)], [Segment(0, 60, 110)]]
    assert pack([Length((30, 30, 40), chat=True)], 60, 0) == [[Segment(0, 0, 60)]]  # the rest is shorter than a sample
    assert pack([Length((120,), chat=True)], 50, 0) == [[Segment(0, 0, 50)]]  # no turn begins in its rest


def test_a_text_among_chats_is_cut_anywhere_and_loses_nothing() -> None:
    assert pack([Length((120,), chat=False)], 50, 0) == [[Segment(0, 0, 50)], [Segment(0, 50, 100)]]


@pytest.mark.parametrize("seqlen", [1, 7])
def test_documents_without_tokens_are_passed_over(seqlen: int) -> None:
    assert pack(chats(0, 0), seqlen, 0) == [] == pack([], seqlen, 0)


def test_the_seed_decides_which_chats_come_first() -> None:
    firsts = {pack(chats(*[10] * 50), 10, seed)[0][0].document for seed in range(20)}
    assert len(firsts) > 5
