"""What lies on this machine beside a store and may go: unfinished work, checkouts, blobs that can be fetched again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.store.folder import inside
from requant.tasks.store.store import CHECKOUT_RECORDS, Store

UNUSED_S = 30 * 24 * 3600.0  # seconds after which a blob that was not used here is fetched again when it is


@dataclass(frozen=True)
class Found:
    """A file or a folder that goes, and the bytes of it that nothing else holds."""

    path: Path
    bytes: int

    def remove(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def find_local_leftovers(
    store: Store,
    named: Collection[str],
    digests: Collection[str],
    needed: Collection[str],
    working: Collection[tuple[str, str]],
    grace: float,
    unfinished: float,
) -> list[Found]:
    """What may go. `named`: blobs of the artifacts that stay, `digests`: those artifacts; what a lease needs stays."""
    root = store.cache.root
    now = store.cache.now()
    found: list[Found] = []
    at_work = tuple(f"{stage}-{key[:16]}" for stage, key in working)
    for folder in _entries(root, "work"):
        if not folder.name.startswith(at_work) and _last_change(folder) < now - unfinished:
            found.append(Found(folder, _bytes(folder)))
    for folder in _entries(root, "checkouts"):
        if folder.name not in digests and folder.lstat().st_mtime < now - grace:
            found.append(Found(folder, _bytes(folder)))
    for path in _entries(root, CHECKOUT_RECORDS):
        if path.lstat().st_mtime < now - grace and _names_a_folder_that_is_gone(path):
            found.append(Found(path, _bytes(path)))
    for path in _entries(root, "arriving"):
        if _last_change(path) < now - grace:
            found.append(Found(path, _bytes(path)))
    if not store.is_local:
        for item in store.cache.items("blobs"):
            sha256 = item.key.rpartition("/")[2]
            patience = UNUSED_S if sha256 in named else grace
            if sha256 not in needed and item.modified < now - patience:
                found.append(Found(root / item.key, item.size))
        found += [Found(root / name, (root / name).lstat().st_size) for name in store.cache.leftovers(now - grace)]
    return found


def _entries(root: Path, name: str) -> list[Path]:
    folder = inside(root, name)
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _names_a_folder_that_is_gone(record: Path) -> bool:
    """Whether a record of what was laid into a user's folder is of no use any more."""
    try:
        return not os.path.lexists(json.loads(record.read_bytes())["folder"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a record that cannot be read is of no use either
        return True


def _tree(path: Path) -> Iterator[os.stat_result]:
    """A file or folder and everything below it, as far as it is still there."""
    names = [str(path)]
    for folder, folders, files in () if path.is_symlink() else os.walk(path):
        names += (os.path.join(folder, name) for name in (*folders, *files))
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            yield os.lstat(name)


def _last_change(path: Path) -> float:
    return max((found.st_mtime for found in _tree(path)), default=float("inf"))


def _bytes(path: Path) -> int:
    return sum(found.st_size for found in _tree(path) if found.st_nlink == 1)
