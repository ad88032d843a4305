"""Heal flow runs whose process is gone: end what nobody works on any more, and restart crashed `requantize` runs.

A Prefect server learns of a dead process only from what no longer arrives. Its automations could watch for that, but
they keep what they wait for in the memory of one server process: a restart of the server delays them by 15 minutes, an
update of an automation makes it forget every run that it watched, and none of them can see that somebody cancelled the
run before it crashed (Prefect 3.8.8). A sweep looks at the state of the runs themselves, so it may be repeated,
interrupted and done by any number of workers at a time.

No clocks of different machines are compared: a run is taken for dead if the number of its events has stayed the same
for as long as the sweeper has watched, without a break in the server's answers or in the sweeper's own work. Every run
of these deployments sends an event at least every 30 s (`PREFECT_FLOWS_HEARTBEAT_FREQUENCY` in
deployments/prefect.yaml).
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

TAG = "requant"  # of every deployment in deployments/prefect.yaml
EVERY_S = 10.0  # seconds between two passes
GAP_S = 30.0  # seconds between two passes, or in one, after which heartbeats may have been missed
SILENCE_S = 90.0  # seconds without an event after which a Running run is dead: three heartbeats
CANCELLING_S = 75.0  # seconds in which a worker ends a process that somebody cancelled
PROCESS_START_S = 90.0  # seconds in which a worker starts a process on its own machine
NODE_START_S = 1800.0  # the same where a node may have to be made and an image pulled first
RESTARTS = 10  # of one crashed run, before it is given up
GOES_ON = "goes on after a crash"  # the message of the state in which a sweep starts a run again
RECENT = datetime.timedelta(days=3)  # A run that crashed earlier is not started again: nobody expects it any more.
FIRST_DELAY_S, LONGEST_DELAY_S = 15.0, 600.0  # before the second restart, doubled each time, and before any
ANSWERED = 200  # runs that the server returns at most for one request
FLOWS = ("requantize", "plan", "watch", "quantize", "validate", "benchmark")  # of deployments/prefect.yaml
SKEW = datetime.timedelta(days=1)  # by which the clock of a machine may be behind the server's
END_OF_TIME = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)  # for machines whose clocks are ahead

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
    """The signs of life of one run, and when the sweeper first saw these (its own monotonic clock, in seconds)."""

    sign: tuple[UUID, int]
    since_s: float


class Sweep:
    """Passes over the runs of one server. The passes of one object belong together: it remembers what it saw."""

    def __init__(self, client: SyncPrefectClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._watched: dict[UUID, _Watched] = {}
        self._looked_s: float | None = None
        self._pool_types: dict[str, str] = {}

    def __call__(self) -> list[str]:
        """Make one pass. Return one sentence for each run that was ended or started again.

        Raises what the Prefect client raises if the server does not answer. What was watched is forgotten then, and
        after a pause in which heartbeats may have been missed: of the server, of this process, or of its machine.
        """
        if self._looked_s is not None and self._clock() - self._looked_s > GAP_S:
            self._watched.clear()
        began_s = self._clock()
        try:
            silent = self._silent(self._runs(StateType.RUNNING, StateType.PENDING, StateType.CANCELLING))
            self._looked_s = self._clock()
            if self._looked_s - began_s > GAP_S:
                self._watched.clear()
                silent = []
            return [*self._each(self._end, silent), *self._each(self._go_on, self._crashed())]
        except Exception:
            self._watched.clear()
            raise

    def _each(self, heal: Callable[[FlowRun], str | None], runs: Sequence[FlowRun]) -> list[str]:
        """Heal one run after another. One that cannot be healed keeps no other from it."""
        done = []
        for run in runs:
            try:
                sentence = heal(run)
            except httpx.TransportError:  # The server is away, which concerns all of them.
                raise
            except Exception:
                log.exception("run %s cannot be healed", run.id)
                continue
            done += [sentence] if sentence else []
        return done

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

    def _sign_of_life(self, run: FlowRun) -> tuple[UUID, int]:
        """The id of a run's state, and the number of its events. Of a run that is being cancelled only the state
        counts: its process may go on sending heartbeats where no worker is left to end it."""
        state = _state(run)
        if state.is_cancelling():
            return state.id, 0
        assert run.created is not None  # by the server's clock; events carry that of the machine that sent them
        events = EventFilter(
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
            occurred=EventOccurredFilter(since=run.created - SKEW, until=END_OF_TIME),
        )
        return state.id, self._client.read_events(events, limit=1).total

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
        return self._runs(StateType.CRASHED, flows=("requantize",), ended_within=RECENT)

    def _go_on(self, run: FlowRun) -> str | None:
        """Start a crashed run again, or end it for good."""
        return self._set(run, after_a_crash(_state(run), self._client.read_flow_run_states(run.id)))

    def _set(self, run: FlowRun, state: State[None]) -> str | None:
        if not propose(self._client, run, state):
            return None
        return f"run {run.name} ({run.id}) was {_state(run).name} and is {state.name}: {state.message}"

    def _runs(
        self, *kinds: StateType, flows: Sequence[str] = FLOWS, ended_within: datetime.timedelta | None = None
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
        of = FlowFilter(name=FlowFilterName(any_=list(flows)))
        found: list[FlowRun] = []
        while True:
            page = self._client.read_flow_runs(flow_filter=of, flow_run_filter=only, limit=ANSWERED, offset=len(found))
            found += page
            if len(page) < ANSWERED:
                return [run for run in found if run.deployment_id is not None]


def propose(client: SyncPrefectClient, seen: FlowRun, state: State[None]) -> bool:
    """Put a run into a state, unless its state is another than was seen. Return whether the server took it.

    Whoever saw the same state names the same transition, which the server makes once.
    """
    before = _state(seen)
    if _state(client.read_flow_run(seen.id)).id != before.id:
        return False
    proposed = to_state_create(state)
    proposed.state_details.transition_id = uuid5(before.id, state.name or "")  # The client's method makes up its own.
    route: Any = f"/flow_runs/{seen.id}/set_state"
    answer = client.request("POST", route, json={"state": proposed.model_dump(mode="json")})
    return bool(answer.raise_for_status().json()["status"] == SetStateStatus.ACCEPT)


def after_a_crash(crashed: State, history: Sequence[State]) -> State[None]:
    """The state that a crashed run gets: it starts again, unless somebody cancelled it or it crashed too often.

    The first restart is made at once and later ones after a while, by the server's clock, which the run's own state
    carries.
    """
    if was_cancelled(history):
        return Cancelled(message="it was being cancelled when its process ended")
    restarts = restarts_of(history)
    if restarts >= RESTARTS:
        sentence = f"it crashed {RESTARTS + 1} times: look for what kills this run, then start another one"
        return Failed(message=sentence)
    delay_s = min(FIRST_DELAY_S * 2 ** (restarts - 1), LONGEST_DELAY_S) if restarts else 0.0
    return AwaitingRetry(message=GOES_ON, scheduled_time=crashed.timestamp + datetime.timedelta(seconds=delay_s))


def was_cancelled(history: Sequence[State]) -> bool:
    """Whether somebody cancelled a run, or was cancelling it, since it was last scheduled.

    A run that is scheduled after it was cancelled was started again by a person.
    """
    ordered = in_order(history)
    begun = max((index for index, state in enumerate(ordered) if state.is_scheduled()), default=0)
    return any(state.is_cancelled() or state.is_cancelling() for state in ordered[begun:])


def restarts_of(history: Sequence[State]) -> int:
    """How often a sweep started a run again since it was last scheduled by anybody else."""
    restarts = 0
    for state in in_order(history):
        if state.is_scheduled():
            restarts = restarts + 1 if state.message == GOES_ON else 0
    return restarts


def in_order(history: Sequence[State]) -> list[State]:
    """The states of a run, the earliest first."""
    return sorted(history, key=lambda state: state.timestamp)


def _state(run: FlowRun) -> State:
    assert run.state is not None  # A run has had a state since it was created.
    return run.state


def sweep_for_ever() -> None:
    """Make one pass after another, in a thread beside a worker. A server that is away is waited for."""
    # A client that tries again by itself would hide that the server was away, and sleep for minutes.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        while True:
            try:
                with get_client(sync_client=True) as client:
                    remove_retired_automations()
                    sweep = Sweep(client)
                    while True:
                        for sentence in sweep():
                            log.warning("%s", sentence)
                        time.sleep(EVERY_S)
            except PrefectHTTPStatusError as error:
                log.warning("no sweep: the Prefect server refuses (%s)", error.response.status_code)
            except httpx.HTTPError as error:
                log.info("no sweep: the Prefect server does not answer (%s)", type(error).__name__)
            except Exception:  # The thread must outlive whatever one pass meets.
                log.exception("a sweep failed")
            time.sleep(EVERY_S)


def remove_retired_automations() -> None:
    """Delete the automations that earlier versions of Requant made: they restart runs that somebody cancelled."""

    async def remove() -> None:
        async with get_client() as client:
            for name in RETIRED_AUTOMATIONS:
                for automation in await client.read_automations_by_name(name):
                    await client.delete_automation(automation.id)

    asyncio.run(remove())
