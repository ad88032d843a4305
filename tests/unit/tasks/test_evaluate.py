"""The stage evaluate: what a key reads, which engine runs what, and how outcomes are compared."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from requant.tasks import evaluate as stage
from requant.tasks.errors import EngineFailed
from requant.tasks.evaluate import Remember, compare_outcomes, do_not_remember, evaluate_pair, evaluation_key
from requant.tasks.evaluating.outcomes import Outcomes, Score
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Eval, Recipe
from requant.tasks.validating.gates import worst_task
from requant.tasks.validating.measured import Evaluation
from requant.tasks.validating.paired import Verdict
from tests.factories.task_answers import ITEMS, Answers, flip, right


def score(value: float, *, more: bool = True) -> Score:
    return Score(metric="acc", value=value, stderr=0.01, samples=200, higher_is_better=more)


def compared(base: dict[str, Score], ours: dict[str, Score]) -> Evaluation:
    """Compare scores without items."""
    return compare_outcomes(
        Outcomes(engine="x 1", scores=base), Outcomes(engine="x 1", scores=ours), Eval(tasks=["gsm8k"])
    )


def test_recovery_is_the_share_of_the_bases_score_and_the_worst_task_counts() -> None:
    found = compared({"a": score(0.8), "b": score(0.5)}, {"a": score(0.84), "b": score(0.4)})
    assert found.tasks is not None
    assert found.tasks["a"].recovery == pytest.approx(1.05)
    assert found.worst_task_recovery == found.tasks["b"].recovery == pytest.approx(0.8)
    assert worst_task(found.tasks) == "b"
    assert {"metric", "base", "ours", "recovery"} <= set(found.to_json()["tasks"]["a"])


def test_where_less_is_better_recovery_is_the_bases_over_ours() -> None:
    found = compared({"ppl": score(10.0, more=False)}, {"ppl": score(12.5, more=False)})
    assert found.worst_task_recovery == pytest.approx(0.8)


def test_a_task_on_which_the_base_scores_nothing_shows_nothing() -> None:
    found = compared({"a": score(0.8), "hard": score(0.0)}, {"a": score(0.8), "hard": score(0.0)})
    assert found.tasks is not None
    assert found.tasks["hard"].recovery is None and found.worst_task_recovery is None
    assert worst_task(found.tasks) == "hard"


def test_a_task_that_was_lost_altogether_has_recovery_zero() -> None:
    assert compared({"a": score(0.8)}, {"a": score(0.0)}).worst_task_recovery == 0.0


def recipe(benchmark: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    section = {"tasks": ["gsm8k"], **changes}
    document = {"base": {"repo_id": "a/b"}, "allow_remote_code": True, "eval": section, "benchmark": benchmark or {}}
    return parse_recipe(document)


def test_what_is_asked_is_part_of_a_key_and_the_batch_size_is_not(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("task: x")
    plain = evaluation_key(recipe())
    assert (
        evaluation_key(recipe(batch_size=1)) == plain
        and evaluation_key(parse_recipe({"base": {"repo_id": "a/b"}})) == {}
    )
    own = [evaluation_key(recipe(definitions=str(tmp_path)))]
    (tmp_path / "task.yaml").write_text("task: y")
    own.append(evaluation_key(recipe(definitions=str(tmp_path))))
    others = [
        evaluation_key(recipe(**c))
        for c in (
            {"limit": 5},
            {"num_fewshot": 0},
            {"chat_template": True},
            {"tasks": ["b"]},
            {"margin": 0.01},
            {"stop_early": False},
            {"engine": "torch"},
            {"benchmark": {"flags": {"max-model-len": 1024}}},
        )
    ]
    assert all(a != b for i, a in enumerate([plain, *own, *others]) for b in [plain, *own, *others][:i])
    assert str(tmp_path) not in str(own)


@pytest.mark.parametrize("engine", ["torch", "none", "url:http://127.0.0.1:8000"])
def test_where_the_benchmark_starts_no_engine_the_tasks_need_none(engine: str) -> None:
    assert evaluation_key(recipe({"engine": engine})) == evaluation_key(recipe(engine="torch"))


class StandIn:
    """An engine with lm-eval: which checkpoint it served at which version, and what that answers."""

    def __init__(self, engine: str, answers: Mapping[str, Answers]) -> None:
        self.engine, self.answers, self.served = engine, answers, list[str]()

    @contextlib.contextmanager
    def serve(self, folder: Path, *others: Any, **more: Any) -> Iterator[Any]:
        self.served.append(folder.name)
        answers = self.answers[folder.name]

        def outcomes() -> Outcomes:
            return answers.outcomes().model_copy(update={"engine": self.engine})

        yield SimpleNamespace(engine=self.engine, outcomes=outcomes, answers=answers)


BASE, OURS = Path("base"), Path("ours")


@pytest.fixture
def checkpoints() -> dict[str, Answers]:
    """A base, and a result that is damaged."""
    return {"base": Answers({"t": right()}), "ours": Answers({"t": flip(right(), 0.2, 0.01)})}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Answers]) -> dict[str, StandIn]:
    """This machine has vLLM and transformers."""
    made = {"vllm": StandIn("vLLM 1.0", checkpoints), "torch": StandIn("transformers 1.0", checkpoints)}
    monkeypatch.setattr(stage, "find_vllm", lambda: ["vllm", "serve"])
    monkeypatch.setattr(stage, "has_client", lambda: True)
    monkeypatch.setattr(stage, "run_in_vllm", made["vllm"].serve)
    monkeypatch.setattr(stage, "run_in_torch", made["torch"].serve)
    monkeypatch.setattr(stage, "whole_model_settings", lambda *_: SimpleNamespace(device=torch.device("cpu"), dtype=0))
    monkeypatch.setattr(stage, "scale_settings", lambda folder, settings: {"scales": "bfloat16"})
    return made


def evaluated(asked: Recipe, tmp_path: Path, remember: Remember = do_not_remember) -> Evaluation:
    return evaluate_pair(asked, BASE, OURS, tmp_path, remember)


def test_both_are_run_by_the_engine_one_after_the_other(engines: dict[str, StandIn], tmp_path: Path) -> None:
    found = evaluated(recipe(), tmp_path)
    assert engines["vllm"].served == ["base", "ours"] and engines["torch"].served == []
    assert found.tasks_engine == "vLLM 1.0" and found.tasks is not None
    assert found.tasks["t"].paired is not None and found.tasks["t"].paired.verdict is Verdict.WORSE
    assert found.worst_task_recovery == found.tasks["t"].recovery is not None and found.tasks["t"].samples == 200


def test_all_items_are_run_where_the_recipe_asks_for_it(engines: dict[str, StandIn], tmp_path: Path) -> None:
    found = evaluated(recipe(stop_early=False), tmp_path)
    assert found.tasks is not None and found.tasks["t"].paired is not None and found.tasks["t"].paired.items == ITEMS


@pytest.mark.parametrize("asked", [recipe(engine="torch"), recipe({"engine": "none"}), recipe({"engine": "torch"})])
def test_torch_runs_both_where_the_recipe_has_no_engine(
    asked: Recipe, engines: dict[str, StandIn], tmp_path: Path
) -> None:
    kept: dict[str, Outcomes] = {}
    assert evaluated(asked, tmp_path, remembering(kept)).tasks_engine == "transformers 1.0"
    assert engines["torch"].served == ["base", "ours"] and engines["vllm"].served == []
    of_base, of_ours = kept
    assert "scales" in of_ours and "scales" not in of_base, "only the result has scales that are rounded"


@pytest.mark.parametrize("fails", ["base", "ours"])
def test_torch_runs_both_where_the_engine_cannot_serve_one(
    fails: str,
    engines: dict[str, StandIn],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def serve(folder: Path, *others: Any, **more: Any) -> Any:
        if folder.name == fails:
            raise EngineFailed("vLLM did not start: no room")
        return engines["vllm"].serve(folder)

    monkeypatch.setattr(stage, "run_in_vllm", serve)
    assert evaluated(recipe(), tmp_path).tasks_engine == "transformers 1.0"
    assert engines["torch"].served == ["base", "ours"] and "vLLM did not start: no room" in caplog.text


def test_torch_runs_both_without_the_packages_of_the_client(
    engines: dict[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "has_client", lambda: False)
    assert evaluated(recipe(), tmp_path).tasks_engine == "transformers 1.0"
    assert "pip install 'requant[eval]'" in caplog.text


def remembering(kept: dict[str, Outcomes]) -> Remember:
    """A store in memory."""

    def remember(folder: Path, settings: Any, work: Callable[[], Outcomes]) -> Outcomes:
        key = f"{folder} {json.dumps(settings, sort_keys=True)}"
        if key not in kept:
            kept[key] = work()
        return kept[key]

    return remember


def test_a_base_is_run_once_and_again_only_for_another_version_of_the_engine(
    engines: dict[str, StandIn], tmp_path: Path
) -> None:
    kept: dict[str, Outcomes] = {}
    first = evaluated(recipe(), tmp_path, remembering(kept))
    assert evaluated(recipe(), tmp_path, remembering(kept)) == first
    assert engines["vllm"].served == ["base", "ours", "ours"] and len(kept) == 2
    engines["vllm"].engine = "vLLM 2.0"
    found = evaluated(recipe(), tmp_path, remembering(kept))
    assert found.tasks_engine == "vLLM 2.0" and engines["vllm"].served[3:] == ["ours", "base", "ours"]
    evaluated(recipe(benchmark={"flags": {"max-model-len": 512}}), tmp_path, remembering(kept))
    assert engines["vllm"].served[6:] == ["base", "ours"]


def test_a_result_is_run_again_for_another_margin_and_the_base_is_not(
    engines: dict[str, StandIn], tmp_path: Path
) -> None:
    kept: dict[str, Outcomes] = {}
    for margin in (0.02, 0.01):
        evaluated(recipe(margin=margin), tmp_path, remembering(kept))
    assert engines["vllm"].served == ["base", "ours", "ours"] and len(kept) == 3
