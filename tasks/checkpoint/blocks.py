"""Finds the decoder blocks of a checkpoint by the names of its tensors."""

from __future__ import annotations

import math
import re
from collections import Counter

from requant.tasks.checkpoint.checkpoint import Checkpoint

BLOCK_NAME = re.compile(r"(?:^|.*?\.)(?:layers|layer|blocks|block|h)\.\d+(?=\.)")
# Names of vision and audio towers: VISION_MM_KEYS and AUDIO_MM_KEYS of auto_round/utils/common.py (0.16.1).
TOWERS = re.compile(r"vision|visual|image|img|audio|speech|wav", re.IGNORECASE)


def block_of(name: str) -> str | None:
    """Return the decoder block that a tensor or module is in, as `model.layers.3`.

    Returns None outside of blocks, and for the blocks of a vision or audio tower.
    """
    match = BLOCK_NAME.match(name)
    return match[0] if match and not TOWERS.search(match[0]) else None


def block_sizes(base: Checkpoint) -> dict[str, int]:
    """Count the parameters of each decoder block, without the MTP head."""
    head = set(base.head.names if base.head else ())
    sizes = Counter[str]()
    for tensor in base.tensors.values():
        block = block_of(tensor.name)
        if block is not None and tensor.name not in head:
            sizes[block] += math.prod(tensor.shape)
    return dict(sizes)


def streaming_parameters(base: Checkpoint) -> int:
    """Count the parameters that are in memory at once if blocks are loaded one after the other.

    These are all parameters outside of blocks, and twice those of the largest block. A layer of the MTP head counts as
    a block, without the copies of the main model's embeddings and output layer that it may have.
    """
    copies = base.head.copies if base.head else ()
    sizes = Counter[str]()
    for tensor in base.tensors.values():
        if tensor.name in copies:
            continue
        block = re.search(r"(?:^|\.)layers\.\d+\.", tensor.name)
        sizes[block.string[: block.end()] if block else ""] += math.prod(tensor.shape)
    return sizes.pop("", 0) + 2 * max(sizes.values(), default=0)
