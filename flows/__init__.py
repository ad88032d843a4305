"""What runs, in which order, where; and the command line."""

from pathlib import Path

RECIPES_FOLDER = Path("deployments/recipes")  # whose bases are watched, unless another folder is named
