"""A pass over a whole model with one decoder block in memory at a time.

The model's own forward is run with its blocks recording what they are called with; then each block, once its weights
are there, goes over all rows before the next one comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from requant.tasks.errors import CheckpointError
from requant.tasks.validating.model import Skeleton


@dataclass
class Rows:
    """Rows of equal length on their way through the blocks: hidden states `[1, length, hidden]` each, and what every
    block gets beside them (masks, rotary embeddings), which is the same for all of them."""

    hidden: list[torch.Tensor]
    extra: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    def of(cls, skeleton: Skeleton, tokens: torch.Tensor) -> Rows:
        """Embed rows of tokens, int64 `[rows, length]`. The skeleton's ends are loaded.

        Raises CheckpointError for a model whose blocks get something else for other rows: it cannot be run this way.
        """
        hidden: list[torch.Tensor] = []
        extra: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for row in tokens:
            with _recording(skeleton.blocks) as calls:
                skeleton.text(input_ids=row[None].to(skeleton.device), use_cache=False)
            if len(calls) != len(skeleton.blocks):
                raise CheckpointError(f"{type(skeleton.model).__name__} does not run each of its blocks once")
            hidden.append(calls[0][0][0])
            now = [(args[1:], kwargs) for args, kwargs in calls]
            if not extra:
                extra = now
            elif not _same(extra, now):
                raise CheckpointError(f"the blocks of {type(skeleton.model).__name__} get more than hidden states")
        return cls(hidden, extra)

    def through(self, number: int, block: nn.Module) -> None:
        """Replace the hidden states by what a block makes of them."""
        args, kwargs = self.extra[number]
        self.hidden = [_output(block(state, *args, **kwargs)) for state in self.hidden]


def run_blocks(
    skeleton: Skeleton, groups: list[Rows], after: Callable[[int], None] = lambda number: None
) -> list[torch.Tensor]:
    """Run every group through all blocks, and the final norm: `[rows, length, hidden]` each. `after` a block is called
    with its number."""
    for number in range(len(skeleton.blocks)):
        with skeleton.loaded(number) as block:
            for rows in groups:
                rows.through(number, block)
        after(number)
    norm = getattr(skeleton.text, "norm", None) or nn.Identity()
    return [torch.cat([norm(state) for state in rows.hidden]) for rows in groups]


@contextlib.contextmanager
def _recording(blocks: list[nn.Module]) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Let blocks hand their input on, and keep what each was called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(((hidden_states, *args), kwargs))
        return hidden_states

    for block in blocks:
        block.forward = record
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


def _output(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)
