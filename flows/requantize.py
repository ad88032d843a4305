"""The pipeline: download -> quantize -> mtp_fix -> validate -> benchmark -> publish."""

from __future__ import annotations

import base64
from typing import Any

from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.markdown import markdown
from flows.report import Report
from tasks import benchmark as speed
from tasks import validate as quality
from tasks.artifact import Manifest
from tasks.benchmark import benchmark_task
from tasks.download import download_task
from tasks.errors import RequantError
from tasks.evaluate import check_tasks
from tasks.gates import compare
from tasks.hub.revision import Revision, resolve
from tasks.hub.target import check_target
from tasks.log import plain_logs
from tasks.mtp_fix import mtp_fix_task
from tasks.pictures import FOLDER, Picture
from tasks.prefect_stage import options, say
from tasks.publish import beside_for, publish_task
from tasks.quantize import quantize_task
from tasks.recipe import Recipe
from tasks.stage import StageResult
from tasks.store import open_store
from tasks.text import Text, find_text
from tasks.validate import validate_task

plain_logs()


class RunFailed(RequantError):
    """A run that ended early; `report` holds what was done before."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.error or "failed")
        self.report = report


@flow(name="requantize", persist_result=False)
def requantize(recipe: Recipe) -> Report:
    """Turn a base checkpoint into a quantized one, measure it, and publish it if it passes every gate."""
    report = Report(recipe)
    try:
        _run(recipe, report)
    except (RequantError, TimeoutError) as error:  # a task's own time limit is a plain TimeoutError
        report.status, report.error = "failed", str(error)
        raise RunFailed(report) from error
    finally:
        draw_pictures(report)
        text = markdown(report, embedded)
        create_markdown_artifact(text, key="requant-report", description="What this run made and measured")
    return report


def _run(recipe: Recipe, report: Report) -> None:
    store = open_store()
    store.check()
    base, calibration, text = resolve_task(recipe)
    report.base = base

    base_files = _done(download_task(base), report)
    quantized = _done(quantize_task(recipe, base_files, calibration), report)
    artifact = _done(mtp_fix_task(recipe, base_files, quantized), report)
    report.artifact = artifact
    _done(validate_task(recipe, base_files, artifact, text), report)
    report.measured = measured = quality.read_values(store, report.stages[-1])
    report.gates = compare(measured, recipe.gates)
    create_table_artifact([gate.to_json() for gate in report.gates], key="requant-gates")
    if not all(gate.passed for gate in report.gates):
        report.status = "rejected"
        return
    _done(benchmark_task(recipe, artifact), report)
    report.benchmark = speed.read_values(store, report.stages[-1])
    draw_pictures(report)
    report.status = "validated"
    report.beside = beside_for(
        store,
        recipe,
        base,
        base_files,
        artifact,
        report.gates,
        measured,
        report.benchmark,
        report.stages,
        markdown(report, lambda picture: f"{FOLDER}/{picture.name}.png"),
        report.pictures,
    )
    if recipe.publish is not None:
        _done(publish_task(recipe, base, artifact, report.beside), report)
        report.published = report.stages[-1].provenance["published"]
        if report.published["pull_request"] is None:  # else main is as it was until a person merges
            report.status = "published"


@task(**options("resolve", hours=1))
def resolve_task(recipe: Recipe) -> tuple[Revision, Text, Text]:
    """Resolve the base and the texts, to calibrate and to measure, to what they are at this moment."""
    check_tasks(recipe.eval)
    base = resolve(recipe.base.repo_id, recipe.base.revision)
    say()(f"{recipe.base.repo_id}@{recipe.base.revision} is {base.sha}")
    if recipe.publish is not None:
        check_target(recipe.publish, base)
    return base, find_text(recipe.quantize.calibration), find_text(recipe.validation.text, "validation.text")


def draw_pictures(report: Report) -> None:
    """Draw what was measured, once. A picture that cannot be drawn ends no run: the numbers are there without it."""
    if report.pictures:
        return
    from tasks.pictures.draw import draw

    try:
        report.pictures = draw(report.measured, report.benchmark, report.blocks)
    except Exception as error:
        say()(f"no pictures: {type(error).__name__}: {error}")


def embedded(picture: Picture) -> str:
    """A picture as an address that holds it: Prefect's UI shows these, and has no files to point to."""
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _done(outcome: Any, report: Report) -> Manifest:
    """A stage's artifact. A task that ended in a named state hands over the state, any other its result."""
    result: StageResult = outcome.result() if isinstance(outcome, State) else outcome
    report.stages.append(result)
    say()(f"{result.name}: {result.state} in {result.seconds:.1f} s")
    return result.manifest
