"""Pictures with a point for each block or matrix: errors, slopes, and losses before and after tuning."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from requant.tasks.plots import Picture
from requant.tasks.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    block_axis,
    canvas,
    finite,
    legend,
    percent,
    percent_tick,
    rendered,
    scientific_tick,
    short,
    value_axis,
)
from requant.tasks.record import RecordedBlock
from requant.tasks.validating.gates import slope_off
from requant.tasks.validating.measured import BlockError, MatrixError

OUTLIER_FACTOR = 3.0  # an error this many times the median of its kind of block gets a label
MIN_LABELLED_SLOPE = 0.02  # a slope this far off gets a label
MAX_LABELS = 3
# A kind of block has the same style in every picture.
KINDS = {"linear_attention": (BLUE, "o"), "full_attention": (ORANGE, "s")}
OTHER_STYLE = (GREEN, "D")
BLOCK_INDEX = re.compile(r"^(?!mtp\.).*?\b(?:layers|h|blocks)\.(\d{1,4})(?:\.|$)")


def block_errors(blocks: Sequence[BlockError]) -> Picture | None:
    """Draw the error of each block's output, by kind of block, and the drift of the hidden states behind it."""
    indices = [block.block for block in blocks]
    errors = [finite(block.error) for block in blocks]
    drifts = [finite(block.drift) for block in blocks]
    positive = [error for error in errors if error > 0]
    if not positive:
        return None
    figure, (axes,) = canvas("Error of each block", 3.1)
    for kind in _kinds(blocks):
        color, marker = KINDS.get(kind, OTHER_STYLE)
        points = [i for i, block in enumerate(blocks) if block.kind == kind and errors[i] > 0]
        axes.scatter(
            [indices[i] for i in points],
            [errors[i] for i in points],
            s=26,
            color=color,
            marker=marker,
            label=short(kind.replace("_", " "), 18),
            gid=f"error {short(kind)}",
        )
    axes.plot(indices, drifts, color=GREY, linewidth=1.4, zorder=1, label="drift: all blocks up to it", gid="drift")
    value_axis(axes, [*positive, *drifts], percent_tick)
    axes.set_ylabel("relative error")
    block_axis(axes, indices)
    legend(axes)
    for index, error in _outliers(blocks, errors):
        _label(axes, index, error, f"block {index}: {percent(error)}", indices)
    not_finite = [index for index, error in zip(indices, errors, strict=True) if math.isnan(error)]
    for index in not_finite[:MAX_LABELS]:
        axes.axvline(index, color=ORANGE, linestyle=":", gid=f"not a number {index}")
        axes.annotate(
            f"block {index}: not a number",
            (index, axes.get_ylim()[1]),
            (-2, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
        )
    worst = max(positive)
    caption = (
        "Relative error of each block's output against the base's, given the base's input: median "
        f"{percent(statistics.median(positive))}, worst {percent(worst)} in block {indices[errors.index(worst)]}"
        + (f"; no number in block {', '.join(map(str, not_finite[:MAX_LABELS]))}" if not_finite else "")
        + "."
    )
    return rendered("block-errors", caption, figure)


def _kinds(blocks: Sequence[BlockError]) -> list[str]:
    """Return the kinds of the blocks: at first those of KINDS, in that order, then the others by name."""
    kinds = {block.kind for block in blocks}
    return [*(kind for kind in KINDS if kind in kinds), *sorted(kinds - set(KINDS))]


def _outliers(blocks: Sequence[BlockError], errors: Sequence[float]) -> list[tuple[int, float]]:
    """Return index and error of the blocks whose error is far above that of others of their kind, the worst first."""
    by_kind: dict[str, list[float]] = {}
    for block, error in zip(blocks, errors, strict=True):
        if error > 0:
            by_kind.setdefault(block.kind, []).append(error)
    limits = {kind: OUTLIER_FACTOR * statistics.median(values) for kind, values in by_kind.items()}
    outliers = [
        (block.block, error)
        for block, error in zip(blocks, errors, strict=True)
        if error > 0 and error > limits[block.kind]
    ]
    return sorted(outliers, key=lambda outlier: -outlier[1])[:MAX_LABELS]


@dataclass(frozen=True)
class _MatrixPoint:
    """A quantized matrix as it is drawn."""

    module: str
    bits: str
    error: float
    slope_off: float  # how far the slope is from where rounding alone would put it
    block: int | None


def matrices(measured: Sequence[MatrixError]) -> Picture | None:
    """Draw the relative error of each quantized matrix, and how far its slope is from that of rounding alone.

    The slope is `<Q, W> / <W, W>` (tasks/validating/gates.py).
    """
    points = [
        _MatrixPoint(_module(m.name), short(m.bits, 6), finite(m.error), slope_off(m), _block_of(m.name))
        for m in measured
    ]
    points = [point for point in points if point.error > 0 and math.isfinite(point.slope_off)]
    if not points:
        return None
    behind = 1 + max(point.block or 0 for point in points)  # where the output layer and the head are drawn
    indices = [behind if point.block is None else point.block for point in points]
    errors, slopes_off = [point.error for point in points], [point.slope_off for point in points]
    figure, (above, below) = canvas("Quantized matrices against the base's", 4.2, rows=2)
    for bits, color in zip(sorted({point.bits for point in points}), (BLUE, ORANGE, GREEN, GREY), strict=False):
        drawn = [i for i, point in enumerate(points) if point.bits == bits]
        for axes, values, what in ((above, errors, "error"), (below, slopes_off, "slope")):
            axes.scatter(
                [indices[i] for i in drawn],
                [values[i] for i in drawn],
                s=14,
                color=color,
                alpha=0.75,
                linewidths=0,
                label=f"{bits} bits",
                gid=f"{what} {bits} bits",
            )
    value_axis(above, errors, percent_tick)
    above.set_ylabel("relative error")
    reach = 1.35 * max(0.002, *map(abs, slopes_off))
    below.axhline(0, color=INK, linewidth=0.8)
    below.set_ylim(-reach, reach)
    below.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.4g} %" if value else "0")
    below.set_ylabel("slope, off by")
    block_axis(below, indices)
    above.grid(axis="x", visible=False)
    if behind in indices:
        ticks = [int(tick) for tick in below.get_xticks() if tick < behind]
        below.set_xticks([*ticks, behind], [*map(str, ticks), "other"])
    legend(above)
    for i in _farthest(indices, slopes_off):
        _label(below, indices[i], slopes_off[i], f"{points[i].module}: {percent(slopes_off[i])}", indices)
    worst = max(points, key=lambda point: point.error)
    farthest = max(points, key=lambda point: abs(point.slope_off))
    caption = (
        f"Of each quantized matrix the relative error, at most {percent(worst.error)} ({worst.module}), "
        "and how far its slope on the base's is from where rounding alone would put it: at most "
        f"{percent(abs(farthest.slope_off))} ({farthest.module})."
    )
    return rendered("matrices", caption, figure)


def _farthest(indices: Sequence[int], slopes_off: Sequence[float]) -> list[int]:
    """Return the places of the matrices that get a label: of each block the farthest, if it is far; farthest first."""
    ordered = sorted(range(len(slopes_off)), key=lambda i: -abs(slopes_off[i]))
    by_block = {indices[i]: i for i in reversed(ordered) if abs(slopes_off[i]) > MIN_LABELLED_SLOPE}
    return sorted(by_block.values(), key=lambda i: -abs(slopes_off[i]))[:MAX_LABELS]


def losses(blocks: Sequence[RecordedBlock]) -> Picture | None:
    """Draw the loss of each block before tuning and after."""
    points: list[tuple[int, float, float]] = []
    for number, block in enumerate(blocks):
        index, before, after = _block_of(block.name), finite(block.loss_before), finite(block.loss_after)
        if before > 0 and after > 0:
            points.append((number if index is None else index, before, after))
    if not points:
        return None
    indices, losses_before, losses_after = zip(*points, strict=True)
    figure, (axes,) = canvas("Loss of each block, before tuning and after", 2.9)
    axes.vlines(indices, losses_after, losses_before, color=GREY, linewidth=1.2, alpha=0.7)
    axes.scatter(
        indices, losses_before, s=24, facecolors="none", edgecolors=GREY, linewidths=1.4, label="before", gid="before"
    )
    axes.scatter(indices, losses_after, s=24, color=BLUE, label="after", gid="after")
    value_axis(axes, [*losses_before, *losses_after], scientific_tick)
    axes.set_ylabel("mean squared error")
    block_axis(axes, indices)
    legend(axes)
    gain = statistics.median(before / after for _, before, after in points)
    return rendered("losses", f"Tuning made the loss of a block {gain:.3g} times smaller (median).", figure)


def _block_of(name: str) -> int | None:
    """Return the index of the decoder block in a name; None for the MTP head and for names without a block."""
    match = BLOCK_INDEX.match(name)
    return int(match[1]) if match else None


def _module(tensor: str) -> str:
    """Shorten a tensor's name to the index of its block and the name of its module in the block."""
    name = tensor.removesuffix(".weight")
    match = BLOCK_INDEX.match(name)
    return short(name[match.start(1) :] if match else name)


def _label(axes: Axes, x: float, y: float, text: str, xs: Sequence[int]) -> None:
    """Write text above a point, on the side where there is more room; `xs` are those of all points."""
    right = x <= (min(xs) + max(xs)) / 2
    axes.annotate(
        text,
        (x, y),
        (6 if right else -6, 3),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom",
    )
