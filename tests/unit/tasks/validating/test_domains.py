"""The comparison by domain: values of the windows of each domain, and intervals that hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from requant.tasks.validating import LONG_CONTEXT
from requant.tasks.validating.domains import MIN_WINDOWS, compare_domains
from requant.tasks.validating.measured import DomainValues
from requant.tasks.validating.measurement import UNDRAFTED, Measurement, aligned, interval, quantile_interval

PLACES = 40


def measured(windows: dict[str, int], *, loss: float = 2.0, seed: int = 0, **arrays: Any) -> Measurement:
    """Measure so many windows of each domain, with random losses and choices."""
    random, count = np.random.default_rng(seed), sum(windows.values())
    values: dict[str, Any] = {
        "tokens": np.ones((count, PLACES + 1), np.int32),
        "nll": random.normal(loss, 0.1, (count, PLACES)).astype(np.float32),
        "top1": np.full((count, PLACES), 5, np.int32),
        "drafts": np.full((1, count, PLACES), 5, np.int32),
        "generated": np.zeros((0, 0), np.int32),
        "speculation": np.zeros((0, 0), np.int32),
        "speculative": np.zeros(0, np.float32),
        "context": np.array([5, 5], np.int32),
        "hidden": torch.zeros(count, PLACES + 1, 2),
        "probes": torch.zeros(2, 5, 2),
        "features": torch.empty(0),
        "domains": tuple(name for name, number in windows.items() for _ in range(number)),
    }
    return Measurement(**{**values, **arrays})


def compared(ours: Measurement, base: Measurement, kl: float = 0.1) -> dict[str, DomainValues]:
    return compare_domains(ours, base, np.full(base.nll.shape, kl, np.float32))


def test_each_domain_has_the_values_of_its_own_windows() -> None:
    base = measured({"code": 6, "prose": 5})
    nll = base.nll.copy()
    nll[6:] += 0.3
    top1 = base.top1.copy()
    top1[6:, ::2] = 7
    kl = np.zeros(base.nll.shape, np.float32)
    kl[6:] = 0.4
    found = compare_domains(measured({"code": 6, "prose": 5}, nll=nll, top1=top1), base, kl)
    code, prose = found["code"], found["prose"]
    assert list(found) == ["code", "prose"] and (code.tokens, prose.tokens) == (6 * 41, 5 * 41)
    assert (code.perplexity_increase, code.kl_divergence, code.top1_agreement) == (0.0, 0.0, 1.0)
    assert prose.perplexity_increase == pytest.approx(np.expm1(0.3), rel=1e-4)
    assert prose.kl_divergence == prose.kl_divergence_p99 == pytest.approx(0.4) and prose.top1_agreement == 0.5
    assert code.mtp_acceptance_ratio == 1.0 and prose.mtp_acceptance_ratio == pytest.approx(0.5, abs=0.03)


def test_a_value_lies_in_its_interval() -> None:
    random = np.random.default_rng(1)
    base = measured({"code": 16}, seed=2, drafts=random.integers(4, 6, (1, 16, PLACES)).astype(np.int32))
    ours = measured({"code": 16}, seed=3, top1=random.integers(4, 6, (16, PLACES)).astype(np.int32), drafts=base.drafts)
    kl = random.exponential(0.1, base.nll.shape).astype(np.float32)
    values = compare_domains(ours, base, kl)["code"].model_dump()
    names = [name.removesuffix("_interval") for name in values if name.endswith("_interval")]
    assert len(names) == 9
    for name in names:
        low, high = values[f"{name}_interval"]
        assert low < values[name] < high, name


def test_a_domain_of_few_windows_has_no_intervals() -> None:
    few, enough = {"code": MIN_WINDOWS - 1}, {"code": MIN_WINDOWS}
    values = compared(measured(few, seed=1), measured(few))["code"]
    assert all(getattr(values, name) is None for name in DomainValues.model_fields if name.endswith("_interval"))
    assert compared(measured(enough, seed=1), measured(enough))["code"].kl_divergence_interval is not None


def test_without_a_head_or_an_accepted_draft_there_is_no_ratio() -> None:
    base = measured({"code": 4})
    no_head = {"drafts": np.zeros((0, 0, 0), np.int32)}
    assert compared(measured({"code": 4}, **no_head), base)["code"].mtp_acceptance is None
    never = measured({"code": 4}, drafts=np.full((1, 4, PLACES), 9, np.int32))
    found = compared(base, never)["code"]
    assert (found.base_mtp_acceptance, found.mtp_acceptance_ratio, found.mtp_acceptance_ratio_interval) == (
        0,
        None,
        None,
    )
    broken = measured({"code": 4}, nll=np.full((4, PLACES), np.nan, np.float32))
    assert compared(broken, base)["code"].mtp_acceptance is None


def test_a_ratio_of_few_accepted_drafts_has_a_wide_interval() -> None:
    """The base accepts one draft in one window: a resample without that window says nothing."""
    drafts = np.full((1, 8, PLACES), 9, np.int32)
    drafts[0, 0, 0] = 5
    base = measured({"code": 8}, drafts=drafts)
    values = compared(measured({"code": 8}, drafts=np.full((1, 8, PLACES), 9, np.int32)), base)["code"]
    assert values.mtp_acceptance_ratio == 0.0 and values.mtp_acceptance_ratio_interval is not None
    assert not values.mtp_acceptance_ratio_interval[1] < 0.95


def test_places_without_a_draft_do_not_count() -> None:
    """In the long text only the first draft is made."""
    drafts = np.full((2, 4, PLACES), 5, np.int32)
    drafts[1, 2:] = UNDRAFTED
    tokens = np.full((4, PLACES + 1), 5, np.int32)
    found = measured({"code": 2, LONG_CONTEXT: 2}, drafts=drafts, tokens=tokens)
    assert found.acceptance_by_position == [1.0, 1.0]


def test_measurements_of_long_texts_of_different_lengths_are_compared_where_both_are() -> None:
    one, other = measured({"code": 4, LONG_CONTEXT: 8}), measured({"code": 4, LONG_CONTEXT: 5})
    left, right = aligned(one, other)
    assert left.domains == right.domains == other.domains and left.hidden.shape == other.hidden.shape
    np.testing.assert_array_equal(left.nll, one.nll[:9])
    shorter = measured({"code": 3, LONG_CONTEXT: 8})
    assert aligned(one, shorter) == (one, shorter), "and another number of other windows is a difference"


def test_an_interval_of_pairs_is_that_of_their_ratio() -> None:
    rates = np.array([[0.5, 1.0], [0.25, 0.5], [0.4, 0.8], [0.1, 0.2]])
    assert interval(rates, lambda means: means[..., 0] / means[..., 1]) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_quantile_has_an_interval_over_windows() -> None:
    places = np.random.default_rng(0).exponential(1.0, (16, 500))
    low, high = quantile_interval(places, 0.99)
    assert low < np.quantile(places, 0.99) < high and high - low < 2
