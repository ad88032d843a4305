"""What measuring is made of: a pass block by block, the MTP head, decoding, the vision tower, a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.tasks.errors import RecipeError

WINDOWS, LENGTH = 24, 512  # tokens measured on: 24 windows of 512, spread over the text
PROBE = 128  # tokens of the first window whose hidden states are kept at every block


def window_length(text_config: Mapping[str, Any], most: int = LENGTH) -> int:
    """Give the tokens of one window: as long as the model allows, and at most `most`."""
    return min(most, int(text_config.get("max_position_embeddings") or most))


def window_count(tokens: int, length: int, name: str, most: int = WINDOWS) -> int:
    """Say how many windows of `length` a text of so many tokens gives. Raises RecipeError if it gives none."""
    count = min(most, tokens // length)
    if count < 1:
        raise RecipeError(f"{name} has {tokens:,} tokens, and measuring needs at least {length}: name a longer text")
    return count
