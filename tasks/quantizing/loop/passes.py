"""Forward passes of a block over all samples, with the same batches as auto-round's, without its waits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from requant.tasks.quantizing.loop.batches import split
from requant.tasks.quantizing.loop.ranks import ALONE, Ranks


def without_waits(forward: Callable[..., Any], ranks: Ranks = ALONE) -> Callable[..., Any]:
    """Wrap `BlockForwardRunner.forward` (auto-round 0.16.1) to select the batches of a pass with indices on the CPU.

    auto-round keeps the indices of a batch on the GPU, and reads them one by one to take samples from a list. Each time
    it waits until the GPU has computed the batch before, and the GPU waits for the next one. A pass over some samples,
    and a block that passes more than hidden states on, is left to auto-round.

    Each of several processes computes its share of the batches, and gets the outputs of the others.
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

        def compute(batch: list[int]) -> torch.Tensor:
            selected, others = runner._select_batch(inputs, input_others, torch.tensor(batch))
            output: torch.Tensor = runner._normalize_output(runner._forward_one_batch(block, selected, others), block)
            return output

        outputs: dict[int, torch.Tensor] = {}
        for batches, computed in _of_all(split(list(range(len(inputs))), runner.batch_size), compute, ranks):
            for batch, output in zip(batches, computed, strict=True):
                samples = runner.split_outputs(output[: len(batch)]) if batch else ()
                outputs |= {one: sample.to(device) for one, sample in zip(batch, samples, strict=True)}
        return [outputs[one] for one in range(len(inputs))]

    return forward_all


def _of_all(
    batches: list[list[int]], compute: Callable[[list[int]], torch.Tensor], ranks: Ranks
) -> Iterator[tuple[Sequence[list[int]], Sequence[torch.Tensor]]]:
    """Compute the batches, each process its share, and yield a batch of each process with its output, `[b, s, h]`.

    A process without a batch left has an empty one. The outputs of smaller batches have more rows than these.
    """
    if ranks.count == 1:
        yield from (([batch], [compute(batch)]) for batch in batches)
        return
    shares = [replace(ranks, rank=rank).share(batches) for rank in range(ranks.count)]
    rows, like = len(batches[0]), compute(shares[ranks.rank][0] if shares[ranks.rank] else batches[0])
    for number, of_all in enumerate(itertools.zip_longest(*shares, fillvalue=[])):
        own = of_all[ranks.rank]
        output = (like if number == 0 else compute(own)) if own else like.new_zeros(0, *like.shape[1:])
        part = torch.cat([output, output.new_zeros(rows - len(output), *output.shape[1:])])
        whole = part.new_empty(ranks.count * rows, *part.shape[1:])
        ranks.gather(part, whole)
        yield of_all, torch.split(whole, rows)
