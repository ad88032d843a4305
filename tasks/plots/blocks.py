"""Pictures along the model: the error of each block, its matrices, and its loss before and after tuning."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from requant.tasks.plots import Picture
from requant.tasks.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    canvas,
    every_block,
    legend,
    number,
    percent,
    percent_tick,
    rendered,
    scientific_tick,
    short,
    vertical,
)
from requant.tasks.validating.gates import slope_off

Values = Sequence[Mapping[str, Any]]
LABELLED_ERROR = 3.0  # times the median of its kind: an error that gets a label
OFF = 0.02  # of a slope: gets a label
LABELS = 3  # at most
# The same colours for the same kinds in each picture, whatever comes first.
KINDS = {"linear_attention": (BLUE, "o"), "full_attention": (ORANGE, "s")}
OTHER_STYLE = (GREEN, "D")
BLOCK_INDEX = re.compile(r"^(?!mtp\.).*?\b(?:layers|h|blocks)\.(\d{1,4})(?:\.|$)")


def block_errors(blocks: Values) -> Picture | None:
    """The error of each block's own output, by kind of block, and the drift of the hidden state up to it."""
    at = [int(block["block"]) for block in blocks]
    errors = [number(block, "error") for block in blocks]
    drifts = [number(block, "drift") for block in blocks]
    drawn = [value for value in errors if value > 0]
    if not drawn:
        return None
    figure, (axes,) = canvas("Error of each block", 3.1)
    for kind in _kinds(blocks):
        color, marker = KINDS.get(kind, OTHER_STYLE)
        mine = [i for i, block in enumerate(blocks) if str(block.get("kind")) == kind and errors[i] > 0]
        axes.scatter(
            [at[i] for i in mine],
            [errors[i] for i in mine],
            s=26,
            color=color,
            marker=marker,
            label=short(kind.replace("_", " "), 18),
            gid=f"error {short(kind)}",
        )
    axes.plot(at, drifts, color=GREY, linewidth=1.4, zorder=1, label="drift: all blocks up to it", gid="drift")
    vertical(axes, [*drawn, *drifts], percent_tick)
    axes.set_ylabel("relative error")
    every_block(axes, at)
    legend(axes)
    for n, error in _loud(blocks, at, errors):
        _label(axes, n, error, f"block {n}: {percent(error)}", at)
    lost = [n for n, error in zip(at, errors, strict=True) if math.isnan(error)]
    for n in lost[:LABELS]:
        axes.axvline(n, color=ORANGE, linestyle=":", gid=f"not a number {n}")
        place: dict[str, Any] = {"ha": "right", "va": "top", "rotation": 90}
        axes.annotate(f"block {n}: not a number", (n, axes.get_ylim()[1]), (-2, 0), textcoords="offset points", **place)
    worst = max(drawn)
    caption = (
        "Relative error of each block's output against the base's, given the base's input: median "
        f"{percent(statistics.median(drawn))}, worst {percent(worst)} in block {at[errors.index(worst)]}"
        + (f"; no number in block {', '.join(map(str, lost[:LABELS]))}" if lost else "")
        + "."
    )
    return rendered("block-errors", caption, figure)


def _kinds(blocks: Values) -> list[str]:
    """Known kinds first, in their order."""
    found = {str(block.get("kind")) for block in blocks}
    return [*(kind for kind in KINDS if kind in found), *sorted(found - set(KINDS))]


def _loud(blocks: Values, at: Sequence[int], errors: Sequence[float]) -> list[tuple[int, float]]:
    """The blocks that stand out from others of their kind, the worst first."""
    kinds: dict[str, list[float]] = {}
    for block, error in zip(blocks, errors, strict=True):
        if error > 0:
            kinds.setdefault(str(block.get("kind")), []).append(error)
    usual = {kind: statistics.median(values) for kind, values in kinds.items()}
    found = [
        (n, error)
        for n, error, block in zip(at, errors, blocks, strict=True)
        if error > 0 and error > LABELLED_ERROR * usual[str(block.get("kind"))]
    ]
    return sorted(found, key=lambda pair: -pair[1])[:LABELS]


def matrices(values: Values) -> Picture | None:
    """Of each packed matrix its relative error, and how far its slope `<Wq, W> / <W, W>` is from where rounding alone
    would put it (tasks/validating/gates.py)."""
    figures = ("slope", "error", "slope_excess", "scale_factor", "rounding_noise")
    told = [
        (number(v, "error"), slope_off({key: number(v, key) for key in figures if key in v}), _block_of(v), v)
        for v in values
        if "slope" in v and "error" in v
    ]
    told = [row for row in told if row[0] > 0 and math.isfinite(row[1])]
    if not told:
        return None
    behind = 1 + max(block or 0 for _, _, block, _ in told)  # where the output layer and the head are drawn
    at = [behind if block is None else block for _, _, block, _ in told]
    errors, offs = [row[0] for row in told], [row[1] for row in told]
    bits = [short(row[3].get("bits"), 6) for row in told]
    figure, (above, below) = canvas("Packed matrices against the base's", 4.2, rows=2)
    for width, color in zip(sorted(set(bits)), (BLUE, ORANGE, GREEN, GREY), strict=False):
        mine = [index for index, own in enumerate(bits) if own == width]
        dots: dict[str, Any] = {"s": 14, "color": color, "alpha": 0.75, "linewidths": 0}
        for axes, drawn, what in ((above, errors, "error"), (below, offs, "slope")):
            axes.scatter(
                [at[i] for i in mine],
                [drawn[i] for i in mine],
                label=f"{width} bits",
                gid=f"{what} {width} bits",
                **dots,
            )
    vertical(above, errors, percent_tick)
    above.set_ylabel("relative error")
    reach = 1.35 * max(0.002, *map(abs, offs))
    below.axhline(0, color=INK, linewidth=0.8)
    below.set_ylim(-reach, reach)
    below.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.4g} %" if value else "0")
    below.set_ylabel("slope, off by")
    every_block(below, at)
    above.grid(axis="x", visible=False)
    if behind in at:
        ticks = [int(tick) for tick in below.get_xticks() if tick < behind]
        below.set_xticks([*ticks, behind], [*map(str, ticks), "other"])
    legend(above)
    for index in _far(at, offs):
        _label(below, at[index], offs[index], f"{_module(told[index][3])}: {percent(offs[index])}", at)
    worst, far = errors.index(max(errors)), max(range(len(offs)), key=lambda i: abs(offs[i]))
    caption = (
        f"Of each packed matrix the relative error, at most {percent(errors[worst])} ({_module(told[worst][3])}), "
        "and how far its slope on the base's is from where rounding alone would put it: at most "
        f"{percent(abs(offs[far]))} ({_module(told[far][3])})."
    )
    return rendered("matrices", caption, figure)


def _far(at: Sequence[int], offs: Sequence[float]) -> list[int]:
    """The matrix of each block that is farthest off, where that is far; the farthest first."""
    ordered = sorted(range(len(offs)), key=lambda i: -abs(offs[i]))
    first = {at[i]: i for i in reversed(ordered) if abs(offs[i]) > OFF}
    return sorted(first.values(), key=lambda i: -abs(offs[i]))[:LABELS]


def losses(blocks: Values) -> Picture | None:
    """The loss of each block before tuning and after."""
    told = [
        (index if (n := _block_of(block)) is None else n, number(block, "loss_before"), number(block, "loss_after"))
        for index, block in enumerate(blocks)
    ]
    told = [row for row in told if row[1] > 0 and row[2] > 0]
    if not told:
        return None
    at, before, after = zip(*told, strict=True)
    figure, (axes,) = canvas("Loss of each block, before tuning and after", 2.9)
    axes.vlines(at, after, before, color=GREY, linewidth=1.2, alpha=0.7)
    axes.scatter(at, before, s=24, facecolors="none", edgecolors=GREY, linewidths=1.4, label="before", gid="before")
    axes.scatter(at, after, s=24, color=BLUE, label="after", gid="after")
    vertical(axes, [*before, *after], scientific_tick)
    axes.set_ylabel("mean squared error")
    every_block(axes, at)
    legend(axes)
    gain = statistics.median(b / a for _, b, a in told)
    return rendered("losses", f"Tuning made the loss of a block {gain:.3g} times smaller (median).", figure)


def _block_of(record: Mapping[str, Any]) -> int | None:
    """The decoder block that a name speaks of; None for the head and for what is in no block."""
    match = BLOCK_INDEX.match(str(record.get("name")))
    return int(match[1]) if match else None


def _module(record: Mapping[str, Any]) -> str:
    """A matrix by its name in its block."""
    name = str(record.get("name")).removesuffix(".weight")
    match = BLOCK_INDEX.match(name)
    return short(name[match.start(1) :] if match else name)


def _label(axes: Axes, x: float, y: float, text: str, at: Sequence[int]) -> None:
    """Text above a point, to the side where there is room."""
    right = x <= (min(at) + max(at)) / 2
    side: dict[str, Any] = {"ha": "left" if right else "right", "va": "bottom"}
    axes.annotate(text, (x, y), (6 if right else -6, 3), textcoords="offset points", **side)
