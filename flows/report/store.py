"""Show what is in a store, and what gc deletes, in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from requant.tasks.formatting import gigabytes
from requant.tasks.store.catalog import Catalog, Entry
from requant.tasks.store.gc import CollectionPlan

TABLE_WIDTH = 130


@dataclass(frozen=True)
class ArtifactUser:
    """A run that uses an artifact, and how long ago it was last active."""

    recipe: str
    base: str
    makes: str
    seconds: int


@dataclass(frozen=True)
class StoredArtifact:
    """An artifact as `requant store ls --json` shows it. Its fields are the keys of the document."""

    stage: str
    key: str
    digest: str
    base: str | None
    files: int
    bytes: int
    started: str | None
    unused_seconds: int
    used_by: tuple[ArtifactUser, ...]

    @classmethod
    def of(cls, catalog: Catalog, entry: Entry) -> StoredArtifact:
        """Describe an artifact of a catalog. Ages are by the store's clock."""
        runs = catalog.users.get(entry.name, [])
        recorded = entry.provenance.base
        base = f"{recorded.repo_id}@{recorded.sha}" if recorded else None
        return cls(
            stage=entry.stage,
            key=entry.key,
            digest=entry.manifest.digest,
            base=runs[0].base if runs else base,
            files=len(entry.manifest.files),
            bytes=entry.manifest.size,
            started=entry.provenance.started or None,
            unused_seconds=round(max(catalog.now - entry.last_used, 0.0)),
            used_by=tuple(
                ArtifactUser(run.recipe, run.base, run.makes, round(max(catalog.now - run.seen, 0.0))) for run in runs
            ),
        )


def artifact_table(rows: Iterable[StoredArtifact]) -> str:
    """Lay out a table of artifacts."""
    made = Table(box=None, pad_edge=False)
    for name in ("stage", "artifact", "base", "size", "files", "unused for", "used by"):
        made.add_column(name, justify="right" if name in {"size", "files", "unused for"} else "left", overflow="fold")
    for row in rows:
        made.add_row(
            row.stage,
            row.digest[:12],
            Text(short_base(row.base)),
            gigabytes(row.bytes),
            str(row.files),
            age(row.unused_seconds),
            Text(users(row.used_by)),
        )
    console = Console(width=TABLE_WIDTH, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(made)
    return capture.get()


def short_base(base: str | None) -> str:
    """Shorten the commit of a base."""
    name, _, sha = (base or "-").partition("@")
    return f"{name}@{sha[:7]}" if sha else name


def users(runs: Sequence[ArtifactUser]) -> str:
    """Say what the last run makes, and how many other runs there are."""
    if not runs:
        return "-"
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{runs[0].makes} ({runs[0].recipe[:7]}){more}"


def age(seconds: float) -> str:
    """Format an age in the largest unit of which it has at least two."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def gc_text(plan: CollectionPlan, *, dry_run: bool, fits: bool) -> str:
    """Say what gc deleted or would delete. `fits`: the rest fits into --max-size."""
    verb = "would go" if dry_run else "gone"
    lines = [
        f"{entry.stage:10} {entry.manifest.digest[:12]} {gigabytes(entry.manifest.size):>12} {verb}"
        for entry in plan.artifacts
    ]
    lines += [
        f"{len(plan.artifacts)} artifacts, {len(plan.blobs)} blobs ({gigabytes(sum(b.size for b in plan.blobs))}), "
        f"{len(plan.records)} records and {len(plan.leftovers)} leftovers {verb}",
        f"on this machine: {len(plan.local_files)} folders and files "
        f"({gigabytes(sum(file.bytes for file in plan.local_files))}) {verb}",
        f"{gigabytes(plan.remaining_bytes)} of blobs stay",
    ]
    if not fits:
        lines.append("that is more than --max-size: the rest is in use, too young, or kept by another option")
    return "\n".join(lines)
