"""Which rows are written next: every domain gets its share, the same ones for a seed, and an end where it is no use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.writing.rows import Order, Row, Start
from requant.tasks.writing.schedule import Schedule

STARTS = [Start(domain, (number,)) for domain in ("prose", "code", "math") for number in range(5)]


def rows_of(orders: list[Order], length: Callable[[Order], int], problem: str = "") -> list[Row]:
    return [Row(o.number, o.start.domain, (0,) * length(o), 1, problem, "e") for o in orders]


def written(seed: int = 1, length: Callable[[Order], int] = lambda order: 50) -> tuple[Schedule, list[Order]]:
    schedule, orders = Schedule(STARTS, tokens=6000, row_tokens=100, seed=seed), []
    while schedule.tokens_missing:
        batch = schedule.orders()
        orders += batch
        schedule.add(rows_of(batch, length))
    return schedule, orders


def test_a_domain_with_short_rows_gets_more_of_them_and_the_same_tokens() -> None:
    schedule, orders = written(length=lambda order: 10 if order.start.domain == "math" else 80)
    assert all(1900 <= tokens <= 2800 for tokens in schedule.kept.values()), schedule.kept
    counts = Counter(order.start.domain for order in orders)
    assert counts["math"] > 5 * counts["prose"]


def test_every_row_has_a_seed_of_its_own_and_every_prompt_has_its_turn() -> None:
    _, orders = written()
    assert len({order.seed for order in orders}) == len(orders)
    assert [order.number for order in orders] == list(range(len(orders)))
    assert {order.start for order in orders[:15]} == set(STARTS)


def test_the_rows_follow_from_the_seed() -> None:
    assert written(1)[1] == written(1)[1] != written(2)[1]


def test_a_new_schedule_goes_on_where_another_one_was() -> None:
    first = Schedule(STARTS, tokens=30_000, row_tokens=100, seed=1)
    batch = first.orders()
    first.add(rows_of(batch, lambda order: 70))
    second = Schedule(STARTS, tokens=30_000, row_tokens=100, seed=1)
    second.add(rows_of(batch, lambda order: 70))
    assert second.orders() == first.orders() != batch


def test_a_domain_that_only_loops_leaves_its_share_to_the_others() -> None:
    schedule = Schedule(STARTS, tokens=6000, row_tokens=100, seed=1)
    while schedule.tokens_missing:
        orders = schedule.orders()
        bad = [order for order in orders if order.start.domain == "math"]
        schedule.add(rows_of(bad, lambda order: 100, "loops"))
        schedule.add(rows_of([order for order in orders if order not in bad], lambda order: 100))
    assert schedule.kept["math"] == 0 and schedule.kept.total() >= 6000


def test_a_base_that_only_loops_is_told_so_in_a_sentence() -> None:
    schedule = Schedule(STARTS, tokens=6000, row_tokens=100, seed=1)
    with pytest.raises(RecipeError, match=r"of which 0 in rows that neither loop .* name another text"):
        for _ in range(1000):
            schedule.add(rows_of(schedule.orders(), lambda order: 100, "loops"))
    assert schedule.kept.total() == 0


def test_more_tokens_can_be_asked_for_later() -> None:
    schedule, _ = written()
    schedule.raise_to(12_000)
    assert schedule.tokens_missing > 5000 and schedule.orders()
