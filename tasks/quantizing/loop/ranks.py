"""The processes that tune a block together, one for each GPU, and what they exchange.

Each process has a rank. All of them run the same code on the same samples, so each call here is made by all. A process
alone exchanges nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `count`: number `rank`. They belong to the default group of torch.distributed.

    Tensors are exchanged on `device`.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    def share(self, indices: list[T]) -> list[T]:
        """Return the items that this process works on: a contiguous part, of the same size for all or one less."""
        size, more = divmod(len(indices), self.count)
        begin = self.rank * size + min(self.rank, more)
        return indices[begin : begin + size + (self.rank < more)]

    def rounds(self, indices: list[int], size: int) -> int:
        """Return how many pieces of this size the largest share has: all processes go through as many."""
        return math.ceil(math.ceil(len(indices) / self.count) / size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        if self.count > 1:
            tensor = tensor.to(self.device, copy=True)
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Fill `whole`, `[count * n, ...]`, with the parts `[n, ...]` of all processes in the order of their ranks."""
        if self.count == 1:
            whole.copy_(part)
        else:
            _all_gather(whole, part)

    def sum_of_part(self, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Add up `whole`, `[count * n, ...]`, over all processes, and return this process's part of it, `[n, ...]`.

        `part` is memory for the result, which a process alone does not need.
        """
        if self.count == 1:
            return whole
        torch.distributed.reduce_scatter_tensor(part, whole)
        return part


ALONE = Ranks()


def _all_gather(whole: torch.Tensor, part: torch.Tensor) -> None:
    """Gather tensors in torch 2.11, and in 2.13, where the function has another name."""
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    gather(whole, part)
