"""The content of a store: every artifact with its record and its last use, and the runs that use it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from requant.tasks.artifact import Manifest
from requant.tasks.errors import StoreError
from requant.tasks.record import StageRecord
from requant.tasks.store.runs import Run
from requant.tasks.store.store import Store

PARALLEL_READS = 16  # more would wait for the client's connections

Name = tuple[str, str]  # stage and stage key
# Objects with other names below artifacts/ are not Requant's.
ARTIFACT_NAME = re.compile(r"artifacts/([\w-]{1,64})/([\w-]{1,128})", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One artifact. `last_used` is when it was made or reused for the last time, by the store's clock."""

    stage: str
    key: str
    manifest: Manifest
    provenance: StageRecord
    last_used: float

    @property
    def name(self) -> Name:
        return self.stage, self.key


@dataclass(frozen=True)
class Catalog:
    """Everything in a store at the time `now` of its clock. `damaged` are manifests that cannot be read, and why."""

    now: float
    entries: dict[Name, Entry]
    runs: list[Run]
    damaged: dict[Name, str]

    @cached_property
    def users(self) -> dict[Name, list[Run]]:
        """The runs that use each artifact directly or through another artifact, newest first."""
        users: dict[Name, list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: -run.seen):
            for name in self.closure(run.artifacts):
                users.setdefault(name, []).append(run)
        return users

    def closure(self, names: Iterable[Name]) -> set[Name]:
        """Return these artifacts and all artifacts that were used in making them."""
        closed: set[Name] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name in self.entries and name not in closed:
                closed.add(name)
                left += self.entries[name].provenance.used
        return closed


def read_catalog(store: Store) -> Catalog:
    """List and read everything. Small objects are read in parallel, so that a thousand artifacts take seconds.

    An artifact that is deleted meanwhile is left out.
    """
    now = store.backend.now()
    manifests = {
        item.key: item.modified for item in store.backend.items("artifacts") if ARTIFACT_NAME.fullmatch(item.key)
    }
    used = {item.key.partition("/")[2]: item.modified for item in store.backend.items("uses")}
    runs = {item.key: item.modified for item in store.backend.items("runs")}
    record_keys = {key: f"provenance/{key.partition('/')[2]}" for key in manifests}
    texts = read_all(store, [*manifests, *record_keys.values(), *runs])
    entries: dict[Name, Entry] = {}
    damaged: dict[Name, str] = {}
    for key, made in manifests.items():
        name = key.partition("/")[2]
        stage, _, stage_key = name.partition("/")
        text = texts[key]
        if text is None:
            continue
        try:
            manifest = Manifest.from_json(text)
        except StoreError as error:
            damaged[stage, stage_key] = str(error)
            continue
        last_used = max(made, used.get(name, made))
        record = StageRecord.from_json(texts[record_keys[key]])
        entries[stage, stage_key] = Entry(stage, stage_key, manifest, record, last_used)
    parsed = [(key, Run.from_json(texts[key] or b"", seen)) for key, seen in runs.items()]
    # Requant writes a run's record only under the run's own key, at which gc deletes it. Ignore records of other keys.
    return Catalog(now, entries, [run for key, run in parsed if run is not None and run.key == key], damaged)


def read_all(store: Store, keys: Iterable[str]) -> dict[str, bytes | None]:
    """Read objects in parallel, and return their contents by key."""
    names = list(keys)
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        return dict(zip(names, pool.map(store.backend.read, names), strict=True))
