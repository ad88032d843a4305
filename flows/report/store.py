"""Show what is in a store, and what gc deletes, in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import Field
from rich.table import Table
from rich.text import Text

from requant.flows.report.console import text_console
from requant.tasks.documents import Document
from requant.tasks.formatting import gigabytes
from requant.tasks.store.catalog import Catalog, Entry
from requant.tasks.store.gc import CollectionPlan

TABLE_WIDTH = 130


class ArtifactUser(Document):
    """A run that uses an artifact."""

    recipe: str = Field(description="The beginning of the digest of its recipe")
    base: str = Field(description="Its base, owner/name@commit")
    makes: str = Field(description="The repos that it publishes to, or the schemes of its outputs")
    seconds: int = Field(description="Seconds since it was last active")


class NamedArtifact(Document):
    """An artifact, by its names."""

    stage: str = Field(description="Its stage")
    key: str = Field(description="Its stage key")
    digest: str = Field(description="Its digest")


class StoredArtifact(NamedArtifact):
    """An artifact as `requant store ls --json` shows it."""

    base: str | None = Field(description="The base that it was made from, owner/name@commit; null if it is not known")
    files: int = Field(description="How many files it has")
    bytes: int = Field(description="Bytes of its files")
    started: str | None = Field(description="When its stage began, in ISO 8601; null if it is not known")
    unused_seconds: int = Field(description="Seconds since it was last made or reused")
    used_by: tuple[ArtifactUser, ...] = Field(description="The runs that use it")

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
                ArtifactUser(
                    recipe=run.recipe,
                    base=run.base,
                    makes=run.makes,
                    seconds=round(max(catalog.now - run.seen, 0.0)),
                )
                for run in runs
            ),
        )


class BaseSize(Document):
    """How much of a store the artifacts of a base take."""

    repo_id: str | None = Field(description="Repo of the base, whatever its commit; null if it is not known")
    artifacts: int = Field(description="How many artifacts there are")
    bytes: int = Field(description="Bytes of their blobs, each counted once")
    own_bytes: int = Field(description="Bytes of the blobs that the artifacts of no other base name")


def sizes_by_base(catalog: Catalog) -> list[BaseSize]:
    """Add up the blobs of the artifacts of each base. The largest base comes first."""
    sizes: dict[str, int] = {}
    counts = Counter[str | None]()
    blobs: dict[str | None, set[str]] = {}
    for entry in catalog.entries.values():
        name = StoredArtifact.of(catalog, entry).base
        repo_id = name.partition("@")[0] if name else None
        counts[repo_id] += 1
        sizes |= {file.sha256: file.size for file in entry.manifest.files}
        blobs.setdefault(repo_id, set()).update(file.sha256 for file in entry.manifest.files)
    users = Counter(sha256 for named in blobs.values() for sha256 in named)
    rows = [
        BaseSize(
            repo_id=repo_id,
            artifacts=counts[repo_id],
            bytes=sum(sizes[sha256] for sha256 in named),
            own_bytes=sum(sizes[sha256] for sha256 in named if users[sha256] == 1),
        )
        for repo_id, named in blobs.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def size_table(rows: Sequence[BaseSize], stored_bytes: int) -> str:
    """Lay out a table of the sizes of bases, with the sum of all blobs."""
    table = [("base", "artifacts", "size", "alone")]
    table += [(row.repo_id or "-", str(row.artifacts), gigabytes(row.bytes), gigabytes(row.own_bytes)) for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = [f"{b:{widths[0]}}  {a:>{widths[1]}}  {s:>{widths[2]}}  {o:>{widths[3]}}" for b, a, s, o in table]
    return "\n".join([*lines, f"{gigabytes(stored_bytes)} of blobs in all"])


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
    console = text_console(TABLE_WIDTH)
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
