"""The flows: which stages run, in which order and where; and the command line."""

from pathlib import Path

RECIPES_FOLDER = Path("deployments/recipes")  # the default folder of the watch
