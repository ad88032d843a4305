"""What `requant store` says, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from requant.tasks.formatting import gigabytes

TABLE_WIDTH = 130


def artifact_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The artifacts, the longest unused first."""
    made = Table(box=None, pad_edge=False)
    for name in ("stage", "artifact", "base", "size", "files", "unused for", "used by"):
        made.add_column(name, justify="right" if name in {"size", "files", "unused for"} else "left", overflow="fold")
    for row in rows:
        made.add_row(
            row["stage"],
            row["digest"][:12],
            Text(short_base(row["base"])),
            gigabytes(row["bytes"]),
            str(row["files"]),
            age(row["unused_seconds"]),
            Text(users(row["used_by"])),
        )
    console = Console(width=TABLE_WIDTH, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(made)
    return capture.get()


def short_base(base: str | None) -> str:
    name, _, sha = (base or "-").partition("@")
    return f"{name}@{sha[:7]}" if sha else name


def users(runs: list[Mapping[str, Any]]) -> str:
    """What the last run makes, and how many other runs there are."""
    if not runs:
        return "-"
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{runs[0]['makes']} ({runs[0]['recipe'][:7]}){more}"


def age(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def gc_text(document: Mapping[str, Any]) -> str:
    """What went, or would go."""
    verb = "would go" if document["dry_run"] else "gone"
    lines = [f"{a['stage']:10} {a['digest'][:12]} {gigabytes(a['bytes']):>12} {verb}" for a in document["artifacts"]]
    blobs, near = document["blobs"], document["on_this_machine"]
    lines += [
        f"{len(document['artifacts'])} artifacts, {blobs['count']} blobs ({gigabytes(blobs['bytes'])}), "
        f"{document['records']} records and {len(document['leftovers'])} leftovers {verb}",
        f"on this machine: {len(near['paths'])} folders and files ({gigabytes(near['bytes'])}) {verb}",
        f"{gigabytes(document['stays']['bytes'])} of blobs stay",
    ]
    if not document["fits"]:
        lines.append("that is more than --max-size: the rest is in use, too young, or kept by another option")
    return "\n".join(lines)
