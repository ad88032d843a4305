"""What a Prefect server is told, and what its form shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

from flows.deploy_command import POOLS, with_recipes
from flows.gpu import pinned, run_name, where
from flows.requantize import requantize
from tasks.artifact import File, Manifest
from tasks.errors import RecipeError
from tasks.recipe_file import load_recipe, parse_recipe, recipe_of
from tasks.text import find_text

DEPLOYMENTS = Path(__file__).parent.parent.parent / "deployments"
RECIPES = sorted((DEPLOYMENTS / "recipes").glob("*.yaml"))


def deployments() -> dict[str, dict[str, Any]]:
    document = with_recipes(yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text()), DEPLOYMENTS / "recipes")
    return {each["name"]: each for each in document["deployments"]}


def form() -> dict[str, Any]:
    return parameter_schema(requantize.fn).model_dump()


def test_every_deployment_names_a_flow_and_a_pool() -> None:
    for each in deployments().values():
        assert import_object(each["entrypoint"]).name == each["entrypoint"].rsplit(".", 1)[-1]
        assert each["work_pool"]["name"] in POOLS
        assert "requant" in each["tags"]  # which the automations look for
    assert {name for name, each in deployments().items() if each["work_pool"]["name"] == "gpu"} == {
        "quantize", "validate", "benchmark",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_deployment_whose_form_holds_and_accepts_all_that_it_says(path: Path) -> None:
    parameters = deployments()[path.stem]["parameters"]
    assert recipe_of(parameters["recipe"]) == load_recipe(path)
    jsonschema.validate(parameters, form())


def test_a_limit_that_a_recipe_takes_away_stays_away(tmp_path: Path) -> None:
    (tmp_path / "free.yaml").write_text("base: {repo_id: a/b}\ngates: {min_top1_agreement: null}\n")
    document = with_recipes(yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text()), tmp_path)
    assert recipe_of(document["deployments"][-1]["parameters"]["recipe"]).gates.min_top1_agreement is None


def test_the_form_has_an_order_bounds_and_lists_to_choose_from() -> None:
    sections = form()["definitions"]
    for section in sections.values():
        positions = [field["position"] for field in section["properties"].values()]
        assert positions == list(range(len(positions)))
        assert all(field.get("title") for field in section["properties"].values())
    quantize = sections["Quantize"]["properties"]
    assert quantize["scheme"]["enum"][0] == "W4A16" and quantize["torch_compile"]["enum"] == ["auto", True, False]
    assert quantize["iters"]["maximum"] == 10_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": {"repo_id": "not a repo"}},
        {"base": {"repo_id": "a/b"}, "quantize": {"scheme": "W5A16"}},
        {"base": {"repo_id": "a/b"}, "quantize": {"iters": -1}},
        {"base": {"repo_id": "a/b"}, "quantize": {"torch_compile": "sometimes"}},
        {"base": {"repo_id": "a/b"}, "benchmark": {"engine": "abacus"}},
        {"base": {"repo_id": "a/b"}, "colour": "red"},
        {"quantize": {}},
    ],
    ids=str,
)
def test_what_the_form_refuses_the_run_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"recipe": wrong}, form())
    with pytest.raises(RecipeError):
        recipe_of(wrong)


def test_the_automations_are_ones_that_prefect_knows() -> None:
    documents = yaml.safe_load((DEPLOYMENTS / "automations.yaml").read_text())
    assert len({AutomationCore.model_validate(document).name for document in documents}) == len(documents) == 4


def test_a_run_that_no_worker_started_does_every_stage_itself() -> None:
    large = Manifest.of([File("model.safetensors", 54_000_000_000, "a" * 64)])
    recipe = parse_recipe({"base": {"repo_id": "a/b"}})
    assert {where(stage, recipe, large) for stage in ("quantize", "validate", "benchmark")} == {"here"}


def test_a_text_goes_to_another_worker_by_a_name_that_it_finds(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("words")
    assert pinned(find_text(str(tmp_path / "mine.txt"))) == str(tmp_path / "mine.txt")
    assert pinned(find_text("builtin:python")) == "builtin:python"


def test_a_recipe_that_is_no_mapping_is_refused_in_a_sentence_and_its_run_still_has_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RecipeError, match="not a mapping"):
        recipe_of("demo")  # type: ignore[arg-type]
    for given in ("demo", None, {"base": 3}, {"base": {"repo_id": "Qwen/Qwen3.6-27B"}}):
        monkeypatch.setattr("prefect.runtime.flow_run.parameters", {"recipe": given}, raising=False)
        assert run_name().endswith("W4A16")
