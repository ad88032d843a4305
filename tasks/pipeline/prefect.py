"""Run stages under Prefect: retries of failures that may pass, progress, and the final state of a task.

The stages themselves are plain functions, which also run without Prefect.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Self, TypedDict
from uuid import UUID

from prefect import State, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE, CachePolicy
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
from requant.tasks.formatting import format_duration
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.progress import Bar, progress
from requant.tasks.quantizing.events import (
    BlockDone,
    BlockLoss,
    BlockStarted,
    CompileFailed,
    Event,
    Resumed,
    SettingsChosen,
    StepsTimed,
)

log = logging.getLogger(__name__)


def may_succeed_later(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Check whether a failed task may succeed later, which expected errors say by `retryable`; others may not."""
    error = getattr(state.data, "exception", None) or state.data
    if not isinstance(error, BaseException):
        try:
            state.result()
        except BaseException as raised:  # The state raises the error of the task.
            error = raised
    return isinstance(error, RequantError) and error.retryable


class TaskOptions(TypedDict):
    """Options of Prefect's `task`."""

    name: str
    tags: list[str]
    retries: int
    retry_delay_seconds: Callable[[int], list[float]]
    retry_jitter_factor: float
    retry_condition_fn: Callable[[Task[..., Any], TaskRun, State[Any]], bool]
    timeout_seconds: float
    persist_result: bool
    cache_policy: CachePolicy


def options(stage: str, hours: float, retries: int = 3) -> TaskOptions:
    """Return the options of a stage's task, which may take some hours.

    It is retried after 1, 2, 4 s and so on, each delay up to doubled at random.
    """
    return {
        "name": stage,
        "tags": ["requant", stage],
        "retries": retries,
        "retry_delay_seconds": exponential_backoff(1),
        "retry_jitter_factor": 1.0,
        "retry_condition_fn": may_succeed_later,
        "timeout_seconds": hours * 3600,
        "persist_result": False,
        "cache_policy": NO_CACHE,
    }


def stage_summary(result: StageResult) -> Any:
    """Return the result of a task: a reused one in a state named Reused, which Prefect's UI shows."""
    return Completed(name="Reused", data=result) if result.state == "reused" else result


def crash_stale_task_runs() -> None:
    """Set the tasks to Crashed that an earlier process of this run left in the state Running when it was killed.

    A restart of a run does not change their states. Tasks that stand for a run on another worker are left alone, since
    that run may still be at work.
    """
    if (runtime.flow_run.run_count or 0) < 2:
        return
    unfinished = TaskRunFilter(
        state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])),
        subflow_runs=TaskRunFilterSubFlowRuns(exists_=False),
    )
    this = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(runtime.flow_run.id)]))
    with get_client(sync_client=True) as client:
        for run in client.read_task_runs(flow_run_filter=this, task_run_filter=unfinished):
            client.set_task_run_state(run.id, Crashed(message="the process of the run was killed"), force=True)


class ShareProgress:
    """Shows a finished share, from 0 to 1, as a progress artifact of Prefect."""

    def __init__(self, key: str, description: str) -> None:
        artifact = create_progress_artifact(0.0, key=key, description=description)
        assert isinstance(artifact, UUID)  # It is no coroutine, since stages run in a thread without an event loop.
        self._artifact = artifact

    def __call__(self, share: float) -> None:
        update_progress_artifact(self._artifact, 100.0 * share)


class BlockProgress:
    """Reports the events of the quantize child as log lines, as a bar, and as a progress artifact of Prefect.

    The bar is shown from the first block on, until the `with` block ends.
    """

    def __init__(self) -> None:
        self._progress = ShareProgress("quantize-progress", "Blocks quantized")
        self._lines = BlockLines()
        self._shown = contextlib.ExitStack()
        self._bar: Bar | None = None
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.close()

    def __call__(self, event: Event) -> None:
        for line in self._lines(event):
            log.info(line)
        if isinstance(event, BlockStarted) and self._bar is None:
            self._bar = self._shown.enter_context(progress("quantize", event.total or 0, "blocks"))
        if isinstance(event, BlockDone):
            self._progress(event.done / event.total)
            if self._bar is not None:
                self._bar.advance(event.done - self._done)
            self._done = event.done


class BlockLines:
    """Puts the events of the quantize child into words: each block with its time, its losses and the time left."""

    def __init__(self) -> None:
        self._block, self._loss, self._started_s, self._compiling_s = "", "", 0.0, 0.0
        self._seconds: list[float] = []  # of each block, without compiling

    def __call__(self, event: Event) -> list[str]:
        match event:
            case SettingsChosen():
                self._block, self._seconds = "", []
            case BlockStarted():
                self._block, self._loss, self._started_s, self._compiling_s = event.name, "", event.seconds, 0.0
            case BlockLoss():
                self._loss = f", loss {event.before:.3g} to {event.after:.3g}"
            case StepsTimed():
                self._compiling_s = event.compiling
            case Resumed():
                return [f"going on after {event.blocks} finished blocks"]
            case CompileFailed():
                return [f"{self._block}: {event.text}"]
            case BlockDone() if self._block:
                seconds = event.seconds - self._started_s
                self._seconds.append(seconds - self._compiling_s)
                return [self._line(event, seconds)]
        return []

    def _line(self, event: BlockDone, seconds: float) -> str:
        line = f"block {event.done} of {event.total}: {self._block}, {seconds:.1f} s{self._loss}"
        left = (event.total - event.done) * seconds_per_block(self._seconds)
        if left:
            line += f", about {format_duration(left)} left"
        if event.peak_gpu_bytes:
            line += f", at most {event.peak_gpu_bytes / 1e9:.1f} GB of GPU memory"
        return line


def seconds_per_block(seconds: list[float]) -> float:
    """Estimate the seconds of a block from those that ended. The first one counts only if there is no other.

    auto-round's own loop does not say how long it compiled.
    """
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted) if counted else 0.0
