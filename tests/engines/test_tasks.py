"""Tasks of lm-eval in the real vLLM, which is started for the base and then for the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.evaluate import do_not_remember, evaluate_pair
from requant.tasks.recipe.loader import load_recipe
from requant.tasks.recipe.recipe import Recipe
from tests.engines.pipeline import RECIPE, Made, engine_environment
from tests.factories.line_tasks import line_tasks
from tests.factories.paths import TINY

pytest.importorskip("tenacity", reason="lm-eval's client is not installed: pip install 'requant[eval]'")


@pytest.mark.slow
def test_base_and_result_are_served_one_after_the_other(
    made: Made, vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUANT_VLLM", engine_environment(vllm_python)["REQUANT_VLLM"])
    recipe = load_recipe(RECIPE)
    asked, logs = line_tasks(tmp_path), tmp_path / "logs"
    changed = Recipe.model_validate({**recipe.model_dump(), "eval": asked.model_dump(), "allow_remote_code": True})
    found = evaluate_pair(changed, TINY, made.folder, logs, do_not_remember)
    assert found.tasks_engine is not None and found.tasks_engine.startswith("vLLM 0.")
    assert {path.name for path in logs.iterdir()} == {"vllm-eval-base.log", "vllm-eval-result.log"}
    assert found.tasks is not None and all(score.paired is not None for score in found.tasks.values())
    assert all("speculative" in path.read_text() for path in logs.iterdir()), "both draft with their head"
