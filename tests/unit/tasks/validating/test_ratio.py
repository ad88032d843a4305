"""The ratio of two draft acceptance rates: its value, its interval, and how often the interval is right."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from requant.tasks.validating.ratio import (
    MIN_BATCHES,
    Counts,
    Ratio,
    _t_quantile,
    compare_rates,
    rate,
    relative_half_width,
)

DRAFTED = 280  # tokens of a batch


def counts(
    random: np.random.Generator, mean: float, places: np.ndarray | None = None, batches: int = 30, own: float = 0.02
) -> Counts:
    """Batches whose rates scatter by 0.02 because of their places, and by `own` beyond that, around a mean."""
    shift = (np.zeros(batches) if places is None else places) + own * random.standard_normal(batches)
    return [(DRAFTED, int(random.binomial(DRAFTED, min(1.0, max(0.0, mean + step))))) for step in shift]


def test_a_rate_is_accepted_tokens_over_drafted_tokens_of_all_batches() -> None:
    assert rate([(100, 90), (300, 210)]) == 0.75
    assert rate([(0, 0)]) is None and rate([(10, 0)]) == 0.0


def test_an_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """Over 400 pairs, whose batches share what their places make of them."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        places = 0.03 * random.standard_normal(30)
        ratio = compare_rates(counts(random, 0.80, places), counts(random, 0.85, places))
        assert ratio is not None
        held += ratio.low <= 0.80 / 0.85 <= ratio.high
    assert 0.92 <= held / 400 <= 0.98


def test_an_interval_that_takes_tokens_for_independent_would_be_too_narrow() -> None:
    """The scatter of the batches is what tells, and not the number of tokens."""
    random = np.random.default_rng(1)
    for _ in range(20):
        half_width = relative_half_width(counts(random, 0.8, 0.05 * random.standard_normal(30)))
        independent = 1.96 * math.sqrt(0.2 / 0.8 / (30 * DRAFTED))
        assert half_width > 1.5 * independent


def test_what_the_same_places_do_to_both_rates_cancels() -> None:
    random = np.random.default_rng(2)
    places = 0.06 * random.standard_normal(30)
    paired = compare_rates(counts(random, 0.8, places), counts(random, 0.8, places))
    apart = compare_rates(counts(random, 0.8, places), counts(random, 0.8, places[::-1]))
    assert paired is not None and apart is not None
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)


@pytest.mark.parametrize("seed", range(20))
def test_a_base_against_itself_passes_a_limit_of_95_percent_at_every_seed(seed: int) -> None:
    random = np.random.default_rng(seed)
    places = 0.02 * random.standard_normal(40)
    ratio = compare_rates(counts(random, 0.9, places, 40), counts(random, 0.9, places, 40))
    assert ratio is not None and 0.95 < ratio.low < ratio.value < ratio.high


@pytest.mark.parametrize("seed", range(20))
def test_a_head_with_scales_one_too_high_is_below_95_percent_at_every_seed(seed: int) -> None:
    """81.3 % of its drafts are accepted in vLLM, where the base has 89.4 %."""
    random = np.random.default_rng(seed)
    places = 0.02 * random.standard_normal(40)
    ratio = compare_rates(counts(random, 0.813, places, 40), counts(random, 0.894, places, 40))
    assert ratio is not None and ratio.high < 0.95


def test_more_batches_of_one_side_narrow_its_part_of_the_interval() -> None:
    random = np.random.default_rng(3)
    base = counts(random, 0.9, batches=200)
    few, many = (compare_rates(counts(random, 0.85, batches=count), base) for count in (12, 200))
    assert few is not None and many is not None and many.high - many.low < few.high - few.low


def test_equal_counts_have_the_ratio_1_without_any_width() -> None:
    same = [(DRAFTED, 250 + number % 5) for number in range(MIN_BATCHES)]
    assert compare_rates(same, same) == Ratio(1.0, 1.0, 1.0)


def test_a_checkpoint_that_drafts_nothing_or_none_of_whose_drafts_is_accepted_has_the_ratio_0() -> None:
    base = [(DRAFTED, 250 + number % 3) for number in range(MIN_BATCHES)]
    assert compare_rates([(0, 0)] * MIN_BATCHES, base) == Ratio(0.0, 0.0, 0.0)
    none = compare_rates([(DRAFTED, 0)] * MIN_BATCHES, base)
    assert none is not None and (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(3 / (DRAFTED * MIN_BATCHES) / rate(base))  # type: ignore[operator]


def test_a_ratio_is_undefined_where_the_base_has_no_rate_or_there_are_few_batches() -> None:
    ours = [(DRAFTED, 200)] * MIN_BATCHES
    for base in ([(0, 0)] * MIN_BATCHES, [(DRAFTED, 0)] * MIN_BATCHES, ours[:-1], []):
        assert compare_rates(ours, base) is None
    assert relative_half_width(ours[:-1]) == math.inf


def test_counting_may_stop_where_nothing_is_drafted() -> None:
    assert relative_half_width([(0, 0)] * MIN_BATCHES) == 0.0


def test_counting_goes_on_where_no_draft_is_accepted_yet() -> None:
    assert relative_half_width([(DRAFTED, 0)] * 3 * MIN_BATCHES) == math.inf


def test_further_tokens_are_those_that_make_the_interval_end_at_the_limit() -> None:
    """The interval is half as wide with four times the tokens."""
    ratio = Ratio(0.97, 0.97 / 1.04, 0.97 * 1.04)
    more = ratio.further_tokens(0.95, 10_000)
    assert more is not None
    factor = math.exp(math.log(1.04) / math.sqrt((10_000 + more) / 10_000))
    assert 0.97 / factor == pytest.approx(0.95, rel=1e-6)
    assert ratio.further_tokens(0.97, 10_000) is None and Ratio(0, 0, 0.1).further_tokens(0.05, 10_000) is None


@pytest.mark.parametrize(("freedom", "quantile"), [(9, 2.2622), (19, 2.0930), (60, 2.0003), (1000, 1.9623)])
def test_the_quantiles_are_those_of_students_t(freedom: int, quantile: float) -> None:
    assert _t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-3)


def test_the_factory_of_these_tests_makes_the_rates_that_it_says() -> None:
    random = np.random.default_rng(5)
    assert statistics.fmean(rate(counts(random, 0.8)) or 0 for _ in range(50)) == pytest.approx(0.8, abs=0.005)
