"""Checks a store: is everything there that its manifests name? And mends it.

What is damaged or missing is put back from a whole copy on this machine, if there is one; otherwise the artifacts that
need it are taken out of sight, and the next run makes them anew.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from requant.tasks.artifact import File, sha256_of
from requant.tasks.errors import StoreError
from requant.tasks.store.catalog import Catalog, read_catalog
from requant.tasks.store.folder import clone, make_folder
from requant.tasks.store.lease import LeaseHandle, lease
from requant.tasks.store.store import GC, Store, blob_key

PARALLEL_REQUESTS = 8
HASHERS = 2  # at once, when every byte is read
Blob = tuple[str, int]  # sha256 and size


@dataclass
class StoreCheck:
    """How many blobs were looked at, a sentence for each problem, and one for each thing that was done about them."""

    checked: int = 0
    problems: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)


def verify_store(store: Store, *, deep: bool = False, repair: bool = False) -> StoreCheck:
    """Look at every blob that a manifest names: is it there in its size or, `deep`, in every byte."""
    catalog = read_catalog(store)
    blobs = _blobs(catalog)
    found = StoreCheck(len(blobs))
    bad = _bad(store, blobs.values(), deep)
    if bad:  # or on its way out: gc takes an artifact's manifest first
        store.wait_for_gc()
        catalog = read_catalog(store)
        bad = _bad(store, (file for blob, file in _blobs(catalog).items() if blob in bad), deep)
    for (stage, key), entry in sorted(catalog.entries.items()):
        for file in entry.manifest.files:
            if _blob(file) in bad:
                text = f"{file.path} ({file.sha256[:12]}) is missing or damaged"
                found.problems.append(f"artifacts/{stage}/{key}: {text}")
    found.problems += [f"artifacts/{stage}/{key}: {why}" for (stage, key), why in sorted(catalog.damaged.items())]
    if repair and found.problems:
        with lease(store.backend, *GC) as held:
            found.repairs = list(_mend(store, deep, bad, held))
    return found


def _blob(file: File) -> Blob:
    return file.sha256, file.size


def _blobs(catalog: Catalog) -> dict[Blob, File]:
    """The blobs that manifests name, each once; one that two manifests give two sizes is two, and one of them wrong."""
    return {_blob(file): file for _, entry in sorted(catalog.entries.items()) for file in entry.manifest.files}


def _bad(store: Store, files: Iterable[File], deep: bool) -> set[Blob]:
    """The blobs that are not whole."""
    looked_at = list(files)
    with ThreadPoolExecutor(HASHERS if deep else PARALLEL_REQUESTS) as pool:
        whole = pool.map(lambda file: _is_good(store, file, deep), looked_at)
        return {_blob(file) for file, good in zip(looked_at, whole, strict=True) if not good}


def _is_good(store: Store, file: File, deep: bool) -> bool:
    if not store.sees_blob(file):
        return False
    try:
        return not deep or _sha256_in_store(store, file) == file.sha256
    except OSError:  # StoreError is one
        if store.sees_blob(file):
            raise
        return False  # it went meanwhile


def _sha256_in_store(store: Store, file: File) -> str:
    if store.is_local:
        return sha256_of(store.cache.path(blob_key(file.sha256)))
    make_folder(arriving := store.cache.path("arriving"))
    with tempfile.TemporaryDirectory(dir=arriving) as folder:
        copy = Path(folder) / "blob"
        return store.backend.get_file(blob_key(file.sha256), copy)


def _mend(store: Store, deep: bool, bad: set[Blob], held: LeaseHandle) -> Iterator[str]:
    """Mend what is still bad now that nobody deletes beside us; a sentence for each thing done."""
    catalog = read_catalog(store)
    blobs = _blobs(catalog)
    lost: set[Blob] = set()
    for blob in sorted(_bad(store, (file for blob, file in blobs.items() if blob in bad), deep)):
        file = blobs[blob]
        key = blob_key(file.sha256)
        if copy := _whole_copy(store, catalog, file):
            _put_back(store, key, copy)
            yield f"{file.path} ({file.sha256[:12]}) was put back from {copy}"
        else:
            lost.add(blob)
    for (stage, key), entry in sorted(catalog.entries.items()):
        names = sorted(file.path for file in entry.manifest.files if _blob(file) in lost)
        if names:
            store.backend.delete(f"artifacts/{stage}/{key}", held.assert_held)
            yield f"artifacts/{stage}/{key} was removed, for want of {', '.join(names)}: the next run makes it anew"
    for sha256 in sorted({sha256 for sha256, _ in lost} - {sha256 for sha256, _ in blobs.keys() - lost}):
        # one of the right size would be taken for good
        store.backend.delete(blob_key(sha256), held.assert_held)
        if not store.is_local:
            store.cache.delete(blob_key(sha256))
    for stage, key in sorted(catalog.damaged):
        store.backend.delete(f"artifacts/{stage}/{key}", held.assert_held)
        yield f"artifacts/{stage}/{key} was removed, which could not be read: the next run makes it anew"


def _whole_copy(store: Store, catalog: Catalog, file: File) -> Path | None:
    """A file on this machine with the bytes of a blob: in the local cache, or in a checkout beside a local store."""
    candidates = [] if store.is_local else [store.cache.path(blob_key(file.sha256))]
    for entry in catalog.entries.values():
        checkout = store.checkout_folder(entry.manifest)
        candidates += [checkout / other.path for other in entry.manifest.files if other.sha256 == file.sha256]
    for path in candidates:
        if path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256:
            return path
    return None


def _put_back(store: Store, key: str, copy: Path) -> None:
    """Putting a file may move it away: a copy of the copy goes in."""
    spare = store.cache.path(f"arriving/{key.rpartition('/')[2]}-{os.getpid()}")
    make_folder(spare.parent)
    spare.unlink(missing_ok=True)
    try:
        clone(copy, spare)
        store.backend.put_file(key, spare)
    except FileNotFoundError as error:
        raise StoreError(f"{copy} went away while it was put back: run again") from error
    finally:
        spare.unlink(missing_ok=True)
