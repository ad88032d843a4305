"""How wide reports are printed."""

from __future__ import annotations

import shutil
import sys

from rich.console import Console


def text_console(widest: int) -> Console:
    """Return the console that lays out a report, `widest` columns wide, on a narrower terminal as wide as that is.

    Cells of tables are folded where they do not fit, so that nothing of them is lost.
    """
    width = min(widest, shutil.get_terminal_size().columns) if sys.stdout.isatty() else widest
    return Console(width=width, no_color=True, force_terminal=False)
