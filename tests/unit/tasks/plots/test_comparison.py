"""The picture of a comparison is drawn whatever was measured."""

from __future__ import annotations

import math

import pytest

from requant.tasks.plots.comparison import comparison
from requant.tasks.validating.comparison import Answer, ComparisonDocument, Difference, DomainComparison


def document(*divergences: tuple[float, float], answer: Answer | None = None) -> ComparisonDocument:
    rows = {
        f"domain {number}": DomainComparison(
            tokens=8192,
            kl_divergence=Difference(a=a, b=b, difference=0.5, interval=None, answer=answer),
            perplexity=(10.0, 10.0),
            top1_agreement=(0.9, 0.9),
            mtp_acceptance=None,
        )
        for number, (a, b) in enumerate(divergences)
    }
    return ComparisonDocument(a="x", b="y", base="z", text="t", answer=answer, domains=rows)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "divergences",
    [
        [(math.nan, 0.1), (0.2, 0.1)],
        [(0.1, math.nan)],
        [(math.nan, math.nan)],
        [(math.inf, 0.1)],
        [(0.0, 0.0), (0.0, 0.0)],
    ],
)
def test_values_that_are_no_numbers_or_zero_are_drawn_with_their_labels(divergences: list[tuple[float, float]]) -> None:
    svg = comparison(document(*divergences)).svg.decode()
    assert svg.count("not judged") == len(divergences) and "nan" not in svg.replace("dominant", "").lower()


def test_the_axis_reaches_beyond_the_largest_number() -> None:
    with_nan = comparison(document((math.nan, 0.1), (0.4, 0.2), answer="b")).svg.decode()
    assert ">0.4<" in with_nan and with_nan.count("B is 50 % lower") == 2
