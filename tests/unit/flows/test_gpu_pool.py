"""The flows of the gpu pool."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest

from requant.flows import gpu_pool, requantize
from requant.tasks.artifact import Manifest
from requant.tasks.pipeline.stage import Stage, StageResult
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.record import StageRecord
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.store import open_store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import Text

RECIPE = parse_recipe({"base": {"repo_id": "a/b"}})


def test_the_flows_of_the_engine_take_what_a_run_hands_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker finds the text by its name, and what it reads by stage keys."""
    asked: dict[str, set[str]] = {}

    def ask(stage: Stage, key: str, recipe: Recipe, **reads: str) -> None:
        asked[stage.name] = {"recipe", *reads, "key"}

    monkeypatch.setattr(requantize, "run_on_gpu_pool", ask)
    made = StageResult("download", "k", "ran", 0.0, Manifest(()), StageRecord())
    text = Text("builtin:mixed-evaluation", "a" * 64)
    delegated = frozenset({"benchmark", "acceptance"})
    context = requantize.RunContext(open_store(tmp_path.as_uri()), RECIPE, Calibration.of(text), text, {}, delegated)
    stages = requantize.MadeStages(made, made, made)
    requantize._benchmark(context, RECIPE, made)
    requantize._acceptance(context, RECIPE, stages, BenchmarkResult(engine="vllm"))
    assert asked == {
        flow.name: set(signature(flow.fn).parameters) for flow in (gpu_pool.benchmark, gpu_pool.acceptance)
    }
