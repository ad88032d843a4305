"""A run that a worker started has stages done by workers of the `gpu` pool, and waits for them.

`requant run` does every stage in its own process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling, Running

from requant.flows.sweep import propose, state_after_crash
from requant.flows.work_pool import WorkerNotice, problem_of_pool
from requant.tasks.artifact import Manifest
from requant.tasks.errors import CheckpointError, EngineFailed, RequantError, StoreError
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.prefect import options, stage_summary
from requant.tasks.pipeline.stage import Stage, StageResult
from requant.tasks.planning.stages import ON_GPU
from requant.tasks.quantize import STAGE as QUANTIZE
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.texts.text import Text
from requant.tasks.writing.amount import writes_text

log = logging.getLogger(__name__)
POLL_INTERVAL_S = 2.0
MAX_ATTEMPTS = 100  # runs of one stage in one run
LARGE_MODEL_BYTES = 4_000_000_000  # From this size of the weights on, a CPU needs more than minutes to measure a model.


# Failures of a stage that a run may go on without. The name of the final state tells the waiting run which it was.
TOLD_BY_NAME: dict[str, type[RequantError]] = {error.__name__: error for error in (EngineFailed, CheckpointError)}


class StageFailed(RequantError, RuntimeError):
    """A stage failed on the worker that ran it, or could not be run. The sentence is that of its own error."""


def gpu_pool_stages(recipe: Recipe, base: Revision) -> frozenset[str]:
    """Return the stages of this run that workers of the gpu pool do: none if no worker has started it."""
    if runtime.deployment.id is None:  # Prefect asks its server each time.
        return frozenset()
    weights_bytes = sum(file.size for file in base.wanted if file.path.endswith(".safetensors"))
    return frozenset(stage for stage in ON_GPU if delegates(stage, recipe, weights_bytes))


def delegates(stage: str, recipe: Recipe, weights_bytes: int) -> bool:
    """Check whether a run that a worker started has a stage done by a worker of the gpu pool.

    It always delegates quantize, with the text that the base writes for it. It delegates validate for LARGE_MODEL_BYTES
    or more, and then also benchmark, acceptance and probe, unless these need no model on this machine; probe also needs
    vLLM.
    """
    large = weights_bytes >= LARGE_MODEL_BYTES
    runs_model = recipe.benchmark.engine in {"auto", "vllm", "torch"}
    in_engine = large and runs_model
    return {
        "self_calibration": writes_text(recipe),
        "quantize": True,
        "validate": large,
        "benchmark": in_engine,
        "acceptance": in_engine,
        "probe": in_engine and recipe.probes is not None and recipe.benchmark.engine != "torch",
    }[stage]


@dataclass(frozen=True)
class StageRequest:
    """A stage that a worker of the gpu pool is to do. `reads` has the other parameters of its flow."""

    stage: Stage
    key: str
    recipe: Recipe
    reads: Mapping[str, str | dict[str, str]]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the flow run, as JSON."""
        return {"recipe": self.recipe.model_dump(mode="json"), **self.reads, "key": self.key}


def run_on_gpu_pool(stage: Stage, key: str, recipe: Recipe, **reads: str | dict[str, str]) -> Any:
    """Have a worker of the gpu pool do a stage, unless the store has its artifact."""
    return task(**options(stage.name, hours=72))(_on_gpu_pool)(StageRequest(stage, key, recipe, reads))


def _on_gpu_pool(request: StageRequest) -> Any:
    started, store = time.monotonic(), open_store()
    name, key = request.stage.name, request.key
    manifest = store.manifest(name, key)
    state = "reused"
    if manifest is None:
        state = "ran"
        _run_and_wait(request)
        manifest = artifact_of(store, name, key)
    seconds = round(time.monotonic() - started, 3)
    return stage_summary(StageResult(name, key, state, seconds, manifest, store.provenance(name, key)))


def _run_and_wait(request: StageRequest) -> None:
    """Start the flow run, or rejoin the one that an earlier process of this run started. Wait for its end.

    Raises StageFailed if it ends in another state than Completed, or the error that the name of its state tells.
    """
    name = request.stage.name
    run = _start_run(name, request.key, request.parameters)
    log.info(f"{name}: waiting for run {run.name} of the gpu pool")
    notice = WorkerNotice(_problem_of_gpu_pool, functools.partial(_show_problem, name))
    while True:
        state = _state(run.id)
        if state.is_completed():
            return
        if state.is_crashed() and (outcome := _restart(run.id)) is not CrashOutcome.FINAL:
            if outcome is CrashOutcome.RESTARTED:
                resumes = "; it resumes after its last finished block" if request.stage is QUANTIZE else ""
                log.info(f"{name}: run {run.name} crashed ({state.message}) and is restarted{resumes}")
        elif state.is_final():
            failure = TOLD_BY_NAME.get(state.name or "", StageFailed)
            raise failure(state.message or f"{name} ended {state.name} on the gpu pool")
        else:
            # A server that does not answer may be back at the next look.
            with contextlib.suppress(httpx.HTTPError, PrefectHTTPStatusError):
                notice.look(waiting=state.is_scheduled())
        time.sleep(POLL_INTERVAL_S)


def _problem_of_gpu_pool() -> str | None:
    """Say why the gpu pool takes no run, or return None if nothing is wrong.

    Raises what the Prefect client raises if the server does not answer.
    """
    with get_client(sync_client=True) as client:
        return problem_of_pool(client, "gpu")


def _show_problem(stage: str, problem: str | None) -> None:
    """Show whether a worker has taken the awaited run, in the log and in the state of this run."""
    log.info(f"{stage} waits: {problem}" if problem else f"{stage}: a worker of the gpu pool takes its run")
    state: State[Any] = Running(name="WaitingForWorker", message=problem) if problem else Running()
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(UUID(runtime.flow_run.id))
        if this.state is not None and this.state.is_running():  # It may have been cancelled in the meantime.
            propose(client, this, state)


def _start_run(name: str, key: str, parameters: dict[str, Any]) -> FlowRun:
    """Return the flow run for this stage.

    The idempotency key returns an earlier attempt, and a failed attempt leads to the next. Raises StageFailed if there
    is no such deployment, or after MAX_ATTEMPTS.
    """
    for attempt in range(MAX_ATTEMPTS):
        try:
            run = run_deployment(
                f"{name}/{name}",
                parameters=parameters,
                timeout=0,
                flow_run_name=runtime.flow_run.name,  # Otherwise it has a random name until a worker takes it.
                idempotency_key=f"{runtime.flow_run.id}:{key}:{attempt}",
            )
        except ObjectNotFound as error:
            raise StageFailed(f"the Prefect server has no deployment {name}/{name}: run `requant deploy`") from error
        assert isinstance(run, FlowRun)
        state = _state(run.id)
        if not state.is_final() or state.is_completed() or state.is_crashed():
            return run
    raise StageFailed(f"{name} was tried too often in this run: start another one")


class CrashOutcome(Enum):
    """What became of a crashed flow run that this run waits for."""

    RESTARTED = "restarted"  # by this run
    FINAL = "final"  # somebody cancelled it, or it crashed too often
    UNKNOWN = "unknown"  # the server did not answer, or the run is no longer crashed: look at its state again


def _restart(run_id: UUID) -> CrashOutcome:
    """Restart a crashed run, unless somebody cancelled it or it crashed too often."""
    restarted = False
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
            if run.state is not None and run.state.is_crashed():
                state = state_after_crash(run.state, client.read_flow_run_states(run_id))
                if not state.is_scheduled():
                    return CrashOutcome.FINAL
                restarted = propose(client, run, state)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.info(f"the Prefect server does not answer ({type(error).__name__}): waiting for it")
    return CrashOutcome.RESTARTED if restarted else CrashOutcome.UNKNOWN


def _state(run_id: UUID) -> State[Any]:
    """Read the state of a run. Wait for a server that does not answer: the worker keeps running meanwhile."""
    warned = False
    while True:
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(run_id).state
            assert state is not None
            return state
        except ObjectNotFound as error:
            raise StageFailed("its run of the gpu pool is gone: somebody deleted it; start another run") from error
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            if not warned:
                log.info(f"the Prefect server does not answer ({type(error).__name__}): waiting for it")
                warned = True
            time.sleep(POLL_INTERVAL_S)


def cancel_children(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Cancel the runs on other workers that a cancelled run waits for: Prefect does not pass a cancellation on."""
    with get_client(sync_client=True) as client:
        children = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
        )
        for child in children:
            _cancel(client, child)


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    if run.state is None or run.state.is_final():
        return
    has_started = run.state.type in {StateType.RUNNING, StateType.PENDING, StateType.CANCELLING}
    client.set_flow_run_state(run.id, Cancelling() if has_started else Cancelled())


def names_for_worker(text: Text) -> str | dict[str, str]:
    """Return the name of a text to measure on by which another worker finds it too, or the names by domain."""
    if text.domains:
        return {domain: name_for_worker(part) for domain, part in text.domains}
    return name_for_worker(text)


def name_for_worker(text: Text) -> str:
    """Return a name of a text by which another worker finds it too."""
    return str(text.path) if text.path is not None and not text.name.startswith("builtin:") else text.name


def artifact_of(store: Store, stage: str, key: str) -> Manifest:
    """Return an artifact that another worker made. Raises StoreError if the store does not have it."""
    manifest = store.manifest(stage, key)
    if manifest is None:
        raise StoreError(
            f"the store {store.url} has no {stage} {key[:12]}: set REQUANT_STORE to the same store on every worker",
            key=f"artifacts/{stage}/{key}",
        )
    return manifest
