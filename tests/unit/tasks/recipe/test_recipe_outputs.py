"""Several outputs of one base: what each comes to, what it is called, where it goes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from requant.flows.deployment import Deployment, WorkPool, with_recipes
from requant.flows.requantize import requantize
from requant.tasks.errors import RecipeError
from requant.tasks.recipe.loader import load_recipe, parse_recipe, recipe_of
from requant.tasks.recipe.quantize_section import PRESETS
from requant.tasks.recipe.recipe import Recipe

BASE = {"base": {"repo_id": "Qwen/Qwen3.6-27B"}}
THREE: list[dict[str, Any]] = [{}, {"scheme": "W8A16"}, {"format": "auto_round:auto_awq"}]


KEPT = {"up_proj": {"bits": 16}}


def of(*outputs: Any, **keys: Any) -> Recipe:
    return parse_recipe({**BASE, **keys, "outputs": list(outputs)})


def refusal(*outputs: Any, **keys: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        of(*outputs, **keys)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 600
    return message


def test_each_output_is_a_recipe_of_its_own_with_what_it_does_otherwise() -> None:
    recipe = of(*THREE, quantize={"iters": 50, "group_size": 64}, mtp="int8")
    made = recipe.each
    assert list(made) == ["W4A16G64-auto_round", "W8A16G64-auto_round", "W4A16G64-auto_awq"]
    assert [one.quantize.resolved[0] for one in made.values()] == [4, 8, 4]
    assert made["W4A16G64-auto_awq"] == parse_recipe(
        {**BASE, "quantize": {"iters": 50, "group_size": 64, "format": "auto_round:auto_awq"}, "mtp": "int8"}
    )
    assert all(one.each == {"": one} for one in made.values())


def test_a_recipe_without_outputs_has_the_digest_that_it_always_had() -> None:
    """Else every watch would run all that it knows once more."""
    expected = "33bd64558c4ced86704533197078a42eb2e2dddc1298311c156c3a1a00aef14a"
    texts = {"quantize": {"calibration": "builtin:python"}, "validation": {"text": "builtin:python-evaluation"}}
    assert parse_recipe({"base": {"repo_id": "a/b"}, **texts}).digest == expected
    assert of({}).digest != of({"iters": 3}).digest != parse_recipe(BASE).digest


def test_a_scheme_brings_its_bits_and_a_group_size_only_if_it_names_one() -> None:
    quantize = {"bits": 4, "group_size": 32, "sym": True}
    schemes = of({"scheme": "W8A16"}, {"scheme": "W8A16G64"}, {"scheme": "W8A16", "bits": 2}, quantize=quantize).each
    assert [one.quantize.resolved[:2] for one in schemes.values()] == [(8, 32), (8, 64), (2, 32)]


def test_a_preset_brings_all_that_presets_say_and_keys_beside_it_win() -> None:
    """The larger steps of one preset are not left to another."""
    light = {"preset": "auto-round-light"}
    best, beside = of(
        {"preset": "auto-round-best"}, {"preset": "auto-round-best", "iters": 7, "name": "b"}, quantize=light
    ).each.values()
    best_keys = PRESETS["auto-round-best"]
    assert best.quantize.model_dump(include=set(best_keys)) == best_keys and best.quantize.lr is None
    assert (beside.quantize.iters, beside.quantize.nsamples) == (7, 512)


NAMES: list[tuple[dict[str, Any], str]] = [
    ({}, "W4A16-auto_round"),
    ({"bits": 2, "group_size": 32}, "W2A16G32-auto_round"),
    ({"group_size": -1, "sym": False}, "W4A16Gall-asym-auto_round"),
    ({"format": "auto_round:auto_awq", "preset": "auto-round-best"}, "W4A16-auto_awq-best"),
    ({"preset": "auto-round", "mtp": "drop"}, "W4A16-auto_round-mtp-drop"),
    ({"name": "small.v2", "scheme": "W2A16"}, "small.v2"),
]


@pytest.mark.parametrize(("output", "name"), NAMES)
def test_an_output_is_called_after_what_it_is(output: dict[str, Any], name: str) -> None:
    assert list(of(output).each) == [name]


def test_each_output_goes_to_a_repo_of_its_own() -> None:
    publish = {"repo_id": "me/q", "private": True}
    made = of({}, {"scheme": "W8A16", "repo_id": "me/eight"}, publish=publish).each.values()
    assert [one.publish and (one.publish.repo_id, one.publish.private) for one in made] == [
        ("me/q-W4A16-auto_round", True), ("me/eight", True),
    ]  # fmt: skip
    assert of({}, publish={"repo_id": BASE["base"]["repo_id"]})  # the base's name, and more behind it


REFUSED: list[tuple[list[Any], str]] = [
    ([{}, {"scheme": "W8A16", "format": "auto_round:auto_awq"}], "outputs.1: format auto_round:auto_awq holds 4 bits"),
    ([{}, {"batch_size": 512}], "outputs.1: batch_size 512 is larger than nsamples 128"),
    ([{}, {"iters": 200}], "outputs.1 makes the same as outputs.0: take one of them out"),
    ([{"name": "a"}, {"name": "b"}], "outputs.1 makes the same as outputs.0"),
    ([{}, {"iters": 3}], "outputs.1 would be called W4A16-auto_round, as outputs.0 is: give it a name"),
    ([{"name": "a"}, {"name": "A", "iters": 3}], "outputs.1 would be called A, as outputs.0 is"),
    ([{"iter": 3}], "outputs.0.iter is not a key of a recipe: did you mean iters?"),
    ([{}, {"iters": -1}], "outputs.1.iters: -1 is not allowed"),
    ([{"scheme": "W5A16"}], "outputs.0.scheme: use W2A16"),
    ([{"format": "gguf"}], "outputs.0.format: 'gguf' is not allowed"),
    ([{"preset": "worst"}], "outputs.0.preset: 'worst' is not allowed: input should be 'auto-round'"),
    ([{"name": "../out"}], "outputs.0.name: '../out' is not allowed"),
    ([{"layers": {"lm_head": {"bits": float("nan")}}}], "outputs.0.layers: use text, numbers"),
    ([{"seed": 3}], "outputs.0.seed is not a key of a recipe"),
    ([{"repo_id": "me/a"}], "outputs.0.repo_id me/a: without publish, nothing is published"),
    ([5], "outputs.0: 5 is not allowed"),
    ([{}] * 17, "at most 16 items"),
]  # fmt: skip


@pytest.mark.parametrize(("outputs", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_cannot_be_is_refused_by_its_number(outputs: list[Any], sentence: str) -> None:
    assert sentence in refusal(*outputs)


def test_a_repo_that_is_the_base_anothers_or_none_is_refused() -> None:
    publish = {"repo_id": "me/q"}
    eight = {"scheme": "W8A16", "repo_id": "Me/X"}
    assert "outputs.1.repo_id Me/X is where outputs.0 goes" in refusal({"repo_id": "me/x"}, eight, publish=publish)
    assert "is the base itself" in refusal({"repo_id": "qwen/qwen3.6-27b"}, publish=publish)


GPTQ, AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
SAME: list[tuple[list[dict[str, Any]], str]] = [
    ([{}, {"format": GPTQ}], f"format auto_round and format {GPTQ} are both packed as {GPTQ}"),
    ([{"format": GPTQ, "name": "a"}, {"name": "b"}], f"format {GPTQ} and format auto_round are both packed as {GPTQ}"),
    ([{"scheme": "W8A16"}, {"bits": 8, "format": GPTQ}], f"are both packed as {GPTQ}"),
    ([{"sym": False}, {"sym": False, "format": AWQ}], f"format auto_round and format {AWQ} are both packed as {AWQ}"),
    ([{"layers": KEPT, "sym": False}, {"layers": KEPT, "sym": False, "format": AWQ}], f"are both packed as {AWQ}"),
]


@pytest.mark.parametrize(("outputs", "formats"), SAME, ids=str)
def test_two_formats_that_auto_round_packs_alike_are_one_output(outputs: list[dict[str, Any]], formats: str) -> None:
    sentence = refusal(*outputs)
    assert "outputs.1 makes the same as outputs.0 (format " in sentence and formats in sentence
    assert sentence.endswith("): take one of them out")


@pytest.mark.parametrize("other", [{"bits": 4}, {"group_size": 128}, {"sym": True}, {"scheme": "W8A16", "bits": 4}])
def test_two_spellings_of_one_scheme_are_one_output(other: dict[str, Any]) -> None:
    assert "outputs.1 makes the same as outputs.0: take one of them out" in refusal({}, {"name": "again", **other})


@pytest.mark.parametrize("outputs", [
    [{}, {"format": "auto_round:auto_awq"}],  # symmetric: auto_round leaves AWQ's packing to those who ask for it
    [{"sym": False, "bits": 2}, {"sym": False}],
    [{"sym": False, "layers": {"up_proj": {"bits": 8}}}, {"sym": False, "layers": {}, "name": "b"}],
    [{}, {"name": "b", "mtp": "drop"}],
], ids=str)  # fmt: skip
def test_outputs_that_differ_in_their_packing_are_several(outputs: list[dict[str, Any]]) -> None:
    assert len(of(*outputs).each) == 2


@pytest.mark.parametrize(("repo_id", "name", "why"), [
    (f"me/q{'q' * 90}", "n" * 64, "the maximum length is 96"),
    ("me/q", "a--b", "cannot have -- or .."),
    ("me/q", "a..b", "cannot have -- or .."),
    ("me/q", "a.git", "cannot end by '.git'"),
    ("me/q", "a-", "cannot start or end with '-' or '.'"),
])  # fmt: skip
def test_a_repo_that_the_hub_would_refuse_is_refused_by_the_outputs_number(repo_id: str, name: str, why: str) -> None:
    """The recipe names neither of these repos itself."""
    sentence = refusal({"name": name}, publish={"repo_id": repo_id})
    assert sentence.startswith("outputs.0: publish.repo_id: ") and why in sentence and f"'{repo_id}-{name}'" in sentence


@pytest.mark.parametrize("repo_id", ["noslash", "me/a--b", "me/a.git"])
def test_the_repo_of_one_output_is_one_that_the_hub_takes(repo_id: str) -> None:
    assert f"not {repo_id!r}" in refusal({"repo_id": repo_id}, publish={"repo_id": "me/q"})


def test_set_changes_one_output(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**BASE, "outputs": THREE}))
    assert list(load_recipe(path, ["outputs.1.bits=2"]).each)[1] == "W2A16-auto_round"
    for override in ("outputs.3.bits=2", "outputs.x.bits=2"):
        with pytest.raises(RecipeError, match="not a group of keys"):
            load_recipe(path, [override])


def test_the_form_shows_a_list_with_titles_and_choices_and_takes_what_a_deployment_has(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text(yaml.safe_dump({**BASE, "outputs": THREE}))
    plain = Deployment(name="requantize", entrypoint="a.b", work_pool=WorkPool(name="cpu"))
    parameters = with_recipes([plain], tmp_path)[-1].parameters
    schema = parameter_schema(requantize.fn).model_dump()
    jsonschema.validate(json.loads(json.dumps(parameters)), schema)
    assert recipe_of(parameters["recipe"]).each == load_recipe(tmp_path / "three.yaml").each
    shown = schema["definitions"]["Output"]["properties"]
    assert schema["definitions"]["Recipe"]["properties"]["outputs"]["title"] == "Outputs"
    assert all(field["title"] and field["description"] for field in shown.values())
    choices = {name: field["anyOf"][0].get("enum") for name, field in shown.items()}
    assert choices["scheme"][0] == "W4A16" and choices["mtp"] == ["keep", "int8", "int4", "drop"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"recipe": {**BASE, "outputs": [{"scheme": "W5A16"}]}}, schema)
