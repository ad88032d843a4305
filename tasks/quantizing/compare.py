"""Which rounding a block keeps: that of the batch with the lowest loss, or that of the last step.

auto-round keeps the parameters whose batch had the lowest loss. Of batches that differ by more than the late steps do,
that says more of the batch than of the parameters: they are a dozen steps short of the end, where the steps have become
small and the rounding has settled. Here both are compared over the same samples, and the better one is kept
(`compare_last`): the loss over all samples falls by 0.5 to 5 % (`make bench-gpu`, and the tiny base).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tasks.quantizing import descent
from tasks.quantizing.batches import Loss

COMPARED = 32  # samples: of 2048 tokens each 65,536 pairs, at the price of two or three steps


def spread(samples: int, whole: int) -> list[int]:
    """Some COMPARED samples at even distances, in whole steps' numbers, so that no piece has another shape."""
    count = whole * max(1, min(samples, COMPARED) // whole)
    return [i * samples // count for i in range(count)]


def mean(forward: Callable[[list[int], list[int]], torch.Tensor], pieces: list[list[int]]) -> float:
    """The mean loss over pieces of samples. forward: (piece, the one after it) -> loss.

    The gradients that are prepared for and not asked for are the price of the graph that is compiled already.
    """
    losses = [Loss(forward(piece, after)) for piece, after in zip(pieces, [*pieces[1:], []], strict=True)]
    return sum(loss.read() * len(piece) for loss, piece in zip(losses, pieces, strict=True)) / sum(map(len, pieces))


def better(
    parameters: list[torch.Tensor],
    best: list[torch.Tensor],
    offload: bool,
    loss: Callable[[], float],
    report: Callable[..., None],
) -> list[torch.Tensor]:
    """Of the parameters as they are and `best`, those with the lower `loss()`. `report` gets the event `kept`."""
    of_last = loss()
    last = descent.copied(parameters, [], offload)
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    of_best = loss()
    kept = "last step" if of_last < of_best else "lowest batch"
    losses = {"last step": of_last, "lowest batch": of_best}
    report("kept", kept=kept, losses={name: float(f"{value:.6g}") for name, value in losses.items()})
    return last if of_last < of_best else best
