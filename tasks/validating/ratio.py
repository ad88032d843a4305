"""The ratio of two draft acceptance rates, with its confidence interval.

Tokens that were drafted in one batch of prompts are not independent, so the batches are the sample, and not the tokens:
the variances below come from how the batches scatter (linearization, also called the delta method, for a ratio of sums
over clusters; Cochran, Sampling Techniques, 3rd edition, sections 6.3 and 9A.9). All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import NormalDist

LEVEL = 0.95  # of confidence intervals
MIN_BATCHES = 10  # with fewer, their scatter says little about the variance
# If none of n drafts is accepted, the rate is below 3 / n with a confidence of 95 % (the rule of three).
RULE_OF_THREE = 3.0

Counts = Sequence[tuple[int, int]]  # of each batch: drafted tokens, and accepted tokens


@dataclass(frozen=True)
class Ratio:
    """A ratio of two rates with its interval at LEVEL."""

    value: float
    low: float
    high: float

    def further_tokens(self, limit: float, drafted: int) -> int | None:
        """Estimate how many more drafted tokens than `drafted` would show on which side of a limit the ratio is.

        The interval's width falls with the square root of the tokens. None if the ratio is the limit itself, or if
        there is no ratio to scale.
        """
        if min(self.value, self.low, limit) <= 0 or self.value == limit:
            return None
        distance, half_width = abs(math.log(self.value / limit)), math.log(self.high / self.low) / 2
        return max(0, math.ceil(drafted * ((half_width / distance) ** 2 - 1)))


def rate(counts: Counts) -> float | None:
    """Return accepted tokens divided by drafted tokens; None if nothing was drafted."""
    drafted, accepted = _sums(counts)
    return accepted / drafted if drafted else None


def relative_half_width(counts: Counts) -> float:
    """Return half of the interval of a rate, divided by the rate: infinite for fewer than MIN_BATCHES batches.

    A rate of 0 has no relative width, and counting goes on: infinite. Batches without drafts say all they can: 0.
    """
    if len(counts) < MIN_BATCHES:
        return math.inf
    known = rate(counts)
    if known is None:
        return 0.0
    return _half_width(_influences(counts)) if known else math.inf


def compare_rates(ours: Counts, base: Counts) -> Ratio | None:
    """Return the rate of `ours` divided by that of the base, with its interval.

    Batches with the same index must have the same prompts: what makes both rates high there cancels in the ratio. The
    interval is symmetric for the logarithm of the ratio. None if the ratio is undefined, since no draft of the base was
    accepted, or if one of them has fewer than MIN_BATCHES batches.
    """
    base_rate = rate(base)
    if not base_rate or min(len(ours), len(base)) < MIN_BATCHES:
        return None
    our_rate = rate(ours) or 0.0
    if our_rate == 0:
        drafted, _ = _sums(ours)
        return Ratio(0.0, 0.0, min(1.0, RULE_OF_THREE / drafted) / base_rate if drafted else 0.0)
    differences = [a - b for a, b in zip_longest(_influences(ours), _influences(base), fillvalue=0.0)]
    value, factor = our_rate / base_rate, math.exp(_half_width(differences))
    return Ratio(value, value / factor, value * factor)


def _sums(counts: Counts) -> tuple[int, int]:
    return sum(drafted for drafted, _ in counts), sum(accepted for _, accepted in counts)


def _influences(counts: Counts) -> list[float]:
    """Return by how much each batch moves the logarithm of the rate. They add up to 0."""
    drafted, accepted = _sums(counts)
    return [in_batch / accepted - of_batch / drafted for of_batch, in_batch in counts]


def _half_width(influences: Sequence[float]) -> float:
    """Return half of the interval of a sum of independent values around 0."""
    count = len(influences)
    variance = count / (count - 1) * sum(value**2 for value in influences)
    return _t_quantile((1 + LEVEL) / 2, count - 1) * math.sqrt(variance)


def _t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution, within 0.1 % from 9 degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
