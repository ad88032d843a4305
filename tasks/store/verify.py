"""Check and repair a store: do all blobs that its manifests name exist, and are they intact?

A missing or damaged blob is replaced by an intact copy on this machine, if there is one. Otherwise the manifests that
name it are deleted, and the next run makes the artifacts again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import Field

from requant.tasks.artifact import File, sha256_of
from requant.tasks.documents import Document
from requant.tasks.errors import StoreError
from requant.tasks.progress import progress
from requant.tasks.store.catalog import Catalog, read_catalog
from requant.tasks.store.folder import clone, make_folder
from requant.tasks.store.lease import LeaseHandle, lease
from requant.tasks.store.store import GC, PARTIAL_FILES, Store, blob_key

PARALLEL_REQUESTS = 8
PARALLEL_HASHES = 2
Blob = tuple[str, int]  # sha256 and size in bytes


class StoreCheck(Document):
    """The document of `requant store verify`."""

    checked: int = Field(description="How many blobs were checked")
    problems: list[str] = Field(description="What is missing or damaged, in sentences")
    repairs: list[str] = Field(description="What --repair did, in sentences")


def verify_store(store: Store, *, deep: bool = False, repair: bool = False) -> StoreCheck:
    """Check the size of every blob that a manifest names, or with `deep` every byte. With `repair`, repair the store.

    Raises StoreError or StoreUnreachable.
    """
    catalog = read_catalog(store)
    blobs = _named_blobs(catalog)
    bad = _find_bad(store, blobs.values(), deep)
    if bad:  # A gc that is deleting an artifact deletes its manifest first, so that the catalog may be out of date.
        store.wait_for_gc()
        catalog = read_catalog(store)
        bad = _find_bad(store, (file for blob, file in _named_blobs(catalog).items() if blob in bad), deep)
    problems, repairs = [], []
    for (stage, key), entry in sorted(catalog.entries.items()):
        for file in entry.manifest.files:
            if _blob(file) in bad:
                text = f"{file.path} ({file.sha256[:12]}) is missing or damaged"
                problems.append(f"artifacts/{stage}/{key}: {text}")
    problems += [f"artifacts/{stage}/{key}: {why}" for (stage, key), why in sorted(catalog.damaged.items())]
    if repair and problems:
        with lease(store.backend, *GC) as held:
            repairs = list(_repair(store, deep, bad, held))
    return StoreCheck(checked=len(blobs), problems=problems, repairs=repairs)


def _blob(file: File) -> Blob:
    return file.sha256, file.size


def _named_blobs(catalog: Catalog) -> dict[Blob, File]:
    """Return the blobs that manifests name, without repetition.

    If two manifests give one sha256 two sizes, both are returned: one of them is wrong.
    """
    return {_blob(file): file for _, entry in sorted(catalog.entries.items()) for file in entry.manifest.files}


def _find_bad(store: Store, files: Iterable[File], deep: bool) -> set[Blob]:
    """Return the blobs that are missing or damaged."""
    checked = list(files)
    size_bytes = sum(file.size for file in checked)
    with (
        progress("verify", size_bytes if deep else len(checked), "bytes" if deep else "files") as bar,
        ThreadPoolExecutor(PARALLEL_HASHES if deep else PARALLEL_REQUESTS) as pool,
    ):

        def check(file: File) -> bool:
            good = _is_intact(store, file, deep)
            bar.advance(file.size if deep else 1)
            return good

        return {_blob(file) for file, good in zip(checked, pool.map(check, checked), strict=True) if not good}


def _is_intact(store: Store, file: File, deep: bool) -> bool:
    if not store.sees_blob(file):
        return False
    try:
        return not deep or _sha256_in_store(store, file) == file.sha256
    except OSError:  # StoreError is one
        if store.sees_blob(file):
            raise
        return False  # the blob was deleted meanwhile


def _sha256_in_store(store: Store, file: File) -> str:
    if store.is_local:
        return sha256_of(store.cache.path(blob_key(file.sha256)))
    make_folder(partial_files := store.cache.path(PARTIAL_FILES))
    with tempfile.TemporaryDirectory(dir=partial_files) as folder:
        copy = Path(folder) / "blob"
        return store.backend.get_file(blob_key(file.sha256), copy)


def _repair(store: Store, deep: bool, bad: set[Blob], held: LeaseHandle) -> Iterator[str]:
    """Repair what is still bad under the lease of gc, when nobody else deletes. Yield a sentence for each repair."""
    catalog = read_catalog(store)
    blobs = _named_blobs(catalog)
    lost: set[Blob] = set()
    for blob in sorted(_find_bad(store, (file for blob, file in blobs.items() if blob in bad), deep)):
        file = blobs[blob]
        key = blob_key(file.sha256)
        if copy := _find_intact_copy(store, catalog, file):
            _restore(store, key, copy)
            yield f"{file.path} ({file.sha256[:12]}) was put back from {copy}"
        else:
            lost.add(blob)
    for (stage, key), entry in sorted(catalog.entries.items()):
        names = sorted(file.path for file in entry.manifest.files if _blob(file) in lost)
        if names:
            store.backend.delete(f"artifacts/{stage}/{key}", held.assert_held)
            yield f"artifacts/{stage}/{key} was removed, for want of {', '.join(names)}: the next run makes it anew"
    for sha256 in sorted({sha256 for sha256, _ in lost} - {sha256 for sha256, _ in blobs.keys() - lost}):
        # A later run would take a damaged blob of the right size for an intact one.
        store.backend.delete(blob_key(sha256), held.assert_held)
        if not store.is_local:
            store.cache.delete(blob_key(sha256))
    for stage, key in sorted(catalog.damaged):
        store.backend.delete(f"artifacts/{stage}/{key}", held.assert_held)
        yield f"artifacts/{stage}/{key} was removed, which could not be read: the next run makes it anew"


def _find_intact_copy(store: Store, catalog: Catalog, file: File) -> Path | None:
    """Find a file on this machine with the content of a blob: in the local cache, or in a checkout."""
    candidates = [] if store.is_local else [store.cache.path(blob_key(file.sha256))]
    for entry in catalog.entries.values():
        checkout = store.checkout_folder(entry.manifest)
        candidates += [checkout / other.path for other in entry.manifest.files if other.sha256 == file.sha256]
    for path in candidates:
        if path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256:
            return path
    return None


def _restore(store: Store, key: str, copy: Path) -> None:
    """Store a blob from an intact copy. `put_file` may move its file away, so it gets a copy of the copy."""
    spare = store.cache.path(f"{PARTIAL_FILES}/{key.rpartition('/')[2]}-{os.getpid()}")
    make_folder(spare.parent)
    spare.unlink(missing_ok=True)
    try:
        clone(copy, spare)
        store.backend.put_file(key, spare)
    except FileNotFoundError as error:
        raise StoreError(f"{copy} went away while it was put back: run again") from error
    finally:
        spare.unlink(missing_ok=True)
