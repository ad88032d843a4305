"""What lies in a store: every artifact with its record and its last use, and the runs that use it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from requant.tasks.artifact import Manifest
from requant.tasks.errors import StoreError
from requant.tasks.store.runs import Run
from requant.tasks.store.store import Store, record_of

READERS = 16  # at once: more wait for the client's connections

Name = tuple[str, str]  # stage, stage key
ARTIFACT_NAME = re.compile(r"artifacts/([\w-]{1,64})/([\w-]{1,128})", re.ASCII)  # anything else was put there by others


@dataclass(frozen=True)
class Entry:
    """One artifact. `used`: when it was last made or reused, by the store's clock."""

    stage: str
    key: str
    manifest: Manifest
    provenance: dict[str, Any]
    used: float

    @property
    def name(self) -> Name:
        return self.stage, self.key

    @property
    def inner(self) -> list[Name]:
        """The artifacts that were made or reused while this one was made."""
        names = self.provenance.get("used")
        pairs = names if isinstance(names, list) else []
        return [(str(p[0]), str(p[1])) for p in pairs if isinstance(p, list) and len(p) == 2]


@dataclass(frozen=True)
class Catalog:
    """Everything in the store at one time by its own clock. `damaged`: manifests that cannot be read, and why."""

    now: float
    entries: dict[Name, Entry]
    runs: list[Run]
    damaged: dict[Name, str]

    @cached_property
    def users(self) -> dict[Name, list[Run]]:
        """The runs that use each artifact, also through another one, the last first."""
        users: dict[Name, list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: -run.seen):
            for name in self.closure(run.artifacts):
                users.setdefault(name, []).append(run)
        return users

    def closure(self, names: Iterable[Name]) -> set[Name]:
        """These artifacts and those that were used in making them."""
        found: set[Name] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name in self.entries and name not in found:
                found.add(name)
                left += self.entries[name].inner
        return found


def read_catalog(store: Store) -> Catalog:
    """List and read everything; many small objects at once, so that a thousand artifacts take seconds.

    An artifact that goes meanwhile is left out.
    """
    now = store.backend.now()
    manifests = {
        item.key: item.modified for item in store.backend.items("artifacts") if ARTIFACT_NAME.fullmatch(item.key)
    }
    used = {item.key.partition("/")[2]: item.modified for item in store.backend.items("uses")}
    runs = {item.key: item.modified for item in store.backend.items("runs")}
    beside = {key: f"provenance/{key.partition('/')[2]}" for key in manifests}
    texts = read_all(store, [*manifests, *beside.values(), *runs])
    entries: dict[Name, Entry] = {}
    damaged: dict[Name, str] = {}
    for key, made in manifests.items():
        short = key.partition("/")[2]
        stage, _, stage_key = short.partition("/")
        text = texts[key]
        if text is None:
            continue
        try:
            manifest = Manifest.from_json(text)
        except StoreError as error:
            damaged[stage, stage_key] = str(error)
            continue
        last = max(made, used.get(short, made))
        entries[stage, stage_key] = Entry(stage, stage_key, manifest, record_of(texts[beside[key]]), last)
    found = [(key, Run.from_json(texts[key] or b"", seen)) for key, seen in runs.items()]
    # One that stands under another name than its own is not ours either: gc would delete what it names.
    return Catalog(now, entries, [run for key, run in found if run is not None and run.key == key], damaged)


def read_all(store: Store, keys: Iterable[str]) -> dict[str, bytes | None]:
    """The objects by their keys."""
    names = list(keys)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(store.backend.read, names), strict=True))
