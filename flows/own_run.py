"""End the process of a flow run once the run was cancelled, or was started again in another process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from uuid import UUID

import psutil
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State

from requant.flows.sweep import in_order, was_cancelled

LOOK_INTERVAL_S = 10.0

log = logging.getLogger(__name__)

_starts: dict[UUID, int] = {}  # by run of this process: how often it had been scheduled at the first look


def watch_own_run() -> None:
    """Start a thread that ends this process once its run was cancelled, or restarted in another process.

    A killed worker leaves the processes of its runs behind, and nobody else can end them. Such a process would continue
    after its run was cancelled, publish the result, and overwrite the cancellation with its own final state. A run
    without a deployment has no worker, and is not watched.
    """
    if runtime.deployment.id is not None:
        run_id = UUID(runtime.flow_run.id)
        threading.Thread(target=_watch, args=(run_id,), name="own run", daemon=True).start()


def exit_if_run_is_over() -> None:
    """End this process if its run was cancelled or restarted elsewhere: its final state would overwrite that.

    The thread may not have looked again yet: the cancellation of a run also cancels the run that it waits for on
    another worker, and the process learns of the latter first.
    """
    if not _starts:  # It is not watched. To ask for its deployment is a request to the server.
        return
    run_id = UUID(runtime.flow_run.id) if runtime.deployment.id is not None else None
    if run_id not in _starts:
        return
    try:
        with get_client(sync_client=True) as client:
            history = client.read_flow_run_states(run_id)
    except Exception as error:  # A server that does not answer takes no final state either.
        log.debug("its run cannot be looked at: %s", error)
        return
    if is_over(history, _starts[run_id]):
        _end_process(in_order(history)[-1])


def _watch(run_id: UUID) -> None:
    seen: UUID | None = None
    while True:
        try:
            with get_client(sync_client=True) as client:
                while True:
                    state = client.read_flow_run(run_id).state
                    if state is not None and state.id != seen:
                        history = client.read_flow_run_states(run_id)
                        if is_over(history, _starts.setdefault(run_id, count_starts(history))):
                            _end_process(state)
                        seen = state.id
                    time.sleep(LOOK_INTERVAL_S)
        except Exception as error:  # The run goes on while the server does not answer.
            log.debug("its run cannot be looked at: %s", error)
        time.sleep(LOOK_INTERVAL_S)


def count_starts(history: Sequence[State]) -> int:
    """Count how often a run was scheduled."""
    return sum(state.is_scheduled() for state in history)


def is_over(history: Sequence[State], starts: int) -> bool:
    """Check whether a run was cancelled, or scheduled again after the `starts` times when this process began."""
    ended = bool(history) and in_order(history)[-1].is_final()
    return count_starts(history) > starts or (ended and was_cancelled(history))


def _end_process(state: State) -> None:
    """End this process and its children, without telling the server.

    The exit status is 0: a worker takes any other for a crash of the run.
    """
    log.warning("the run is %s: this process of it ends", state.name)
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(0)
