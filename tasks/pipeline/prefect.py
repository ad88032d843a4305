"""How Prefect runs a stage: retries for failures that pass, logs without tracebacks or secrets, progress, the state.

Nothing here decides what a stage does; without Prefect the stages are plain functions.
"""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from prefect import State, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
    TaskRunFilterSubFlowRuns,
)
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.states import Completed, Crashed
from prefect.tasks import Task, exponential_backoff

from requant.tasks.errors import RequantError
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.quantizing.events import (
    BlockDone,
    BlockLoss,
    BlockStarted,
    CompileFailed,
    Event,
    Resumed,
    SettingsChosen,
)

log = logging.getLogger(__name__)


def passes(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the same call may succeed later: errors say so themselves, and unexpected ones do not."""
    error = getattr(state.data, "exception", None) or state.data
    if not isinstance(error, BaseException):
        try:
            state.result()
        except BaseException as raised:  # the state holds what the task raised
            error = raised
    return isinstance(error, RequantError) and error.retryable


def options(stage: str, hours: float, retries: int = 3) -> dict[str, Any]:
    """The options of a stage's task. Delays between tries: 1, 2, 4 s and so on, each up to doubled at random."""
    return {
        "name": stage,
        "tags": ["requant", stage],
        "retries": retries,
        "retry_delay_seconds": exponential_backoff(1),
        "retry_jitter_factor": 1.0,
        "retry_condition_fn": passes,
        "timeout_seconds": hours * 3600,
        "persist_result": False,
        "cache_policy": NO_CACHE,
    }


def stage_summary(result: StageResult) -> Any:
    """The state a stage ends in: Completed, or Reused, which the UI shows by that name."""
    return Completed(name="Reused", data=result) if result.state == "reused" else result


def end_earlier_tasks() -> None:
    """End what an earlier life of this run left Running: its process was killed, and whoever starts a run again sees
    to the run alone. What stands for a run on another worker is none of these: it may still be at work."""
    if (runtime.flow_run.run_count or 0) < 2:
        return
    left = TaskRunFilter(
        state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])),
        subflow_runs=TaskRunFilterSubFlowRuns(exists_=False),
    )
    this = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(runtime.flow_run.id)]))
    with get_client(sync_client=True) as client:
        for run in client.read_task_runs(flow_run_filter=this, task_run_filter=left):
            client.set_task_run_state(run.id, Crashed(message="the process of the run was killed"), force=True)


class BlockProgress:
    """The quantize child's events as log lines and a Prefect progress artifact."""

    def __init__(self) -> None:
        artifact = create_progress_artifact(0.0, key="quantize-progress", description="Blocks quantized")
        assert isinstance(artifact, UUID)  # and not a coroutine: stages run in a thread without an event loop
        self._artifact = artifact
        self._lines = BlockLines()

    def __call__(self, event: Event) -> None:
        for line in self._lines(event):
            log.info(line)
        if isinstance(event, BlockDone):
            update_progress_artifact(self._artifact, 100.0 * event.done / event.total)


class BlockLines:
    """The quantize child's events in words: block i of n, its seconds and losses, the time left, the memory taken."""

    def __init__(self) -> None:
        self._block, self._loss, self._began = "", "", 0.0
        self._seconds: list[float] = []

    def __call__(self, event: Event) -> list[str]:
        match event:
            case SettingsChosen():
                self._block, self._seconds = "", []
            case BlockStarted():
                self._block, self._loss, self._began = event.name, "", event.seconds
            case BlockLoss():
                self._loss = f", loss {event.before:.3g} to {event.after:.3g}"
            case Resumed():
                return [f"going on after {event.blocks} finished blocks"]
            case CompileFailed():
                return [f"{self._block}: {event.text}"]
            case BlockDone() if self._block:
                self._seconds.append(event.seconds - self._began)
                return [self._line(event)]
        return []

    def _line(self, event: BlockDone) -> str:
        line = f"block {event.done} of {event.total}: {self._block}, {self._seconds[-1]:.1f} s{self._loss}"
        left = (event.total - event.done) * seconds_a_block(self._seconds)
        if left:
            line += f", about {duration(left)} left"
        if event.peak_gpu_bytes:
            line += f", at most {event.peak_gpu_bytes / 1e9:.1f} GB of GPU memory"
        return line


def seconds_a_block(seconds: list[float]) -> float:
    """What a block will take, from those done in this process; the first compiles, and counts only if it is alone."""
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted) if counted else 0.0


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
