"""How many tokens of each row the router of a mixture of experts sends to each expert, one block in memory at a time.

transformers 5.23.0 computes the experts of a block in one module that has `num_experts` and gets each token's experts
as integers, as in `Qwen3_5MoeExperts.forward`. Code of a base's own often has a ModuleList with one module an expert,
which gets that expert's tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from requant.tasks.validating.blocks import Rows
from requant.tasks.validating.model import Skeleton, few_threads
from requant.tasks.writing.experts import Routing

# Rows pass the blocks together up to this number of tokens: 2.7 GB of hidden states with 5120 values in 16 bits.
MAX_TOKENS_AT_ONCE = 1 << 18


def has_experts(skeleton: Skeleton) -> bool:
    """Check whether a model has experts whose tokens can be counted: as many in each block that has any."""
    modules = [module for block in skeleton.blocks for module in _experts_in(block).values()]
    return len({_count_experts(module) for module in modules}) == 1


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


def _experts_in(block: nn.Module) -> dict[str, nn.Module]:
    """Find the modules of a block that hold experts, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == "experts"
        and (isinstance(module, nn.ModuleList) or type(getattr(module, "num_experts", None)) is int)
    }


def _count_experts(module: nn.Module) -> int:
    return len(module) if isinstance(module, nn.ModuleList) else cast(int, module.num_experts)


@contextlib.contextmanager
def counting_experts(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Count the tokens that each expert of a block gets, int64 `[experts]` by the name of the module that has them."""
    counted: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in _experts_in(block).items():
        if isinstance(module, nn.ModuleList):
            counted[name] = torch.zeros(_count_experts(module), dtype=torch.int64)
            handles += [
                expert.register_forward_pre_hook(_count_inputs(counted[name], number), with_kwargs=True)
                for number, expert in enumerate(module)
            ]
        else:
            counted[name] = torch.zeros(_count_experts(module), dtype=torch.int64)
            handles.append(module.register_forward_pre_hook(_count_chosen(counted[name]), with_kwargs=True))
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def _count_chosen(counts: torch.Tensor) -> Callable[..., None]:
    """Return a hook that counts how often each expert is in the integer tensor that a module gets."""

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dtype in {torch.int64, torch.int32}:
                chosen = torch.bincount(value.flatten().cpu(), minlength=len(counts))
                counts.add_(chosen[: len(counts)])  # behind them, some routers have a number for "no expert"
                return

    return count


def _count_inputs(counts: torch.Tensor, number: int) -> Callable[..., None]:
    """Return a hook that counts the tokens that one expert gets, `[tokens, hidden]`."""

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        counts[number] += hidden.numel() // hidden.shape[-1]

    return count
