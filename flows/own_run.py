"""A process of a flow run that ends itself when its run is somebody else's, or nobody's, any more."""

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

EVERY_S = 10.0  # seconds between two looks at the run

log = logging.getLogger(__name__)

_lives: dict[UUID, int] = {}  # how often a run of this process had been scheduled when it was first looked at


def end_with_the_run() -> None:
    """End this process once its run was cancelled or started again elsewhere, in a thread that looks at it.

    A worker that was killed leaves the processes of its runs behind, and nobody else can end them. Such a process would
    go on after its run was cancelled, publish, and put its own last state over the cancellation. A run that no
    deployment made has no worker: it is left alone.
    """
    if runtime.deployment.id is not None:
        run_id = UUID(runtime.flow_run.id)
        threading.Thread(target=_watch, args=(run_id,), name="own run", daemon=True).start()


def end_if_the_run_is_over() -> None:
    """Look at the run before this process puts its last state: the thread may not have looked since it was cancelled.

    The last state would stand over the cancellation. What cancels a run cancels the run that it waits for on another
    worker too, and it learns of that sooner than the thread looks.
    """
    run_id = UUID(runtime.flow_run.id) if runtime.deployment.id is not None else None
    if run_id not in _lives:
        return
    try:
        with get_client(sync_client=True) as client:
            history = client.read_flow_run_states(run_id)
    except Exception as error:  # A server that is away takes no last state either.
        log.debug("its run cannot be looked at: %s", error)
        return
    if is_over(history, _lives[run_id]):
        _end(in_order(history)[-1])


def _watch(run_id: UUID) -> None:
    seen: UUID | None = None
    while True:
        try:
            with get_client(sync_client=True) as client:
                while True:
                    state = client.read_flow_run(run_id).state
                    if state is not None and state.id != seen:
                        history = client.read_flow_run_states(run_id)
                        if is_over(history, _lives.setdefault(run_id, lives_of(history))):
                            _end(state)
                        seen = state.id
                    time.sleep(EVERY_S)
        except Exception as error:  # The run goes on while the server is away.
            log.debug("its run cannot be looked at: %s", error)
        time.sleep(EVERY_S)


def lives_of(history: Sequence[State]) -> int:
    """How often a run was scheduled."""
    return sum(state.is_scheduled() for state in history)


def is_over(history: Sequence[State], lives: int) -> bool:
    """Whether a run that had been scheduled `lives` times when its process began is none of this process any more."""
    ended = bool(history) and in_order(history)[-1].is_final()
    return lives_of(history) > lives or (ended and was_cancelled(history))


def _end(state: State) -> None:
    """End this process and all that it has started, without a word to the server.

    The exit status is that of success: a worker that is there takes any other for a crash of the run.
    """
    log.warning("the run is %s: this process of it ends", state.name)
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(0)
