"""The figures that follow from measured arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from requant.tasks.validating.measurement import Measurement, interval, perplexity_increase


def measurement(**arrays: Any) -> Measurement:
    """One window of five tokens, of which nothing was measured but what is given."""
    empty = np.zeros((0, 0), np.int32)
    values: dict[str, Any] = {
        "tokens": np.zeros((1, 5), np.int32),
        "nll": np.zeros((1, 4), np.float32),
        "top1": np.zeros((1, 4), np.int32),
        "drafts": np.zeros((0, 0, 0), np.int32),
        "generated": empty,
        "speculation": empty,
        "speculative": np.zeros(0, np.float32),
        "context": np.array([5, 5], np.int32),
        "hidden": torch.zeros(1, 5, 2),
        "probes": torch.zeros(2, 5, 2),
        "features": torch.empty(0),
    }
    return Measurement(**{**values, **arrays})


def test_a_measurement_survives_being_written_and_read(tmp_path: Path) -> None:
    nll = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    before = measurement(nll=nll, hidden=torch.ones(1, 5, 2, dtype=torch.bfloat16), domains=("code",))
    (tmp_path / "file").write_bytes(before.to_bytes())
    after = Measurement.load(tmp_path / "file")
    assert after.domains == before.domains == ("code",)
    assert math.isclose(after.perplexity, math.exp(2.5)) and after.acceptance is None
    for name, value in vars(before).items():
        if name == "domains":
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(vars(after)[name], value) and vars(after)[name].dtype == value.dtype
        else:
            np.testing.assert_array_equal(vars(after)[name], value)


@pytest.mark.parametrize(
    ("draft", "share"), [([11, 12, 13, 99], 1.0), ([11, 99, 13, 99], 2 / 3), ([10, 11, 12, 13], 0)]
)
def test_acceptance_compares_a_draft_with_the_choice_one_position_later(draft: list[int], share: float) -> None:
    """The draft at t is for token t + 2, which the main model chooses at t + 1."""
    top1 = np.array([[10, 11, 12, 13]], np.int32)
    found = measurement(top1=top1, drafts=np.array([[draft]], np.int32))
    assert found.acceptance == pytest.approx(share) and found.acceptance_by_position == [pytest.approx(share)]


def test_a_second_draft_counts_where_the_text_went_on_as_the_first_said() -> None:
    """Three places to draft at. First drafts 11, 12, 13 are all taken, the text follows those at 0 and 1; of the second
    drafts there, one is taken: (1) * (1 / 2)."""
    tokens = np.array([[0, 0, 11, 12, 77]], np.int32)
    top1 = np.array([[10, 11, 12, 13]], np.int32)
    drafts = np.array([[[11, 12, 13, 0]], [[12, 99, 0, 0]]], np.int32)
    found = measurement(tokens=tokens, top1=top1, drafts=drafts)
    assert found.acceptance_by_position == [pytest.approx(1.0), pytest.approx(0.5)]


def test_a_second_draft_that_nothing_tells_of_counts_as_not_taken() -> None:
    drafts = np.array([[[1, 1, 1, 1]], [[1, 1, 1, 1]]], np.int32)
    assert measurement(drafts=drafts, top1=np.full((1, 4), 2, np.int32)).acceptance_by_position == [0.0, 0.0]


def test_greedy_acceptance_is_counted_over_the_steps_of_all_prompts() -> None:
    found = measurement(speculation=np.array([[10, 8, 4], [30, 20, 6]], np.int32))
    assert found.greedy_acceptance_by_position == [0.7, 0.25]
    assert measurement().greedy_acceptance_by_position == []


def test_an_interval_holds_the_mean_is_reproducible_and_shrinks_with_more_windows() -> None:
    random = np.random.default_rng(3)
    few, many = random.normal(2, 1, 24), random.normal(2, 1, 2400)
    low, high = interval(few, np.exp)
    assert low < math.exp(few.mean()) < high and interval(few, np.exp) == (low, high)
    narrow = interval(many, np.exp)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert interval(np.full(24, 2.0), np.exp) == (pytest.approx(math.exp(2)), pytest.approx(math.exp(2)))


def test_an_increase_is_compared_window_by_window() -> None:
    """Windows differ by far more than the models do, and the interval of the increase does not show it."""
    nll = np.random.default_rng(1).normal(3, 1, (24, 1)).astype(np.float32) + np.zeros((24, 9), np.float32)
    worse = nll + np.float32(0.05)
    base, ours = measurement(nll=nll), measurement(nll=worse)
    increase, (low, high) = perplexity_increase(ours, base)
    assert increase == pytest.approx(math.exp(0.05) - 1, rel=1e-4)
    assert low == pytest.approx(increase, rel=1e-3) and high == pytest.approx(increase, rel=1e-3)
    wide = ours.perplexity_interval
    assert wide[1] - wide[0] > 0.2 * ours.perplexity
