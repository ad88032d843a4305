"""validate: what its key reads. What it measures is in test_measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tasks.artifact import File, Manifest
from tasks.recipe import Recipe
from tasks.recipe_file import parse_recipe
from tasks.validate import compared_part, validate_key

A, B = "a" * 64, "b" * 64
BASE = Manifest.of(File(p, 1, A) for p in ("config.json", "model.safetensors", "README.md", ".gitattributes"))
MADE = Manifest.of([File("model.safetensors", 2, B)])


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, **changes})


def changed(path: str) -> Manifest:
    return Manifest.of(replace(f, sha256=B) if f.path == path else f for f in BASE.files)


def test_a_changed_limit_measures_nothing_again() -> None:
    key = validate_key(recipe(), BASE, MADE)
    others = ({"gates": {"min_top1_agreement": 0.1}}, {"publish": {"repo_id": "me/x"}}, {"quantize": {"iters": 1}})
    assert all(validate_key(recipe(**other), BASE, MADE) == key for other in others)


def test_a_changed_card_of_the_base_measures_nothing_again() -> None:
    key = validate_key(recipe(), BASE, MADE)
    assert validate_key(recipe(), changed("README.md"), MADE) == key
    assert {f.path for f in compared_part(BASE).files} == {"config.json", "model.safetensors"}


def test_a_changed_base_artifact_or_head_is_measured() -> None:
    keys = {
        validate_key(recipe(), BASE, MADE),
        validate_key(recipe(), changed("model.safetensors"), MADE),
        validate_key(recipe(), changed("config.json"), MADE),
        validate_key(recipe(), BASE, BASE),
        validate_key(recipe(mtp="drop"), BASE, MADE),
        validate_key(recipe(allow_remote_code=True), BASE, MADE),
    }
    assert len(keys) == 6
