"""Count the tokens that each expert of a decoder block gets.

transformers 5.23.0 computes the experts of a block in one module that has `num_experts` and gets each token's experts
as integers, as in `Qwen3_5MoeExperts.forward`. Code of a base's own often has a ModuleList with one module an expert,
which gets that expert's tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn


def experts_in(block: nn.Module) -> dict[str, nn.Module]:
    """Find the modules of a block that hold experts, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == "experts"
        and (isinstance(module, nn.ModuleList) or type(getattr(module, "num_experts", None)) is int)
    }


def count_experts(module: nn.Module) -> int:
    """Return the number of experts in a module that `experts_in` finds."""
    return len(module) if isinstance(module, nn.ModuleList) else cast(int, module.num_experts)


@contextlib.contextmanager
def counting_experts(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Count the tokens that each expert of a block gets, int64 `[experts]` by the name of the module that has them."""
    counted: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in experts_in(block).items():
        if isinstance(module, nn.ModuleList):
            counted[name] = torch.zeros(count_experts(module), dtype=torch.int64)
            handles += [
                expert.register_forward_pre_hook(_count_inputs(counted[name], number), with_kwargs=True)
                for number, expert in enumerate(module)
            ]
        else:
            counted[name] = torch.zeros(count_experts(module), dtype=torch.int64)
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
