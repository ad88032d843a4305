"""Reports of runs that have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from requant.flows.report.report import RunReport
from requant.tasks.artifact import File, Manifest
from requant.tasks.hub.release import Release
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.record import StageRecord
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.validating.gates import Gate
from requant.tasks.validating.measured import Measured

SHA = "0123456789abcdef0123456789abcdef01234567"


ARTIFACT = Manifest.of([File("model.safetensors", 18_000_000_000, "a" * 64)])


RECIPE = parse_recipe({"base": {"repo_id": "Qwen/Qwen3.6-27B"}})


SPEED = {
    "engine": "torch", "version": "transformers 5", "hardware": "CPU, 2 cores", "prefill_tokens_per_second": 1000.0,
    "tokens_per_second": 50.0, "acceptance": None, "prompts": [],
}  # fmt: skip


PUBLISHED = Release(repo_id="me/x", commit=SHA, tag="v1", changed=True)


def finished(**changes: Any) -> RunReport:
    """Make the report of a finished run; `measured` and `benchmark` are given as documents."""
    values: dict[str, Any] = {
        "status": "published",
        "base": Revision("Qwen/Qwen3.6-27B", SHA, ()),
        "artifact": ARTIFACT,
        "path": Path("/out"),
        "stages": [
            StageResult("download", "k", "reused", 0.12, ARTIFACT, StageRecord()),
            StageResult("quantize", "k", "ran", 75.5, ARTIFACT, StageRecord()),
        ],
        "gates": [
            Gate("structure", 0.0, 0.0, True),
            Gate("top1_agreement", None, 0.85, False, "could not be measured"),
        ],
        "benchmark": SPEED,
        "published": PUBLISHED,
    }
    values |= changes
    values["benchmark"] = BenchmarkResult.model_validate(values["benchmark"])
    if "measured" in values:
        values["measured"] = Measured.from_json(values["measured"])
    return RunReport(RECIPE, **values)
