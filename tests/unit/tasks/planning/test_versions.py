"""Tools of another version than the stages need are found before a run begins, as far as it uses them here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from requant.flows.delegation import gpu_pool_stages
from requant.tasks.errors import Refused
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.plan import plan_of, preflight
from requant.tasks.planning.inputs import Inputs
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from requant.tasks.versions import locked_version
from tests.factories.pico import pico_base
from tests.factories.stores import Install, held_base

CALIBRATION, TEXT = Calibration.of(find_text("builtin:python")), find_text("builtin:python-evaluation")
Problems = Callable[..., list[str]]


def recipe(engine: str = "torch", **changes: Any) -> Recipe:
    small = {"nsamples": 8, "seqlen": 64, "batch_size": 4, "group_size": 32}
    return parse_recipe(
        {"base": {"repo_id": "a/b"}, "quantize": small, "benchmark": {"engine": engine}, "mtp": "drop", **changes}
    )


@pytest.fixture
def base(store: Store, tmp_path: Path) -> Revision:
    """A base that the store has: nothing of it is to be fetched."""
    return held_base(store, pico_base(tmp_path / "base"))


@pytest.fixture
def problems(store: Store, base: Revision) -> Problems:
    def found(asked: Recipe, there: Collection[str] = (), *, elsewhere: bool = False) -> list[str]:
        """What is said of versions: whether there is an lm-eval or a vLLM is another matter."""
        document = plan_of(store, asked, Inputs(base, CALIBRATION, TEXT), elsewhere=elsewhere, delegated=there)
        assert document.stages, "the plan went on to its end"
        return [problem for problem in document.problems if problem.startswith("stage ")]

    return found


def test_with_the_declared_versions_nothing_is_wrong(problems: Problems) -> None:
    assert problems(recipe(eval={"tasks": ["gsm8k"]})) == []


def test_another_lm_eval_is_told_before_hours_of_quantization(problems: Problems, install: Install) -> None:
    install(lm_eval="0.4.9")
    (told,) = problems(recipe(eval={"tasks": ["gsm8k"]}))
    assert told.startswith(
        f"stage evaluate needs lm_eval {locked_version('lm_eval')}, under which its result would be "
    )
    assert told.endswith(f"has lm_eval 0.4.9: run pip install 'lm_eval=={locked_version('lm_eval')}'")
    assert problems(recipe()) == [], "no tasks were asked for"


def test_a_tool_of_several_stages_is_told_once(problems: Problems, install: Install) -> None:
    install(transformers="5.24.0")
    (told,) = problems(recipe(eval={"tasks": ["gsm8k"]}))
    assert told.startswith("stage quantize needs transformers ")


def test_a_run_does_not_fetch_a_base_that_it_cannot_quantize(store: Store, base: Revision, install: Install) -> None:
    install(transformers="5.24.0")
    with pytest.raises(Refused, match=r"^stage quantize needs transformers .* this one has transformers 5\.24\.0"):
        preflight(store, recipe(), base, CALIBRATION, TEXT)


def test_what_a_worker_of_another_pool_does_needs_nothing_here(problems: Problems, install: Install) -> None:
    install(auto_round="0.15.0", lm_eval="0.4.9")
    tasks = {"tasks": ["gsm8k"]}
    assert [told.split(" needs ")[0] for told in problems(recipe(eval=tasks))] == ["stage quantize", "stage evaluate"]
    (told,) = problems(recipe("none", eval=tasks), {"quantize"})
    assert told.startswith("stage evaluate needs lm_eval ")
    assert problems(recipe(eval=tasks), {"quantize", "validate", "benchmark"}) == []


def test_a_plan_for_another_machine_does_not_judge_the_versions_of_this_one(
    problems: Problems, install: Install
) -> None:
    install(transformers="5.24.0", auto_round="0.15.0")
    assert problems(recipe(), elsewhere=True) == []


def test_a_benchmark_needs_its_tools_in_torch_alone(problems: Problems, install: Install) -> None:
    install(auto_round="0.15.0")
    (told,) = problems(recipe("torch"), {"quantize"})
    assert told.startswith("stage benchmark needs auto-round ")
    for engine in ("vllm", "none", "url:http://localhost:8000"):
        assert problems(recipe(engine), {"quantize"}) == []


def test_a_run_that_no_worker_started_has_no_stage_done_by_another(base: Revision) -> None:
    assert gpu_pool_stages(recipe(), base) == frozenset()


def test_a_run_of_a_worker_leaves_to_the_gpu_pool_what_it_does_not_do_itself(
    base: Revision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a-deployment")
    large = Revision("a/b", "0" * 40, (HubFile("model.safetensors", 54_000_000_000, "", "a" * 64),))
    assert gpu_pool_stages(recipe(), base) == {"quantize"}
    assert gpu_pool_stages(recipe(), large) == {"quantize", "validate", "benchmark", "acceptance"}
    assert gpu_pool_stages(recipe("none"), large) == {"quantize", "validate"}
    own = recipe("none", quantize={"calibration": "self"})
    assert gpu_pool_stages(own, base) == {"self_calibration", "quantize"}
