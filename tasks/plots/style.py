"""Size, colours, axes and file formats of all pictures.

Backgrounds are transparent, and colours can be read on a white page and on a dark one. INK has a contrast of 4.3 to 1
with white and with GitHub's dark page. The other colours are those of Okabe and Ito, made lighter or darker until they
have a contrast of at least 3 to 1 with both.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from requant.tasks.plots import Picture

INK, GREY, BLUE, ORANGE, GREEN = "#767d86", "#8b949e", "#3b82f6", "#d55e00", "#0f9d76"
WIDTH_INCHES = 6.25  # 600 pixels in SVG
PNG_DOTS_PER_INCH = 160  # 1000 pixels
MAX_LABEL_LENGTH = 30
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
INK_KEYS = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "grid.color", "xtick.color")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, and does not become paths
    "svg.hashsalt": "requant",  # makes ids the same each time
    "text.parse_math": False,  # names may contain dollar signs
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
    **dict.fromkeys((*INK_KEYS, "ytick.color"), INK),
}


def canvas(title: str, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make an empty picture, for use in `styled()`, with a title and `rows` axes that share the x axis."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor="none")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    all_axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.set_facecolor("none")
    return figure, list(all_axes)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Set the style in which pictures are drawn and rendered. Letters that the font lacks are drawn as boxes."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def legend(axes: Axes) -> None:
    """Add a legend above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0.3, borderaxespad=0,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip


def rendered(name: str, caption: str, figure: Figure) -> Picture:
    """Render a picture. The same drawing gives the same bytes each time."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    figure.savefig(png, format="png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return Picture(name, caption, svg.getvalue(), png.getvalue())


def finite(value: float | None) -> float:
    """Return a value to draw, which is NaN if it is absent or infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def short(text: object, length: int = MAX_LABEL_LENGTH) -> str:
    """Make a label: printable characters in one line, at most `length` of them."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return plain if len(plain) <= length else f"{plain[: length - 1]}…"


def percent(value: float) -> str:
    """Format a share in percent with two significant digits."""
    if not math.isfinite(value):
        return "not a number"
    digits = min(6, max(0, 1 - math.floor(math.log10(abs(value) * 100)))) if value else 0
    return f"{value:.{digits}%}".replace("%", " %")


def value_axis(axes: Axes, values: Iterable[float], label: Callable[[float], str]) -> None:
    """Set up the y axis for positive values: from zero, or logarithmic if the largest is over 4 times the smallest."""
    positive = [value for value in values if value > 0]
    low, high = min(positive), max(positive)
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
    """Format a value as 2·10⁻⁵, or as 10⁻⁵ if its digit is 1."""
    if not value:
        return "0"
    digit, power = f"{value:.1e}".replace(".0e", "e").split("e")
    return ("" if digit == "1" else f"{digit}·") + "10" + str(int(power)).translate(SUPERSCRIPT)


def block_axis(axes: Axes, indices: Sequence[int]) -> None:
    """Set up the x axis for indices of blocks, with a tick at each, or at every 2nd, 4th, ... if there are many."""
    last = max(indices)
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 20) if last / step <= 17)
    axes.set_xticks(range(0, last + 1, step))
    axes.set_xlim(min(indices) - 0.7, last + 0.7)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("block")
