"""Pictures of drafting and speed: by draft position, and prompt by prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from requant.tasks.plots import Picture
from requant.tasks.plots.style import BLUE, GREEN, GREY, ORANGE, canvas, legend, number, percent, rendered, short

Values = Sequence[Mapping[str, Any]]
Sides = Mapping[str, tuple[str, Sequence[float]]]  # name to colour and values
POSITIONS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"))


def acceptance_by_position(ours: Sequence[float] | None, base: Sequence[float] | None) -> Picture | None:
    """Teacher-forced acceptance of the drafts at each position, the base's beside ours."""
    if not ours:
        return None
    sides = {"base": (GREY, list(base or [])), "quantized": (BLUE, list(ours))}
    rows = [_ordinal(i) for i in range(max(len(values) for _, values in sides.values()))]
    texts = {name: [percent(value) for value in values] for name, (_, values) in sides.items()}
    figure, axes = _bars("Drafts accepted, by position", rows, sides, texts)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    told = ", ".join(f"{name} {percent(value)}" for name, value in zip(rows, ours, strict=False))
    than = f" (base: {', '.join(percent(value) for value in base)})" if base else ""
    return rendered("acceptance-by-position", f"Drafts accepted, given the true text: {told}{than}.", figure)


def acceptance_by_prompt(prompts: Values) -> Picture | None:
    """Of each prompt the share of drafts that the engine accepted, at each position."""
    setting, found = first_setting([p for p in prompts if p.get("mtp") and _accepted(p)])
    if not found:
        return None
    figure, axes = _rows(f"Drafts accepted, by prompt: {setting}", [_label(p) for p in found], 1)
    axes.grid(axis="y", visible=True)
    for position in range(max(len(_accepted(p)) for p in found)):
        rows = [i for i, p in enumerate(found) if position < len(_accepted(p))]
        color, marker = POSITIONS[position % len(POSITIONS)]
        name = _ordinal(position)
        values = [_accepted(found[i])[position] for i in rows]
        axes.scatter(values, rows, s=30, color=color, marker=marker, label=name, gid=name)
    axes.set_xlim(min(0.5, *(min(_accepted(p)) - 0.03 for p in found)), 1.005)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    legend(axes)
    first = [_accepted(p)[0] for p in found]
    worst = first.index(min(first))
    caption = (
        f"Drafts accepted by the engine, {setting}: the first one in {percent(statistics.median(first))} (median), at "
        f"least in {percent(min(first))} ({_label(found[worst])})."
    )
    return rendered("acceptance-by-prompt", caption, figure)


def throughput(prompts: Values) -> Picture | None:
    """Of each prompt the output tokens per second, with MTP and without."""
    setting, found = first_setting([p for p in prompts if number(p, "tokens_per_second") > 0 and "mtp" in p])
    if not found:
        return None
    labels = list(dict.fromkeys(_label(p) for p in found))
    speeds = {
        mtp: [_median(p for p in found if _label(p) == label and bool(p["mtp"]) is mtp) for label in labels]
        for mtp in (False, True)
    }
    off, on = speeds[False], speeds[True]
    gains = [new / old if new > 0 and old > 0 else math.nan for old, new in zip(off, on, strict=True)]
    figure, axes = _bars(
        f"Output tokens per second, by prompt: {setting}",
        labels,
        {"MTP off": (GREY, off), "MTP on": (BLUE, on)},
        {"MTP on": ["" if math.isnan(gain) else f"{gain:.2f} times" for gain in gains]},
    )
    axes.set_xlim(0, 1.18 * max(value for value in [*off, *on] if value > 0))
    told = [
        f"{statistics.median(side):.3g} {name}"
        for name, speeds_of in (("with MTP", on), ("without", off))
        if (side := [value for value in speeds_of if value > 0])
    ]
    caption = f"Output tokens per second, {setting}: {' and '.join(told)} (medians)"
    if known := [gain for gain in gains if gain > 0]:
        caption += f", {min(known):.2f} to {max(known):.2f} times as many with it"
    return rendered("throughput", f"{caption}.", figure)


def _bars(title: str, rows: Sequence[str], sides: Sides, texts: Mapping[str, Sequence[str]]) -> tuple[Figure, Axes]:
    """A row of bars for each of `rows`, a bar for each of `sides`; `texts` of a side stand behind its bars."""
    sides = {name: side for name, side in sides.items() if any(value > 0 for value in side[1])}
    figure, axes = _rows(title, rows, len(sides))
    for place, (name, (color, values)) in enumerate(sides.items()):
        shift = (place - (len(sides) - 1) / 2) * 0.4
        told = [i for i, value in enumerate(values) if math.isfinite(value)]
        bars = axes.barh([i + shift for i in told], [values[i] for i in told], height=0.38, color=color, label=name)
        for bar in bars:
            bar.set_gid(f"{name} bar")
        for i, text in enumerate(texts.get(name, ())):
            if text:
                axes.annotate(text, (values[i], i + shift), (4, 0), textcoords="offset points", va="center_baseline")
    if sides:
        legend(axes)
    return figure, axes


def _rows(title: str, labels: Sequence[str], bars: int) -> tuple[Figure, Axes]:
    """A picture with a row for each label, the first on top."""
    figure, (axes,) = canvas(title, 0.95 + len(labels) * (0.38 if bars > 1 else 0.25))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    return figure, axes


def first_setting(prompts: Values) -> tuple[str, Values]:
    """The setting to show, in words, and its prompts: greedy before sampled, one request at a time before many."""
    settings = sorted({(str(p.get("sampling")), int(number(p, "concurrency"))) for p in prompts if _settled(p)})
    if not settings:
        return "", []
    sampling, concurrency = settings[0]
    words = "one request at a time" if concurrency == 1 else f"{concurrency} requests at a time"
    found = [p for p in prompts if _settled(p) and (str(p["sampling"]), int(p["concurrency"])) == settings[0]]
    return f"{short(sampling)}, {words}", found


def _settled(prompt: Mapping[str, Any]) -> bool:
    return "sampling" in prompt and math.isfinite(number(prompt, "concurrency"))


def _accepted(prompt: Mapping[str, Any]) -> list[float]:
    """Acceptance by position; the one value of an engine that tells no more."""
    by_position = prompt.get("acceptance_by_position") or [prompt.get("acceptance")]
    values = [number({"": value}, "") for value in by_position]
    return values if all(math.isfinite(value) for value in values) else []


def _label(prompt: Mapping[str, Any]) -> str:
    return short(f"{prompt.get('set')}: {prompt.get('name')}")


def _median(prompts: Any) -> float:
    speeds = [number(p, "tokens_per_second") for p in prompts]
    return statistics.median(speeds) if speeds else math.nan


def _ordinal(position: int) -> str:
    return f"{('1st', '2nd', '3rd')[position] if position < 3 else f'{position + 1}th'} draft"
