"""Garbage collection: mark what must stay, sweep the rest.

What goes: artifacts that the policy chooses, blobs that no manifest names, and what killed processes left. What stays
whatever the policy says: everything written or used within the grace period, what a run that was alive within it uses,
and what a lease that beat within it needs. Ages are those of the store's own clock.

No run loses what it relies on. Deleting happens only under the lease `gc/store`, and everything is read after it is
taken. A run writes first (a lease that names the blobs it needs, a manifest, a use), then waits until that lease is
free, and then looks whether what it relies on is there. So either gc has read what the run wrote, and leaves it alone,
or the run looks after gc is done, and makes again what is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from requant.tasks.artifact import SHA256
from requant.tasks.errors import StoreError
from requant.tasks.store.backend import Item
from requant.tasks.store.cache import Found, find_local_leftovers
from requant.tasks.store.catalog import Catalog, Entry, Name, read_all, read_catalog
from requant.tasks.store.lease import LeaseHandle, lease, owner_of
from requant.tasks.store.store import GC, Store, blob_key

GRACE_S = 24 * 3600.0  # seconds: longer than any upload, and than the pauses of any run between two of its stages
UNFINISHED_S = 7 * 24 * 3600.0  # seconds after which nobody goes on with unfinished work
PARALLEL_REQUESTS = 8


@dataclass(frozen=True)
class Policy:
    """Which artifacts go: those that every option given says of. None of them given: no artifact goes."""

    keep_last: int | None = None  # of each recipe, all but what its last runs use; what no run names is not meant
    older_than: float | None = None  # seconds since the last use
    max_size: int | None = None  # bytes of all blobs: the longest unused goes first, until the rest fits
    grace: float = GRACE_S
    unfinished: float = UNFINISHED_S


@dataclass(frozen=True)
class Live:
    """What the leases say that beat within the grace period: stage keys under way, and the sha256 of blobs needed."""

    working: frozenset[Name]
    needed: frozenset[str]


@dataclass
class CollectionPlan:
    """What goes. `stays`: bytes of the blobs that remain."""

    artifacts: list[Entry] = field(default_factory=list)
    blobs: list[Item] = field(default_factory=list)
    records: list[str] = field(default_factory=list)  # other objects: uses, provenance, runs, leases, unfinished work
    leftovers: list[str] = field(default_factory=list)
    local_files: list[Found] = field(default_factory=list)
    stays: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.artifacts or self.blobs or self.records or self.leftovers or self.local_files)


def collect(store: Store, policy: Policy, *, dry_run: bool = False) -> CollectionPlan:
    """Delete what the policy lets go; what was deleted, or with `dry_run` what would be.

    Raises StoreError if a manifest cannot be read: nobody knows then which blobs it names.
    """
    plan = make_plan(store, policy)
    if dry_run or plan.is_empty:
        return plan
    with lease(store.backend, *GC) as held:
        plan = make_plan(store, policy)
        _sweep(store, plan, held)
    return plan


def make_plan(store: Store, policy: Policy) -> CollectionPlan:
    """Mark. Everything is read anew, and nothing written."""
    catalog = read_catalog(store)
    for (stage, key), why in catalog.damaged.items():
        raise StoreError(f"artifacts/{stage}/{key}: {why.partition(':')[0]}: run requant store verify --repair first")
    young = catalog.now - policy.grace
    live = _live(store, young)
    found = ((item.key.rpartition("/")[2], item) for item in store.backend.items("blobs"))
    sizes = {name: item for name, item in found if SHA256.fullmatch(name) and item.key == blob_key(name)}
    plan = CollectionPlan(
        artifacts=chosen(catalog, policy, live, {sha256: item.size for sha256, item in sizes.items()})
    )
    gone = {entry.name for entry in plan.artifacts}
    stays = {name: entry for name, entry in catalog.entries.items() if name not in gone}
    named = {file.sha256 for entry in stays.values() for file in entry.manifest.files}
    for sha256, item in sizes.items():
        if sha256 not in named and sha256 not in live.needed and item.modified < young:
            plan.blobs.append(item)
        else:
            plan.stays += item.size
    plan.records = [*_records(store, catalog, gone, young), *_unfinished(store, catalog, live, policy)]
    plan.leftovers = [name for name in store.backend.leftovers(young) if _blob_of(name) not in live.needed]
    digests = {entry.manifest.digest for entry in stays.values()}
    plan.local_files = find_local_leftovers(
        store, named, digests, live.needed, live.working, policy.grace, policy.unfinished
    )
    return plan


def chosen(catalog: Catalog, policy: Policy, live: Live, sizes: dict[str, int]) -> list[Entry]:
    """The artifacts that go, the longest unused first."""
    entries = sorted(catalog.entries.values(), key=lambda entry: entry.used)
    if policy.keep_last is None and policy.older_than is None and policy.max_size is None:
        return []
    young = catalog.now - policy.grace
    in_use = catalog.closure(name for run in catalog.runs if run.seen >= young for name in run.artifacts)
    go = [entry for entry in entries if entry.used < young and entry.name not in in_use | live.working]
    go = [entry for entry in go if not {f.sha256 for f in entry.manifest.files} <= live.needed]
    if policy.older_than is not None:
        unused_since = catalog.now - policy.older_than
        go = [entry for entry in go if entry.used < unused_since]
    if policy.keep_last is not None:
        last = _last_runs(catalog, policy.keep_last)
        go = [entry for entry in go if entry.name in catalog.users and entry.name not in last]
    if policy.max_size is not None:
        go = _until_it_fits(catalog, go, sizes, policy.max_size)
    return go


def _last_runs(catalog: Catalog, count: int) -> set[Name]:
    """What the last runs of each recipe use."""
    seen: Counter[str] = Counter()
    names: list[Name] = []
    for run in sorted(catalog.runs, key=lambda run: -run.seen):
        seen[run.recipe] += 1
        if seen[run.recipe] <= count:
            names += run.artifacts
    return catalog.closure(names)


def _until_it_fits(catalog: Catalog, candidates: list[Entry], sizes: dict[str, int], limit: int) -> list[Entry]:
    blobs = {entry.name: {file.sha256 for file in entry.manifest.files} for entry in catalog.entries.values()}
    uses = Counter(sha256 for names in blobs.values() for sha256 in names)
    total = sum(sizes.get(sha256, 0) for sha256 in uses)
    go = []
    for entry in candidates:
        if total <= limit:
            break
        go.append(entry)
        for sha256 in blobs[entry.name]:
            uses[sha256] -= 1
            total -= sizes.get(sha256, 0) if uses[sha256] == 0 else 0
    return go


def _live(store: Store, young: float) -> Live:
    beating = {item.key: item.key.split("/") for item in store.backend.items("leases") if item.modified >= young}
    owners = [owner_of(text) for text in read_all(store, beating).values() if text is not None]
    return Live(
        frozenset((parts[1], parts[2]) for parts in beating.values() if len(parts) == 4),
        frozenset(sha256 for owner in owners if owner is not None for sha256 in owner.needs),
    )


def _records(store: Store, catalog: Catalog, gone: set[Name], young: float) -> list[str]:
    """What stands beside artifacts that go or are gone, runs of which nothing is left, and leases of the dead."""
    go = [f"{kind}/{stage}/{key}" for stage, key in gone for kind in ("uses", "provenance")]
    there = {"/".join(name) for name in catalog.entries}
    for kind in ("uses", "provenance"):
        for item in store.backend.items(kind):
            if item.modified < young and item.key.partition("/")[2] not in there:
                go.append(item.key)
    stays = catalog.entries.keys() - gone
    go += [run.key for run in catalog.runs if run.seen < young and stays.isdisjoint(run.artifacts)]
    ours = "/".join(("leases", *GC, ""))
    go += [i.key for i in store.backend.items("leases") if i.modified < young and not i.key.startswith(ours)]
    return go


def _unfinished(store: Store, catalog: Catalog, live: Live, policy: Policy) -> list[str]:
    """Carried work that nobody went on with, or whose artifact has long been there."""
    groups: dict[Name, list[Item]] = {}
    for item in store.backend.items("resume"):
        parts = item.key.split("/")
        if len(parts) > 3:
            groups.setdefault((parts[1], parts[2]), []).append(item)
    go: list[str] = []
    for name, items in groups.items():
        patience = policy.grace if name in catalog.entries else policy.unfinished
        if name not in live.working and max(item.modified for item in items) < catalog.now - patience:
            go += [item.key for item in items]
    return go


def _blob_of(leftover: str) -> str:
    return leftover.rpartition("?")[0].rpartition("/")[2]


def _sweep(store: Store, plan: CollectionPlan, held: LeaseHandle) -> None:
    """Manifests first: killed at any moment, there is no manifest without its blobs."""
    backend = store.backend

    def delete(names: Iterable[str]) -> None:
        def one(name: str) -> None:
            backend.delete(name, held.assert_held)

        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(one, names))

    delete(f"artifacts/{entry.stage}/{entry.key}" for entry in plan.artifacts)
    delete(item.key for item in plan.blobs)
    delete(plan.records)
    for leftover in plan.leftovers:
        held.assert_held()
        backend.discard(leftover)
    for found in plan.local_files:
        held.assert_held()
        found.remove()
