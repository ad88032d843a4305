"""When one more run of a commit and recipe is started."""

from __future__ import annotations

import datetime

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.types import DateTime

from requant.flows.last_run import remember_run
from requant.flows.start import MAX_RUNS, RETRY_AFTER, needs_another_run, run_keys
from requant.flows.watching import Due
from requant.tasks.errors import RequantError
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.store import Store

RECIPE = parse_recipe({"base": {"repo_id": "a/b"}})
BASE = Revision("a/b", "1" * 40, (HubFile("config.json", 30, "a3", None),))
OTHER = Revision("a/b", "2" * 40, (HubFile("config.json", 30, "b3", None),))
DUE = Due("b.yaml", RECIPE, BASE)
NOW, LONG_AGO = datetime.timedelta(0), RETRY_AFTER + datetime.timedelta(minutes=1)


def run(kind: StateType, ago: datetime.timedelta = LONG_AGO, message: str = "") -> FlowRun:
    timestamp = DateTime.now("UTC") - ago
    state = State(type=kind, name=kind.value.title(), timestamp=timestamp, message=message)
    return FlowRun.model_validate({"flow_id": "0" * 32, "name": "the-run", "state": state})


def test_the_first_key_names_repo_commit_and_recipe_and_later_ones_are_numbered(store: Store) -> None:
    key = f"a/b@{'1' * 40}:{RECIPE.digest}"
    assert run_keys(store, DUE) == [key, f"{key}:2", f"{key}:3"]


def test_the_first_run_is_started(store: Store) -> None:
    assert needs_another_run([], store, DUE)


@pytest.mark.parametrize(
    "kind",
    [
        StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING,
        StateType.CANCELLED,
    ],
)  # fmt: skip
def test_a_run_that_waits_works_or_was_cancelled_is_left_alone(kind: StateType, store: Store) -> None:
    assert not needs_another_run([run(kind)], store, DUE)


@pytest.mark.parametrize("kind", [StateType.FAILED, StateType.CRASHED])
def test_a_failed_run_is_followed_by_another_but_not_at_once(kind: StateType, store: Store) -> None:
    assert not needs_another_run([run(kind, NOW)], store, DUE)
    assert needs_another_run([run(kind)], store, DUE)
    assert not needs_another_run([run(kind), run(StateType.SCHEDULED, NOW)], store, DUE)


def test_after_the_last_attempt_somebody_has_to_look(store: Store) -> None:
    failed = run(StateType.FAILED, message="the base is gated")
    with pytest.raises(
        RequantError, match=f"{MAX_RUNS} runs of a/b@1+ were started, .* Failed \\(the base is gated\\)"
    ):
        needs_another_run([failed] * MAX_RUNS, store, DUE)


def test_a_run_that_ended_meanwhile_is_seen(store: Store) -> None:
    remember_run(store, RECIPE, BASE, "published")
    assert not needs_another_run([run(StateType.COMPLETED, NOW)], store, DUE)


def test_a_base_that_moved_on_and_back_is_run_again(store: Store) -> None:
    remember_run(store, RECIPE, OTHER, "published")
    assert needs_another_run([run(StateType.COMPLETED, NOW)], store, DUE)


def test_a_store_that_is_not_the_workers_starts_no_run_after_another(store: Store) -> None:
    with pytest.raises(RequantError, match="knows nothing of it: set REQUANT_STORE to the workers' store"):
        needs_another_run([run(StateType.COMPLETED)], store, DUE)
