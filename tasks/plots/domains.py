"""Picture of the KL divergence by domain of the evaluation text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from requant.tasks.plots import Picture
from requant.tasks.plots.style import BLUE, GREY, INK, ORANGE, canvas, finite, legend, rendered, short
from requant.tasks.validating.measured import DomainValues


def divergence_by_domain(domains: Mapping[str, DomainValues], limit: float | None) -> Picture | None:
    """Draw the mean KL divergence of each domain with its interval, from the noise floor up to it, and the limit.

    `limit` is that of the recipe in nats, without the noise floor; None: the recipe has none.
    """
    found = [(short(name), values) for name, values in domains.items() if finite(values.kl_divergence) > 0]
    if not found:
        return None
    names = [name for name, _ in found]
    divergences = [values.kl_divergence for _, values in found]
    floors = [finite(values.kl_noise_floor) for _, values in found]
    intervals = [values.kl_divergence_interval or (math.nan, math.nan) for _, values in found]
    drawn = [value for value in (*divergences, *floors, *(end for ends in intervals for end in ends)) if value > 0]
    drawn += [limit] if limit is not None and limit > 0 else []
    low, high = min(drawn) / 2, 2 * max(drawn)

    figure, (axes,) = canvas("KL divergence from the base, by domain of the text", 1.15 + 0.3 * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 2000 * low else (1.0,), numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.set_xlabel("nats")
    with_interval = [row for row, (begin, _) in enumerate(intervals) if begin > 0]
    for row, (divergence, floor, (begin, end)) in enumerate(zip(divergences, floors, intervals, strict=True)):
        left = floor if floor > 0 else low
        (bar,) = axes.barh(
            row, divergence - left, left=left, height=0.4, color=BLUE, label="quantized" if not row else ""
        )
        bar.set_gid("divergence bar")
        if row in with_interval:
            label = "95 % interval" if row == with_interval[0] else ""
            axes.plot((begin, end), (row, row), color=INK, linewidth=1.6, label=label)
    known = [row for row, floor in enumerate(floors) if floor > 0]
    if known:
        at = [floors[row] for row in known]
        axes.scatter(at, known, s=120, marker="|", color=GREY, linewidths=2.5, label="base against itself", gid="floor")
    if limit is not None and limit > 0:
        axes.axvline(limit, color=ORANGE, linestyle="--", linewidth=1.4, label="limit", gid="limit")
    legend(axes)
    worst = divergences.index(max(divergences))
    caption = (
        f"Mean KL divergence of the next token from the base's: at most {divergences[worst]:.3g} nats ({names[worst]})"
    )
    if limit is not None:
        caption += f", where {limit:g} over the noise floor are allowed"
    if known:
        caption += f"; the base against itself, computed in another way, has {max(at):.2g} at most"
    return rendered("divergence-by-domain", f"{caption}.", figure)
