"""A pass through a complete model with one decoder block in memory at a time.

First the model's own forward is run, with blocks that only record their arguments. Then the blocks are loaded one after
the other, and each processes all rows before the next one is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from requant.tasks.errors import CheckpointError
from requant.tasks.validating.model import Skeleton

# An argument of a block that is the second output of the block before: the tokens that GLM-5's attention looks at.
# Source: transformers 5.23.0, models/glm_moe_dsa/modeling_glm_moe_dsa.py (GlmMoeDsaModel.forward).
PASSED = "prev_topk_indices"


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides the hidden states, such as masks and rotary embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Rows:
    """Rows of tokens of equal length on their way through the blocks.

    hidden: the hidden states of each row, `[1, length, hidden]`, or of each batch of rows, `[batch, length, hidden]`;
    calls: the other arguments of each block, which are the same for all of them; passed: for each row what its last
    block gave to the next one under the name PASSED.
    """

    hidden: list[torch.Tensor]
    calls: list[Call]
    passed: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, skeleton: Skeleton, tokens: torch.Tensor) -> Rows:
        """Embed rows of tokens, int64 `[rows, length]`, or batches, `[batches, batch, length]`.

        The skeleton's ends must be loaded.

        Raises CheckpointError if the other arguments of a block depend on the row: such a model cannot be run this way.
        """
        hidden: list[torch.Tensor] = []
        calls: list[Call] = []
        for row in tokens:
            with _recording(skeleton.blocks) as recorded:
                skeleton.text(input_ids=row.reshape(-1, row.shape[-1]).to(skeleton.device), use_cache=False)
            if len(recorded) != len(skeleton.blocks):
                raise CheckpointError(f"{type(skeleton.model).__name__} does not run each of its blocks once")
            hidden.append(recorded[0].args[0])
            others = [Call(call.args[1:], call.kwargs) for call in recorded]
            if not calls:
                calls = others
            elif not all(map(_same_arguments, calls, others)):
                raise CheckpointError(f"the blocks of {type(skeleton.model).__name__} get more than hidden states")
        return cls(hidden, calls)

    def through(self, number: int, block: nn.Module) -> None:
        """Replace the hidden states by the block's output for them."""
        call = self.calls[number]
        if PASSED not in call.kwargs:
            self.hidden = [_hidden_states(block(state, *call.args, **call.kwargs)) for state in self.hidden]
            return
        passed = self.passed or [None] * len(self.hidden)
        outputs = [
            block(state, *call.args, **{**call.kwargs, PASSED: value})
            for state, value in zip(self.hidden, passed, strict=True)
        ]
        self.hidden, self.passed = [state for state, _ in outputs], [value for _, value in outputs]


def run_blocks(
    skeleton: Skeleton,
    groups: list[Rows],
    after: Callable[[int], None] = lambda number: None,
    *,
    stay: bool = False,
) -> list[torch.Tensor]:
    """Run groups of rows through all blocks and the final norm, and return `[rows, length, hidden]` for each group.

    `after` is called behind each block, with its index. `stay`: whether the weights stay in memory.
    """
    for number, block in enumerate(skeleton.in_turn(stay=stay)):
        for rows in groups:
            rows.through(number, block)
        after(number)
    norm = getattr(skeleton.text, "norm", None) or nn.Identity()
    return [torch.cat([norm(state) for state in rows.hidden]) for rows in groups]


@contextlib.contextmanager
def _recording(blocks: list[nn.Module]) -> Iterator[list[Call]]:
    """Make blocks return their input, and record the arguments of each. The hidden states are the first of `args`."""
    calls: list[Call] = []

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(Call((hidden_states, *args), kwargs))
        return (hidden_states, None) if PASSED in kwargs else hidden_states

    for block in blocks:
        block.forward = record
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


def _hidden_states(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _same_arguments(one: Call, other: Call) -> bool:
    return _same(one.args, other.args) and _same(one.kwargs, other.kwargs)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)
