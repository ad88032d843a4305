"""Heal flow runs whose process is gone: end runs that no process works on, and restart crashed `requantize` runs.

A Prefect server notices a dead process only by its missing heartbeats. Automations could watch for those, but they keep
their state in the memory of one server process: a restart of the server delays them by 15 minutes, an update of an
automation makes it forget every run that it watched, and none of them can see that somebody cancelled the run before it
crashed (Prefect 3.8.8). A sweep looks at the state of the runs themselves, so it may be repeated, interrupted and done
by any number of workers at a time.

A sweep compares no clocks of different machines. It takes a run for dead if the number of the run's events has not
changed during the timeout, while the server answered without a gap and the sweep itself ran without a gap. Every run of
these deployments sends an event at least every 30 s (`PREFECT_FLOWS_HEARTBEAT_FREQUENCY` in deployments/prefect.yaml).
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid5

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events.filters import EventFilter, EventOccurredFilter, EventResourceFilter
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed, to_state_create

TAG = "requant"  # on every deployment in deployments/prefect.yaml
# The flows of the same file.
FLOWS = ("requantize", "plan", "watch", "self_calibration", "quantize", "validate", "benchmark", "acceptance", "probe")
PASS_INTERVAL_S = 10.0
MAX_PASS_GAP_S = 30.0  # After a longer gap, between two passes or within one, heartbeats may have been missed.
HEARTBEAT_TIMEOUT_S = 90.0  # three heartbeats
CANCEL_TIMEOUT_S = 75.0  # A worker ends a cancelled process in this time.
PROCESS_START_TIMEOUT_S = 90.0  # A worker starts a process on its own machine in this time.
NODE_START_TIMEOUT_S = 1800.0  # The same where a node may have to be created and an image pulled first.
MAX_RESTARTS = 10  # of one crashed run
RESTART_MESSAGE = "goes on after a crash"  # the message of the state in which a sweep restarts a run
MAX_CRASH_AGE = datetime.timedelta(days=3)  # Nobody expects a run that crashed earlier to be restarted.
SECOND_RESTART_DELAY_S = 15.0  # The first restart is immediate, and from the second on the delay doubles.
MAX_RESTART_DELAY_S = 600.0
MAX_RUNS_PER_REQUEST = 200  # Prefect's own limit
MAX_CLOCK_SKEW = datetime.timedelta(days=1)  # by which the clock of a machine may be behind the server's
FAR_FUTURE = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)  # for machines whose clocks are ahead

# Automations that earlier versions of `requant deploy` made, and whose work a sweep does.
RETIRED_AUTOMATIONS = (
    "a run without a heartbeat is crashed",
    "a run that does not start is crashed",
    "a run that nobody cancels is cancelled",
    "a crashed requantize run goes on",
)

log = logging.getLogger(__name__)


@dataclass
class _Watched:
    """A run's sign of life, and when this sweep first saw it, by its own monotonic clock."""

    sign: tuple[UUID, int]
    since_s: float


class Sweep:
    """Makes passes over the runs of one server, and remembers their signs of life from pass to pass."""

    def __init__(self, client: SyncPrefectClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._watched: dict[UUID, _Watched] = {}
        self._last_look_s: float | None = None
        self._pool_types: dict[str, str] = {}

    def __call__(self) -> list[str]:
        """Make one pass. Return one sentence for each run that was ended or restarted.

        Raises what the Prefect client raises if the server does not answer. The sweep then forgets all signs of life,
        and likewise after a gap in which it may have missed heartbeats, because the server, this process or its machine
        was suspended.
        """
        if self._last_look_s is not None and self._clock() - self._last_look_s > MAX_PASS_GAP_S:
            self._watched.clear()
        started_s = self._clock()
        try:
            silent = self._silent(self._runs(StateType.RUNNING, StateType.PENDING, StateType.CANCELLING))
            self._last_look_s = self._clock()
            if self._last_look_s - started_s > MAX_PASS_GAP_S:
                self._watched.clear()
                silent = []
            return [*self._heal_all(self._end, silent), *self._heal_all(self._restart, self._crashed())]
        except Exception:
            self._watched.clear()
            raise

    def _heal_all(self, heal: Callable[[FlowRun], str | None], runs: Sequence[FlowRun]) -> list[str]:
        """Heal the runs one after another. If one cannot be healed, the others still are."""
        sentences = []
        for run in runs:
            try:
                sentence = heal(run)
            except httpx.TransportError:  # The server does not answer, which concerns all runs.
                raise
            except Exception:
                log.exception("run %s cannot be healed", run.id)
                continue
            sentences += [sentence] if sentence else []
        return sentences

    def _silent(self, runs: Sequence[FlowRun]) -> list[FlowRun]:
        """Return the runs that gave no sign of life for longer than their state allows."""
        now_s = self._clock()
        watched: dict[UUID, _Watched] = {}
        silent = []
        for run in runs:
            sign = self._sign_of_life(run)
            before = self._watched.get(run.id)
            watched[run.id] = before if before and before.sign == sign else _Watched(sign, now_s)
            if now_s - watched[run.id].since_s >= self._limit_s(run):
                silent.append(run)
        self._watched = watched
        return silent

    def _sign_of_life(self, run: FlowRun) -> tuple[UUID, int]:
        """Return the id of a run's state, and the number of its events.

        Of a run that is being cancelled only the state counts: its process may send heartbeats without a worker that
        could end it.
        """
        state = _state(run)
        if state.is_cancelling():
            return state.id, 0
        assert run.created is not None  # The server's clock; events have the time of the machine that sent them.
        events = EventFilter(
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
            occurred=EventOccurredFilter(since=run.created - MAX_CLOCK_SKEW, until=FAR_FUTURE),
        )
        return state.id, self._client.read_events(events, limit=1).total

    def _limit_s(self, run: FlowRun) -> float:
        kind = _state(run).type
        if kind == StateType.RUNNING:
            return HEARTBEAT_TIMEOUT_S
        if kind == StateType.CANCELLING:
            return CANCEL_TIMEOUT_S
        return PROCESS_START_TIMEOUT_S if self._pool_type(run) == "process" else NODE_START_TIMEOUT_S

    def _pool_type(self, run: FlowRun) -> str:
        name = run.work_pool_name or ""
        if name and name not in self._pool_types:
            self._pool_types[name] = self._client.read_work_pool(name).type
        return self._pool_types.get(name, "")

    def _end(self, run: FlowRun) -> str | None:
        """Put a dead run into its final state."""
        state: State[None] = {
            StateType.RUNNING: Crashed(message=f"no heartbeat for {HEARTBEAT_TIMEOUT_S:.0f} seconds"),
            StateType.PENDING: Crashed(message="its process did not start"),
            StateType.CANCELLING: Cancelled(
                message=f"no worker ended its process within {CANCEL_TIMEOUT_S:.0f} seconds"
            ),
        }[_state(run).type]
        return self._set(run, state)

    def _crashed(self) -> list[FlowRun]:
        """Return the crashed runs of `requantize`. A run of the gpu pool is restarted by the run that waits for it."""
        return self._runs(StateType.CRASHED, flows=("requantize",), ended_within=MAX_CRASH_AGE)

    def _restart(self, run: FlowRun) -> str | None:
        """Restart a crashed run, or put it into its final state."""
        return self._set(run, state_after_crash(_state(run), self._client.read_flow_run_states(run.id)))

    def _set(self, run: FlowRun, state: State[None]) -> str | None:
        """Put a run into a state. Return a sentence if the server accepted it."""
        if not propose(self._client, run, state):
            return None
        return f"run {run.name} ({run.id}) was {_state(run).name} and is {state.name}: {state.message}"

    def _runs(
        self, *kinds: StateType, flows: Sequence[str] = FLOWS, ended_within: datetime.timedelta | None = None
    ) -> list[FlowRun]:
        """Return all runs of Requant's deployments in these states."""
        after = None
        if ended_within is not None:
            after = FlowRunFilterEndTime(after_=datetime.datetime.now(datetime.UTC) - ended_within)
        run_filter = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[TAG]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(kinds))),
            end_time=after,
        )
        flow_filter = FlowFilter(name=FlowFilterName(any_=list(flows)))
        runs: list[FlowRun] = []
        while True:
            page = self._client.read_flow_runs(
                flow_filter=flow_filter, flow_run_filter=run_filter, limit=MAX_RUNS_PER_REQUEST, offset=len(runs)
            )
            runs += page
            if len(page) < MAX_RUNS_PER_REQUEST:
                return [run for run in runs if run.deployment_id is not None]


def propose(client: SyncPrefectClient, seen: FlowRun, state: State[None]) -> bool:
    """Put a run into a state, unless its state has changed since. Return whether the server accepted it.

    All sweeps that saw the same state give the transition the same id, and the server makes it only once.
    """
    before = _state(seen)
    if _state(client.read_flow_run(seen.id)).id != before.id:
        return False
    proposed = to_state_create(state)
    proposed.state_details.transition_id = uuid5(before.id, state.name or "")  # The client's method has a random one.
    route: Any = f"/flow_runs/{seen.id}/set_state"
    answer = client.request("POST", route, json={"state": proposed.model_dump(mode="json")})
    return bool(answer.raise_for_status().json()["status"] == SetStateStatus.ACCEPT)


def state_after_crash(crashed: State, history: Sequence[State]) -> State[None]:
    """Return the next state of a crashed run: a restart, unless somebody cancelled the run or it crashed too often.

    The delay of a restart counts from the time of the crash by the server's clock.
    """
    if was_cancelled(history):
        return Cancelled(message="it was being cancelled when its process ended")
    restarts = count_restarts(history)
    if restarts >= MAX_RESTARTS:
        sentence = f"it crashed {MAX_RESTARTS + 1} times: look for what kills this run, then start another one"
        return Failed(message=sentence)
    delay_s = min(SECOND_RESTART_DELAY_S * 2 ** (restarts - 1), MAX_RESTART_DELAY_S) if restarts else 0.0
    return AwaitingRetry(
        message=RESTART_MESSAGE, scheduled_time=crashed.timestamp + datetime.timedelta(seconds=delay_s)
    )


def was_cancelled(history: Sequence[State]) -> bool:
    """Check whether somebody cancelled a run, or was cancelling it, since it was last scheduled.

    If a run was scheduled after its cancellation, a person restarted it.
    """
    ordered = in_order(history)
    last_start = max((index for index, state in enumerate(ordered) if state.is_scheduled()), default=0)
    return any(state.is_cancelled() or state.is_cancelling() for state in ordered[last_start:])


def count_restarts(history: Sequence[State]) -> int:
    """Count how often a sweep restarted a run since anybody else scheduled it."""
    restarts = 0
    for state in in_order(history):
        if state.is_scheduled():
            restarts = restarts + 1 if state.message == RESTART_MESSAGE else 0
    return restarts


def in_order(history: Sequence[State]) -> list[State]:
    """Sort the states of a run, the earliest first."""
    return sorted(history, key=lambda state: state.timestamp)


def _state(run: FlowRun) -> State:
    assert run.state is not None  # A run has had a state since it was created.
    return run.state


def sweep_for_ever() -> None:
    """Make one pass after another, in a thread of a worker. Wait for a server that does not answer."""
    # A client that retries by itself would hide that the server did not answer, and sleep for minutes.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        while True:
            try:
                with get_client(sync_client=True) as client:
                    remove_retired_automations()
                    sweep = Sweep(client)
                    while True:
                        for sentence in sweep():
                            log.warning("%s", sentence)
                        time.sleep(PASS_INTERVAL_S)
            except PrefectHTTPStatusError as error:
                log.warning("no sweep: the Prefect server refuses (%s)", error.response.status_code)
            except httpx.HTTPError as error:
                log.info("no sweep: the Prefect server does not answer (%s)", type(error).__name__)
            except Exception:  # The thread must survive any error of a single pass.
                log.exception("a sweep failed")
            time.sleep(PASS_INTERVAL_S)


def remove_retired_automations() -> None:
    """Delete the automations of earlier versions of Requant: they restart runs that somebody cancelled."""

    async def remove() -> None:
        async with get_client() as client:
            for name in RETIRED_AUTOMATIONS:
                for automation in await client.read_automations_by_name(name):
                    await client.delete_automation(automation.id)

    asyncio.run(remove())
