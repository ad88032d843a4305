"""The stages that want a GPU, as flows of their own: deployments of the `gpu` work pool, which hold it while they run.

A run that a worker started has them done there, and waits. `requant run` does every stage in its own process. What
they hand on is in the store: a flow gets the names of what it reads, and the stage key that its work must have.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, runtime, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling, Completed, Failed, Running

from requant.flows.own_run import end_if_the_run_is_over, end_with_the_run
from requant.flows.sweep import after_a_crash, propose
from requant.flows.work_pool import WorkerNotice, problem_of_pool
from requant.tasks import benchmark as speed
from requant.tasks import quantize as quantizing
from requant.tasks import validate as quality
from requant.tasks.artifact import Manifest
from requant.tasks.errors import RecipeError, RequantError, StoreError
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.log import log_into_runs
from requant.tasks.pipeline.prefect import end_earlier_tasks, options, stage_summary
from requant.tasks.pipeline.stage import Stage, StageResult
from requant.tasks.planning.stages import ON_GPU
from requant.tasks.recipe.loader import recipe_of
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.texts.text import Text, find_text

log = logging.getLogger(__name__)

log_into_runs()
POLL_S = 2.0
LARGE = 4_000_000_000  # bytes of weights that a CPU measures in minutes


class StageFailed(RequantError, RuntimeError):
    """A stage failed on the worker that did it; the sentence is its own."""


def run_name() -> str:
    """What a list of runs shows of each, from its recipe as it was given, sound or not."""
    recipe = runtime.flow_run.parameters.get("recipe")
    given = recipe.model_dump() if isinstance(recipe, Recipe) else recipe if isinstance(recipe, Mapping) else {}
    base, quantize = (part if isinstance(part := given.get(key), Mapping) else {} for key in ("base", "quantize"))
    repo = str(base.get("repo_id") or "a base without a name").split("/")[-1]
    outputs = given.get("outputs")
    several = f"{len(outputs)} outputs" if isinstance(outputs, list) and outputs else None
    return f"{repo} {several or quantize.get('scheme') or 'W4A16'}"[:200]


OPTIONS: dict[str, Any] = {
    "flow_run_name": run_name,
    "validate_parameters": False,  # recipe_of says in a sentence what is wrong
    "persist_result": False,
}
# The flows of the gpu pool


@flow(name="quantize", **OPTIONS)
def quantize(recipe: Recipe, base: str, calibration: str, key: str) -> State[Any]:
    """Quantize the base whose download has the stage key `base`."""

    def work() -> Any:
        asked, store, text = recipe_of(recipe), _store(), find_text(calibration)
        files = _made(store, "download", base)
        _expect(key, quantizing.quantize_key(asked, files, text))
        return quantizing.quantize_task(asked, files, text)

    return ended(work)


@flow(name="validate", **OPTIONS)
def validate(recipe: Recipe, base: str, artifact: str, text: str, key: str) -> State[Any]:
    """Measure the artifact of the mtp_fix key `artifact` against its base."""

    def work() -> Any:
        asked, store, found = recipe_of(recipe), _store(), find_text(text, "validation.text")
        files, made = _made(store, "download", base), _made(store, "mtp_fix", artifact)
        _expect(key, quality.validate_key(asked, files, made, found))
        return quality.validate_task(asked, files, made, found)

    return ended(work)


@flow(name="benchmark", **OPTIONS)
def benchmark(recipe: Recipe, artifact: str, key: str) -> State[Any]:
    """Measure the speed of the artifact of the mtp_fix key `artifact`."""

    def work() -> Any:
        asked, store = recipe_of(recipe), _store()
        made = _made(store, "mtp_fix", artifact)
        _expect(key, speed.benchmark_key(asked, made))
        return speed.benchmark_task(asked, made)

    return ended(work)


def ended(work: Callable[[], Any]) -> State[Any]:
    """Do the work of a flow; its last state. An expected failure is a sentence, without the words that Prefect adds."""
    end_with_the_run()
    end_earlier_tasks()
    try:
        work()
        state: State[Any] = Completed()
    except (RequantError, TimeoutError) as error:  # a task's own time limit is a plain TimeoutError
        state = Failed(message=str(error), data=error)
    end_if_the_run_is_over()
    return state


def _store() -> Store:
    store = open_store()
    store.check()
    return store


def _made(store: Store, stage: str, key: str) -> Manifest:
    manifest = store.manifest(stage, key)
    if manifest is None:
        raise StoreError(f"the store {store.url} has no {stage} {key[:12]}: set REQUANT_STORE alike on every worker")
    return manifest


def _expect(asked: str, ours: str) -> None:
    """Two versions of Requant would name their work differently, and each wait for the other's."""
    if asked != ours:
        raise RecipeError(
            f"this worker would make {ours[:12]} where {asked[:12]} is asked for: install the same version of Requant "
            "on every worker"
        )


# What the run that asks does


def stages_there(recipe: Recipe, base: Revision) -> frozenset[str]:
    """The stages of this run that are to be done by a worker of the gpu pool."""
    weights_bytes = sum(file.size for file in base.wanted if file.path.endswith(".safetensors"))
    return frozenset(stage for stage in ON_GPU if where(stage, recipe, weights_bytes) == "gpu")


def where(stage: str, recipe: Recipe, weights_bytes: int) -> str:
    """`gpu` if a stage is to be done by a worker of the gpu pool, else `here`: quantize always, and what a CPU cannot
    measure in minutes. A run that no worker started has no pools.
    """
    if runtime.deployment.id is None:
        return "here"
    large = weights_bytes >= LARGE
    runs_engine = recipe.benchmark.engine in {"auto", "vllm", "torch"}
    wanted = {"quantize": True, "validate": large, "benchmark": large and runs_engine}
    return "gpu" if wanted[stage] else "here"


def on_gpu(stage: Stage, key: str, recipe: Recipe, **reads: str) -> Any:
    """Have a stage done by a worker of the gpu pool; none is asked if the store has its artifact."""
    parameters = {"recipe": recipe.model_dump(mode="json"), **reads, "key": key}
    return task(_on_gpu, **options(stage.name, hours=72))(stage, key, parameters)


def _on_gpu(stage: Stage, key: str, parameters: dict[str, Any]) -> Any:
    started, store = time.monotonic(), open_store()
    manifest = store.manifest(stage.name, key)
    state = "reused"
    if manifest is None:
        state = "ran"
        _run_there(stage.name, key, parameters)
        manifest = _made(store, stage.name, key)
    seconds = round(time.monotonic() - started, 3)
    return stage_summary(StageResult(stage.name, key, state, seconds, manifest, store.provenance(stage.name, key)))


def _run_there(name: str, key: str, parameters: dict[str, Any]) -> None:
    """Start the flow run, or find the one that an earlier life of this run started, and wait for its end."""
    run = _begin(name, key, parameters)
    log.info(f"{name}: waiting for run {run.name} of the gpu pool")
    notice = WorkerNotice(_look_at_pool, functools.partial(_tell, name))
    while True:
        state = _state(run.id)
        if state.is_completed():
            return
        if state.is_crashed() and _restart(run.id):
            log.info(f"{name}: run {run.name} was killed ({state.message}); it goes on from its last finished block")
        elif state.is_final():
            raise StageFailed(state.message or f"{name} ended {state.name} on the gpu pool")
        else:
            with contextlib.suppress(httpx.HTTPError, PrefectHTTPStatusError):  # A later look finds the server back.
                notice.look(waiting=state.is_scheduled())
        time.sleep(POLL_S)


def _look_at_pool() -> str | None:
    """Say why the gpu pool takes no run. Raises what the Prefect client raises if the server does not answer."""
    with get_client(sync_client=True) as client:
        return problem_of_pool(client, "gpu")


def _tell(stage: str, problem: str | None) -> None:
    """Say in the log and in the state of this run that no worker takes the run that it waits for, or that one does."""
    log.info(f"{stage} waits: {problem}" if problem else f"{stage}: a worker of the gpu pool takes its run")
    state: State[Any] = Running(name="WaitingForWorker", message=problem) if problem else Running()
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(UUID(runtime.flow_run.id))
        if this.state is not None and this.state.is_running():  # It may have been cancelled in the meantime.
            propose(client, this, state)


def _begin(name: str, key: str, parameters: dict[str, Any]) -> FlowRun:
    """The run of this stage for this run: a new one where an earlier one failed and the user tries again."""
    for attempt in range(100):
        try:
            run = run_deployment(
                f"{name}/{name}",
                parameters=parameters,
                timeout=0,
                flow_run_name=runtime.flow_run.name,  # else it has one by chance while it waits
                idempotency_key=f"{runtime.flow_run.id}:{key}:{attempt}",
            )
        except ObjectNotFound as error:
            raise StageFailed(f"the Prefect server has no deployment {name}/{name}: run `requant deploy`") from error
        assert isinstance(run, FlowRun)
        state = _state(run.id)
        if not state.is_final() or state.is_completed() or state.is_crashed():
            return run
    raise StageFailed(f"{name} was tried too often in this run: start another one")


def _restart(run_id: UUID) -> bool:
    """Start a crashed run again; False if somebody cancelled it, or if it crashed too often.

    A server that is away meanwhile is asked again at the next look: the run is still crashed then.
    """
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
            if run.state is not None and run.state.is_crashed():
                state = after_a_crash(run.state, client.read_flow_run_states(run_id))
                if not state.is_scheduled():
                    return False
                propose(client, run, state)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.info(f"the Prefect server does not answer ({type(error).__name__}): waiting for it")
    return True


def _state(run_id: UUID) -> State[Any]:
    """A run's state. A server that is away for a while is waited for: the work goes on without it."""
    told = False
    while True:
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(run_id).state
            assert state is not None
            return state
        except ObjectNotFound as error:
            raise StageFailed("its run of the gpu pool is gone: somebody deleted it; start another run") from error
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            if not told:
                log.info(f"the Prefect server does not answer ({type(error).__name__}): waiting for it")
                told = True
            time.sleep(POLL_S)


def cancel_children(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Cancel what a cancelled run has asked of other workers: Prefect does not pass a cancellation on."""
    with get_client(sync_client=True) as client:
        children = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
        )
        for child in children:
            _cancel(client, child)


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    if run.state is None or run.state.is_final():
        return
    began = run.state.type in {StateType.RUNNING, StateType.PENDING, StateType.CANCELLING}
    client.set_flow_run_state(run.id, Cancelling() if began else Cancelled())


def pinned(text: Text) -> str:
    """A text by a name that another worker finds too."""
    return str(text.path) if text.path is not None and not text.name.startswith("builtin:") else text.name
