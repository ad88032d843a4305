"""The pipeline: download -> quantize -> mtp_fix -> validate -> benchmark -> acceptance -> probe -> publish.

With an adapter, the stage merge comes after download, and with `calibration: self`, self_calibration before quantize.
"""

from __future__ import annotations

import base64
import functools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect import State, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed, Failed

from requant.flows.delegation import (
    cancel_children,
    gpu_pool_stages,
    name_for_worker,
    names_for_worker,
    run_on_gpu_pool,
)
from requant.flows.last_run import remember_run
from requant.flows.own_run import exit_if_run_is_over, watch_own_run
from requant.flows.recipe_flow import recipe_flow
from requant.flows.report.markdown import comparison, markdown
from requant.flows.report.report import RunReport, gate_rows, verdict, worst
from requant.flows.stages import (
    acceptance_task,
    benchmark_task,
    download_task,
    merge_task,
    mtp_fix_task,
    probe_task,
    publish_task,
    quantize_task,
    self_calibration_task,
    validate_task,
)
from requant.tasks.acceptance import (
    NO_BASE_SERVER,
    DraftCounter,
    acceptance_key,
    drafts_in,
    read_comparison,
    serves_base,
    without_addresses,
)
from requant.tasks.acceptance import STAGE as ACCEPTANCE
from requant.tasks.artifact import PICTURES
from requant.tasks.benchmark import STAGE as BENCHMARK
from requant.tasks.benchmark import benchmark_key
from requant.tasks.benchmark import read_result as read_benchmark
from requant.tasks.card.facts import CardFacts
from requant.tasks.errors import CheckpointError, EngineFailed, RecipeError, RequantError
from requant.tasks.hub.revision import Revision
from requant.tasks.merge import find_merged_base, with_card
from requant.tasks.pipeline.prefect import crash_stale_task_runs, options
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.plan import Foreseen, preflight
from requant.tasks.plots import Picture
from requant.tasks.probe import STAGE as PROBE
from requant.tasks.probe import no_engine, probe_key, read_probes
from requant.tasks.probing.compare import probe_gates, unmeasured_gates
from requant.tasks.publish import PublishResult, file_facts, release_files
from requant.tasks.quantize import STAGE as QUANTIZE
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.loader import recipe_of
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.redaction import public
from requant.tasks.self_calibration import STAGE as SELF_CALIBRATION
from requant.tasks.self_calibration import self_calibration_key
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.store import Store, open_checked_store, open_store
from requant.tasks.store.runs import recorded
from requant.tasks.texts.calibration import Calibration, find_calibration
from requant.tasks.texts.text import Text
from requant.tasks.texts.validation import find_validation_text
from requant.tasks.validate import STAGE as VALIDATE
from requant.tasks.validate import read_values as read_measured
from requant.tasks.validate import validate_key
from requant.tasks.validating.engine_gate import EngineDrafts, judge_engine
from requant.tasks.validating.expert_gate import judge_experts
from requant.tasks.validating.gates import Gate, accepted, judge, summary
from requant.tasks.versions import source_commit

log = logging.getLogger(__name__)


class RunFailed(RequantError):
    """A run that failed. `report` has what was done before."""

    def __init__(self, report: RunReport) -> None:
        super().__init__(verdict(report))
        self.report = report


@recipe_flow("requantize", on_cancellation=[cancel_children])
def requantize(recipe: Recipe) -> State[Any]:
    """Turn a base checkpoint into a quantized one, measure it, and publish it if it passes every gate.

    The final state has a RunReport as its data, or RunFailed with one. Its name is the status of the run, and its
    message gives the reason.
    """
    try:
        report = RunReport(recipe_of(recipe))
    except RecipeError as error:
        return Failed(message=str(error), data=error)

    def work() -> None:
        watch_own_run()
        crash_stale_task_runs()
        _run(report)

    _run_and_report(report, work)
    exit_if_run_is_over()
    return _final_state(report)


def _run_and_report(report: RunReport, work: Callable[[], None]) -> None:
    """Do the work of a run, or of one of its outputs, and show the report in Prefect's UI."""
    try:
        work()
    except (RequantError, TimeoutError) as error:  # The time limit of a task raises a plain TimeoutError.
        report.status, report.error = "failed", str(error)
    finally:
        draw_pictures(report)
        text = comparison(report) if report.recipe.outputs else markdown(report, as_data_url)
        create_markdown_artifact(
            text, key=_artifact_key("report", report), description="What this run made and measured"
        )


def _final_state(report: RunReport) -> State[Any]:
    """Return the final state of a run, or of one of its outputs."""
    if report.status == "failed":
        return Failed(message=verdict(report), data=RunFailed(report))
    if report.status == "rejected":
        log.warning(verdict(report))
        return Failed(name="Rejected", message=verdict(report), data=report)
    return Completed(name=report.status.capitalize(), message=verdict(report), data=report)


@dataclass(frozen=True)
class RunContext:
    """What the stages of all outputs of a run share.

    `recipe` is that of the run with all its outputs. `foreseen` has the preflight results by output name, and
    `delegated` the names of the stages that workers of the gpu pool do.
    """

    store: Store
    recipe: Recipe
    calibration: Calibration
    text: Text
    foreseen: Mapping[str, Foreseen]
    delegated: frozenset[str]


def _run(report: RunReport) -> None:
    """Run the preflight checks, then all stages."""
    store, recipe = open_checked_store(), report.recipe
    with recorded(store, lambda: report.run):
        report.base, calibration, text = resolve_task(recipe)
        delegated = gpu_pool_stages(recipe, report.base)
        foreseen = preflight_task(recipe, report.base, calibration, text, delegated)
        context = RunContext(store, recipe, calibration, text, foreseen, delegated)
        if recipe.outputs:
            _run_outputs(context, report)
        else:
            _run_stages(context, report)
    if report.status != "failed":
        remember_run(store, recipe, report.base, report.status)


def _run_outputs(context: RunContext, report: RunReport) -> None:
    """Make the outputs one after another. One that fails or is rejected does not stop the others."""
    recipes = report.recipe.each
    for name, recipe in recipes.items():
        log.info(f"output {len(report.outputs) + 1} of {len(recipes)}: {name}")
        one = report.outputs[name] = RunReport(recipe, name, base=report.base)
        _run_and_report(one, functools.partial(_run_stages, context, one))
        _show_output_state(one)
    report.status = worst(report.outputs.values())
    if report.status == "failed":
        report.error = verdict(report)


def _show_output_state(report: RunReport) -> None:
    """Show the final state of an output in Prefect's UI, as the state of a task with the output's name.

    The stages do not run inside this task: a retry of the outer task would roll them back. They do not run in a subflow
    either: a cancellation would not reach the runs that it has on other workers.
    """
    decorate = task(**options(report.name, hours=1, retries=0))
    show = decorate(lambda: _final_state(report))
    show(return_state=True)


def _run_stages(context: RunContext, report: RunReport) -> None:
    """Run the stages of one result."""
    store, foreseen, delegated = context.store, context.foreseen, context.delegated
    recipe, base = foreseen[report.name].recipe, report.base
    report.settled = recipe
    assert base is not None
    downloaded = source = _record(download_task(base), report)
    if base.adapter is not None:
        source = _record(merge_task(downloaded.manifest, base.adapter), report)
    calibration, written = context.calibration, None
    if calibration.waits_for_base:
        written = _record(_self_calibration(context.recipe, source, delegated), report)
        calibration = calibration.with_written(written.manifest)
    quantized = _record(_quantize(recipe, source, calibration, delegated, written), report)
    fixed = _record(mtp_fix_task(recipe, source.manifest, quantized.manifest), report)
    artifact = report.artifact = fixed.manifest
    validated = _record(_validate(recipe, source, fixed, context.text, delegated), report)
    report.measured = measured = read_measured(store, validated)
    report.gates = [*judge(measured, recipe.gates), *judge_experts(report.experts, recipe.gates)]
    show_gates(report)
    if not accepted(report.gates):
        report.status = "rejected"
        return
    benchmarked = _record(_benchmark(context, recipe, fixed), report)
    report.benchmark = read_benchmark(store, benchmarked.manifest)
    made = MadeStages(source, fixed, benchmarked)
    engine_gates = judge_engine(measured, recipe.gates, _drafts_in_engine(context, report, made))
    if recipe.probes is not None and accepted([*report.gates, *engine_gates]):
        engine_gates = [*engine_gates, *_judge_probes(context, report, made)]
    if engine_gates:
        report.gates = [*report.gates, *engine_gates]
        show_gates(report)
    if not accepted(report.gates):
        report.status = "rejected"
        return
    draw_pictures(report)
    report.status = "validated"  # The Markdown report below shows the status.
    facts = CardFacts(
        recipe=recipe,
        base=base,
        files=file_facts(store, recipe, with_card(source.manifest, downloaded.manifest), artifact),
        measured=measured,
        gates=report.gates,
        benchmark=report.benchmark,
        drafts=report.drafts,
        probes=report.probes,
        provenance={stage.name: stage.provenance for stage in report.stages},
        pictures=report.pictures,
        others={name: other.recipe for name, other in foreseen.items() if name != report.name},
        engines=foreseen[report.name].engines,
        commit=source_commit(),
    )
    report_text = markdown(report, lambda picture: f"{PICTURES}/{picture.name}.png")
    report.beside = release_files(store, artifact, facts, report_text)
    if recipe.publish is not None:
        published = _record(publish_task(recipe, base, artifact, report.beside), report)
        assert isinstance(published, PublishResult)
        report.published = published.release
        if published.release.pull_request is None:  # Otherwise main stays as it is until a person merges.
            report.status = "published"


def _self_calibration(recipe: Recipe, base: StageResult, delegated: frozenset[str]) -> Any:
    """Let the base write its calibration text here, or on a worker of the gpu pool."""
    if SELF_CALIBRATION.name not in delegated:
        return self_calibration_task(recipe, base.manifest)
    key = self_calibration_key(recipe, base.manifest)
    return run_on_gpu_pool(SELF_CALIBRATION, key, recipe, base=base.key)


def _quantize(
    recipe: Recipe,
    base: StageResult,
    calibration: Calibration,
    delegated: frozenset[str],
    written: StageResult | None,
) -> Any:
    """Quantize here, or on a worker of the gpu pool. `written` is the text that the base wrote, if it did."""
    if QUANTIZE.name not in delegated:
        return quantize_task(recipe, base.manifest, calibration)
    key = quantize_key(recipe, base.manifest, calibration)
    pinned = calibration.pinned(recipe.quantize, name_for_worker)
    recipe = recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"calibration": pinned})})
    return run_on_gpu_pool(QUANTIZE, key, recipe, base=base.key, **({"written": written.key} if written else {}))


def _validate(recipe: Recipe, base: StageResult, fixed: StageResult, text: Text, delegated: frozenset[str]) -> Any:
    if VALIDATE.name not in delegated:
        return validate_task(recipe, base.manifest, fixed.manifest, text)
    key = validate_key(recipe, base.manifest, fixed.manifest, text)
    return run_on_gpu_pool(VALIDATE, key, recipe, base=base.key, artifact=fixed.key, text=names_for_worker(text))


def _benchmark(context: RunContext, recipe: Recipe, fixed: StageResult) -> Any:
    text = context.text
    if BENCHMARK.name not in context.delegated:
        return benchmark_task(recipe, fixed.manifest, DraftCounter(context.store, recipe, text).count_while_served)
    key = benchmark_key(recipe, fixed.manifest)
    return run_on_gpu_pool(BENCHMARK, key, recipe, artifact=fixed.key, text=names_for_worker(text))


@dataclass(frozen=True)
class MadeStages:
    """The stages of a result that acceptance and probe read."""

    base: StageResult  # downloaded, and merged with its adapter
    artifact: StageResult  # of mtp_fix
    benchmark: StageResult


def _drafts_in_engine(context: RunContext, report: RunReport, made: MadeStages) -> EngineDrafts | None:
    """Compare the drafts of the result with its base's in the engine that measured it. None if it does not draft there.

    If no engine serves both, the run goes on: the gate then says why the drafts were not compared.
    """
    recipe, measured, benchmark = report.settled, report.measured, report.benchmark
    assert recipe is not None and measured is not None and benchmark is not None
    if not drafts_in(benchmark.engine, recipe.benchmark, head=measured.head_kept):
        return None
    if not serves_base(benchmark.engine, recipe.benchmark):
        return EngineDrafts(why_not=NO_BASE_SERVER)
    try:
        compared = _record(_acceptance(context, recipe, made, benchmark), report)
    except (EngineFailed, CheckpointError) as error:
        log.warning(f"the drafts are not compared with the base's: {error}")
        return EngineDrafts(why_not=without_addresses(str(error), recipe.benchmark))
    report.drafts = read_comparison(context.store, compared.manifest)
    return EngineDrafts(report.drafts)


def _acceptance(context: RunContext, recipe: Recipe, made: MadeStages, benchmark: BenchmarkResult) -> Any:
    base, artifact, text = made.base.manifest, made.artifact.manifest, context.text
    if ACCEPTANCE.name not in context.delegated:
        return acceptance_task(recipe, base, artifact, text, benchmark)
    reads = {"base": made.base.key, "artifact": made.artifact.key, "benchmark": made.benchmark.key}
    key = acceptance_key(recipe, base, artifact, text, benchmark.engine)
    return run_on_gpu_pool(ACCEPTANCE, key, recipe, **reads, text=names_for_worker(text))


def _judge_probes(context: RunContext, report: RunReport, made: MadeStages) -> list[Gate]:
    """Ask base and result the questions of the recipe's probes, and return their gates.

    Where one of them cannot be served, the gates say why: a base may be too large for a GPU that the result fits.
    """
    recipe = report.settled
    assert recipe is not None and recipe.probes is not None
    limit, here = recipe.gates.max_probe_loss, PROBE.name not in context.delegated
    try:
        if here and (why := no_engine(recipe.benchmark)):
            raise EngineFailed(why)
        probed = _record(_probe(context, recipe, made), report)
    except (EngineFailed, CheckpointError) as error:
        log.warning(f"the probes were not measured: {error}")
        return unmeasured_gates(recipe.probes.sets, limit, str(public(str(error))))  # gates are published
    report.probes = read_probes(context.store, probed).summary
    return probe_gates(report.probes, limit)


def _probe(context: RunContext, recipe: Recipe, made: MadeStages) -> Any:
    base, artifact = made.base.manifest, made.artifact.manifest
    if PROBE.name not in context.delegated:
        return probe_task(recipe, base, artifact)
    key = probe_key(recipe, base, artifact)
    return run_on_gpu_pool(PROBE, key, recipe, base=made.base.key, artifact=made.artifact.key)


@task(**options("resolve", hours=1))
def resolve_task(recipe: Recipe) -> tuple[Revision, Calibration, Text]:
    """Resolve the base to its commit, and the texts for calibration and validation to their content.

    Raises RecipeError, HubError, HubUnavailable.
    """
    base = find_merged_base(open_store(), recipe)
    log.info(f"{recipe.base.folder or f'{recipe.base.name}@{recipe.base.revision}'} is {base.sha}")
    if base.adapter is not None:
        log.info(f"its adapter is {base.adapter.name}")
    return base, find_calibration(recipe.quantize), find_validation_text(recipe.validation.text)


@task(**options("preflight", hours=1))
def preflight_task(
    recipe: Recipe, base: Revision, calibration: Calibration, text: Text, delegated: frozenset[str]
) -> dict[str, Foreseen]:
    """Make the plan of the run, and stop the run with everything that would make it fail: see `preflight`.

    `delegated`: the stages of the gpu pool. Return the preflight results by output name. Raises Refused or
    HubUnavailable.
    """
    return preflight(open_store(), recipe, base, calibration, text, delegated)


def show_gates(report: RunReport) -> None:
    """Show the gates as a table in Prefect's UI, the failed ones first."""
    gates = report.gates
    rows = gate_rows(sorted(gates, key=lambda gate: (not gate.failed, gate.passed is not None)))
    create_table_artifact(
        [dict(zip(("gate", "measured", "limit", "result", "note"), row, strict=True)) for row in rows],
        key=_artifact_key("gates", report),
        description=f"All {len(gates)} gates passed" if all(g.passed for g in gates) else f"Gates: {summary(gates)}",
    )


def _artifact_key(kind: str, report: RunReport) -> str:
    """Return the key of an artifact in Prefect's UI, in small letters, digits and dashes, with the output's name."""
    return re.sub(r"[^a-z0-9]+", "-", f"requant-{kind} {report.name}".lower()).strip("-")


def draw_pictures(report: RunReport) -> None:
    """Draw the pictures once. If that fails, the run goes on: the report has the numbers."""
    if report.pictures:
        return
    from requant.tasks.plots.draw import draw

    try:
        limit = report.recipe.gates.max_kl_divergence
        report.pictures = draw(report.measured, report.benchmark, report.blocks, limit)
    except Exception as error:
        log.warning(f"no pictures: {type(error).__name__}: {error}")


def as_data_url(picture: Picture) -> str:
    """Return a data URL with the picture: Prefect's UI can show these, but no files."""
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _record(outcome: Any, report: RunReport) -> StageResult:
    """Add a stage's result to the report. A task returns its result, or a Prefect state that wraps it."""
    result: StageResult = outcome.result() if isinstance(outcome, State) else outcome
    report.stages.append(result)
    log.info(f"{result.name}: {result.state} in {result.seconds:.1f} s")
    return result
