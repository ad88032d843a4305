"""Pictures of draft acceptance rates and speed, by draft position and by prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from requant.tasks.plots import Picture
from requant.tasks.plots.style import BLUE, GREEN, GREY, ORANGE, canvas, legend, percent, rendered, short
from requant.tasks.serving.result import PromptResult

Bars = Mapping[str, tuple[str, Sequence[float]]]  # by the name in the legend: the colour, and a value for each row
POSITIONS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"))


def acceptance_by_position(ours: Sequence[float] | None, base: Sequence[float] | None) -> Picture | None:
    """Draw the teacher-forced draft acceptance rate at each position, of the base and of the quantized model."""
    if not ours:
        return None
    bars = {"base": (GREY, list(base or [])), "quantized": (BLUE, list(ours))}
    rows = [_ordinal(i) for i in range(max(len(values) for _, values in bars.values()))]
    texts = {name: [percent(value) for value in values] for name, (_, values) in bars.items()}
    figure, axes = _draw_bars("Draft acceptance rate, by position", rows, bars, texts)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    rates = ", ".join(f"{name} {percent(value)}" for name, value in zip(rows, ours, strict=False))
    of_base = f" (base: {', '.join(percent(value) for value in base)})" if base else ""
    return rendered("acceptance-by-position", f"Draft acceptance rate, given the true text: {rates}{of_base}.", figure)


def acceptance_by_prompt(prompts: Sequence[PromptResult]) -> Picture | None:
    """Draw the engine's draft acceptance rate for each prompt, at each position."""
    setting, shown = first_setting([p for p in prompts if p.mtp and _rates(p)])
    if not shown:
        return None
    rates = [_rates(p) for p in shown]
    figure, axes = _draw_rows(f"Draft acceptance rate, by prompt: {setting}", [_label(p) for p in shown], 1)
    axes.grid(axis="y", visible=True)
    for position in range(max(map(len, rates))):
        rows = [i for i, of_prompt in enumerate(rates) if position < len(of_prompt)]
        color, marker = POSITIONS[position % len(POSITIONS)]
        name = _ordinal(position)
        axes.scatter([rates[i][position] for i in rows], rows, s=30, color=color, marker=marker, label=name, gid=name)
    axes.set_xlim(min(0.5, *(min(of_prompt) - 0.03 for of_prompt in rates)), 1.005)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    legend(axes)
    first = [of_prompt[0] for of_prompt in rates]
    worst = first.index(min(first))
    caption = (
        f"The engine's draft acceptance rate, {setting}: of the first draft {percent(statistics.median(first))} "
        f"(median), at least {percent(min(first))} ({_label(shown[worst])})."
    )
    return rendered("acceptance-by-prompt", caption, figure)


def throughput(prompts: Sequence[PromptResult]) -> Picture | None:
    """Draw the output tokens per second for each prompt, with MTP and without."""
    setting, shown = first_setting([p for p in prompts if 0 < p.tokens_per_second < math.inf])
    if not shown:
        return None
    labels = list(dict.fromkeys(_label(p) for p in shown))
    off, on = ([_median_speed(shown, label, mtp=mtp) for label in labels] for mtp in (False, True))
    speedups = [new / old if new > 0 and old > 0 else math.nan for old, new in zip(off, on, strict=True)]
    figure, axes = _draw_bars(
        f"Output tokens per second, by prompt: {setting}",
        labels,
        {"MTP off": (GREY, off), "MTP on": (BLUE, on)},
        {"MTP on": ["" if math.isnan(speedup) else f"{speedup:.2f} times" for speedup in speedups]},
    )
    axes.set_xlim(0, 1.18 * max(value for value in [*off, *on] if value > 0))
    medians = [
        f"{statistics.median(measured):.3g} {name}"
        for name, speeds in (("with MTP", on), ("without", off))
        if (measured := [speed for speed in speeds if speed > 0])
    ]
    caption = f"Output tokens per second, {setting}: {' and '.join(medians)} (medians)"
    if known := [speedup for speedup in speedups if speedup > 0]:
        caption += f", {min(known):.2f} to {max(known):.2f} times as many with it"
    return rendered("throughput", f"{caption}.", figure)


def _draw_bars(title: str, rows: Sequence[str], bars: Bars, texts: Mapping[str, Sequence[str]]) -> tuple[Figure, Axes]:
    """Draw rows of bars. `texts` has, by a name of `bars`, what is written next to the bar of each row."""
    bars = {name: bar for name, bar in bars.items() if any(value > 0 for value in bar[1])}
    figure, axes = _draw_rows(title, rows, len(bars))
    for number, (name, (color, values)) in enumerate(bars.items()):
        shift = (number - (len(bars) - 1) / 2) * 0.4
        known = [i for i, value in enumerate(values) if math.isfinite(value)]
        drawn = axes.barh([i + shift for i in known], [values[i] for i in known], height=0.38, color=color, label=name)
        for bar in drawn:
            bar.set_gid(f"{name} bar")
        for i, text in enumerate(texts.get(name, ())):
            if text:
                axes.annotate(text, (values[i], i + shift), (4, 0), textcoords="offset points", va="center_baseline")
    if bars:
        legend(axes)
    return figure, axes


def _draw_rows(title: str, labels: Sequence[str], bars: int) -> tuple[Figure, Axes]:
    """Make a picture with a row for each label, the first at the top, and room for so many bars in each."""
    figure, (axes,) = canvas(title, 0.95 + len(labels) * (0.38 if bars > 1 else 0.25))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    return figure, axes


def first_setting(prompts: Sequence[PromptResult]) -> tuple[str, Sequence[PromptResult]]:
    """Choose the setting to show; return it in words, and its prompts.

    Greedy sampling comes before others, and one request at a time before several.
    """
    if not prompts:
        return "", []
    sampling, concurrency = min((p.sampling, p.concurrency) for p in prompts)
    words = "one request at a time" if concurrency == 1 else f"{concurrency} requests at a time"
    chosen = [p for p in prompts if (p.sampling, p.concurrency) == (sampling, concurrency)]
    return f"{short(sampling)}, {words}", chosen


def _rates(prompt: PromptResult) -> list[float]:
    """Return the acceptance rates by draft position, or the one rate of an engine that reports no positions."""
    rates = prompt.acceptance_by_position or ([] if prompt.acceptance is None else [prompt.acceptance])
    return list(rates) if all(map(math.isfinite, rates)) else []


def _label(prompt: PromptResult) -> str:
    return short(f"{prompt.set}: {prompt.name}")


def _median_speed(prompts: Sequence[PromptResult], label: str, *, mtp: bool) -> float:
    """Return the median tokens per second of the prompts with a label; NaN if there are none."""
    speeds = [p.tokens_per_second for p in prompts if p.mtp is mtp and _label(p) == label]
    return statistics.median(speeds) if speeds else math.nan


def _ordinal(position: int) -> str:
    return f"{('1st', '2nd', '3rd')[position] if position < 3 else f'{position + 1}th'} draft"
