"""Forward passes over all samples: the values of auto-round's own passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from auto_round.algorithms.block_runner import BlockForwardRunner

from requant.tasks.quantizing.loop.passes import without_waits


class Block(torch.nn.Module):
    """A block with a position argument per sample, as decoder layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: float) -> tuple[torch.Tensor]:
        return (self.linear(hidden_states) * scale + shift,)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@torch.no_grad()
def test_all_samples_have_the_values_that_auto_rounds_own_pass_gives(batch_size: int) -> None:
    torch.manual_seed(0)
    runner = BlockForwardRunner(batch_size=batch_size, amp=False, enable_torch_compile=False)
    inputs = [torch.randn(1, 3, 4) for _ in range(5)]
    others: dict[str, Any] = {"shift": [torch.randn(1, 3, 4) for _ in inputs], "scale": 2.0, "positional_inputs": None}
    block = Block()
    expected = runner.forward(block, inputs, others)
    outputs = without_waits(BlockForwardRunner.forward)(runner, block, inputs, others)
    assert len(outputs) == 5 and all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


def test_some_samples_and_inputs_in_a_dict_are_left_to_auto_round() -> None:
    asked: list[Any] = []
    forward = without_waits(lambda runner, block, inputs, others, indices, device: asked.append(indices))
    runner = BlockForwardRunner(enable_torch_compile=False)
    forward(runner, Block(), [torch.ones(1)], {}, indices=[0])
    forward(runner, Block(), {"hidden_states": [torch.ones(1)]}, {})
    assert asked == [[0], None]
