"""Checks whether a quantized matrix is a rounding of the base's matrix with the scales that the checkpoint states.

The slope of a rounded matrix (see weight_error.py) depends on its bits, groups and values: at 2 bits, clipping alone
takes 10 %. Therefore the expected slope is computed: the base's matrix is rounded to nearest with the checkpoint's own
scales and zero points, and compared with the checkpoint's matrix. The result is two figures:

    slope_excess   the slope of the checkpoint's matrix minus that of the rounded one: 0 apart from the effect of
                   tuning, and about -1 for an unrelated matrix
    scale_factor   the factor by which the scales are too large: 1, or 1.05 if they are 5 % too large

An integer says between which two boundaries its weight was when it was rounded. If the scales are too large by the
factor t, the weight is between these boundaries only after multiplication by t. `scale_factor` is the t for which most
integers agree with their weights.

Tuning moves integers too: up to one weight in eight, in both directions, and by about the same part of a step at every
boundary. Wrong scales move a boundary further, the further it is from zero. Boundaries therefore count by the fourth
power of their distance from zero. Matrices of a language model that auto-round tuned (SmolLM2, 42 for each width) have
factors of 0.976 to 1.026 with 2 bits, 0.993 to 1.007 with 3 bits, and 0.995 to 1.003 with 4 bits, also with groups of
complete rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from requant.tasks.checkpoint.packing import Array, Floats

SAMPLED_WEIGHTS = 1 << 19  # the weights of a matrix that are compared, in evenly spaced rows
FACTORS: npt.NDArray[np.float64] = np.exp(np.linspace(np.log(0.8), np.log(1.25), 181))  # candidates for `scale_factor`
FITTED_FACTORS = 10  # the factors on each side of the best one to which a parabola is fitted
DISTANCE_POWER = 4  # the power of its distance from zero by which a boundary counts
MIN_BOUNDARIES = 200  # with fewer boundaries within 5 % of a weight, the factor of the scales is not determined


@dataclass
class Rounding:
    """Sums over the rows of a matrix that were compared so far.

    `weights`: the sum of squared weights. `excess`, `noise`: the numerators of `slope_excess` and `rounding_noise`.
    `misplaced_changes`: for each interval of FACTORS, how the weighted number of misplaced integers changes there.
    """

    bits: int
    weights: float = 0.0
    excess: float = 0.0
    noise: float = 0.0
    close_boundaries: int = 0
    misplaced_changes: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(FACTORS) - 1))

    def add(self, ours: Floats, theirs: Floats, scales: Floats, zeros: Array) -> None:
        """Add rows `[rows, in]` of both matrices, with the scale and the zero point of each weight.

        A weight whose scale is 0 or not finite counts as rounded to 0.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            x, integers = theirs / scales, np.rint(ours / scales)
        known = np.isfinite(x) & np.isfinite(integers) & np.isfinite(scales)
        lost = float(np.square(theirs[~known & np.isfinite(theirs)]).sum(dtype=np.float64))
        x, integers, scales = (values[known].astype(np.float32) for values in (x, integers, scales))
        low = -zeros[known].astype(np.float32)
        high = low + ((1 << self.bits) - 1)
        rounded = np.clip(np.rint(x), low, high)
        weights = x * scales
        self.weights += float(np.vdot(weights, weights)) + lost
        self.excess += float(np.vdot((integers - rounded) * scales, weights))
        self.noise += float(np.square(rounded * scales - weights).sum(dtype=np.float64)) + lost
        self._count_boundaries(x, integers, low, high)

    def _count_boundaries(self, x: Floats, integers: Floats, low: Floats, high: Floats) -> None:
        """Record between which two factors each integer is the rounding of its weight.

        At the lower factor the number of misplaced integers decreases, and at the upper factor it increases. The
        smallest and the largest integer have only one of the two.
        """
        nonzero = x != 0
        x, integers, low, high = x[nonzero], integers[nonzero], low[nonzero], high[nonzero]
        size, down = np.abs(x), x < 0
        toward = np.where(down, -integers, integers)  # positive in the direction of the weight
        lowest, highest = np.where(down, -high, low), np.where(down, -low, high)
        for boundary, open_end, sign in ((toward - 0.5, toward <= lowest, -1), (toward + 0.5, toward >= highest, 1)):
            factor = (boundary / size)[~open_end]
            counts = boundary[~open_end].astype(np.float64) ** DISTANCE_POWER
            self.misplaced_changes += sign * np.histogram(factor, FACTORS, weights=counts)[0]
            self.close_boundaries += int(((factor > 0.95) & (factor < 1.05)).sum())

    @property
    def slope_excess(self) -> float:
        return self.excess / self.weights if self.weights else 0.0

    @property
    def rounding_noise(self) -> float:
        """|R - W|^2 / |W|^2, where R is W rounded to nearest."""
        return self.noise / self.weights if self.weights else 0.0

    @property
    def scale_factor(self) -> float:
        """The factor with which the fewest integers are misplaced; 1 if there are too few boundaries to say."""
        if self.close_boundaries < MIN_BOUNDARIES:
            return 1.0
        misplaced = np.concatenate([[0.0], np.cumsum(self.misplaced_changes)])
        best = int(np.argmin(misplaced))
        window = slice(max(best - FITTED_FACTORS, 0), best + FITTED_FACTORS + 1)
        factors = np.log(FACTORS[window])
        depth = np.ptp(misplaced[window])
        if not depth:
            return float(FACTORS[best])
        curve, tilt, _ = np.polyfit(factors - factors.mean(), misplaced[window] / depth, 2)
        if curve <= 0:
            return float(FACTORS[best])
        lowest = np.clip(factors.mean() - tilt / (2 * curve), factors[0], factors[-1])
        return float(np.exp(lowest))
