"""The pipeline: download -> quantize -> mtp_fix -> validate -> benchmark -> publish."""

from __future__ import annotations

import base64
import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed, Failed

from requant.flows.gpu_pool import OPTIONS, cancel_children, on_gpu, pinned, stages_there, where
from requant.flows.last_run import remember_run
from requant.flows.own_run import end_if_the_run_is_over, end_with_the_run
from requant.flows.report.markdown import comparison, markdown
from requant.flows.report.report import RunReport, gate_rows, verdict, worst
from requant.tasks import benchmark as speed
from requant.tasks import quantize as quantizing
from requant.tasks import validate as quality
from requant.tasks.artifact import PICTURES
from requant.tasks.benchmark import benchmark_task
from requant.tasks.card.facts import CardFacts
from requant.tasks.download import download_task
from requant.tasks.errors import RecipeError, RequantError
from requant.tasks.evaluate import check_tasks
from requant.tasks.hub.publish_target import check_target
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.mtp_fix import mtp_fix_task
from requant.tasks.pipeline.log import log_into_runs
from requant.tasks.pipeline.prefect import end_earlier_tasks, options
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.plan import Foreseen, preflight
from requant.tasks.plots import Picture
from requant.tasks.publish import file_facts, publish_task, release_files
from requant.tasks.quantize import quantize_task
from requant.tasks.recipe.loader import recipe_of
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.store.runs import recorded
from requant.tasks.texts.text import Text, find_text
from requant.tasks.validate import validate_task
from requant.tasks.validating.gates import accepted, judge, summary

log = logging.getLogger(__name__)

log_into_runs()


class RunFailed(RequantError):
    """A run that ended early; `report` holds what was done before."""

    def __init__(self, report: RunReport) -> None:
        super().__init__(verdict(report))
        self.report = report


@flow(name="requantize", on_cancellation=[cancel_children], **OPTIONS)
def requantize(recipe: Recipe) -> State[Any]:
    """Turn a base checkpoint into a quantized one, measure it, and publish it if it passes every gate.

    The last state holds a Report, or RunFailed with one; its name is what came of the run, its message says why.
    """
    try:
        report = RunReport(recipe_of(recipe))
    except RecipeError as error:
        return Failed(message=str(error), data=error)

    def work() -> None:
        end_with_the_run()
        end_earlier_tasks()
        _run(report)

    _do(report, work)
    end_if_the_run_is_over()
    return _ended(report)


def _do(report: RunReport, work: Callable[[], None]) -> None:
    """Do the work of a run, or of one output of it, and show what came of it."""
    try:
        work()
    except (RequantError, TimeoutError) as error:  # a task's own time limit is a plain TimeoutError
        report.status, report.error = "failed", str(error)
    finally:
        draw_pictures(report)
        text = comparison(report) if report.recipe.outputs else markdown(report, embedded)
        create_markdown_artifact(text, key=_key("report", report), description="What this run made and measured")


def _ended(report: RunReport) -> State[Any]:
    """The last state of a run, or of one output of it."""
    if report.status == "failed":
        return Failed(message=verdict(report), data=RunFailed(report))
    if report.status == "rejected":
        return Failed(name="Rejected", message=verdict(report), data=report)
    return Completed(name=report.status.capitalize(), message=verdict(report), data=report)


def _run(report: RunReport) -> None:
    """Look at everything before the first byte, then make what the recipe asks for."""
    store, recipe = open_store(), report.recipe
    store.check()
    with recorded(store, lambda: report.run):
        report.base, calibration, text = resolve_task(recipe)
        there = stages_there(recipe, report.base)
        foreseen = preflight_task(recipe, report.base, calibration, text, there)
        if recipe.outputs:
            _outputs(store, report, calibration, text, foreseen)
        else:
            _stages(store, report, calibration, text, foreseen)
    if report.status != "failed":
        remember_run(store, recipe, report.base, report.status)


def _outputs(store: Store, report: RunReport, calibration: Text, text: Text, foreseen: Mapping[str, Foreseen]) -> None:
    """Make each output, one after the other; one that fails or is rejected stops no other."""
    recipes = report.recipe.each
    for name, recipe in recipes.items():
        log.info(f"output {len(report.outputs) + 1} of {len(recipes)}: {name}")
        one = report.outputs[name] = RunReport(recipe, name, base=report.base)
        others = {other: foreseen[other].recipe for other in recipes if other != name}
        _do(one, functools.partial(_stages, store, one, calibration, text, foreseen, others))
        _show(one)
    report.status = worst(report.outputs.values())
    if report.status == "failed":
        report.error = verdict(report)


def _show(report: RunReport) -> None:
    """What came of an output, as a task of its name: Prefect's UI shows the state beside those of the stages.

    The stages themselves are no part of it. A task inside another is part of its transaction, and one that is tried
    again would roll that back; a flow inside another has runs on other workers that no cancellation of ours reaches.
    """
    task(lambda: _ended(report), **options(report.name, hours=1, retries=0))(return_state=True)


def _stages(
    store: Store,
    report: RunReport,
    calibration: Text,
    text: Text,
    foreseen: Mapping[str, Foreseen],
    others: Mapping[str, Recipe] | None = None,
) -> None:
    """The stages of one result. foreseen: what the plan knows, by the output's name; others: what else the same run
    makes of this base, by name."""
    recipe, base = foreseen[report.name].recipe, report.base
    report.settled = recipe
    assert base is not None
    downloaded = _done(download_task(base), report)
    quantized = _done(_quantize(recipe, downloaded, calibration), report)
    fixed = _done(mtp_fix_task(recipe, downloaded.manifest, quantized.manifest), report)
    artifact = report.artifact = fixed.manifest
    report.measured = measured = quality.read_values(store, _done(_validate(recipe, downloaded, fixed, text), report))
    report.gates = judge(measured, recipe.gates)
    show_gates(report)
    if not accepted(report.gates):
        report.status = "rejected"
        return
    report.benchmark = speed.read_values(store, _done(_benchmark(recipe, downloaded, fixed), report))
    draw_pictures(report)
    report.status = "validated"
    facts = CardFacts(
        recipe=recipe,
        base=base,
        files=file_facts(store, recipe, downloaded.manifest, artifact),
        measured=measured,
        gates=report.gates,
        benchmark=report.benchmark,
        provenance={stage.name: stage.provenance for stage in report.stages},
        pictures=report.pictures,
        others=others or {},
        engines=foreseen[report.name].engines,
    )
    report_text = markdown(report, lambda picture: f"{PICTURES}/{picture.name}.png")
    report.beside = release_files(store, artifact, facts, report_text)
    if recipe.publish is not None:
        report.published = _done(publish_task(recipe, base, artifact, report.beside), report).provenance["published"]
        if report.published["pull_request"] is None:  # else main is as it was until a person merges
            report.status = "published"


def _quantize(recipe: Recipe, base: StageResult, calibration: Text) -> Any:
    if where("quantize", recipe, base.manifest.weights) == "here":
        return quantize_task(recipe, base.manifest, calibration)
    key = quantizing.quantize_key(recipe, base.manifest, calibration)
    return on_gpu(quantizing.STAGE, key, recipe, base=base.key, calibration=pinned(calibration))


def _validate(recipe: Recipe, base: StageResult, fixed: StageResult, text: Text) -> Any:
    if where("validate", recipe, base.manifest.weights) == "here":
        return validate_task(recipe, base.manifest, fixed.manifest, text)
    key = quality.validate_key(recipe, base.manifest, fixed.manifest, text)
    return on_gpu(quality.STAGE, key, recipe, base=base.key, artifact=fixed.key, text=pinned(text))


def _benchmark(recipe: Recipe, base: StageResult, fixed: StageResult) -> Any:
    if where("benchmark", recipe, base.manifest.weights) == "here":
        return benchmark_task(recipe, fixed.manifest)
    return on_gpu(speed.STAGE, speed.benchmark_key(recipe, fixed.manifest), recipe, artifact=fixed.key)


@task(**options("resolve", hours=1))
def resolve_task(recipe: Recipe) -> tuple[Revision, Text, Text]:
    """Resolve the base and the texts, to calibrate and to measure, to what they are at this moment."""
    check_tasks(recipe.eval)
    base = resolve(recipe.base.repo_id, recipe.base.revision)
    log.info(f"{recipe.base.repo_id}@{recipe.base.revision} is {base.sha}")
    for one in recipe.each.values():
        if one.publish is not None:
            check_target(one.publish, base)
    return base, find_text(recipe.quantize.calibration), find_text(recipe.validation.text, "validation.text")


@task(**options("preflight", hours=1))
def preflight_task(
    recipe: Recipe, base: Revision, calibration: Text, text: Text, there: frozenset[str]
) -> dict[str, Foreseen]:
    """Find out before the first byte whether the run can end well: what `requant plan` says."""
    return preflight(open_store(), recipe, base, calibration, text, there)


def show_gates(report: RunReport) -> None:
    """The gates as a table in Prefect's UI: what failed comes first."""
    gates = report.gates
    rows = gate_rows(sorted(gates, key=lambda gate: (not gate.failed, gate.passed is not None)))
    create_table_artifact(
        [dict(zip(("gate", "measured", "limit", "result", "note"), row, strict=True)) for row in rows],
        key=_key("gates", report),
        description=f"All {len(gates)} gates passed" if all(g.passed for g in gates) else f"Gates: {summary(gates)}",
    )


def _key(kind: str, report: RunReport) -> str:
    """The key of an artifact in Prefect's UI, which has small letters, digits and dashes: of each output its own."""
    return re.sub(r"[^a-z0-9]+", "-", f"requant-{kind} {report.name}".lower()).strip("-")


def draw_pictures(report: RunReport) -> None:
    """Draw what was measured, once. A picture that cannot be drawn ends no run: the numbers are there without it."""
    if report.pictures:
        return
    from requant.tasks.plots.draw import draw

    try:
        report.pictures = draw(report.measured, report.benchmark, report.blocks)
    except Exception as error:
        log.info(f"no pictures: {type(error).__name__}: {error}")


def embedded(picture: Picture) -> str:
    """A picture as an address that holds it: Prefect's UI shows these, and has no files to point to."""
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _done(outcome: Any, report: RunReport) -> StageResult:
    """A stage's result. A task that ended in a named state hands over the state, any other its result."""
    result: StageResult = outcome.result() if isinstance(outcome, State) else outcome
    report.stages.append(result)
    log.info(f"{result.name}: {result.state} in {result.seconds:.1f} s")
    return result
