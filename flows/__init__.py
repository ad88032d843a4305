"""The flows: which stages run, in which order and where; and the command line."""

from pathlib import Path

RECIPES_FOLDERS = (Path("deployments/recipes"), Path("recipes"))  # The default is the first of them that exists.


def default_recipes() -> Path:
    """Return the folder of recipes to use if none is named, in the working folder."""
    return next((folder for folder in RECIPES_FOLDERS if folder.is_dir()), RECIPES_FOLDERS[-1])
