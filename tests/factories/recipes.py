"""Recipes as files, and the sentence with which a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.recipe.loader import load_recipe

SMALL = "base: {repo_id: Qwen/Qwen3.6-27B}\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def sentence(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The refusal of a recipe: one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    assert len(message) < 600
    return message
