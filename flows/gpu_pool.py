"""The stages that need a GPU, as flows: deployments of the `gpu` work pool, which occupy a GPU while they run.

Stages pass data through the store: a flow gets the stage keys of what it reads, and the stage key that its result must
have. `delegation.py` is the other side, the run that waits for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from requant.flows.delegation import TOLD_BY_NAME, artifact_of
from requant.flows.own_run import exit_if_run_is_over, watch_own_run
from requant.flows.recipe_flow import recipe_flow
from requant.flows.stages import (
    acceptance_task,
    benchmark_task,
    probe_task,
    quantize_task,
    self_calibration_task,
    validate_task,
)
from requant.tasks.acceptance import DraftCounter, acceptance_key
from requant.tasks.artifact import Manifest
from requant.tasks.benchmark import STAGE as BENCHMARK
from requant.tasks.benchmark import benchmark_key
from requant.tasks.benchmark import read_result as read_benchmark
from requant.tasks.errors import RecipeError, RequantError
from requant.tasks.evaluating.definitions import check_tasks
from requant.tasks.merge import base_stage
from requant.tasks.pipeline.prefect import crash_stale_task_runs
from requant.tasks.probe import probe_key
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.loader import recipe_of
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.self_calibration import STAGE as SELF_CALIBRATION
from requant.tasks.self_calibration import self_calibration_key
from requant.tasks.store import Store, open_checked_store
from requant.tasks.texts.calibration import find_calibration
from requant.tasks.texts.validation import find_validation_text
from requant.tasks.validate import validate_key

log = logging.getLogger(__name__)


@recipe_flow("self_calibration")
def self_calibration(recipe: Recipe, base: str, key: str) -> State[Any]:
    """Let the base whose files have the stage key `base` write its calibration text, for all outputs."""

    def work() -> Any:
        checked, store = recipe_of(recipe), open_checked_store()
        base_files = _base_files(store, checked, base)
        _check_key(key, self_calibration_key(checked, base_files))
        return self_calibration_task(checked, base_files)

    return run_to_final_state(work)


@recipe_flow("quantize")
def quantize(recipe: Recipe, base: str, key: str, written: str | None = None) -> State[Any]:
    """Quantize the base whose files have the stage key `base`. The recipe names the calibration texts pinned.

    `written` is the stage key of the text that the base wrote, if it did.
    """

    def work() -> Any:
        checked, store = recipe_of(recipe), open_checked_store()
        calibration = find_calibration(checked.quantize)
        if written is not None:
            calibration = calibration.with_written(artifact_of(store, SELF_CALIBRATION.name, written))
        base_files = _base_files(store, checked, base)
        _check_key(key, quantize_key(checked, base_files, calibration))
        return quantize_task(checked, base_files, calibration)

    return run_to_final_state(work)


@recipe_flow("validate")
def validate(recipe: Recipe, base: str, artifact: str, text: str | dict[str, str], key: str) -> State[Any]:
    """Measure the artifact with the mtp_fix key `artifact` against its base, whose files have the key `base`."""

    def work() -> Any:
        checked, store, validation = recipe_of(recipe), open_checked_store(), find_validation_text(text)
        check_tasks(checked.eval)
        base_files = _base_files(store, checked, base)
        quantized_files = artifact_of(store, "mtp_fix", artifact)
        _check_key(key, validate_key(checked, base_files, quantized_files, validation))
        return validate_task(checked, base_files, quantized_files, validation)

    return run_to_final_state(work)


@recipe_flow("benchmark")
def benchmark(recipe: Recipe, artifact: str, text: str | dict[str, str], key: str) -> State[Any]:
    """Measure the speed of the artifact with the mtp_fix key `artifact`, and count its drafts on a text."""

    def work() -> Any:
        checked, store, validation = recipe_of(recipe), open_checked_store(), find_validation_text(text)
        quantized_files = artifact_of(store, "mtp_fix", artifact)
        _check_key(key, benchmark_key(checked, quantized_files))
        return benchmark_task(checked, quantized_files, DraftCounter(store, checked, validation).count_while_served)

    return run_to_final_state(work)


@recipe_flow("acceptance")
def acceptance(
    recipe: Recipe, base: str, artifact: str, text: str | dict[str, str], benchmark: str, key: str
) -> State[Any]:
    """Compare the drafts of the artifact with the mtp_fix key `artifact` with its base's, in one engine.

    `base` is the key of the base's files, and `benchmark` that of the artifact's benchmark.
    """

    def work() -> Any:
        checked, store, validation = recipe_of(recipe), open_checked_store(), find_validation_text(text)
        base_files = _base_files(store, checked, base)
        quantized_files = artifact_of(store, "mtp_fix", artifact)
        measured = read_benchmark(store, artifact_of(store, BENCHMARK.name, benchmark))
        _check_key(key, acceptance_key(checked, base_files, quantized_files, validation, measured.engine))
        return acceptance_task(checked, base_files, quantized_files, validation, measured)

    return run_to_final_state(work)


@recipe_flow("probe")
def probe(recipe: Recipe, base: str, artifact: str, key: str) -> State[Any]:
    """Ask the base and the artifact with the mtp_fix key `artifact` the questions of the recipe's probes."""

    def work() -> Any:
        checked, store = recipe_of(recipe), open_checked_store()
        base_files = _base_files(store, checked, base)
        quantized_files = artifact_of(store, "mtp_fix", artifact)
        _check_key(key, probe_key(checked, base_files, quantized_files))
        return probe_task(checked, base_files, quantized_files)

    return run_to_final_state(work)


def _base_files(store: Store, recipe: Recipe, key: str) -> Manifest:
    """Return the files of the base: as merged with its adapter, or else as downloaded."""
    return artifact_of(store, base_stage(recipe), key)


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


def _check_key(expected: str, computed: str) -> None:
    """Raise RecipeError if this version of Requant computes another stage key than the run that waits for the stage.

    That run would not find the artifact.
    """
    if expected != computed:
        raise RecipeError(
            f"this worker computes stage key {computed[:12]}, but the run expects {expected[:12]}: install the same "
            "version of Requant on every worker"
        )
