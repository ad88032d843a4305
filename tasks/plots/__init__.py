"""Pictures of a run, from the values in its report: errors, draft acceptance rates, speed.

`draw.py` makes them. Nothing else in a run needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.checkpoint.writer import write_file

# All pictures that a run can have, the most important first.
NAMES = (
    "divergence-by-domain", "block-errors", "matrices", "losses", "acceptance-by-position", "acceptance-by-prompt",
    "throughput",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture. `name` is the stem of its files; `caption` says in a sentence what it shows, with numbers."""

    name: str
    caption: str
    svg: bytes
    png: bytes


def write_pictures(folder: Path, pictures: Iterable[Picture], kinds: Sequence[str] = ("svg", "png")) -> list[str]:
    """Write pictures as `NAME.KIND`, delete those of an earlier run that this one lacks, and return the file names."""
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
