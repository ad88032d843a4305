"""The difference of what a vision tower makes of an image, in base and result."""

from __future__ import annotations

import math

import pytest
import torch

from requant.tasks.validating.compare import feature_difference

NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    ("of_result", "of_base", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.5),
        ([1.0, NAN, INFINITE], [1.0, NAN, INFINITE], 0.0),
        ([1.5, NAN], [1.0, NAN], 0.5),
        ([NAN, 2.0], [1.0, 2.0], INFINITE),
        ([1.0, 2.0], [NAN, 2.0], INFINITE),
        ([INFINITE], [-INFINITE], INFINITE),
        ([1.0], [1.0, 2.0], INFINITE),
        ([], [], None),
    ],
)
def test_features_differ_only_where_the_base_has_other_ones(
    of_result: list[float], of_base: list[float], expected: float | None
) -> None:
    assert feature_difference(torch.tensor(of_result), torch.tensor(of_base)) == expected
