"""Choose which rounding a block keeps: that of the batch with the lowest loss, or that of the last step.

auto-round keeps the parameters whose batch had the lowest loss. But batches differ from each other more than the late
steps do. So that choice depends more on the batch than on the parameters. It can be a dozen steps before the end, where
steps have become small and the rounding has settled. With `compare_last`, both are compared on the same samples. The
last step's parameters are kept if all of these hold; otherwise auto-round's choice stays.

- There are at least MIN_PIECES pieces of samples to compare.
- The mean loss is lower by more than its standard error, computed from the differences in each piece. A lower mean
  alone can come from a single massive activation.
- No group loses its scale that has one in auto-round's choice. A scale is lost if it is at the smallest value that
  auto-round allows, or too small for its dtype to hold it in full precision.

The loss over all samples falls by 0.5 to 5 % (measured with `make bench-gpu` and on the tiny base).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from requant.tasks.quantizing.events import EventSink, RoundingKept
from requant.tasks.quantizing.loop import sign_sgd
from requant.tasks.quantizing.loop.ranks import ALONE, Ranks

COMPARED_SAMPLES = 32  # With 2048 tokens each, they give 65,536 tokens to compare and cost two or three steps.
MIN_PIECES = 4  # The standard error of fewer differences says little.


def spread_indices(samples: int, step_samples: int, batch_size: int) -> list[int]:
    """Return the indices of about COMPARED_SAMPLES evenly spaced samples, or of MIN_PIECES batches if that is more.

    The count is a multiple of `step_samples`, so that each piece has the shape of a compiled graph.
    """
    wanted = min(samples, max(COMPARED_SAMPLES, MIN_PIECES * batch_size))
    count = step_samples * max(1, wanted // step_samples)
    return [i * samples // count for i in range(count)]


def losses_of(
    forward: Callable[[list[int], list[int]], torch.Tensor],
    pieces: list[list[int]],
    dequantize: Callable[[], None],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Return the mean loss of each piece of samples, of which each process computes its share.

    `forward` gets the share of a piece and that of the piece after it. `dequantize` computes the weights from the
    current parameters. The forward passes prepare gradients that nobody asks for. That is cheaper than to compile a
    graph without them.
    """
    dequantize()
    shares = [ranks.share(piece) for piece in pieces]
    losses: list[torch.Tensor | float] = [
        forward(share, after).detach() * (len(share) / len(piece)) if share else 0.0
        for piece, share, after in zip(pieces, shares, [*shares[1:], []], strict=True)
    ]
    values = ranks.sum(torch.stack([torch.as_tensor(loss, dtype=torch.float64, device=device) for loss in losses]))
    return [float(value) for value in values]


def better_parameters(
    parameters: list[torch.Tensor],
    best: list[torch.Tensor],
    offload: bool,
    measure_losses: Callable[[], list[float]],
    sizes: Sequence[int],
    find_lost_groups: Callable[[], list[torch.Tensor]],
    report: EventSink,
) -> list[torch.Tensor]:
    """Return `best`, the parameters of the lowest batch, or a copy of `parameters`, which are those of the last step.

    `measure_losses` returns the loss of each piece of samples with the current parameters, and `sizes` are the pieces'
    numbers of samples. `find_lost_groups` returns for each weight which groups have no scale (`groups_without_scale`).
    `report` gets `RoundingKept`. Afterwards `parameters` hold the values of `best`.
    """
    last_losses, lost_by_last = measure_losses(), find_lost_groups()
    last = sign_sgd.copy_parameters(parameters, [], offload)
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    best_losses, lost_by_best = measure_losses(), find_lost_groups()
    lost = sum(int((in_last & ~in_best).sum()) for in_last, in_best in zip(lost_by_last, lost_by_best, strict=True))
    reason = reason_against_last(last_losses, best_losses, sizes, lost)
    kept = "lowest batch" if reason else "last step"
    means = {"last step": mean(last_losses, sizes), "lowest batch": mean(best_losses, sizes)}
    rounded = {name: float(f"{value:.6g}") for name, value in means.items()}
    report(RoundingKept(kept=kept, losses=rounded, reason=reason))
    return best if reason else last


def reason_against_last(
    last_losses: Sequence[float], best_losses: Sequence[float], sizes: Sequence[int], lost_groups: int
) -> str | None:
    """Say why the last step's parameters are not kept, given the losses of both in each piece; None if they are.

    `lost_groups` is the number of groups that have a scale in auto-round's choice and none after the last step.
    """
    if lost_groups:
        return f"{lost_groups:,} groups would lose their scale"
    gain, error = gain_of(last_losses, best_losses, sizes)
    if not gain > 0:  # NaN is no gain either.
        return "its loss is not lower"
    if len(sizes) < MIN_PIECES:
        return f"{len(sizes)} pieces of samples, of which {MIN_PIECES} are needed, do not tell which is better"
    if not gain > error:
        return "its loss is lower by less than the samples' noise"
    return None


def gain_of(last_losses: Sequence[float], best_losses: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Return by how much the last step's mean loss is lower, and the standard error of that difference.

    The standard error is computed from the differences in each piece of samples. It is infinite for a single piece.
    """
    gains = [best - last for last, best in zip(last_losses, best_losses, strict=True)]
    mean_gain, count = mean(gains, sizes), len(gains)
    if count < 2:
        return mean_gain, math.inf
    squares = sum((size / sum(sizes) * (gain - mean_gain)) ** 2 for gain, size in zip(gains, sizes, strict=True))
    return mean_gain, math.sqrt(squares * count / (count - 1))


def mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean over all samples, given the mean of each piece and its number of samples."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def groups_without_scale(scale: torch.Tensor, smallest: float) -> torch.Tensor:
    """Return a mask of the groups whose scale is lost, in the shape of `scale`.

    A scale is lost if it is not finite, or if its absolute value is not above `smallest`, rounded to the dtype of
    `scale`, or not above the smallest normal number of that dtype.
    """
    floor = max(float(torch.tensor(smallest, dtype=scale.dtype)), torch.finfo(scale.dtype).tiny)
    return ~((scale.abs() > floor) & scale.isfinite())
