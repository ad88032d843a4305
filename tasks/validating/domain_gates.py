"""The value of a gate on the worst domain of the text.

All domains together are compared with the limit as they are. One domain is a sample of a few thousand tokens, and the
worst of several is more often beyond a limit by chance than any one of them. So a domain fails a gate only if its whole
95 % interval is beyond the limit. A domain of too few windows for an interval is not judged by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from requant.tasks.validating.measured import DomainValues, Interval


@dataclass(frozen=True)
class WorstDomain:
    """The value of a gate on the worst domain.

    `limit` is a largest value (`is_most`) or a smallest, and None if nobody asked for one. `interval` is None for a
    domain of few windows. `is_worst` is false where another domain has a worse value, which may be chance.
    """

    domain: str
    value: float
    interval: Interval | None
    limit: float | None
    is_most: bool
    is_worst: bool = True

    @property
    def excess(self) -> float:
        """How far the value is beyond the limit, or how bad it is without one; infinite for what is no number."""
        beyond = self.value - (self.limit or 0.0)
        return math.inf if math.isnan(beyond) else beyond if self.is_most else -beyond

    @property
    def fails(self) -> bool:
        if self.limit is None:
            return False
        if math.isnan(self.value) or self.interval is None:
            return math.isnan(self.value)
        low, high = self.interval
        return low > self.limit if self.is_most else high < self.limit

    @property
    def note(self) -> str:
        """The name of the domain, and why a value beyond the limit fails or passes."""
        words = f"{'worst domain' if self.is_worst else 'worst domain that is beyond chance'}: {self.domain}"
        if self.limit is None or math.isnan(self.value) or self.excess <= 0:
            return words
        if self.interval is None:
            return f"{words}, which has too few tokens to be judged by itself"
        ends = " to ".join(f"{end:.4g}" for end in self.interval)
        return f"{words}, 95 % interval {ends}" + ("" if self.fails else ", which reaches the limit")


def worst_domain(
    gate: str, domains: Mapping[str, DomainValues], limit: float | None, *, is_most: bool
) -> WorstDomain | None:
    """Return the worst domain for a gate; None if less than two domains have its value, which is then that of the text.

    The limit of `kl_divergence` is above the noise floor of each domain.
    """
    rows = [
        WorstDomain(
            domain,
            value,
            getattr(values, f"{gate}_interval"),
            None if limit is None else limit + ((values.kl_noise_floor or 0.0) if gate == "kl_divergence" else 0.0),
            is_most,
        )
        for domain, values in domains.items()
        if (value := getattr(values, gate)) is not None
    ]
    if len(rows) < 2:
        return None
    chosen = max(rows, key=lambda row: (row.fails, row.excess))
    return replace(chosen, is_worst=chosen.excess == max(row.excess for row in rows))
