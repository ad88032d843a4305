"""The digest of a recipe: what it depends on, and that it stays what it was."""

from __future__ import annotations

from typing import Any

import pytest

from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import MAX_KL_DIVERGENCE


def test_recipes_that_say_the_same_have_one_digest_however_they_are_written() -> None:
    short = parse_recipe({"base": {"repo_id": "a/b"}})
    spelled = parse_recipe({"base": {"repo_id": "a/b", "revision": "main"}, "quantize": {"iters": 200}})
    other = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"iters": 50}})
    assert short.digest == spelled.digest != other.digest


# Recorded before builtin:mixed and the limit of max_kl_divergence became defaults.
NAMED = {"quantize": {"calibration": "builtin:python"}, "validation": {"text": "builtin:python-evaluation"}}
RECORDED: dict[str, tuple[dict[str, Any], str]] = {
    "texts alone": (NAMED, "33bd64558c4ced86704533197078a42eb2e2dddc1298311c156c3a1a00aef14a"),
    "a data set and a file": (
        {"quantize": {"calibration": "me/text@main"}, "validation": {"text": "/texts/a.txt"}},
        "2e2d4c1b08a45d3e11624dc6f97069103a8992916ac963392d2ee67f4669b6c0",
    ),
    "other limits": (
        {**NAMED, "gates": {"max_perplexity_increase": 0.1}},
        "e59e0506ea6e54de4421d0952c52c0bd8f7f82267b1d79c50f26140a1df70f76",
    ),
    "a limit of the KL divergence": (
        {**NAMED, "gates": {"max_kl_divergence": 0.1}},
        "653f09dab3dd851db984acd044b0297efa308a4528683a9b46e59037b26be530",
    ),
    "outputs": (
        {**NAMED, "outputs": [{}, {"scheme": "W8A16"}]},
        "327e27d8175f40ecf173a09a63bdbe64790703faa34a21d83de6703693980123",
    ),
    "tasks": (
        {**NAMED, "eval": {"tasks": ["gsm8k"], "limit": 200}},
        "9af9f2551f0aede93c08bfaf788b0d4283345c55e784f614762d192b68d79f73",
    ),
}


@pytest.mark.parametrize(("said", "digest"), RECORDED.values(), ids=RECORDED)
def test_the_digest_of_a_recipe_that_names_its_texts_is_what_it_was(said: dict[str, Any], digest: str) -> None:
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, **said})
    assert recipe.digest == digest
    assert parse_recipe(recipe.model_dump(mode="json")).digest == digest  # as Prefect hands it on


def test_the_default_texts_are_not_python_alone() -> None:
    recipe = parse_recipe({"base": {"repo_id": "a/b"}})
    assert (recipe.quantize.calibration, recipe.validation.text) == ("builtin:mixed", "builtin:mixed-evaluation")


def test_how_tasks_are_compared_enters_a_digest_only_where_it_is_not_the_default() -> None:
    said = [{}, {"engine": "auto", "margin": 0.02, "stop_early": True}]
    others = [{"engine": "torch"}, {"margin": 0.01}, {"stop_early": False}]
    digests = [parse_recipe({"base": {"repo_id": "a/b"}, "eval": {"tasks": ["x"], **more}}).digest for more in said]
    digests += [parse_recipe({"base": {"repo_id": "a/b"}, "eval": {"tasks": ["x"], **more}}).digest for more in others]
    assert digests[0] == digests[1] and len(set(digests)) == 4


def test_the_kl_limit_enters_a_digest_only_where_it_is_neither_the_default_nor_the_null_that_was_it_before() -> None:
    default, spelled, off, other = (
        parse_recipe({"base": {"repo_id": "a/b"}, "gates": gates}).digest
        for gates in ({}, *({"max_kl_divergence": limit} for limit in (MAX_KL_DIVERGENCE, None, 0.4)))
    )
    assert default == spelled == off != other


LATER = [
    ("gates", "mtp_acceptance", None, "required"),
    ("benchmark", "acceptance_precision", 0.01, 0.02),
    ("benchmark", "base_engine", None, "url:http://127.0.0.1:8001"),
]


@pytest.mark.parametrize(("section", "key", "default", "other"), LATER, ids=[row[1] for row in LATER])
def test_a_key_that_was_added_later_enters_a_digest_only_where_it_is_used(
    section: str, key: str, default: object, other: object
) -> None:
    plain, spelled, used = (
        parse_recipe({"base": {"repo_id": "a/b"}, **NAMED, section: said}).digest
        for said in ({}, {key: default}, {key: other})
    )
    assert plain == spelled == RECORDED["texts alone"][1] != used
