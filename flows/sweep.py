"""Heal flow runs whose process is gone: end what nobody works on any more, and restart crashed `requantize` runs.

A Prefect server learns of a dead process only from what no longer arrives. Its automations could watch for that, but
they keep what they wait for in the memory of one server process: a restart of the server delays them by 15 minutes, an
update of an automation makes it forget every run that it watched, and none of them can see that somebody cancelled the
run before it crashed (Prefect 3.8.8). A sweep looks at the state of the runs themselves, so it may be repeated,
interrupted and done by any number of workers at a time.

No clocks of different machines are compared: a run is taken for dead if its newest event has stayed the same for as
long as the sweeper has watched, without a break in the server's answers. Every run of these deployments sends an event
at least every 30 s (`PREFECT_FLOWS_HEARTBEAT_FREQUENCY` in deployments/prefect.yaml).
"""

from __future__ import annotations

import datetime
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
from prefect.events.filters import EventFilter, EventOrder, EventResourceFilter
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_logger
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed, to_state_create

TAG = "requant"  # of every deployment in deployments/prefect.yaml
EVERY_S = 10.0  # seconds between two passes
SILENCE_S = 90.0  # seconds without an event after which a Running run is dead: three heartbeats
CANCELLING_S = 120.0  # seconds in which a worker ends a process that somebody cancelled
PROCESS_START_S = 150.0  # seconds in which a worker starts a process on its own machine
NODE_START_S = 1800.0  # the same where a node may have to be made and an image pulled first
RESTARTS = 10  # of one crashed run, before it is given up
GOES_ON = "goes on after a crash"  # the message of the state in which a sweep starts a run again
RECENT = datetime.timedelta(days=3)  # A run that crashed earlier is not started again: nobody expects it any more.
ANSWERED = 200  # runs that the server returns at most for one request

log = get_logger("requant.sweep")


@dataclass
class _Watched:
    """The newest sign of life of one run, and when the sweeper first saw it (its own monotonic clock, in seconds)."""

    sign: tuple[UUID, UUID | None]
    since_s: float


class Sweep:
    """Passes over the runs of one server. The passes of one object belong together: it remembers what it saw."""

    def __init__(self, client: SyncPrefectClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._watched: dict[UUID, _Watched] = {}
        self._pool_types: dict[str, str] = {}

    def __call__(self) -> list[str]:
        """Make one pass. Return one sentence for each run that was ended or started again.

        Raises what the Prefect client raises if the server does not answer; what was watched is forgotten then, because
        heartbeats did not arrive either.
        """
        try:
            active = self._runs(StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
            done = [self._end(run) for run in self._silent(active)]
            done += [self._go_on(run) for run in self._crashed()]
        except Exception:
            self._watched.clear()
            raise
        return [sentence for sentence in done if sentence]

    def _silent(self, runs: Sequence[FlowRun]) -> list[FlowRun]:
        """Those of the runs that gave no sign of life for longer than their state allows."""
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

    def _sign_of_life(self, run: FlowRun) -> tuple[UUID, UUID | None]:
        """The ids of a run's state and of its newest event. Of a run that is being cancelled only the state counts: its
        process may go on sending heartbeats where no worker is left to end it."""
        state = _state(run)
        if state.is_cancelling():
            return state.id, None
        only = EventFilter(resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]), order=EventOrder.DESC)
        newest = self._client.read_events(only, limit=1).events
        return state.id, newest[0].id if newest else None

    def _limit_s(self, run: FlowRun) -> float:
        kind = _state(run).type
        if kind == StateType.RUNNING:
            return SILENCE_S
        if kind == StateType.CANCELLING:
            return CANCELLING_S
        return PROCESS_START_S if self._pool_type(run) == "process" else NODE_START_S

    def _pool_type(self, run: FlowRun) -> str:
        name = run.work_pool_name or ""
        if name and name not in self._pool_types:
            self._pool_types[name] = self._client.read_work_pool(name).type
        return self._pool_types.get(name, "")

    def _end(self, run: FlowRun) -> str | None:
        """Put a dead run into its last state."""
        state: State[None] = {
            StateType.RUNNING: Crashed(message=f"no heartbeat for {SILENCE_S:.0f} seconds"),
            StateType.PENDING: Crashed(message="its process did not start"),
            StateType.CANCELLING: Cancelled(message=f"no worker ended its process within {CANCELLING_S:.0f} seconds"),
        }[_state(run).type]
        return self._set(run, state)

    def _crashed(self) -> list[FlowRun]:
        """The crashed runs of `requantize`. Runs of the gpu pool are started again by the run that waits for them."""
        return self._runs(StateType.CRASHED, flow="requantize", ended_within=RECENT)

    def _go_on(self, run: FlowRun) -> str | None:
        """Start a crashed run again, unless somebody cancelled it or it was started too often."""
        history = self._client.read_flow_run_states(run.id)
        if was_cancelled(history):
            return self._set(run, Cancelled(message="it was being cancelled when its process ended"))
        if restarts_of(history) >= RESTARTS:
            sentence = f"it crashed {RESTARTS + 1} times: look for what kills this run, then start another one"
            return self._set(run, Failed(message=sentence))
        return self._set(run, AwaitingRetry(message=GOES_ON))

    def _set(self, run: FlowRun, state: State[None]) -> str | None:
        """Put a run into a state, unless a worker or another sweep was faster.

        Two sweeps that saw the same state name the same transition, which the server makes once.
        """
        seen = _state(run)
        if _state(self._client.read_flow_run(run.id)).id != seen.id:
            return None
        proposed = to_state_create(state)
        proposed.state_details.transition_id = uuid5(seen.id, state.name or "")  # The client's method makes up its own.
        route: Any = f"/flow_runs/{run.id}/set_state"
        answer = self._client.request("POST", route, json={"state": proposed.model_dump(mode="json")})
        if answer.raise_for_status().json()["status"] != SetStateStatus.ACCEPT:
            return None
        return f"run {run.name} ({run.id}) was {seen.name} and is {state.name}: {state.message}"

    def _runs(
        self, *kinds: StateType, flow: str | None = None, ended_within: datetime.timedelta | None = None
    ) -> list[FlowRun]:
        """All runs of our deployments in these states."""
        after = None
        if ended_within is not None:
            after = FlowRunFilterEndTime(after_=datetime.datetime.now(datetime.UTC) - ended_within)
        only = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[TAG]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(kinds))),
            end_time=after,
        )
        of = FlowFilter(name=FlowFilterName(any_=[flow])) if flow else None
        found: list[FlowRun] = []
        while True:
            page = self._client.read_flow_runs(flow_filter=of, flow_run_filter=only, limit=ANSWERED, offset=len(found))
            found += page
            if len(page) < ANSWERED:
                return [run for run in found if run.deployment_id is not None]


def was_cancelled(history: Sequence[State]) -> bool:
    """Whether somebody cancelled a run, or was cancelling it, since it was last scheduled.

    A run that is scheduled after it was cancelled was started again by a person.
    """
    ordered = _in_order(history)
    begun = max((index for index, state in enumerate(ordered) if state.is_scheduled()), default=0)
    return any(state.is_cancelled() or state.is_cancelling() for state in ordered[begun:])


def restarts_of(history: Sequence[State]) -> int:
    """How often a sweep started a run again since it was last scheduled by anybody else."""
    restarts = 0
    for state in _in_order(history):
        if state.is_scheduled():
            restarts = restarts + 1 if state.message == GOES_ON else 0
    return restarts


def _in_order(history: Sequence[State]) -> list[State]:
    return sorted(history, key=lambda state: state.timestamp)


def _state(run: FlowRun) -> State:
    assert run.state is not None  # A run has had a state since it was created.
    return run.state


def sweep_for_ever() -> None:
    """Make one pass after another, in a thread beside a worker. A server that is away is waited for."""
    while True:
        try:
            with get_client(sync_client=True) as client:
                sweep = Sweep(client)
                while True:
                    for sentence in sweep():
                        log.warning("%s", sentence)
                    time.sleep(EVERY_S)
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            log.info("no sweep: the Prefect server does not answer (%s)", type(error).__name__)
        except Exception:  # The thread must outlive whatever one pass meets.
            log.exception("a sweep failed")
        time.sleep(EVERY_S)
