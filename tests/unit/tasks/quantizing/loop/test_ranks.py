"""Shares of several processes: each index is in one of them, and none is much larger than another."""

from __future__ import annotations

import pytest
import torch

from requant.tasks.quantizing.loop.ranks import ALONE, Ranks


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("indices", [0, 1, 2, 5, 8, 13])
def test_each_index_is_in_one_share_and_shares_differ_by_one_at_most(indices: int, count: int) -> None:
    shares = [Ranks(rank, count).share(list(range(indices))) for rank in range(count)]
    assert [one for share in shares for one in share] == list(range(indices))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(shares[0]) == max(map(len, shares))


@pytest.mark.parametrize(("indices", "count", "size", "rounds"), [
    (8, 1, 8, 1), (8, 1, 3, 3), (8, 2, 4, 1), (8, 2, 3, 2), (3, 8, 1, 1), (8, 3, 2, 2),
])  # fmt: skip
def test_all_go_through_as_many_pieces_as_the_largest_share_has(
    indices: int, count: int, size: int, rounds: int
) -> None:
    assert Ranks(count - 1, count).rounds(list(range(indices)), size) == rounds


def test_a_process_alone_exchanges_nothing() -> None:
    whole, part = torch.zeros(2, 3), torch.ones(2, 3)
    ALONE.gather(part, whole)
    assert torch.equal(whole, part) and ALONE.sum(part) is part and ALONE.sum_of_part(whole, part) is whole
