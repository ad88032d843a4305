"""A folder of recipes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from requant.flows.deployment import Deployment, WorkPool, with_recipes
from requant.flows.recipes import recipe_files
from requant.tasks.errors import RecipeError


def test_both_ends_of_a_yaml_file_are_recipes_and_lie_directly_in_the_folder(tmp_path: Path) -> None:
    for name in ("b.yml", "a.yaml", "notes.txt", "deeper/c.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in recipe_files(tmp_path)] == ["a.yaml", "b.yml"]


def test_a_folder_without_recipes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert recipe_files(tmp_path) == []
    assert f"the folder {tmp_path} has no recipes" in caplog.text
    with pytest.raises(RecipeError, match="none does not exist: name a folder of recipes with --recipes"):
        recipe_files(tmp_path / "none")


def test_two_recipes_of_one_name_cannot_both_be_deployed(tmp_path: Path) -> None:
    for name in ("a.yaml", "a.yml"):
        (tmp_path / name).write_text("base: me/pico\n")
    plain = Deployment(name="requantize", entrypoint="a.b", work_pool=WorkPool(name="cpu"))
    with pytest.raises(RecipeError, match=r"a\.yml: a\.yaml would have a deployment of the same name"):
        with_recipes([plain], tmp_path)
