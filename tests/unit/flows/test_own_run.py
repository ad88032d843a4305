"""When a process of a flow run ends itself."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Pending,
    Running,
    Scheduled,
)

from requant.flows import own_run
from requant.flows.own_run import count_starts, exit_if_run_is_over, is_over

BEGUN = (Scheduled(), Pending(), Running())


def history(*states: State[Any]) -> list[State[Any]]:
    """These states, a second apart, in no order."""
    began = datetime.datetime.now(datetime.UTC)
    each = [s.model_copy(update={"timestamp": began + datetime.timedelta(seconds=n)}) for n, s in enumerate(states)]
    return each[::-1]


@pytest.mark.parametrize(
    "later",
    [
        (),
        (Running(name="WaitingForWorker"), Running()),
        (Cancelling(),),
        (Completed(name="Published"),),
        (Failed(name="Rejected"),),
        (Crashed(),),
    ],
    ids=str,
)
def test_a_run_that_works_or_ended_by_itself_is_not_over(later: tuple[State[Any], ...]) -> None:
    assert not is_over(history(*BEGUN, *later), starts=1)


@pytest.mark.parametrize(
    "later",
    [
        (Cancelling(), Cancelled()),
        (Cancelling(), Cancelled(), Failed()),
        (Crashed(), AwaitingRetry()),
        (Crashed(), AwaitingRetry(), Pending(), Running()),
        (Cancelling(), Cancelled(), AwaitingRetry(), Pending()),
    ],
    ids=str,
)
def test_a_run_that_was_cancelled_or_started_again_is_over_for_its_process(
    later: tuple[State[Any], ...],
) -> None:
    assert is_over(history(*BEGUN, *later), starts=1)


def test_the_process_of_a_later_life_goes_on() -> None:
    states = history(*BEGUN, Cancelling(), Cancelled(), AwaitingRetry(), Pending(), Running())
    assert count_starts(states) == 2 and not is_over(states, starts=2)


@pytest.fixture
def look_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[UUID], list[State[Any]]]], list[str]]:
    """Let this process be that of a run in its first life, look at it, and say in which states it ended itself."""
    run_id, ended = uuid4(), list[str]()
    there = SimpleNamespace(deployment=SimpleNamespace(id=str(uuid4())), flow_run=SimpleNamespace(id=str(run_id)))
    monkeypatch.setattr(own_run, "runtime", there)
    monkeypatch.setitem(own_run._starts, run_id, 1)
    monkeypatch.setattr(own_run, "_end_process", lambda state: ended.append(state.name))

    def look(read: Callable[[UUID], list[State[Any]]]) -> list[str]:
        @contextlib.contextmanager
        def client(sync_client: bool) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(read_flow_run_states=read)

        monkeypatch.setattr(own_run, "get_client", client)
        exit_if_run_is_over()
        return ended

    return look


def test_a_process_puts_no_last_state_over_a_cancellation(look_at: Callable[..., list[str]]) -> None:
    assert look_at(lambda run_id: history(*BEGUN)) == []
    assert look_at(lambda run_id: history(*BEGUN, Cancelling())) == []  # its worker ends it
    assert look_at(lambda run_id: history(*BEGUN, Cancelling(), Cancelled())) == ["Cancelled"]


def test_a_server_that_is_away_before_the_last_state_ends_no_process(look_at: Callable[..., list[str]]) -> None:
    def away(run_id: UUID) -> list[State[Any]]:
        raise httpx.ConnectError("away")

    assert look_at(away) == []


def test_a_run_that_no_worker_has_started_is_not_looked_at(
    look_at: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_run.runtime.deployment, "id", None)
    assert look_at(lambda run_id: history(*BEGUN, Cancelling(), Cancelled())) == []
