"""A folder of recipes, which the watch tracks and `requant deploy` makes deployments of."""

from __future__ import annotations

import logging
from pathlib import Path

from requant.tasks.errors import RecipeError

RECIPES_FOLDERS = (Path("deployments/recipes"), Path("recipes"))  # The default is the first of them that exists.
log = logging.getLogger(__name__)


def default_recipes() -> Path:
    """Return the folder of recipes to use if none is named, in the working folder."""
    return next((folder for folder in RECIPES_FOLDERS if folder.is_dir()), RECIPES_FOLDERS[-1])


def recipe_files(folder: Path) -> list[Path]:
    """Return the recipes of a folder, in the order of their names. Warn of a folder that has none.

    Raises RecipeError if there is no such folder.
    """
    if not folder.is_dir():
        raise RecipeError(f"the folder {folder} does not exist: name a folder of recipes with --recipes")
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        log.warning(f"the folder {folder} has no recipes: these are .yaml and .yml files that lie directly in it")
    return files
