"""Forward passes of a block over all samples, with the same batches as auto-round's, without its waits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from requant.tasks.quantizing.loop.batches import split


def without_waits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `BlockForwardRunner.forward` (auto-round 0.16.1) to select the batches of a pass with indices on the CPU.

    auto-round keeps the indices of a batch on the GPU, and reads them one by one to take samples from a list. Each time
    it waits until the GPU has computed the batch before, and the GPU waits for the next one. A pass over some samples,
    and a block that passes more than hidden states on, is left to auto-round.
    """
    from auto_round.algorithms.block_runner import _BLOCK_OUTPUT_REGISTRY

    @functools.wraps(forward)
    def forward_all(
        runner: Any, block: Any, inputs: Any, input_others: Any, indices: Any = None, cache_device: Any = None
    ) -> Any:
        more_outputs = runner.is_diffusion or type(block).__name__ in _BLOCK_OUTPUT_REGISTRY
        if indices is not None or not isinstance(inputs, list) or more_outputs:
            return forward(runner, block, inputs, input_others, indices, cache_device)
        runner.last_output_dict = None
        device = runner.cache_device if cache_device is None else cache_device
        outputs: list[torch.Tensor] = []
        for batch in split(list(range(len(inputs))), runner.batch_size):
            selected, others = runner._select_batch(inputs, input_others, torch.tensor(batch))
            output = runner._normalize_output(runner._forward_one_batch(block, selected, others), block)
            outputs += [sample.to(device) for sample in runner.split_outputs(output)]
        return outputs

    return forward_all
