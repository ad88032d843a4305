"""Chats packed into samples of one length, without being cut in the middle where that can be."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Segment(NamedTuple):
    """The tokens `[begin, end)` of one document."""

    document: int
    begin: int
    end: int


@dataclass(frozen=True)
class Length:
    """How many tokens each piece of a document has. Of a document that is no chat, a sample can begin anywhere."""

    pieces: tuple[int, ...]
    chat: bool

    @property
    def tokens(self) -> int:
        return sum(self.pieces)

    def next_start(self, token: int) -> int | None:
        """Return the first token from this one on at which a sample can begin; None if there is none."""
        if not self.chat:
            return token if token < self.tokens else None
        return next((start for start in accumulate(self.pieces[:-1]) if start >= token), None)


def pack(lengths: Sequence[Length], seqlen: int, seed: int) -> list[list[Segment]]:
    """Make as many samples of `seqlen` tokens as the documents are enough for, in an order that `seed` decides.

    A sample begins with a document, and has whole documents as long as they fit: the next one, or if that is too long
    the longest that fits. Where none fits, the sample ends with the beginning of the shortest one that is longer. What
    is left of a document is used again only if the whole document is longer than a sample or no chat: it then counts as
    a document that begins at its next turn. No token is used twice.
    """
    pool = _Pool(lengths, seqlen, seed)
    samples: list[list[Segment]] = []
    while True:
        sample: list[Segment] = []
        rest = seqlen
        while rest:
            segment = pool.take(rest, fill=bool(sample))
            if segment is None:
                return samples
            sample.append(segment)
            rest -= segment.end - segment.begin
        samples.append(sample)


class _Pool:
    """The documents that no sample has yet. A document is known by its rank in the order of the seed."""

    def __init__(self, lengths: Sequence[Length], seqlen: int, seed: int) -> None:
        self._lengths, self._seqlen = lengths, seqlen
        self._order = [number for number, length in enumerate(lengths) if length.tokens]
        random.Random(seed).shuffle(self._order)
        self._begins = dict.fromkeys(range(len(self._order)), 0)  # where what is left begins, by rank
        self._next = 0  # the first rank of which something is left
        self._by_size = sorted((self._size(rank), rank) for rank in self._begins)

    def take(self, room: int, *, fill: bool) -> Segment | None:
        """Take the next document, up to `room` tokens of it; None if there is none.

        With `fill`, take another one if the next one does not fit: the longest that fits, else the shortest.
        """
        if not self._begins:
            return None
        while self._next not in self._begins:
            self._next += 1
        rank = self._next
        if fill and self._size(rank) > room:
            fitting = bisect.bisect_right(self._by_size, (room, len(self._order)))
            rank = self._by_size[fitting - 1 if fitting else 0][1]
        return self._cut(rank, room)

    def _size(self, rank: int) -> int:
        return self._lengths[self._order[rank]].tokens - self._begins[rank]

    def _cut(self, rank: int, room: int) -> Segment:
        number, begin, size = self._order[rank], self._begins[rank], self._size(rank)
        del self._by_size[bisect.bisect_left(self._by_size, (size, rank))]
        end = begin + min(size, room)
        length = self._lengths[number]
        start = length.next_start(end) if end < length.tokens else None
        if start is not None and (not length.chat or length.tokens > self._seqlen):
            self._begins[rank] = start
            bisect.insort(self._by_size, (self._size(rank), rank))
        else:
            del self._begins[rank]
        return Segment(number, begin, end)
