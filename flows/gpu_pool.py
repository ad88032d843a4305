"""The stages that need a GPU, as flows: deployments of the `gpu` work pool, which occupy a GPU while they run.

A run that a worker started waits for them; `requant run` runs every stage in its own process. Stages pass data through
the store: a flow gets the stage keys of what it reads, and the stage key that its result must have.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import httpx
from prefect import Flow, flow, runtime, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling, Completed, Failed, Running

from requant.flows.own_run import exit_if_run_is_over, watch_own_run
from requant.flows.stages import (
    acceptance_task,
    benchmark_task,
    probe_task,
    quantize_task,
    self_calibration_task,
    validate_task,
)
from requant.flows.sweep import propose, state_after_crash
from requant.flows.work_pool import WorkerNotice, problem_of_pool
from requant.tasks.acceptance import DraftCounter, acceptance_key
from requant.tasks.artifact import Manifest
from requant.tasks.benchmark import STAGE as BENCHMARK
from requant.tasks.benchmark import benchmark_key
from requant.tasks.benchmark import read_result as read_benchmark
from requant.tasks.environment import bypass_proxy_on_loopback
from requant.tasks.errors import CheckpointError, EngineFailed, RecipeError, RequantError, StoreError
from requant.tasks.evaluating.definitions import check_tasks
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.log import log_into_runs
from requant.tasks.pipeline.prefect import crash_stale_task_runs, options, stage_summary
from requant.tasks.pipeline.stage import Stage, StageResult
from requant.tasks.planning.stages import ON_GPU
from requant.tasks.probe import probe_key
from requant.tasks.quantize import STAGE as QUANTIZE
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.loader import recipe_of
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.self_calibration import STAGE as SELF_CALIBRATION
from requant.tasks.self_calibration import self_calibration_key
from requant.tasks.store import Store, open_checked_store, open_store
from requant.tasks.texts.calibration import find_calibration
from requant.tasks.texts.text import Text
from requant.tasks.texts.validation import find_validation_text
from requant.tasks.validate import validate_key
from requant.tasks.writing.amount import writes_text

log = logging.getLogger(__name__)

log_into_runs()
bypass_proxy_on_loopback(os.environ)  # A worker's process imports the flows, and not the command line.
P = ParamSpec("P")
R = TypeVar("R")
POLL_INTERVAL_S = 2.0
MAX_ATTEMPTS = 100  # runs of one stage in one run
LARGE_MODEL_BYTES = 4_000_000_000  # From this size of the weights on, a CPU needs more than minutes to measure a model.


# Failures of a stage that a run may go on without. The name of the final state tells the waiting run which it was.
TOLD_BY_NAME: dict[str, type[RequantError]] = {error.__name__: error for error in (EngineFailed, CheckpointError)}


class StageFailed(RequantError, RuntimeError):
    """A stage failed on the worker that ran it, or could not be run. The sentence is that of its own error."""


def run_name() -> str:
    """Name a run in Prefect's lists, after its recipe, which may be invalid."""
    given = runtime.flow_run.parameters.get("recipe")
    recipe = given.model_dump() if isinstance(given, Recipe) else _mapping_or_empty(given)
    base, quantize = _mapping_or_empty(recipe.get("base")), _mapping_or_empty(recipe.get("quantize"))
    repo = str(base.get("folder") or base.get("repo_id") or "a base without a name").split("/")[-1]
    outputs, bits = recipe.get("outputs"), quantize.get("bits")
    if isinstance(outputs, list) and outputs:
        makes = f"{len(outputs)} outputs"
    elif bits:
        makes = f"W{bits}A16"
    else:
        makes = str(quantize.get("scheme") or Quantize.model_fields["scheme"].default)
    return f"{repo} {makes}"[:200]


def _mapping_or_empty(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def recipe_flow(name: str, **more: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Return the decorator of a flow that gets a recipe; `more` has further options of Prefect's `flow`.

    Prefect does not validate the parameters, because `recipe_of` says in a sentence what is wrong with a recipe.
    """
    return flow(name=name, flow_run_name=run_name, validate_parameters=False, persist_result=False, **more)


# The flows of the gpu pool


@recipe_flow("self_calibration")
def self_calibration(recipe: Recipe, base: str, key: str) -> State[Any]:
    """Let the base whose download has the stage key `base` write its calibration text, for all outputs."""

    def work() -> Any:
        checked, store = recipe_of(recipe), open_checked_store()
        base_files = _artifact(store, "download", base)
        _check_key(key, self_calibration_key(checked, base_files))
        return self_calibration_task(checked, base_files)

    return run_to_final_state(work)


@recipe_flow("quantize")
def quantize(recipe: Recipe, base: str, key: str, written: str | None = None) -> State[Any]:
    """Quantize the base whose download has the stage key `base`. The recipe names the calibration texts pinned.

    `written` is the stage key of the text that the base wrote, if it did.
    """

    def work() -> Any:
        checked, store = recipe_of(recipe), open_checked_store()
        calibration = find_calibration(checked.quantize)
        if written is not None:
            calibration = calibration.with_written(_artifact(store, SELF_CALIBRATION.name, written))
        base_files = _artifact(store, "download", base)
        _check_key(key, quantize_key(checked, base_files, calibration))
        return quantize_task(checked, base_files, calibration)

    return run_to_final_state(work)


@recipe_flow("validate")
def validate(recipe: Recipe, base: str, artifact: str, text: str | dict[str, str], key: str) -> State[Any]:
    """Measure the artifact with the mtp_fix key `artifact` against its base, whose download has the key `base`."""

    def work() -> Any:
        checked, store, validation = recipe_of(recipe), open_checked_store(), find_validation_text(text)
        check_tasks(checked.eval)
        base_files, quantized_files = _artifact(store, "download", base), _artifact(store, "mtp_fix", artifact)
        _check_key(key, validate_key(checked, base_files, quantized_files, validation))
        return validate_task(checked, base_files, quantized_files, validation)

    return run_to_final_state(work)


@recipe_flow("benchmark")
def benchmark(recipe: Recipe, artifact: str, text: str | dict[str, str], key: str) -> State[Any]:
    """Measure the speed of the artifact with the mtp_fix key `artifact`, and count its drafts on a text."""

    def work() -> Any:
        checked, store, validation = recipe_of(recipe), open_checked_store(), find_validation_text(text)
        quantized_files = _artifact(store, "mtp_fix", artifact)
        _check_key(key, benchmark_key(checked, quantized_files))
        return benchmark_task(checked, quantized_files, DraftCounter(store, checked, validation).count_while_served)

    return run_to_final_state(work)


@recipe_flow("acceptance")
def acceptance(
    recipe: Recipe, base: str, artifact: str, text: str | dict[str, str], benchmark: str, key: str
) -> State[Any]:
    """Compare the drafts of the artifact with the mtp_fix key `artifact` with its base's, in one engine.

    `base` is the key of the base's download, and `benchmark` that of the artifact's benchmark.
    """

    def work() -> Any:
        checked, store, validation = recipe_of(recipe), open_checked_store(), find_validation_text(text)
        base_files, quantized_files = _artifact(store, "download", base), _artifact(store, "mtp_fix", artifact)
        measured = read_benchmark(store, _artifact(store, BENCHMARK.name, benchmark))
        _check_key(key, acceptance_key(checked, base_files, quantized_files, validation, measured.engine))
        return acceptance_task(checked, base_files, quantized_files, validation, measured)

    return run_to_final_state(work)


@recipe_flow("probe")
def probe(recipe: Recipe, base: str, artifact: str, key: str) -> State[Any]:
    """Ask the base and the artifact with the mtp_fix key `artifact` the questions of the recipe's probes."""

    def work() -> Any:
        checked, store = recipe_of(recipe), open_checked_store()
        base_files, quantized_files = _artifact(store, "download", base), _artifact(store, "mtp_fix", artifact)
        _check_key(key, probe_key(checked, base_files, quantized_files))
        return probe_task(checked, base_files, quantized_files)

    return run_to_final_state(work)


def run_to_final_state(work: Callable[[], Any]) -> State[Any]:
    """Do the work of a flow, and return its final state.

    The message of an expected failure is its sentence alone, without the words that Prefect adds to an exception. Its
    name is that of the error if the error is in TOLD_BY_NAME.
    """
    watch_own_run()
    crash_stale_task_runs()
    try:
        work()
        state: State[Any] = Completed()
    except (RequantError, TimeoutError) as error:  # The time limit of a task raises a plain TimeoutError.
        name = next((name for name, kind in TOLD_BY_NAME.items() if isinstance(error, kind)), "Failed")
        state = Failed(name=name, message=str(error), data=error)
    exit_if_run_is_over()
    return state


def _artifact(store: Store, stage: str, key: str) -> Manifest:
    """Return an artifact that another worker made. Raises StoreError if the store does not have it."""
    manifest = store.manifest(stage, key)
    if manifest is None:
        raise StoreError(
            f"the store {store.url} has no {stage} {key[:12]}: set REQUANT_STORE to the same store on every worker",
            key=f"artifacts/{stage}/{key}",
        )
    return manifest


def _check_key(expected: str, computed: str) -> None:
    """Raise RecipeError if this version of Requant computes another stage key than the run that waits for the stage.

    That run would not find the artifact.
    """
    if expected != computed:
        raise RecipeError(
            f"this worker computes stage key {computed[:12]}, but the run expects {expected[:12]}: install the same "
            "version of Requant on every worker"
        )


# The run that has stages done by workers of the gpu pool


def gpu_pool_stages(recipe: Recipe, base: Revision) -> frozenset[str]:
    """Return the stages of this run that workers of the gpu pool do."""
    weights_bytes = sum(file.size for file in base.wanted if file.path.endswith(".safetensors"))
    return frozenset(stage for stage in ON_GPU if delegates(stage, recipe, weights_bytes))


def delegates(stage: str, recipe: Recipe, weights_bytes: int) -> bool:
    """Check whether this run has a stage done by a worker of the gpu pool.

    A run started by a worker always delegates quantize, with the text that the base writes for it. It delegates
    validate for LARGE_MODEL_BYTES or more, and then also benchmark, acceptance and probe, unless these need no model on
    this machine; probe also needs vLLM. Any other run does all stages itself.
    """
    if runtime.deployment.id is None:
        return False
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
        manifest = _artifact(store, name, key)
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
