"""Whether a packed matrix is a rounding of the base's with the scales that it states, or with other ones.

What rounding does to the slope of a matrix follows its bits, its groups and its values: at 2 bits clipping alone takes
10 %. So it is not assumed but computed: the base's matrix is rounded to nearest with the checkpoint's own scales and
zero points, and compared with what the checkpoint holds. Two figures come of it:

    slope_excess   the slope of the checkpoint's matrix minus that of the rounded one: 0, but for what tuning moved;
                   about -1 where it is another matrix
    scale_factor   the factor by which the scales are too large: 1, and 1.05 where they are 5 % too large

An integer says between which two boundaries its weight lay when it was rounded. With scales that are too large by t,
the weight is between them only after it was multiplied by t: `scale_factor` is the t for which most integers are where
their weights are. Tuning moves integers too, up to one weight in eight, in both directions and by about the same part
of a step at every boundary; wrong scales move a boundary the more, the farther it is from zero. Boundaries therefore
count by the fourth power of their distance. Matrices of a language model tuned by auto-round (SmolLM2, 42 each) come to
0.976 to 1.026 in 2 bits, 0.993 to 1.007 in 3, and 0.995 to 1.003 in 4 bits, with whole rows too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from requant.tasks.checkpoint.packing import Array, Floats

SAMPLED = 1 << 19  # weights of a matrix that are looked at, in rows at even distances
EDGES: npt.NDArray[np.float64] = np.exp(np.linspace(np.log(0.8), np.log(1.25), 181))  # factors that are tried
FITTED = 10  # factors on each side of the best one through which a parabola is laid
DISTANCE = 4  # the power of a boundary's distance from zero by which it counts
ENOUGH = 200  # boundaries within 5 % of a weight, below which the factor of the scales cannot be told


@dataclass
class Rounding:
    """What is known of a matrix after some of its rows."""

    bits: int
    weights: float = 0.0
    excess: float = 0.0
    noise: float = 0.0
    near: int = 0
    places: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(EDGES) - 1))

    def add(self, ours: Floats, theirs: Floats, scales: Floats, zeros: Array) -> None:
        """Some rows of both matrices, `[rows, in]`, with the scale and the zero point of each weight.

        Of a weight whose scale is no scale (0, or no number) the rounding leaves nothing."""
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
        self._count_places(x, integers, low, high)

    def _count_places(self, x: Floats, integers: Floats, low: Floats, high: Floats) -> None:
        """Count between which two factors each integer is the rounding of its weight: -1 at the lower, 1 at the upper.

        The outermost integers are so from the lower factor on, or up to the upper one, however large or small."""
        told = x != 0
        x, integers, low, high = x[told], integers[told], low[told], high[told]
        size, down = np.abs(x), x < 0
        toward = np.where(down, -integers, integers)  # counted in the direction of the weight
        lowest, highest = np.where(down, -high, low), np.where(down, -low, high)
        for boundary, open_end, sign in ((toward - 0.5, toward <= lowest, -1), (toward + 0.5, toward >= highest, 1)):
            factor = (boundary / size)[~open_end]
            counts = boundary[~open_end].astype(np.float64) ** DISTANCE
            self.places += sign * np.histogram(factor, EDGES, weights=counts)[0]
            self.near += int(((factor > 0.95) & (factor < 1.05)).sum())

    @property
    def slope_excess(self) -> float:
        return self.excess / self.weights if self.weights else 0.0

    @property
    def rounding_noise(self) -> float:
        """|R - W|^2 / |W|^2 of rounding to nearest."""
        return self.noise / self.weights if self.weights else 0.0

    @property
    def scale_factor(self) -> float:
        """The factor with the fewest integers out of place; 1 where too few boundaries are near to tell."""
        if self.near < ENOUGH:
            return 1.0
        misplaced = np.concatenate([[0.0], np.cumsum(self.places)])
        best = int(np.argmin(misplaced))
        window = slice(max(best - FITTED, 0), best + FITTED + 1)
        factors = np.log(EDGES[window])
        depth = np.ptp(misplaced[window])
        if not depth:
            return float(EDGES[best])
        curve, tilt, _ = np.polyfit(factors - factors.mean(), misplaced[window] / depth, 2)
        if curve <= 0:
            return float(EDGES[best])
        lowest = np.clip(factors.mean() - tilt / (2 * curve), factors[0], factors[-1])
        return float(np.exp(lowest))
