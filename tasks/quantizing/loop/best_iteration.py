"""Which rounding a block keeps: that of the batch with the lowest loss, or that of the last step.

auto-round keeps the parameters whose batch had the lowest loss. Of batches that differ by more than the late steps do,
that says more of the batch than of the parameters: they are a dozen steps short of the end, where the steps have become
small and the rounding has settled. Here both are compared over the same samples (`compare_last`), and the last step's
are kept if three things hold; else auto-round's choice stays:

- there are enough pieces of samples to compare (MIN_PIECES);
- over them the loss is lower by more than its standard error, of the differences piece by piece: a lower mean alone may
  be that of one massive activation;
- no group has lost its scale, at the smallest value that auto-round allows or below what its type holds in full
  precision, that has one in auto-round's choice.

The loss over all samples falls by 0.5 to 5 % (`make bench-gpu`, and the tiny base).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from requant.tasks.quantizing.events import EventSink, RoundingKept
from requant.tasks.quantizing.loop import sign_sgd
from requant.tasks.quantizing.loop.batches import Loss

COMPARED_SAMPLES = 32  # samples: of 2048 tokens each 65,536 pairs, at the price of two or three steps
MIN_PIECES = 4  # pieces: of fewer differences the standard error says little


def spread(samples: int, whole: int, batch: int) -> list[int]:
    """Return the indices of about COMPARED_SAMPLES evenly spaced samples, or of MIN_PIECES batches if that is more.

    The count is a multiple of a step's samples, so that the compiled graph is reused for each piece.
    """
    count = whole * max(1, min(samples, max(COMPARED_SAMPLES, MIN_PIECES * batch)) // whole)
    return [i * samples // count for i in range(count)]


def losses(forward: Callable[[list[int], list[int]], torch.Tensor], pieces: list[list[int]]) -> list[float]:
    """The mean loss over each piece of samples. forward: (piece, the one after it) -> loss.

    The gradients that are prepared for and not asked for are the price of the graph that is compiled already.
    """
    found = [Loss(forward(piece, after)) for piece, after in zip(pieces, [*pieces[1:], []], strict=True)]
    return [loss.read() for loss in found]


def better(
    parameters: list[torch.Tensor],
    best: list[torch.Tensor],
    offload: bool,
    measured: Callable[[], list[float]],
    sizes: Sequence[int],
    lost: Callable[[], list[torch.Tensor]],
    report: EventSink,
) -> list[torch.Tensor]:
    """Of the parameters as they are, the last step's, and `best`, those to keep. `report` gets `RoundingKept`.

    With the parameters as they are, `measured()` is the loss of each piece of samples, of which `sizes` are the
    numbers, and `lost()` says of each matrix which groups have no scale (`without_scale`).
    """
    of_last, lost_by_last = measured(), lost()
    last = sign_sgd.copied(parameters, [], offload)
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    of_best, lost_by_best = measured(), lost()
    gone = sum(int((now & ~before).sum()) for now, before in zip(lost_by_last, lost_by_best, strict=True))
    reason = objection(of_last, of_best, sizes, gone)
    kept = "lowest batch" if reason else "last step"
    means = {"last step": mean(of_last, sizes), "lowest batch": mean(of_best, sizes)}
    rounded = {name: float(f"{value:.6g}") for name, value in means.items()}
    report(RoundingKept(kept=kept, losses=rounded, reason=reason))
    return best if reason else last


def objection(of_last: Sequence[float], of_best: Sequence[float], sizes: Sequence[int], gone: int) -> str | None:
    """Why the last step's parameters are not kept, given the losses of both in each piece; None if they are.
    gone: the groups that lost their scale."""
    if gone:
        return f"{gone:,} groups would lose their scale"
    gain, error = gain_of(of_last, of_best, sizes)
    if not gain > 0:  # no number is no gain
        return "its loss is not lower"
    if len(sizes) < MIN_PIECES:
        return f"{len(sizes)} pieces of samples, of which {MIN_PIECES} are needed, do not tell which is better"
    if not gain > error:
        return "its loss is lower by less than the samples' noise"
    return None


def gain_of(of_last: Sequence[float], of_best: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """By how much the mean loss of the last step is lower, and the standard error of that: of the differences in each
    piece of samples."""
    gains = [best - last for last, best in zip(of_last, of_best, strict=True)]
    gain, count = mean(gains, sizes), len(gains)
    if count < 2:
        return gain, math.inf
    squares = sum((size / sum(sizes) * (each - gain)) ** 2 for each, size in zip(gains, sizes, strict=True))
    return gain, math.sqrt(squares * count / (count - 1))


def mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean over all samples of values that are the means of pieces."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def without_scale(scale: torch.Tensor, smallest: float) -> torch.Tensor:
    """Which groups have a scale that is none: at the smallest value that is allowed, rounded as the scale is, or below
    what its type holds in full precision, or no number."""
    kind = torch.finfo(scale.dtype)
    floor = max(float(torch.tensor(smallest, dtype=scale.dtype)), kind.tiny)
    return ~((scale.abs() > floor) & scale.isfinite())
