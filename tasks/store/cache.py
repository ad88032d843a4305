"""Files on this machine that may be removed: abandoned work, unused checkouts, cached blobs, partial files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.store.folder import inside
from requant.tasks.store.store import CHECKOUT_RECORDS, PARTIAL_FILES, Store

MAX_UNUSED_S = 30 * 24 * 3600.0  # a cached blob that was not used for longer is removed, and downloaded when needed


@dataclass(frozen=True)
class LocalLeftover:
    """A file or folder that may be removed, and the bytes that this frees."""

    path: Path
    bytes: int

    def remove(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class InUse:
    """What must stay: digests of artifacts, the sha256 of their blobs and of blobs that leases name, and the stage keys
    of leases."""

    digests: Collection[str]
    blobs: Collection[str]
    leased_blobs: Collection[str]
    leased_keys: Collection[tuple[str, str]]


def find_local_leftovers(store: Store, in_use: InUse, grace_s: float, unfinished_s: float) -> list[LocalLeftover]:
    """Find what may be removed from the folders on this machine.

    Whatever changed within `grace_s` seconds stays, and so does unfinished work that changed within `unfinished_s`.
    """
    root = store.cache.root
    now = store.cache.now()
    paths = [
        *_unused_work(root, in_use, now - unfinished_s),
        *_unused_checkouts(root, in_use, now - grace_s),
        *(path for path in _entries(root, PARTIAL_FILES) if _last_change(path) < now - grace_s),
    ]
    leftovers = [LocalLeftover(path, _freed_bytes(path)) for path in paths]
    if not store.is_local:
        for item in store.cache.items("blobs"):
            sha256 = item.key.rpartition("/")[2]
            max_age_s = MAX_UNUSED_S if sha256 in in_use.blobs else grace_s
            if sha256 not in in_use.leased_blobs and item.modified < now - max_age_s:
                leftovers.append(LocalLeftover(root / item.key, item.size))
        for name in store.cache.leftovers(now - grace_s):
            leftovers.append(LocalLeftover(root / name, (root / name).lstat().st_size))
    return leftovers


def _unused_work(root: Path, in_use: InUse, before: float) -> Iterator[Path]:
    """Yield work folders (`Store.work_folder`) of no lease that last changed before that time."""
    leased = tuple(f"{stage}-{key[:16]}" for stage, key in in_use.leased_keys)
    for folder in _entries(root, "work"):
        if not folder.name.startswith(leased) and _last_change(folder) < before:
            yield folder


def _unused_checkouts(root: Path, in_use: InUse, before: float) -> Iterator[Path]:
    """Yield checkouts of artifacts that no longer exist, and records of checkouts whose folder no longer exists."""
    for folder in _entries(root, "checkouts"):
        if folder.name not in in_use.digests and folder.lstat().st_mtime < before:
            yield folder
    for record in _entries(root, CHECKOUT_RECORDS):
        if record.lstat().st_mtime < before and not _has_folder(record):
            yield record


def _entries(root: Path, name: str) -> list[Path]:
    folder = inside(root, name)
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _has_folder(record: Path) -> bool:
    """Check whether the folder of a checkout record exists. A record that cannot be read has none."""
    try:
        return os.path.lexists(json.loads(record.read_bytes())["folder"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _stat_tree(path: Path) -> Iterator[os.stat_result]:
    """Yield the status of a file or folder and of everything below it. What disappears meanwhile is skipped."""
    names = [str(path)]
    for folder, folders, files in () if path.is_symlink() else os.walk(path):
        names += (os.path.join(folder, name) for name in (*folders, *files))
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            yield os.lstat(name)


def _last_change(path: Path) -> float:
    return max((status.st_mtime for status in _stat_tree(path)), default=float("inf"))


def _freed_bytes(path: Path) -> int:
    """Count the bytes that removing a path frees: those of files without another hard link."""
    return sum(status.st_size for status in _stat_tree(path) if status.st_nlink == 1)
