"""Runs whose process is gone, on a real Prefect server. The clock of the sweep is the test's own: nothing waits."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import Event
from prefect.events.filters import EventFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Pending, Running

from requant.flows.sweep import (
    CANCEL_TIMEOUT_S,
    HEARTBEAT_TIMEOUT_S,
    MAX_RESTARTS,
    PASS_INTERVAL_S,
    PROCESS_START_TIMEOUT_S,
    RESTART_MESSAGE,
    Sweep,
    state_after_crash,
)
from tests.factories.paths import ROOT
from tests.factories.requant import Requant, wait_for


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def client(
    prefect_server: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SyncPrefectClient]:
    """A server with the project's own deployments, and no worker."""
    deployed = Requant(tmp_path_factory.mktemp("sweep"), environment)("deploy", str(ROOT / "deployments"))
    assert deployed.status == 0, deployed.stderr
    with SyncPrefectClient(prefect_server) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sweep(client: SyncPrefectClient, clock: Clock) -> Sweep:
    return Sweep(client, clock)


@pytest.fixture
def run_in(client: SyncPrefectClient) -> Iterator[Callable[..., UUID]]:
    """Make runs that went through the given states, one after another; they are gone behind the test."""
    made: list[UUID] = []

    def make(*states: State[Any], deployment: str = "requantize/requantize") -> UUID:
        there = client.read_deployment_by_name(deployment)
        route: Any = f"/deployments/{there.id}/create_flow_run"
        answer = client.request("POST", route, json={"enforce_parameter_schema": False})
        run = UUID(answer.raise_for_status().json()["id"])
        made.append(run)
        for state in states:
            client.set_flow_run_state(run, state, force=True)
        # The server writes down an event of each state some time later, which a pass then takes for a sign of life.
        wait_for(lambda: number_of_events(client, run) == 1 + len(states), pause=0.05)
        return run

    yield make
    for run_id in made:
        client.delete_flow_run(run_id)


def number_of_events(client: SyncPrefectClient, run_id: UUID) -> int:
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    resource, occurred = EventResourceFilter(id=[f"prefect.flow-run.{run_id}"]), EventOccurredFilter(since=since)
    return client.read_events(EventFilter(resource=resource, occurred=occurred), limit=1).total


def state(client: SyncPrefectClient, run_id: UUID) -> State[Any]:
    run: FlowRun = client.read_flow_run(run_id)
    assert run.state is not None
    return run.state


def send_heartbeats(client: SyncPrefectClient, clock_errors_s: Mapping[UUID, float]) -> None:
    """Send what flow runs send while they work, each from a machine of its own, and wait until the server has it."""
    events = []
    for run_id, error_s in clock_errors_s.items():
        occurred = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=error_s)
        resource = {"prefect.resource.id": f"prefect.flow-run.{run_id}"}
        events.append(Event(event="prefect.flow-run.heartbeat", resource=resource, occurred=occurred))
    sent: Any = [event.model_dump(mode="json") for event in events]
    client.request("POST", "/events", json=sent)
    days = [str(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=number)) for number in (-1, 1)]
    ids = [str(event.id) for event in events]
    body: Any = {"filter": {"id": {"id": ids}, "occurred": {"since": days[0], "until": days[1]}}, "limit": len(ids)}
    wait_for(lambda: len(client.request("POST", "/events/filter", json=body).json()["events"]) == len(ids), pause=0.05)


def watch(sweep: Sweep, clock: Clock, seconds: float) -> list[str]:
    """Sweep for so long, a pass every ten seconds."""
    done = []
    for _ in range(int(seconds // PASS_INTERVAL_S)):
        done += sweep()
        clock.now_s += PASS_INTERVAL_S
    return done


def test_a_run_without_a_heartbeat_is_crashed_and_started_again(
    client: SyncPrefectClient, sweep: Sweep, clock: Clock, run_in: Callable[..., UUID]
) -> None:
    run, child = run_in(Pending(), Running()), run_in(Pending(), Running(), deployment="quantize/quantize")
    assert watch(sweep, clock, HEARTBEAT_TIMEOUT_S) == []
    assert len(sweep()) == 3
    assert (state(client, run).name, state(client, run).message) == ("AwaitingRetry", RESTART_MESSAGE)
    assert state(client, child).name == "Crashed"  # The run that waits for it starts it again.
    assert sweep() == []


def test_runs_that_send_heartbeats_are_left_alone_whatever_the_clocks_of_their_machines(
    client: SyncPrefectClient, sweep: Sweep, clock: Clock, run_in: Callable[..., UUID]
) -> None:
    runs = {run_in(Pending(), Running()): error_s for error_s in (0, -600, 600)}
    for _ in range(3):
        assert watch(sweep, clock, HEARTBEAT_TIMEOUT_S - PASS_INTERVAL_S) == []
        send_heartbeats(client, runs)
    assert sweep() == [] and all(state(client, run).is_running() for run in runs)


def test_a_server_that_was_away_has_missed_heartbeats_and_so_the_time_begins_anew(
    client: SyncPrefectClient, sweep: Sweep, clock: Clock, run_in: Callable[..., UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(Pending(), Running())
    watch(sweep, clock, HEARTBEAT_TIMEOUT_S - PASS_INTERVAL_S)
    with monkeypatch.context() as away:

        def refuse(*arguments: Any, **options: Any) -> None:
            raise httpx.ConnectError("the server is away")

        away.setattr(client, "read_flow_runs", refuse)
        with pytest.raises(httpx.ConnectError):
            sweep()
    assert watch(sweep, clock, HEARTBEAT_TIMEOUT_S) == [] and state(client, run).is_running()


def test_a_sweeper_that_stood_still_has_missed_heartbeats_too(
    client: SyncPrefectClient, sweep: Sweep, clock: Clock, run_in: Callable[..., UUID]
) -> None:
    """A machine that was suspended, or a client that waited for the server by itself."""
    run = run_in(Pending(), Running())
    watch(sweep, clock, HEARTBEAT_TIMEOUT_S - PASS_INTERVAL_S)
    clock.now_s += 600
    assert watch(sweep, clock, HEARTBEAT_TIMEOUT_S) == [] and state(client, run).is_running()


def test_a_run_that_cannot_be_healed_keeps_no_other_from_it(
    client: SyncPrefectClient, sweep: Sweep, run_in: Callable[..., UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = run_in(Running(), Crashed()), run_in(Running(), Crashed())
    read = client.read_flow_run_states

    def broken(run_id: UUID) -> list[State[Any]]:
        if run_id == first:
            raise ValueError("the server's answer makes no sense")
        return read(run_id)

    monkeypatch.setattr(client, "read_flow_run_states", broken)
    assert len(sweep()) == 1
    assert (state(client, first).name, state(client, second).name) == ("Crashed", "AwaitingRetry")


@pytest.mark.parametrize("states", [(Cancelling(), Crashed()), (Cancelling(), Cancelled(), Crashed())], ids=len)
def test_a_run_that_crashed_while_somebody_cancelled_it_ends_cancelled_and_is_not_started_again(
    states: tuple[State[Any], ...], client: SyncPrefectClient, sweep: Sweep, run_in: Callable[..., UUID]
) -> None:
    run = run_in(Pending(), Running(), *states)
    assert len(sweep()) == 1
    assert state(client, run).name == "Cancelled"
    assert sweep() == []
    assert "AwaitingRetry" not in {each.name for each in client.read_flow_run_states(run)}


def test_a_cancelled_run_that_a_person_started_again_is_started_again_after_a_crash(
    client: SyncPrefectClient, sweep: Sweep, run_in: Callable[..., UUID]
) -> None:
    run = run_in(Running(), Cancelling(), Cancelled(), AwaitingRetry(), Pending(), Running(), Crashed())
    assert len(sweep()) == 1
    assert state(client, run).message == RESTART_MESSAGE


def test_a_run_that_nobody_ends_is_cancelled_even_where_its_process_still_sends_heartbeats(
    client: SyncPrefectClient, sweep: Sweep, clock: Clock, run_in: Callable[..., UUID]
) -> None:
    run = run_in(Pending(), Running(), Cancelling())
    assert watch(sweep, clock, CANCEL_TIMEOUT_S - PASS_INTERVAL_S) == []
    send_heartbeats(client, {run: 0})
    assert len(watch(sweep, clock, 3 * PASS_INTERVAL_S)) == 1
    assert state(client, run).is_cancelled() and "no worker ended its process" in str(state(client, run).message)


def test_a_run_whose_process_did_not_start_is_started_again(
    client: SyncPrefectClient, sweep: Sweep, clock: Clock, run_in: Callable[..., UUID]
) -> None:
    run = run_in(Pending())
    assert watch(sweep, clock, PROCESS_START_TIMEOUT_S) == []
    assert len(sweep()) == 2
    assert state(client, run).message == RESTART_MESSAGE


def test_a_run_that_crashes_again_and_again_is_given_up(
    client: SyncPrefectClient, sweep: Sweep, run_in: Callable[..., UUID]
) -> None:
    lives = [
        each for _ in range(MAX_RESTARTS) for each in (AwaitingRetry(message=RESTART_MESSAGE), Running(), Crashed())
    ]
    run = run_in(Running(), Crashed(), *lives)
    assert len(sweep()) == 1
    assert state(client, run).is_failed() and f"crashed {MAX_RESTARTS + 1} times" in str(state(client, run).message)


def test_the_second_restart_waits_a_while_and_later_ones_longer() -> None:
    """What keeps a run from starting, such as a registry that is away, is given time to pass."""
    crashed = Crashed()
    delays_s = []
    for restarts in range(MAX_RESTARTS):
        state = state_after_crash(crashed, [AwaitingRetry(message=RESTART_MESSAGE) for _ in range(restarts)])
        delays_s.append((state.state_details.scheduled_time - crashed.timestamp).total_seconds())
    assert delays_s[:4] == [0, 15, 30, 60] and max(delays_s) == 600 and delays_s == sorted(delays_s)


def test_of_two_sweeps_at_once_only_one_restarts_a_run(
    client: SyncPrefectClient, clock: Clock, run_in: Callable[..., UUID]
) -> None:
    run = run_in(Pending(), Running(), Crashed())
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda sweep: sweep(), [Sweep(client, clock) for _ in range(8)]))
    assert len([sentence for each in done for sentence in each]) == 1
    assert [each.name for each in client.read_flow_run_states(run)].count("AwaitingRetry") == 1


def test_runs_that_no_deployment_made_are_left_alone(client: SyncPrefectClient, sweep: Sweep, clock: Clock) -> None:
    """`requant run` on this server has no worker that would take its run up again."""
    run = client.create_flow_run(
        Flow(lambda recipe: None, name="requantize"), parameters={"recipe": {}}, tags=["requant"], state=Running()
    )
    try:
        assert watch(sweep, clock, HEARTBEAT_TIMEOUT_S + PASS_INTERVAL_S) == [] and state(client, run.id).is_running()
    finally:
        client.delete_flow_run(run.id)


def test_a_worker_needs_the_address_of_a_server(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = Requant(tmp_path, environment)("worker", "--pool", "gpu", new_process=True)
    assert done.status == 2 and "PREFECT_API_URL is not set" in done.stderr and "Traceback" not in done.stderr
