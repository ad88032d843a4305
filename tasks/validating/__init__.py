"""Measuring a checkpoint in torch, one decoder block at a time, and comparing the values with the base's and limits.

model.py        checkpoints as transformers models, and a model whose weights come and go block by block
blocks.py       a pass of rows of tokens through all blocks
head.py         the MTP head
head_layouts.py the names of heads' tensors, and what engines do with each
decode.py       greedy decoding, plain and speculative
vision.py       features of a vision tower
windows.py      the windows of tokens of a text, by domain
measure.py      one checkpoint on a text
measurement.py  the arrays of that measurement
compare.py      blocks, distributions and features of a checkpoint and its base
domains.py      the comparison by domain, with intervals
noise.py        a base against itself, computed in another way
measured.py     the values that validate records; no torch
paired.py       two models on the same items: what is kept, and is the difference real; no torch
gates.py        the values against the recipe's limits; no torch
domain_gates.py the same limits in each domain of a text; no torch
drafts.py       an engine's counts of drafts, and their comparison with the base's; no torch
ratio.py        the ratio of two draft acceptance rates, with its interval; no torch
engine_gate.py  that ratio against the recipe's limit; no torch
document.py     the document of `requant validate`; no torch
comparison.py   the document of `requant compare`; no torch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.tasks.errors import RecipeError

WINDOWS, LENGTH = 24, 512  # a text without domains is measured on 24 windows of 512 tokens, spread over it
DOMAIN_TOKENS = 8192  # tokens that are measured of each domain of a text with domains
LONG_CONTEXT = "long_context"  # the domain that is measured as one window, as long as DOMAIN_TOKENS if it fits
WHOLE_TEXT = "text"  # the name of the only domain of a text without domains
OTHER = "other"  # the name for what has no domain of its own: domains too short for a window, or too many
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
