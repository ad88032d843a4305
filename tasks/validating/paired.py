"""Compare two models that did the same items: how much is kept, is the difference real, and does it matter.

Two models of one base agree on most items, so the differences item by item say far more than two scores do. Four
answers come from one confidence interval of the mean difference:

- `equivalent`: the interval lies within the margin on both sides of zero. This is TOST, the two one-sided tests of
  Schuirmann, "A comparison of the two one-sided tests procedure" (J. Pharmacokinetics and Biopharmaceutics 15, 1987).
- `worse`, `better`: the interval lies below or above zero, and the difference is at least the margin.
- `cannot tell`: none of these. `more_items` says how many more items would decide, at the mean and variance so far.

The interval is a normal one after z^2 items are added, half of them at each of the largest differences that one item
can make. That is the plus-four interval of Agresti and Coull, "Approximate is better than 'exact'" (The American
Statistician 52, 1998), for differences. For models that never differ on n items it ends at z^2 / (n + z^2), as the
interval of Tango (Statistics in Medicine 17, 1998) does. So a few equal items prove no equivalence.

A run may look at its items several times, and stop once it is decided. Each of `looks` looks then gets an equal share
of the error rate (Bonferroni). The intervals of all looks hold together, whatever the rule for stopping is: Jennison
and Turnbull, "Interim analyses: the repeated confidence interval approach" (J. Royal Statistical Society B 51, 1989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from requant.tasks.documents import StoredDocument

ERROR_RATE = 0.05  # of all looks together: a wrong `worse` or `better`, or a wrong `equivalent`
MIN_ITEMS = 30  # fewer decide nothing: the interval is an approximation for many
MAX_LOOKS = 5
FIRST_LOOK = 200  # items


class Verdict(StrEnum):
    """What a comparison says of the second model."""

    EQUIVALENT = "equivalent"
    WORSE = "worse"
    BETTER = "better"
    CANNOT_TELL = "cannot tell"


class Scale(StrEnum):
    """What the value of an item is."""

    SCORE = "score"  # more is better
    LOSS = "loss"  # less is better
    LOG_LIKELIHOOD = "log-likelihood"  # in nats, more is better; what is kept is a ratio of likelihoods


class Comparison(StoredDocument):
    """The comparison of a model with its base on the same items. Differences are in the unit of the items."""

    items: int = Field(description="Number of items that both did")
    difference: float = Field(description="Mean difference, above 0 if the model is better")
    interval: tuple[float, float] = Field(description="Confidence interval of the difference")
    recovery: float | None = Field(description="Share of the base's mean that is left; null if a mean is not above 0")
    recovery_interval: tuple[float, float] | None = Field(description="Confidence interval of the recovery")
    lost: int = Field(description="Items on which the model is worse; if values are 0 and 1, flips from right to wrong")
    gained: int = Field(description="Items on which the model is better")
    p_value: float = Field(description="Of McNemar's exact test; for values other than 0 and 1 this is the sign test")
    margin: float = Field(description="The largest difference that does not matter")
    verdict: Verdict = Field(description="What the interval says")
    more_items: int = Field(description="How many more items would decide; 0 if it is decided")


@dataclass(frozen=True)
class _Differences:
    """The differences of `count` items, by their mean and mean square; `largest` is the most that one can be."""

    count: int
    mean: float
    mean_square: float
    largest: float

    @classmethod
    def of(cls, values: NDArray[np.float64], largest: float) -> _Differences:
        return cls(len(values), float(values.mean()), float(np.square(values).mean()), largest)

    def interval(self, z: float, count: int | None = None) -> tuple[float, float]:
        """Return the interval of the mean, or that of `count` items of the same mean and variance."""
        items = self.count if count is None else count
        all_items = items + z * z
        center = items * self.mean / all_items
        squares = items * self.mean_square + (z * self.largest) ** 2 - all_items * center**2
        half_width = z * math.sqrt(max(squares, 0.0)) / all_items
        return center - half_width, center + half_width

    def verdict(self, margin: float, z: float, count: int | None = None) -> Verdict:
        """Judge the interval, or that of `count` items of the same mean and variance."""
        low, high = self.interval(z, count)
        if (self.count if count is None else count) < MIN_ITEMS:
            return Verdict.CANNOT_TELL
        if -margin < low and high < margin:
            return Verdict.EQUIVALENT
        if high < 0 and self.mean <= -margin:
            return Verdict.WORSE
        return Verdict.BETTER if low > 0 and self.mean >= margin else Verdict.CANNOT_TELL

    def more_items(self, margin: float, z: float) -> int:
        """Count the items that are missing for a verdict, at this mean and variance."""
        too_few, enough = self.count, max(self.count, MIN_ITEMS)
        while self.verdict(margin, z, enough) is Verdict.CANNOT_TELL:
            too_few, enough = enough, 2 * enough
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if self.verdict(margin, z, middle) is Verdict.CANNOT_TELL:
                too_few = middle
            else:
                enough = middle
        return enough - self.count


def compare_pairs(
    base: Sequence[float] | NDArray[np.float64],
    ours: Sequence[float] | NDArray[np.float64],
    margin: float,
    *,
    scale: Scale = Scale.SCORE,
    looks: int = 1,
) -> Comparison:
    """Compare a model with its base. `base[i]` and `ours[i]` are the values of item i.

    `margin` is the largest difference of the means that does not matter, in the unit of the values. `looks` says how
    often the items may be looked at until the verdict. Raises ValueError for values that are not finite, no items,
    unequal numbers of items, or a margin that is not above 0.
    """
    of_base, of_ours = np.asarray(base, dtype=np.float64), np.asarray(ours, dtype=np.float64)
    if of_base.ndim != 1 or of_base.shape != of_ours.shape or not len(of_base):
        raise ValueError(f"{of_base.shape} and {of_ours.shape} are no pairs of values")
    if not (np.isfinite(of_base).all() and np.isfinite(of_ours).all()):
        raise ValueError("a value is not finite")
    if not 0 < margin < math.inf:
        raise ValueError(f"the margin {margin} is not above 0")
    z = critical_value(looks)
    signed = of_base - of_ours if scale is Scale.LOSS else of_ours - of_base
    bounded = all(values.min() >= 0 and values.max() <= 1 for values in (of_base, of_ours))
    differences = _Differences.of(signed, 1.0 if bounded else float(np.abs(signed).max()))
    lost, gained = int((signed < 0).sum()), int((signed > 0).sum())
    recovery, recovery_interval = _recovery(of_base, of_ours, differences, scale, z)
    verdict = differences.verdict(margin, z)
    return Comparison(
        items=len(signed),
        difference=differences.mean,
        interval=differences.interval(z),
        recovery=recovery,
        recovery_interval=recovery_interval,
        lost=lost,
        gained=gained,
        p_value=mcnemar(lost, gained),
        margin=margin,
        verdict=verdict,
        more_items=differences.more_items(margin, z) if verdict is Verdict.CANNOT_TELL else 0,
    )


def _recovery(
    base: NDArray[np.float64], ours: NDArray[np.float64], differences: _Differences, scale: Scale, z: float
) -> tuple[float | None, tuple[float, float] | None]:
    """Return the share of the base's mean that is kept, and its interval.

    For log-likelihoods this is the ratio of the geometric means, which is that of perplexities the other way round. For
    other values, the interval is that of the mean of `above - recovery * below`, by the mean of `below` (the delta
    method for a ratio).
    """
    if scale is Scale.LOG_LIKELIHOOD:
        low, high = differences.interval(z)
        return _exp(differences.mean), (_exp(low), _exp(high))
    above, below = (base, ours) if scale is Scale.LOSS else (ours, base)
    if not (base.mean() > 0 and below.mean() > 0):
        return None, None
    recovery = float(above.mean() / below.mean())
    low, high = _Differences.of(above - recovery * below, differences.largest).interval(z)
    return recovery, (max(0.0, recovery + low / float(below.mean())), recovery + high / float(below.mean()))


def _exp(value: float) -> float:
    """Compute e to the power of a value, or of the largest one that a float can hold."""
    return math.exp(min(value, 700.0))


def mcnemar(lost: int, gained: int) -> float:
    """Compute the p-value of McNemar's exact test: a fair coin splits the flips as unevenly as this, or more so.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions" (Psychometrika 12,
    1947). It is the two-sided binomial test with probability 1/2.
    """
    flips, fewer = lost + gained, min(lost, gained)
    term = tail = 1  # whole numbers, which Python divides exactly however large they are
    for k in range(fewer):
        term = term * (flips - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**flips))


def critical_value(looks: int) -> float:
    """Return the half-width of an interval in standard errors, if all `looks` intervals must hold together."""
    if looks < 1:
        raise ValueError(f"{looks} looks are too few")
    return NormalDist().inv_cdf(1 - ERROR_RATE / 2 / looks)


def look_sizes(items: int) -> tuple[int, ...]:
    """Return after how many of `items` items a run looks: after all, half, a quarter, ..., and not below FIRST_LOOK."""
    sizes = [-(-items // 2**k) for k in reversed(range(MAX_LOOKS))]
    return tuple(size for size in sizes if size >= FIRST_LOOK) or (items,)
