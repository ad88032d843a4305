"""What all pictures share: size, colours that hold on a white page and on a black one, and how they become files.

Backgrounds are transparent. Ink is the grey that is as far from white as from GitHub's dark page (4.3 to 1 from both);
the colours are Okabe's and Ito's, made lighter or darker until they are at least 3 to 1 from both.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from requant.tasks.plots import Picture

INK, GREY, BLUE, ORANGE, GREEN = "#767d86", "#8b949e", "#3b82f6", "#d55e00", "#0f9d76"
WIDTH_INCHES = 6.25  # inches, of which SVG makes 600 pixels
DOTS = 160  # per inch, of the PNG: 1000 pixels
LABEL_LENGTH = 30  # characters of a label
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
COLORED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "grid.color", "xtick.color")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "requant",  # ids are the same each time
    "text.parse_math": False,  # a name may hold dollars
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    **dict.fromkeys((*COLORED, "ytick.color"), INK),
}


def canvas(title: str, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty picture with its title above, and `rows` axes that share the horizontal one. Within `styled()`."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor="none")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    made = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axes in made:
        axes.set_facecolor("none")
    return figure, list(made)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The context in which pictures are drawn and rendered. Letters that the font lacks are boxes, and no warnings."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def legend(axes: Axes) -> None:
    """Say above the axes what the colours are."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0.3, borderaxespad=0,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip


def rendered(name: str, caption: str, figure: Figure) -> Picture:
    """The same bytes each time for the same drawing."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    figure.savefig(png, format="png", dpi=DOTS, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return Picture(name, caption, svg.getvalue(), png.getvalue())


def number(record: Mapping[str, Any], key: str) -> float:
    """A value to draw; NaN for whatever is none."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def short(text: object, length: int = LABEL_LENGTH) -> str:
    """A label: one line of printable characters, not too long."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return plain if len(plain) <= length else f"{plain[: length - 1]}…"


def percent(value: float) -> str:
    """A share as people say it: two digits that count."""
    if not math.isfinite(value):
        return "not a number"
    digits = min(6, max(0, 1 - math.floor(math.log10(abs(value) * 100)))) if value else 0
    return f"{value:.{digits}%}".replace("%", " %")


def vertical(axes: Axes, values: Iterable[float], label: Callable[[float], str]) -> None:
    """A vertical axis for positive values: from zero, or logarithmic where they lie far apart."""
    drawn = [value for value in values if value > 0]
    low, high = min(drawn), max(drawn)
    axes.set_ylim(0, 1.15 * high)
    if high > 4 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.35, high * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def percent_tick(value: float) -> str:
    return f"{100 * value:.6g} %"


def scientific_tick(value: float) -> str:
    """2·10⁻⁵; 10⁻⁵ for 1·10⁻⁵."""
    if not value:
        return "0"
    digit, power = f"{value:.1e}".replace(".0e", "e").split("e")
    return ("" if digit == "1" else f"{digit}·") + "10" + str(int(power)).translate(RAISED)


def every_block(axes: Axes, numbers: Sequence[int]) -> None:
    """Ticks at blocks: each of them where there is room."""
    last = max(numbers)
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 20) if last / step <= 17)
    axes.set_xticks(range(0, last + 1, step))
    axes.set_xlim(min(numbers) - 0.7, last + 0.7)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("block")
