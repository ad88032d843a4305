"""Each stage as a task of Prefect: its function, with retries, a time limit, progress, and the state that the UI shows.

The functions in `tasks/` know nothing of Prefect, whose import takes longer than a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import task

from requant.tasks.acceptance import acceptance
from requant.tasks.artifact import Manifest
from requant.tasks.benchmark import CountDrafts, benchmark
from requant.tasks.download import download
from requant.tasks.hub.revision import Revision
from requant.tasks.merge import merge
from requant.tasks.mtp_fix import mtp_fix
from requant.tasks.pipeline.prefect import BlockProgress, ShareProgress, options, stage_summary
from requant.tasks.probe import probe
from requant.tasks.publish import publish
from requant.tasks.quantize import quantize
from requant.tasks.quantizing.memory_fallback import TIMEOUT_S
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.self_calibration import TIMEOUT_HOURS, self_calibration
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.store import open_store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import Text
from requant.tasks.validate import validate

# Prefect ends the task this much later than TIMEOUT_S, after which the stage raises StageTimeout and says what to do.
TIMEOUT_MARGIN_S = 1800.0


@task(**options("download", hours=12))
def download_task(base: Revision) -> Any:
    return stage_summary(download(open_store(), base))


@task(**options("merge", hours=4))
def merge_task(base: Manifest, adapter: Revision) -> Any:
    return stage_summary(merge(open_store(), base, adapter))


@task(**options("self_calibration", hours=TIMEOUT_HOURS))
def self_calibration_task(recipe: Recipe, base: Manifest) -> Any:
    progress = ShareProgress("self-calibration-progress", "Calibration text written")
    return stage_summary(self_calibration(open_store(), recipe, base, progress))


@task(**options("quantize", hours=(TIMEOUT_S + TIMEOUT_MARGIN_S) / 3600))
def quantize_task(recipe: Recipe, base: Manifest, calibration: Calibration) -> Any:
    with BlockProgress() as report:
        return stage_summary(quantize(open_store(), recipe, base, calibration, report))


@task(**options("mtp_fix", hours=4))
def mtp_fix_task(recipe: Recipe, base: Manifest, quantized: Manifest) -> Any:
    return stage_summary(mtp_fix(open_store(), recipe, base, quantized))


@task(**options("validate", hours=12))
def validate_task(recipe: Recipe, base: Manifest, artifact: Manifest, text: Text) -> Any:
    return stage_summary(validate(open_store(), recipe, base, artifact, text))


@task(**options("benchmark", hours=4))
def benchmark_task(recipe: Recipe, artifact: Manifest, count_drafts: CountDrafts | None = None) -> Any:
    return stage_summary(benchmark(open_store(), recipe, artifact, count_drafts))


@task(**options("acceptance", hours=4))
def acceptance_task(recipe: Recipe, base: Manifest, artifact: Manifest, text: Text, benchmark: BenchmarkResult) -> Any:
    return stage_summary(acceptance(open_store(), recipe, base, artifact, text, benchmark))


@task(**options("probe", hours=24))
def probe_task(recipe: Recipe, base: Manifest, artifact: Manifest) -> Any:
    return stage_summary(probe(open_store(), recipe, base, artifact))


@task(**options("publish", hours=12, retries=8))
def publish_task(recipe: Recipe, base: Revision, artifact: Manifest, files: Mapping[str, bytes]) -> Any:
    return stage_summary(publish(open_store(), recipe, base, artifact, files))
