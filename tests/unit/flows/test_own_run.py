"""When a process of a flow run ends itself."""

from __future__ import annotations

import datetime
from typing import Any

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

from requant.flows.own_run import is_over, lives_of

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
    assert not is_over(history(*BEGUN, *later), lives=1)


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
    assert is_over(history(*BEGUN, *later), lives=1)


def test_the_process_of_a_later_life_goes_on() -> None:
    states = history(*BEGUN, Cancelling(), Cancelled(), AwaitingRetry(), Pending(), Running())
    assert lives_of(states) == 2 and not is_over(states, lives=2)
