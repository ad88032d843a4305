"""Pictures of a run, from the values that its report holds: what was lost where, what is accepted, how fast it is.

`draw.py` makes them, and alone of a run needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.checkpoint.writer import write_file

# All that there can be, in the order in which they are worth looking at.
NAMES = (
    "block-errors", "matrices", "losses", "acceptance-by-position", "acceptance-by-prompt", "throughput",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture by the stem of its files. `caption` says in a sentence, with numbers, what is to be seen."""

    name: str
    caption: str
    svg: bytes
    png: bytes


def write_pictures(folder: Path, pictures: Iterable[Picture], kinds: Sequence[str] = ("svg", "png")) -> list[str]:
    """Write them as `NAME.KIND`, and take away what an earlier run drew and this one did not. Returns the names."""
    written = [
        write_file(folder, f"{picture.name}.{kind}", [getattr(picture, kind)]).path
        for picture in pictures
        for kind in kinds
    ]
    for name in NAMES:
        for kind in ("svg", "png"):
            if f"{name}.{kind}" not in written:
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return written
