"""Measuring a checkpoint in torch, one decoder block at a time, and comparing the values with the base's and limits.

model.py        checkpoints as transformers models, and a model whose weights come and go block by block
blocks.py       a pass of rows of tokens through all blocks
head.py         the MTP head
decode.py       greedy decoding, plain and speculative
vision.py       features of a vision tower
measure.py      one checkpoint on a text
measurement.py  the arrays of that measurement
compare.py      blocks, distributions and features of a checkpoint and its base
measured.py     the values that validate records; no torch
gates.py        the values against the recipe's limits; no torch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.tasks.errors import RecipeError

WINDOWS, LENGTH = 24, 512  # a text is measured on 24 windows of 512 tokens, spread over it
PROBE = 128  # tokens of the first window whose hidden states are recorded at every block


def window_length(text_config: Mapping[str, Any], most: int = LENGTH) -> int:
    """Return the number of tokens of one window: `most`, or fewer if the model allows fewer."""
    return min(most, int(text_config.get("max_position_embeddings") or most))


def window_count(tokens: int, length: int, name: str, most: int = WINDOWS) -> int:
    """Return how many windows of `length` tokens a text gives, at most `most`. Raises RecipeError if it gives none."""
    count = min(most, tokens // length)
    if count < 1:
        raise RecipeError(f"{name} has {tokens:,} tokens, and measuring needs at least {length}: name a longer text")
    return count
