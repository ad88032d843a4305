"""The comparison of a checkpoint with its base by domain of the text, with 95 % intervals.

The intervals are those of a bootstrap over windows, or over the parts of the one long window. Both models read the same
windows, so that the intervals of an increase and of a ratio are of pairs.
"""

from __future__ import annotations

import numpy as np

from requant.tasks.validating.measured import DomainValues, Interval
from requant.tasks.validating.measurement import (
    Doubles,
    Floats,
    Measurement,
    interval,
    perplexity_increase,
    quantile_interval,
)

MIN_WINDOWS = 4  # A bootstrap over fewer windows says nothing: such a domain has no intervals, here and in `compare`.
MAX_RATIO = 10.0  # No recipe can ask for a larger one.


def compare_domains(of_quantized: Measurement, of_base: Measurement, kl: Floats) -> dict[str, DomainValues]:
    """Compare two measurements of the same windows, whose KL divergence by place is `kl`, `[n, L-1]`."""
    return {
        domain: _values(of_quantized.of_windows(rows), of_base.of_windows(rows), kl[rows].astype(np.float64))
        for domain, rows in of_base.windows_by_domain.items()
    }


def _values(ours: Measurement, base: Measurement, kl: Doubles) -> DomainValues:
    enough = len(kl) >= MIN_WINDOWS
    same = (ours.top1 == base.top1).astype(np.float64)
    increase, increase_interval = perplexity_increase(ours, base)

    def if_enough(ends: Interval | None) -> Interval | None:
        return ends if enough else None

    def of_means(by_place: Doubles) -> Interval | None:
        return interval(by_place.mean(axis=1)) if enough else None

    # With NaN losses the drafts always agree, so no rate is reported.
    has_drafts = bool(base.drafts.size and ours.drafts.size and np.isfinite(ours.nll).all())
    ours_accepted, base_accepted = (
        (ours.first_accepted, base.first_accepted) if has_drafts else (np.zeros((0, 0)), np.zeros((0, 0)))
    )
    ratio, ratio_interval = _ratio(ours_accepted, base_accepted) if has_drafts else (None, None)
    return DomainValues(
        tokens=int(base.tokens.size),
        base_perplexity=base.perplexity,
        base_perplexity_interval=if_enough(base.perplexity_interval),
        perplexity=ours.perplexity,
        perplexity_interval=if_enough(ours.perplexity_interval),
        perplexity_increase=increase,
        perplexity_increase_interval=if_enough(increase_interval),
        kl_divergence=float(kl.mean()),
        kl_divergence_interval=of_means(kl),
        kl_divergence_p99=float(np.quantile(kl, 0.99)),
        kl_divergence_p99_interval=quantile_interval(kl, 0.99) if enough else None,
        top1_agreement=float(same.mean()),
        top1_agreement_interval=of_means(same),
        base_mtp_acceptance=float(base_accepted.mean()) if has_drafts else None,
        base_mtp_acceptance_interval=of_means(base_accepted) if has_drafts else None,
        mtp_acceptance=float(ours_accepted.mean()) if has_drafts else None,
        mtp_acceptance_interval=of_means(ours_accepted) if has_drafts else None,
        mtp_acceptance_ratio=ratio,
        mtp_acceptance_ratio_interval=if_enough(ratio_interval),
    )


def _ratio(ours: Doubles, base: Doubles) -> tuple[float | None, Interval | None]:
    """Return the ratio of two acceptance rates, and its interval; None if the base accepts nothing.

    A resample in which the base accepts nothing has no ratio. It counts as MAX_RATIO: it says nothing against ours.
    """
    if not base.any():
        return None, None

    def ratio_of(means: Doubles) -> Doubles:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(means[..., 1] > 0, means[..., 0] / means[..., 1], MAX_RATIO)

    by_window = np.stack([ours.mean(axis=1), base.mean(axis=1)], axis=1)
    return float(ours.mean() / base.mean()), interval(by_window, ratio_of)
