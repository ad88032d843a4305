"""When a run says that no worker takes what it waits for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from requant.flows.work_pool import LOOK_INTERVAL_S, WorkerNotice


@dataclass
class Pool:
    """A pool whose problem changes, a clock that is moved by hand, and what was told."""

    problem: str | None = "no worker is online"
    now_s: float = 0.0
    looks: int = 0
    told: list[str | None] = field(default_factory=list)

    def look(self) -> str | None:
        self.looks += 1
        return self.problem


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def notice(pool: Pool) -> WorkerNotice:
    return WorkerNotice(pool.look, pool.told.append, lambda: pool.now_s)


def test_a_run_that_has_just_begun_to_wait_says_nothing_and_asks_nobody(pool: Pool, notice: WorkerNotice) -> None:
    notice.look(waiting=True)
    pool.now_s += LOOK_INTERVAL_S - 1
    notice.look(waiting=True)
    assert (pool.told, pool.looks) == ([], 0)


def test_the_problem_is_told_once_after_a_minute_and_its_end_when_the_run_starts(
    pool: Pool, notice: WorkerNotice
) -> None:
    for _ in range(4):
        notice.look(waiting=True)
        pool.now_s += LOOK_INTERVAL_S
    assert (pool.told, pool.looks) == (["no worker is online"], 3)
    notice.look(waiting=False)
    notice.look(waiting=False)
    assert pool.told == ["no worker is online", None]


def test_a_problem_that_changes_is_told_again(pool: Pool, notice: WorkerNotice) -> None:
    notice.look(waiting=True)
    for problem in ("no worker is online", "the pool is paused", None):
        pool.problem = problem
        pool.now_s += LOOK_INTERVAL_S
        notice.look(waiting=True)
    assert pool.told == ["no worker is online", "the pool is paused", None]


def test_what_could_not_be_told_is_told_at_the_next_look(pool: Pool) -> None:
    told: list[str | None] = []

    def tell(problem: str | None) -> None:
        told.append(problem)
        if len(told) == 1:
            raise ConnectionError("the server is away")

    notice = WorkerNotice(pool.look, tell, lambda: pool.now_s)
    notice.look(waiting=True)
    pool.now_s += LOOK_INTERVAL_S
    with pytest.raises(ConnectionError):
        notice.look(waiting=True)
    pool.now_s += LOOK_INTERVAL_S
    notice.look(waiting=True)
    assert told == ["no worker is online", "no worker is online"]


def test_a_run_that_waits_behind_another_says_nothing(pool: Pool, notice: WorkerNotice) -> None:
    pool.problem = None
    for _ in range(3):
        notice.look(waiting=True)
        pool.now_s += LOOK_INTERVAL_S
    notice.look(waiting=False)
    assert pool.told == []
