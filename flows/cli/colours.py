"""Colours of the command line: where they are used, and for which words."""

from __future__ import annotations

import os
import re
from typing import TextIO

import click

COLOURS = {
    "red": r"FAILED|REJECTED|problem(?=  )",
    "green": r"passed|PUBLISHED|VALIDATED",
    "yellow": r"not measured|warning(?=  )",
}
WORDS = re.compile("|".join(rf"(?P<{colour}>\b(?:{words}))(?!\w)" for colour, words in COLOURS.items()))


def use_colour(stream: TextIO) -> bool:
    """Check whether a stream gets colours: a terminal does, unless NO_COLOR is set; with FORCE_COLOR, any does."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def with_colours(text: str) -> str:
    """Colour the words of a result that say how it went."""
    return WORDS.sub(
        lambda found: click.style(found[0], fg=found.lastgroup, bold=found.lastgroup == "red" or None), text
    )
