"""Scales that are wrong are told from what rounding, clipping and tuning do, at any number of bits and any group."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from requant.tasks.checkpoint.rounding import Rounding
from requant.tasks.recipe.recipe import Gates
from requant.tasks.validating.gates import slope_error, slope_off
from requant.tasks.validating.measured import MatrixError

LIMIT = Gates().max_weight_slope_error or 0.0
ROWS, INPUTS = 192, 1024
# Of the largest weight of a group: the best of these, or all of it, where auto-round begins.
CLIPPING = {"least error": tuple(np.linspace(1, 0.5, 26)), "none": (1.0,)}
CASES = {
    "2 bits, groups of 64": (2, 64, True),
    "2 bits, groups of 64, asymmetric": (2, 64, False),
    "3 bits, groups of 128": (3, 128, True),
    "4 bits, groups of 32": (4, 32, True),
    "4 bits, whole rows": (4, INPUTS, True),
    "4 bits, whole rows, asymmetric": (4, INPUTS, False),
    "8 bits, groups of 128": (8, 128, True),
}


@dataclass
class Packed:
    """A base's matrix and what a quantizer made of it, `[rows, in]`; scales and zero points of each weight."""

    base: Any
    integers: Any
    scales: Any
    zeros: Any
    bits: int

    def figures(self, factor: float = 1.0, *, of: Any = None) -> MatrixError:
        """What fidelity says of it; with all scales too large by `factor`, or beside another base `of`."""
        base = self.base if of is None else of
        scales = (self.scales * factor).astype(np.float16).astype(np.float32)
        ours = (self.integers - self.zeros.astype(np.float32)) * scales
        sample = Rounding(self.bits)
        for part in (slice(0, 64), slice(64, None)):
            sample.add(ours[part], base[part], scales[part], self.zeros[part])
        size = float((base.astype(np.float64) ** 2).sum())
        return MatrixError(
            name="a.weight",
            bits=self.bits,
            slope=float((ours * base).sum(dtype=np.float64)) / size,
            offset=0.0,
            error=float(((ours - base).astype(np.float64) ** 2).sum() / size) ** 0.5,
            slope_excess=sample.slope_excess,
            scale_factor=sample.scale_factor,
            rounding_noise=sample.rounding_noise,
        )


@functools.cache
def heavy_tailed(seed: int) -> Any:
    """Weights as trained ones are: most are small, and some inputs have outliers."""
    random = np.random.default_rng(seed)
    weights = random.standard_t(5, (ROWS, INPUTS)) * 0.02
    weights[:, random.choice(INPUTS, 12, replace=False)] *= 3
    made = weights.astype(np.float32)
    made.flags.writeable = False
    return made


@functools.cache
def quantized(case: str, tuned: float = 0.0, clipping: str = "least error") -> Packed:
    """Round with the clipping that has the least squared error in each group. `tuned`: by how much of a step weights
    are pushed up or down before they are rounded, as sign descent does."""
    bits, group, symmetric = CASES[case]
    weights = heavy_tailed(1)
    groups = weights.reshape(ROWS, -1, group)
    top = (1 << bits) - 1
    push = np.random.default_rng(3).uniform(-tuned, tuned, groups.shape).astype(np.float32)
    found: tuple[Any, ...] = ()
    least = np.full((*groups.shape[:2], 1), np.inf)
    for ratio in CLIPPING[clipping]:
        if symmetric:  # as auto-round: the farther end is where there is one level more
            largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
            scale = -largest * ratio / (1 << (bits - 1))
            zero = np.full(scale.shape, 1 << (bits - 1))
        else:
            low, high = groups.min(-1, keepdims=True) * ratio, groups.max(-1, keepdims=True) * ratio
            scale = (high - low) / top
            zero = np.clip(np.rint(-low / scale), 0, top)
        scale = scale.astype(np.float16).astype(np.float32)
        integers = np.clip(np.rint(groups / scale + push) + zero, 0, top)
        error = np.square((integers - zero) * scale - groups).sum(-1, keepdims=True)
        better = error < least
        old = found or (integers, scale, zero)
        found = tuple(np.where(better, new, before) for new, before in zip((integers, scale, zero), old, strict=True))
        least = np.minimum(error, least)
    integers, scale, zero = (np.broadcast_to(part, groups.shape).reshape(ROWS, INPUTS) for part in found)
    return Packed(weights, integers.astype(np.float32), scale.astype(np.float32), zero.astype(np.uint8), bits)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("tuned", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_a_right_packing_raises_no_alarm(case: str, tuned: float, clipping: str) -> None:
    packed = quantized(case, tuned=tuned, clipping=clipping)
    assert slope_error(packed.figures()) < LIMIT / 2


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("tuned", [0.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_scales_that_are_5_percent_off_raise_an_alarm(case: str, tuned: float, clipping: str, factor: float) -> None:
    packed = quantized(case, tuned=tuned, clipping=clipping)
    assert slope_error(packed.figures(factor)) > LIMIT


@pytest.mark.parametrize("factor", [0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("case", CASES)
def test_scales_that_are_far_off_raise_an_alarm(case: str, clipping: str, factor: float) -> None:
    """With scales a tenth as large the rounding clips nearly every weight, and is as far from the base itself."""
    packed = quantized(case, tuned=0.5, clipping=clipping)
    figures = packed.figures(factor)
    assert slope_error(figures) > LIMIT
    assert (slope_off(figures) > 0) == (factor > 1), "and the sign says into which direction"


@pytest.mark.parametrize("case", CASES)
def test_scales_of_zero_in_most_of_a_matrix_raise_an_alarm(case: str) -> None:
    packed = quantized(case)
    scales = packed.scales.copy()
    scales[: ROWS * 2 // 3] = 0
    assert slope_error(replace(packed, scales=scales).figures()) > 0.4


@pytest.mark.parametrize("case", CASES)
def test_another_matrix_raises_an_alarm(case: str) -> None:
    packed = quantized(case)
    assert slope_error(packed.figures(of=heavy_tailed(2))) > 0.4


@pytest.mark.parametrize("case", CASES)
def test_some_rows_of_another_matrix_raise_an_alarm(case: str) -> None:
    packed = quantized(case)
    base = np.concatenate([packed.base[:160], heavy_tailed(2)[160:]])
    assert slope_error(packed.figures(of=base)) > LIMIT


@pytest.mark.parametrize(
    "case", ["2 bits, groups of 64", "2 bits, groups of 64, asymmetric", "3 bits, groups of 128", "4 bits, whole rows"]
)
def test_a_right_packing_is_not_compared_with_what_fine_rounding_would_give(case: str) -> None:
    """1 - error^2 is the slope where steps are small beside the weights and nothing is clipped: it is not so here."""
    figures = quantized(case, tuned=0.2, clipping="none").figures()
    noise = figures.error**2
    assert abs(figures.slope + noise - 1) - noise / 4 > LIMIT
    assert slope_error(figures) < LIMIT / 2


def test_of_a_few_weights_the_scales_cannot_be_told() -> None:
    sample = Rounding(2)
    weights = heavy_tailed(1)[:1, :64]
    sample.add(weights, weights, np.full((1, 64), 0.02, np.float32), np.full((1, 64), 2, np.uint8))
    assert sample.scale_factor == 1.0


@pytest.mark.parametrize("scale", [0.0, np.inf, np.nan])
def test_scales_that_are_no_scales_hinder_nothing(scale: float) -> None:
    """Of such a rounding nothing is left: the slope itself says what is wrong with the matrix."""
    sample = Rounding(4)
    weights = heavy_tailed(1)[:4]
    sample.add(weights * 0, weights, np.full(weights.shape, scale, np.float32), np.full(weights.shape, 8, np.uint8))
    assert (sample.scale_factor, sample.slope_excess, sample.rounding_noise) == (1.0, 0.0, 1.0)
