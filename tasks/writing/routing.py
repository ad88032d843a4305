"""How many tokens of each row a router sends to each expert of a mixture, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from requant.tasks.expert_counts import count_experts, counting_experts, experts_in
from requant.tasks.validating.blocks import Rows
from requant.tasks.validating.model import Skeleton, few_threads
from requant.tasks.writing.experts import Routing

# Rows pass the blocks together up to this number of tokens: 2.7 GB of hidden states with 5120 values in 16 bits.
MAX_TOKENS_AT_ONCE = 1 << 18


def has_experts(skeleton: Skeleton) -> bool:
    """Check whether a model has experts whose tokens can be counted: as many in each block that has any."""
    modules = [module for block in skeleton.blocks for module in experts_in(block).values()]
    return len({count_experts(module) for module in modules}) == 1


def count_routed(skeleton: Skeleton, rows: Sequence[Sequence[int]]) -> Routing:
    """Count the tokens of each row, a sequence of token ids, that each expert gets.

    Raises CheckpointError for a model that cannot be run one block at a time.
    """
    skeleton.load_ends()
    parts, names = [], tuple[str, ...]()
    with torch.inference_mode(), few_threads(skeleton.nbytes):
        for some in _passes(rows):
            groups = [Rows.of(skeleton, torch.tensor([row])) for row in some]
            counts: dict[str, list[torch.Tensor]] = {}
            for number in range(len(skeleton.blocks)):
                with skeleton.loaded(number) as block, counting_experts(block) as counted:
                    for group in groups:
                        group.through(number, block)
                        for name, tokens in counted.items():
                            counts.setdefault(f"{number}.{name}", []).append(tokens.cpu().clone())
                            tokens.zero_()
            names = tuple(counts)
            parts.append(np.stack([torch.stack(counts[name]).int().numpy() for name in names], axis=1))
    return Routing(names, np.concatenate(parts))


def _passes(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Divide rows into groups of at most MAX_TOKENS_AT_ONCE tokens, or of one row."""
    group: list[Sequence[int]] = []
    for row in rows:
        if group and sum(map(len, group)) + len(row) > MAX_TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
