"""`requant store ...`: list, check, clean up and copy the artifacts of a store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from requant.flows.cli.command import FORCE, NEW_FOLDER, CommandResult, OrderedGroup, command, warn_of_foreign_weights
from requant.tasks.store import Store, open_store

if TYPE_CHECKING:
    from requant.flows.cli.documents import CollectionDocument
    from requant.tasks.store.gc import CollectionPlan


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic in click's types alone
    """A number with a unit, such as 30d or 500GB. The value is in the unit whose factor is 1: seconds or bytes."""

    def __init__(self, name: str, units: dict[str, float]) -> None:
        self.name, self.units = name, units

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]+)", str(value), re.ASCII)
        if match is None or match[2].lower() not in self.units:
            self.fail(f"{value!r} is no {self.name}: a number and {', '.join(self.units)}, as in {self.example}")
        return float(match[1]) * self.units[match[2].lower()]

    @property
    def example(self) -> str:
        return "30d" if "d" in self.units else "500GB"


AGE = Quantity("age", {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400})
SIZE = Quantity(
    "size", {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
)


def _grace(context: click.Context, parameter: click.Parameter, grace_s: float) -> float:
    if grace_s < 600:
        raise click.BadParameter("the grace period must be longer than any upload: at least 10m")
    return grace_s


GRACE = click.option(
    "--grace",
    type=AGE,
    default="24h",
    show_default=True,
    callback=_grace,
    help="Keep everything younger than this, which must be at least 10m.",
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")


@click.group(cls=OrderedGroup)
def store() -> None:
    """List, check, clean up and copy the artifacts of the store.

    REQUANT_STORE names the store: s3://bucket/prefix or an absolute path of a folder, by default a folder below
    ~/.cache/requant.
    """


@command("ls")
def store_ls() -> CommandResult:
    """List every artifact: its base, size and age, and its runs.

    The artifact that was not used for the longest time comes first.

    \b
    Examples:
      requant store ls
      REQUANT_STORE=s3://bucket/prefix requant store ls --json
    """
    from requant.flows.cli.documents import StoreListDocument
    from requant.flows.report.store import StoredArtifact, artifact_table
    from requant.tasks.store.catalog import read_catalog

    opened = _open_store()
    catalog = read_catalog(opened)
    entries = sorted(catalog.entries.values(), key=lambda entry: entry.last_used)
    rows = [StoredArtifact.of(catalog, entry) for entry in entries]
    text = artifact_table(rows) if rows else f"{opened.url} is empty"
    damaged = [f"artifacts/{stage}/{key}: {why}" for (stage, key), why in sorted(catalog.damaged.items())]
    document = StoreListDocument(store=opened.url, artifacts=rows, damaged=damaged)
    return CommandResult(document.to_json(), "\n".join([text.rstrip(), *damaged]))


@command("du")
def store_du() -> CommandResult:
    """Say how much of the store the artifacts of each base take.

    Artifacts share blobs. The column `alone` has the bytes that the artifacts of no other base need.

    \b
    Examples:
      requant store du
      REQUANT_STORE=s3://bucket/prefix requant store du --json
    """
    from requant.flows.cli.documents import StoreSizeDocument
    from requant.flows.report.store import size_table, sizes_by_base
    from requant.tasks.store.catalog import read_catalog

    opened = _open_store()
    rows = sizes_by_base(read_catalog(opened))
    stored_bytes = sum(item.size for item in opened.backend.items("blobs"))
    document = StoreSizeDocument(store=opened.url, bases=rows, stored_bytes=stored_bytes)
    return CommandResult(document.to_json(), size_table(rows, stored_bytes))


@command("verify")
@click.option("--deep", is_flag=True, help="Read and hash every blob, instead of checking its size alone.")
@click.option(
    "--repair",
    is_flag=True,
    help="Restore missing and damaged blobs from an intact copy on this machine. Where there is none, remove the "
    "artifacts that need the blob, so that the next run makes them again.",
)
def store_verify(deep: bool, repair: bool) -> CommandResult:
    """Check that the blobs of every artifact are there.

    Exit status 1: there are problems, or there were some that --repair has dealt with.

    \b
    Examples:
      requant store verify
      requant store verify --deep --repair
    """
    from requant.tasks.store.verify import verify_store

    check = verify_store(_open_store(), deep=deep, repair=repair)
    summary = f"{check.checked} blobs checked, {len(check.problems)} problems"
    return CommandResult(
        check.to_json(), "\n".join([summary, *check.problems, *check.repairs]), 1 if check.problems else 0
    )


@command("gc")
@click.option(
    "--keep-last",
    type=click.IntRange(1),
    metavar="N",
    help="Delete artifacts that none of the last N runs of any recipe use. Those that no run names stay.",
)
@click.option("--older-than", type=AGE, help="Delete artifacts that were not used for this long, as in 30d.")
@click.option(
    "--max-size", type=SIZE, help="Delete the longest unused artifacts until the rest fits into this size, as in 500GB."
)
@GRACE
@DRY_RUN
def store_gc(
    keep_last: int | None, older_than: float | None, max_size: float | None, grace: float, dry_run: bool
) -> CommandResult:
    """Delete leftovers, and the artifacts that the options select.

    With several options, an artifact is deleted only if each of them selects it. Without options no artifact is
    deleted: only blobs that no artifact names, the remains of killed uploads, and unfinished work that nobody
    continued for a week, on this machine and in the store. What a run in progress needs is never deleted, nor is
    anything younger than --grace, which must be longer than any upload takes.

    AGE is a number with one of the units s, m, h, d and w; SIZE is one with KB, MB, GB, TB, KiB, MiB, GiB or TiB.

    \b
    Examples:
      requant store gc --dry-run
      requant store gc --keep-last 2 --older-than 30d --max-size 500GB
    """
    from requant.flows.report.store import gc_text
    from requant.tasks.store.gc import Policy, collect

    opened = _open_store()
    max_bytes = None if max_size is None else int(max_size)
    policy = Policy(keep_last=keep_last, older_than_s=older_than, max_bytes=max_bytes, grace_s=grace)
    plan = collect(opened, policy, dry_run=dry_run)
    fits = max_bytes is None or plan.remaining_bytes <= max_bytes
    document = _collection(opened, plan, dry_run=dry_run, fits=fits)
    return CommandResult(document.to_json(), gc_text(plan, dry_run=dry_run, fits=fits))


@command("rm")
@click.argument("names", metavar="KEY-or-DIGEST...", nargs=-1, required=True)
@GRACE
@DRY_RUN
def store_rm(names: tuple[str, ...], grace: float, dry_run: bool) -> CommandResult:
    """Delete the named artifacts, and the leftovers that gc deletes.

    KEY-or-DIGEST is the beginning of an artifact's stage key or digest. A run that needs a deleted artifact makes it
    again. Blobs that other artifacts name stay. An artifact that is younger than --grace, or that a run has used since,
    is not deleted, and the exit status is then 1.

    \b
    Examples:
      requant store rm 3f9c0a17 --dry-run
      requant store rm 3f9c0a17 b7e40c55 --grace 1h
    """
    from requant.flows.report.store import gc_text
    from requant.tasks.store.catalog import read_catalog
    from requant.tasks.store.copy import find_entries
    from requant.tasks.store.gc import Policy, collect

    opened = _open_store()
    catalog = read_catalog(opened)
    chosen = {entry.name: entry for name in names for entry in find_entries(catalog, name)}
    plan = collect(opened, Policy(names=frozenset(chosen), grace_s=grace), dry_run=dry_run)
    kept = [entry for name, entry in chosen.items() if name not in {deleted.name for deleted in plan.artifacts}]
    lines = [
        f"{entry.stage:10} {entry.manifest.digest[:12]} stays: it is younger than --grace, or a run has used it since"
        for entry in kept
    ]
    text = "\n".join([gc_text(plan, dry_run=dry_run, fits=True), *lines])
    document = _collection(opened, plan, dry_run=dry_run, fits=True)
    return CommandResult(document.to_json(), text, 1 if kept else 0)


def _collection(opened: Store, plan: CollectionPlan, *, dry_run: bool, fits: bool) -> CollectionDocument:
    """Return the document of what was deleted, or would be."""
    from requant.flows.cli.documents import (
        CollectionDocument,
        DeletedArtifact,
        DeletedBlobs,
        LocalFiles,
        RemainingBlobs,
    )

    return CollectionDocument(
        store=opened.url,
        dry_run=dry_run,
        artifacts=[
            DeletedArtifact(stage=e.stage, key=e.key, digest=e.manifest.digest, bytes=e.manifest.size)
            for e in plan.artifacts
        ],
        blobs=DeletedBlobs(count=len(plan.blobs), bytes=sum(item.size for item in plan.blobs)),
        records=len(plan.records),
        leftovers=plan.leftovers,
        on_this_machine=LocalFiles(
            paths=[str(f.path) for f in plan.local_files], bytes=sum(f.bytes for f in plan.local_files)
        ),
        stays=RemainingBlobs(bytes=plan.remaining_bytes),
        fits=fits,
    )


@command("checkout")
@click.argument("name", metavar="KEY-or-DIGEST")
@click.argument("folder", type=NEW_FOLDER)
@FORCE
def store_checkout(name: str, folder: Path, force: bool) -> CommandResult:
    """Copy the files of an artifact into a folder.

    KEY-or-DIGEST is the beginning of the artifact's stage key or digest. FOLDER may be new, empty or an earlier
    checkout, of which the files that this artifact does not have are removed.

    \b
    Examples:
      requant store checkout 3f9c0a17 build/model
      requant store checkout 3f9c0a17 build/model --force
    """
    from requant.flows.checkout import check_folder, copy_to_folder
    from requant.flows.cli.documents import CheckoutDocument
    from requant.tasks.store.catalog import read_catalog
    from requant.tasks.store.copy import find_entries

    opened = _open_store()
    check_folder(opened, folder, force=force)
    manifest = find_entries(read_catalog(opened), name)[0].manifest
    with opened.lease("checkout", os.urandom(8).hex()):
        opened.need(manifest.files)
        path, foreign = copy_to_folder(opened, manifest, folder, force=force)
    warn_of_foreign_weights(path, foreign)
    document = CheckoutDocument(digest=manifest.digest, path=str(path))
    return CommandResult(document.to_json(), f"{manifest.size:,} bytes in {path}")


@command("export")
@click.argument("name", metavar="KEY-or-DIGEST")
@click.argument("destination", metavar="DEST")
def store_export(name: str, destination: str) -> CommandResult:
    """Copy an artifact from this store into another one.

    KEY-or-DIGEST is the beginning of the artifact's stage key or digest. DEST is file:///folder, s3://bucket/prefix
    or a folder, which becomes a store.

    \b
    Examples:
      requant store export 3f9c0a17 s3://bucket/prefix
      requant store export 3f9c0a17 /mnt/stick/requant
    """
    from requant.tasks.store.copy import store_at

    return _copy(_open_store(), _open_store(store_at(destination)), [name])


@command("import")
@click.argument("source", metavar="SRC")
@click.argument("names", metavar="[KEY-or-DIGEST]...", nargs=-1)
def store_import(source: str, names: tuple[str, ...]) -> CommandResult:
    """Copy artifacts from another store into this one.

    SRC is file:///folder, s3://bucket/prefix or a folder. KEY-or-DIGEST is the beginning of the stage key or digest of
    an artifact. Without one, all artifacts are copied.

    \b
    Examples:
      requant store import /mnt/stick/requant
      requant store import s3://bucket/prefix 3f9c0a17
    """
    from requant.tasks.store.copy import store_at

    return _copy(_open_store(store_at(source), must_exist=True), _open_store(), names)


def _copy(source: Store, target: Store, names: Iterable[str]) -> CommandResult:
    """Copy the artifacts with these names, or all of a store."""
    from requant.flows.cli.documents import CopiedArtifact, CopyDocument
    from requant.tasks.store.catalog import read_catalog
    from requant.tasks.store.copy import copy, find_entries

    if source.url == target.url:
        raise click.UsageError(f"{source.url} is one store: name another one")
    catalog = read_catalog(source)
    entries = [e for name in names for e in find_entries(catalog, name)] or list(catalog.entries.values())
    copied = copy(source, target, entries)
    rows = [
        CopiedArtifact(stage=c.entry.stage, key=c.entry.key, digest=c.entry.manifest.digest, bytes_moved=c.bytes)
        for c in copied
    ]
    moved = sum(c.bytes for c in copied)
    text = f"{len(rows)} artifacts from {source.url} are in {target.url}; {moved:,} bytes had to move"
    document = CopyDocument(source=source.url, store=target.url, artifacts=rows, bytes_moved=moved)
    return CommandResult(document.to_json(), text)


def _open_store(url: str | None = None, *, must_exist: bool = False) -> Store:
    opened = open_store(url)
    if must_exist and opened.is_local and not opened.cache.root.is_dir():
        raise click.UsageError(f"there is no store at {opened.url}")
    opened.check()
    return opened


for subcommand in (store_ls, store_du, store_verify, store_gc, store_rm, store_checkout, store_export, store_import):
    store.add_command(subcommand)
