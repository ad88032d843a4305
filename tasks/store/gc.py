"""Garbage collection: mark what must stay, and delete the rest.

gc deletes artifacts that the policy selects, blobs that no manifest names, and files left by killed processes. It
always keeps what was written, used, or named by a lease renewed within the policy's grace period, and what a run alive
then uses. Ages are measured with the store's clock.

No run loses an object that it relies on:

- gc deletes only while it holds the lease `gc/store`, and reads the whole store after it has taken that lease.
- A run writes first: a lease that names the blobs it needs, a manifest, or a use. Then it waits until nobody holds
  `gc/store`. Only then does it check that the objects it relies on exist.

Either gc has read what the run wrote, and keeps those objects. Or gc read the store before the run wrote: then the run
waits until gc has finished, sees which objects are missing, and makes them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from requant.tasks.artifact import SHA256
from requant.tasks.errors import StoreError
from requant.tasks.store.backend import Item
from requant.tasks.store.cache import InUse, LocalLeftover, find_local_leftovers
from requant.tasks.store.catalog import Catalog, Entry, Name, read_all, read_catalog
from requant.tasks.store.lease import LeaseHandle, lease, owner_of
from requant.tasks.store.store import GC, Store, blob_key

GRACE_S = 24 * 3600.0  # longer than any upload, and than the time between two stages of a run
UNFINISHED_S = 7 * 24 * 3600.0  # delete unfinished work after this time
PARALLEL_REQUESTS = 8


@dataclass(frozen=True)
class Policy:
    """What to delete.

    The first four options select artifacts: those that all given ones of them select are deleted, and none if none of
    them is given. The last two are limits for everything.

    names: these artifacts.
    keep_last: artifacts that none of the last `keep_last` runs of a recipe uses; artifacts of no run are kept.
    older_than_s: artifacts that were not used for this many seconds.
    max_bytes: the artifacts unused for longest, until the blobs that manifests still name fit into this many bytes.
    grace_s: nothing that was written or used within this many seconds is deleted.
    unfinished_s: delete unfinished work after this many seconds without progress.
    """

    names: frozenset[Name] | None = None
    keep_last: int | None = None
    older_than_s: float | None = None
    max_bytes: int | None = None
    grace_s: float = GRACE_S
    unfinished_s: float = UNFINISHED_S


@dataclass(frozen=True)
class Leased:
    """The stage keys of leases that were renewed within the grace period, and the sha256 of blobs that they name."""

    keys: frozenset[Name]
    blobs: frozenset[str]


@dataclass
class CollectionPlan:
    """What gc deletes, and how many bytes the other blobs have.

    `records` are keys of other objects: uses, provenance, runs, leases, unfinished work. `leftovers` are names from
    `Backend.leftovers`.
    """

    artifacts: list[Entry] = field(default_factory=list)
    blobs: list[Item] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    local_files: list[LocalLeftover] = field(default_factory=list)
    remaining_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.artifacts or self.blobs or self.records or self.leftovers or self.local_files)


def collect(store: Store, policy: Policy, *, dry_run: bool = False) -> CollectionPlan:
    """Delete what the policy selects. Return what was deleted, or with `dry_run` what would be.

    Raises StoreError if a manifest cannot be read, as the blobs that it names are then unknown.
    """
    # Plan once without the lease, so that an empty collection takes none.
    plan = make_plan(store, policy)
    if dry_run or plan.is_empty:
        return plan
    with lease(store.backend, *GC) as held:
        plan = make_plan(store, policy)
        _sweep(store, plan, held)
    return plan


def make_plan(store: Store, policy: Policy) -> CollectionPlan:
    """Read the whole store, and list what the policy selects. Nothing is written."""
    catalog = read_catalog(store)
    if catalog.damaged:
        (stage, key), why = next(iter(catalog.damaged.items()))
        raise StoreError(
            f"artifacts/{stage}/{key}: {why.partition(':')[0]}: run requant store verify --repair first",
            key=f"artifacts/{stage}/{key}",
        )
    grace_begin = catalog.now - policy.grace_s
    leased = _read_leases(store, grace_begin)
    named = ((item.key.rpartition("/")[2], item) for item in store.backend.items("blobs"))
    blobs = {sha256: item for sha256, item in named if SHA256.fullmatch(sha256) and item.key == blob_key(sha256)}
    sizes = {sha256: item.size for sha256, item in blobs.items()}
    plan = CollectionPlan(artifacts=_choose_artifacts(catalog, policy, leased, sizes))
    doomed = {entry.name for entry in plan.artifacts}
    kept = [entry for name, entry in catalog.entries.items() if name not in doomed]
    in_use = InUse(
        digests={entry.manifest.digest for entry in kept},
        blobs={file.sha256 for entry in kept for file in entry.manifest.files},
        leased_blobs=leased.blobs,
        leased_keys=leased.keys,
    )
    for sha256, item in blobs.items():
        if sha256 not in in_use.blobs and sha256 not in leased.blobs and item.modified < grace_begin:
            plan.blobs.append(item)
        else:
            plan.remaining_bytes += item.size
    plan.records = [
        *_find_stale_records(store, catalog, doomed, grace_begin),
        *_find_abandoned_work(store, catalog, leased, policy),
    ]
    plan.leftovers = [
        name for name in store.backend.leftovers(grace_begin) if _blob_of_upload(name) not in leased.blobs
    ]
    plan.local_files = find_local_leftovers(store, in_use, policy.grace_s, policy.unfinished_s)
    return plan


def _choose_artifacts(catalog: Catalog, policy: Policy, leased: Leased, sizes: dict[str, int]) -> list[Entry]:
    """Choose the artifacts to delete. Those that were unused for longest come first."""
    entries = sorted(catalog.entries.values(), key=lambda entry: entry.last_used)
    if (policy.names, policy.keep_last, policy.older_than_s, policy.max_bytes) == (None, None, None, None):
        return []
    grace_begin = catalog.now - policy.grace_s
    used = catalog.closure(name for run in catalog.runs if run.seen >= grace_begin for name in run.artifacts)
    kept_names = used | leased.keys
    chosen = [entry for entry in entries if entry.last_used < grace_begin and entry.name not in kept_names]
    # Leases name the blobs that runs rely on, and no artifacts. A run that reads an artifact names all of its blobs. If
    # only some are named, they belong to another artifact too: make_plan keeps them, and this artifact may go.
    chosen = [entry for entry in chosen if not {f.sha256 for f in entry.manifest.files} <= leased.blobs]
    if policy.names is not None:
        chosen = [entry for entry in chosen if entry.name in policy.names]
    if policy.older_than_s is not None:
        unused_since = catalog.now - policy.older_than_s
        chosen = [entry for entry in chosen if entry.last_used < unused_since]
    if policy.keep_last is not None:
        kept = _artifacts_of_last_runs(catalog, policy.keep_last)
        chosen = [entry for entry in chosen if entry.name in catalog.users and entry.name not in kept]
    if policy.max_bytes is not None:
        chosen = _limit_size(catalog, chosen, sizes, policy.max_bytes)
    return chosen


def _artifacts_of_last_runs(catalog: Catalog, count: int) -> set[Name]:
    """Return the artifacts that the last `count` runs of each recipe use."""
    runs_of_recipe: Counter[str] = Counter()
    names: list[Name] = []
    for run in sorted(catalog.runs, key=lambda run: -run.seen):
        runs_of_recipe[run.recipe] += 1
        if runs_of_recipe[run.recipe] <= count:
            names += run.artifacts
    return catalog.closure(names)


def _limit_size(catalog: Catalog, candidates: list[Entry], sizes: dict[str, int], max_bytes: int) -> list[Entry]:
    """Choose so many of the candidates, in their order, that all blobs that are still named fit into `max_bytes`."""
    blobs = {entry.name: {file.sha256 for file in entry.manifest.files} for entry in catalog.entries.values()}
    uses = Counter(sha256 for names in blobs.values() for sha256 in names)
    total = sum(sizes.get(sha256, 0) for sha256 in uses)
    chosen = []
    for entry in candidates:
        if total <= max_bytes:
            break
        chosen.append(entry)
        for sha256 in blobs[entry.name]:
            uses[sha256] -= 1
            total -= sizes.get(sha256, 0) if uses[sha256] == 0 else 0
    return chosen


def _read_leases(store: Store, grace_begin: float) -> Leased:
    """Read the leases that were renewed since `grace_begin`."""
    renewed = {item.key: item.key.split("/") for item in store.backend.items("leases") if item.modified >= grace_begin}
    owners = [owner_of(text) for text in read_all(store, renewed).values() if text is not None]
    return Leased(
        frozenset((parts[1], parts[2]) for parts in renewed.values() if len(parts) == 4),
        frozenset(sha256 for owner in owners if owner is not None for sha256 in owner.needs),
    )


def _find_stale_records(store: Store, catalog: Catalog, doomed: set[Name], grace_begin: float) -> list[str]:
    """Find runs without artifacts, records of artifacts that do not exist or will be deleted, and old leases."""
    keys = [f"{kind}/{stage}/{key}" for stage, key in doomed for kind in ("uses", "provenance")]
    existing = {"/".join(name) for name in catalog.entries}
    for kind in ("uses", "provenance"):
        for item in store.backend.items(kind):
            if item.modified < grace_begin and item.key.partition("/")[2] not in existing:
                keys.append(item.key)
    kept = catalog.entries.keys() - doomed
    keys += [run.key for run in catalog.runs if run.seen < grace_begin and kept.isdisjoint(run.artifacts)]
    gc_lease = "/".join(("leases", *GC, ""))  # gc deletes its own earlier leases when it releases its lease.
    keys += [
        item.key
        for item in store.backend.items("leases")
        if item.modified < grace_begin and not item.key.startswith(gc_lease)
    ]
    return keys


def _find_abandoned_work(store: Store, catalog: Catalog, leased: Leased, policy: Policy) -> list[str]:
    """Find unfinished work (resume.py) that no run has resumed for long, or whose artifact exists."""
    groups: dict[Name, list[Item]] = {}
    for item in store.backend.items("resume"):
        parts = item.key.split("/")
        if len(parts) > 3:
            groups.setdefault((parts[1], parts[2]), []).append(item)
    keys: list[str] = []
    for name, items in groups.items():
        max_age_s = policy.grace_s if name in catalog.entries else policy.unfinished_s
        if name not in leased.keys and max(item.modified for item in items) < catalog.now - max_age_s:
            keys += [item.key for item in items]
    return keys


def _blob_of_upload(leftover: str) -> str:
    """Return the sha256 of the blob that an unfinished upload (`KEY?UPLOAD_ID`) is for.

    For another leftover, such as a temporary file, return an empty text.
    """
    return leftover.rpartition("?")[0].rpartition("/")[2]


def _sweep(store: Store, plan: CollectionPlan, held: LeaseHandle) -> None:
    """Delete what the plan lists. Manifests go before blobs: also after a kill, no manifest names a missing blob."""
    backend = store.backend

    def delete(keys: Iterable[str]) -> None:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda key: backend.delete(key, held.assert_held), keys))

    delete(f"artifacts/{entry.stage}/{entry.key}" for entry in plan.artifacts)
    delete(item.key for item in plan.blobs)
    delete(plan.records)
    for leftover in plan.leftovers:
        held.assert_held()
        backend.discard(leftover)
    for local_file in plan.local_files:
        held.assert_held()
        local_file.remove()
