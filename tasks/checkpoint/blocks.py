"""The decoder blocks of a checkpoint, told from the names of its tensors."""

from __future__ import annotations

import math
import re
from collections import Counter

from requant.tasks.checkpoint.checkpoint import Checkpoint

BLOCK_NAME = re.compile(r"(?:^|.*?\.)(?:layers|layer|blocks|block|h)\.\d+(?=\.)")
# Towers whose blocks text does not run through: auto_round/utils/common.py, VISION_MM_KEYS and AUDIO_MM_KEYS (0.16.1).
TOWERS = re.compile(r"vision|visual|image|img|audio|speech|wav", re.IGNORECASE)


def block_of(name: str) -> str | None:
    """The decoder block that a tensor or module lies in, as `model.layers.3`; None outside of them, and in the blocks
    of a vision or audio tower."""
    match = BLOCK_NAME.match(name)
    return match[0] if match and not TOWERS.search(match[0]) else None


def block_sizes(base: Checkpoint) -> dict[str, int]:
    """Parameters of each decoder block of the main model, its MTP head left out."""
    head = set(base.head.names if base.head else ())
    sizes = Counter[str]()
    for tensor in base.tensors.values():
        block = block_of(tensor.name)
        if block is not None and tensor.name not in head:
            sizes[block] += math.prod(tensor.shape)
    return dict(sizes)


def streaming_parameters(base: Checkpoint) -> int:
    """How many parameters are in memory at once where blocks come one after the other: all that are in no block, and
    the largest block twice."""
    sizes = Counter[str]()
    for tensor in base.tensors.values():
        block = re.search(r"(?:^|\.)layers\.\d+\.", tensor.name)
        sizes[block.string[: block.end()] if block else ""] += math.prod(tensor.shape)
    return sizes.pop("", 0) + 2 * max(sizes.values(), default=0)
