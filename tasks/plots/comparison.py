"""The picture of a comparison of two checkpoints: the KL divergence of each from the base, by domain of the text."""

from __future__ import annotations

from requant.tasks.plots import Picture
from requant.tasks.plots.style import BLUE, ORANGE, canvas, finite, legend, percent, rendered, short, styled
from requant.tasks.validating.comparison import ComparisonDocument, Difference

BAR_HEIGHT = 0.38


def comparison(document: ComparisonDocument) -> Picture:
    """Draw two bars for each domain, and next to them which checkpoint is better if the difference is real."""
    rows = {name: row.kl_divergence for name, row in document.domains.items()}
    with styled():
        figure, (axes,) = canvas("KL divergence from the base, by domain", 0.95 + 0.38 * len(rows))
        axes.set_yticks(range(len(rows)), [short(name.replace("_", " ")) for name in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        for label, color, shift in (("A", BLUE, -BAR_HEIGHT / 2), ("B", ORANGE, BAR_HEIGHT / 2)):
            values = [finite(row.a if label == "A" else row.b) for row in rows.values()]
            places = [index + shift for index in range(len(rows))]
            axes.barh(places, values, height=BAR_HEIGHT, color=color, label=label, gid=f"{label} bars")
        for index, row in enumerate(rows.values()):
            place = (_largest(row) or 0.0, index)
            axes.annotate(_label(row), place, (4, 0), textcoords="offset points", va="center_baseline")
        axes.set_xlim(0, 1.25 * (_largest(*rows.values()) or 1.0))
        axes.set_xlabel("nats")
        legend(axes)
        caption = f"Mean KL divergence of the next token from the base. A is {document.a}, B is {document.b}."
        return rendered("comparison", caption, figure)


def _largest(*rows: Difference) -> float | None:
    """Return the largest finite divergence above 0; None if there is none."""
    return max((value for row in rows for value in (row.a, row.b) if finite(value) > 0), default=None)


def _label(row: Difference) -> str:
    """Write the difference of two divergences, if it is real."""
    if row.answer in ("a", "b"):
        return f"{row.answer.upper()} is {percent(abs(row.difference))} lower"
    return row.answer or "not judged"
