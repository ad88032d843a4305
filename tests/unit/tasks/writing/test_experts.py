"""Rows are chosen so that every expert gets its share of tokens."""

from __future__ import annotations

import numpy as np

from requant.tasks.writing.experts import SHARE, Routing, choose


def routing(rare_rows: set[int], rows: int = 40, length: int = 100) -> Routing:
    """Two modules of four experts. The last expert of the second one gets tokens of a few rows alone."""
    tokens = np.zeros((rows, 2, 4), np.int32)
    tokens[:, 0] = length // 4
    tokens[:, 1, :3] = [40, 30, 30]
    for row in rare_rows:
        tokens[row, 1] = [20, 20, 20, 40]
    return Routing(("0.mlp.experts", "1.mlp.experts"), tokens)


def test_rows_for_a_rare_expert_are_chosen_before_others() -> None:
    choice = choose([100] * 40, routing({37, 38}), tokens=2000)
    assert {37, 38} <= set(choice.rows) and len(choice.rows) == 20
    assert choice.starved == [] and choice.tokens[1, 3] == 80 >= choice.least[1] == SHARE * 2000 / 4


def test_an_expert_that_no_row_reaches_is_named() -> None:
    choice = choose([100] * 40, routing(set()), tokens=1000)
    assert choice.starved == ["1.mlp.experts.3"]
    assert choice.rows == tuple(range(10)), "the others are taken in their order"
    assert choice.to_json()["starved"] == ["1.mlp.experts.3"]


def test_where_every_expert_has_its_share_the_first_rows_are_enough() -> None:
    tokens = np.full((10, 1, 2), 50, np.int32)
    choice = choose([100] * 10, Routing(("0.mlp.experts",), tokens), tokens=250)
    assert len(choice.rows) == 3 and choice.tokens.tolist() == [[150, 150]]
