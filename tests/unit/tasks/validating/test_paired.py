"""The comparison of pairs: its verdicts, its numbers, and how often it is wrong."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from requant.tasks.validating.paired import (
    ERROR_RATE,
    MAX_LOOKS,
    MIN_ITEMS,
    Comparison,
    Scale,
    Verdict,
    compare_pairs,
    critical_value,
    look_sizes,
    mcnemar,
)

MARGIN = 0.02
RUNS = 600


def flipped(items: int, lost: int, gained: int, kept: int) -> Comparison:
    """Compare two models on items of which `kept` are right in both."""
    base = [1.0] * (kept + lost) + [0.0] * (items - kept - lost)
    ours = [1.0] * kept + [0.0] * lost + [1.0] * gained + [0.0] * (items - kept - lost - gained)
    return compare_pairs(base, ours, MARGIN)


def test_an_equal_pair_is_equivalent_once_there_are_as_many_items_as_that_takes() -> None:
    needed = 189  # z^2 / (n + z^2) < 0.02
    few = flipped(40, 0, 0, 30)
    assert few.verdict is Verdict.CANNOT_TELL and few.items + few.more_items == needed
    assert flipped(needed - 1, 0, 0, 100).verdict is Verdict.CANNOT_TELL
    enough = flipped(needed, 0, 0, 100)
    assert (enough.verdict, enough.more_items, enough.p_value, enough.recovery) == (Verdict.EQUIVALENT, 0, 1.0, 1.0)
    assert -MARGIN < enough.interval[0] < 0 < enough.interval[1] < MARGIN


def test_damage_is_worse_and_its_reverse_is_better() -> None:
    worse, better = flipped(200, 30, 4, 120), flipped(200, 4, 30, 120)
    assert (worse.verdict, worse.lost, worse.gained) == (Verdict.WORSE, 30, 4)
    assert (better.verdict, better.lost, better.gained) == (Verdict.BETTER, 4, 30)
    assert worse.difference == pytest.approx(-0.13) == -better.difference
    assert worse.p_value == better.p_value < 1e-5
    assert worse.recovery == pytest.approx(124 / 150) and worse.recovery_interval is not None
    assert worse.recovery_interval[0] < 124 / 150 < worse.recovery_interval[1] < 1


def test_as_many_flips_both_ways_in_few_items_cannot_be_told() -> None:
    found = flipped(200, 10, 10, 100)
    assert found.verdict is Verdict.CANNOT_TELL and found.p_value == 1.0 and found.more_items > 500
    needed = 200 + found.more_items
    below, above = needed // 20, -(-needed // 20)  # in steps of 20 items, one flip each way in each
    assert flipped(20 * above, above, above, 10 * above).verdict is Verdict.EQUIVALENT
    assert flipped(20 * below - 20, below - 1, below - 1, 10 * below).verdict is Verdict.CANNOT_TELL


def test_a_real_difference_within_the_margin_is_equivalent() -> None:
    found = flipped(20_000, 150, 50, 15_000)
    assert found.interval[1] < 0 and found.verdict is Verdict.EQUIVALENT


def test_few_items_decide_nothing_however_they_differ() -> None:
    found = flipped(MIN_ITEMS - 1, MIN_ITEMS - 1, 0, 0)
    assert (found.verdict, found.more_items) == (Verdict.CANNOT_TELL, 1)


def test_where_less_is_better_a_smaller_value_is_better() -> None:
    base = np.full(400, 0.30)
    found = compare_pairs(base, base + np.tile([0.05, 0.15], 200), MARGIN, scale=Scale.LOSS)
    assert found.verdict is Verdict.WORSE and found.difference == pytest.approx(-0.1)
    assert found.recovery == pytest.approx(0.75)


def test_log_likelihoods_keep_a_ratio_of_likelihoods() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(-40, 10, 500)
    found = compare_pairs(base, base + generator.normal(-0.1, 0.2, 500), MARGIN, scale=Scale.LOG_LIKELIHOOD)
    assert found.verdict is Verdict.WORSE and found.lost + found.gained == 500
    assert found.recovery == pytest.approx(math.exp(found.difference)) and found.recovery_interval is not None
    assert found.recovery_interval == pytest.approx(tuple(map(math.exp, found.interval)))
    assert compare_pairs(base, base, MARGIN, scale=Scale.LOG_LIKELIHOOD).verdict is Verdict.EQUIVALENT


def test_a_base_without_a_score_has_no_recovery() -> None:
    assert compare_pairs([0.0] * 50, [1.0] * 50, MARGIN).recovery is None
    assert flipped(50, 0, 0, 50).recovery == 1.0


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (9, 2), (10, 10), (40, 20), (1500, 1400)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    flips = lost + gained
    tail = sum(Fraction(math.comb(flips, k), 2**flips) for k in range(min(lost, gained) + 1))
    assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(min(1.0, float(2 * tail)), rel=1e-12)


@pytest.mark.parametrize(
    ("base", "ours", "margin"),
    [
        ([], [], 0.02),
        ([1.0], [1.0, 0.0], 0.02),
        ([1.0], [math.nan], 0.02),
        ([1.0], [1.0], 0.0),
        ([[1.0]], [[1.0]], 1.0),
    ],
)
def test_what_are_no_pairs_is_refused(base: list[float], ours: list[float], margin: float) -> None:
    with pytest.raises(ValueError):
        compare_pairs(base, ours, margin)


def test_looks_double_up_to_all_items_and_none_is_small() -> None:
    assert look_sizes(3200) == (200, 400, 800, 1600, 3200)
    assert look_sizes(1001) == (251, 501, 1001) and look_sizes(400) == (200, 400)
    assert look_sizes(399) == (200, 399) and look_sizes(398) == (398,) and look_sizes(7) == (7,)
    assert all(len(look_sizes(n)) <= MAX_LOOKS for n in range(1, 3000))
    assert all(a < b for n in range(1, 3000) for a, b in pairwise(look_sizes(n)))
    assert critical_value(1) == pytest.approx(1.96, abs=1e-3) and critical_value(5) == pytest.approx(2.576, abs=1e-3)


@pytest.mark.parametrize(
    ("lost_share", "gained_share", "wrong"),
    [
        (0.0, 0.0, {Verdict.WORSE, Verdict.BETTER}),
        (0.03, 0.03, {Verdict.WORSE, Verdict.BETTER}),
        (0.15, 0.15, {Verdict.WORSE, Verdict.BETTER}),
        (0.02, 0.0, {Verdict.EQUIVALENT, Verdict.BETTER}),  # as far as the margin
        (0.05, 0.03, {Verdict.EQUIVALENT, Verdict.BETTER}),
        (0.03, 0.05, {Verdict.EQUIVALENT, Verdict.WORSE}),
    ],
)
def test_a_run_that_stops_once_decided_is_wrong_as_rarely_as_promised(
    lost_share: float, gained_share: float, wrong: set[Verdict]
) -> None:
    generator = np.random.default_rng(22)
    items = 3200
    drawn = generator.random((RUNS, items))
    base, ours = (drawn < 1 - gained_share) * 1.0, (drawn > lost_share) * 1.0
    errors = sum(stopped(*pair).verdict in wrong for pair in zip(base, ours, strict=True))
    # Above this, the true rate is more than ERROR_RATE with a confidence of 99.9 %.
    assert errors <= RUNS * ERROR_RATE + 3.1 * math.sqrt(RUNS * ERROR_RATE * (1 - ERROR_RATE))


def stopped(base: np.ndarray, ours: np.ndarray) -> Comparison:
    """Compare as a run does that stops once it is decided."""
    sizes = look_sizes(len(base))
    for size in sizes:
        found = compare_pairs(base[:size], ours[:size], MARGIN, looks=len(sizes))
        if found.verdict is not Verdict.CANNOT_TELL:
            break
    return found


def test_a_clear_case_stops_early() -> None:
    base = np.tile([1.0, 1.0, 0.0, 1.0], 2000)
    assert stopped(base, base).items == 500
    assert stopped(base, np.where(np.arange(8000) % 5 == 0, 0.0, base)).items == 500
