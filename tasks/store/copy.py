"""Copy artifacts between stores: blob by blob, with a check of each sha256, and the manifest last.

A command that was killed can be repeated: blobs that the target has are not copied again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.artifact import File
from requant.tasks.errors import CorruptBlob, RequantError, StoreError
from requant.tasks.progress import progress
from requant.tasks.store.catalog import Catalog, Entry
from requant.tasks.store.folder import make_folder
from requant.tasks.store.store import PARTIAL_FILES, Store, blob_key

log = logging.getLogger(__name__)

PARALLEL_COPIES = 4


@dataclass(frozen=True)
class Copied:
    """An artifact that both stores now have, and the bytes that had to be copied."""

    entry: Entry
    bytes: int


def find_entries(catalog: Catalog, name: str) -> list[Entry]:
    """Return the artifacts whose digest or stage key begins with `name`. They all hold the same files.

    Raises RequantError if there is none, or if there are several with different files.
    """
    found = [e for e in catalog.entries.values() if e.manifest.digest.startswith(name) or e.key.startswith(name)]
    digests = {entry.manifest.digest for entry in found}
    if len(digests) != 1:
        raise RequantError(f"{len(digests)} artifacts have a digest or key that begins with {name!r}: requant store ls")
    return found


def copy(source: Store, target: Store, entries: Iterable[Entry]) -> list[Copied]:
    """Copy artifacts with their records.

    Raises CorruptBlob for a blob whose content does not have the sha256 in its name. Where `target` has another
    artifact for a stage key, that one stays: raises RequantError after everything else was copied.
    """
    copied, others = [], []
    for entry in entries:
        name = os.urandom(8).hex()  # of leases, in which gc of either store can read what it must not delete
        with source.lease("export", name), target.lease("import", name):
            source.need(entry.manifest.files)
            target.need(entry.manifest.files)
            there = target.manifest(entry.stage, entry.key)
            if there is not None and there != entry.manifest:
                others.append(f"{entry.stage}/{entry.key[:12]} ({there.digest[:12]}, not {entry.manifest.digest[:12]})")
                continue
            files = {file.sha256: file for file in entry.manifest.files}
            missing = [file for file in files.values() if not target.has_blob(file)]
            size_bytes = sum(file.size for file in missing)
            with progress("copy", size_bytes, "bytes") as bar, ThreadPoolExecutor(PARALLEL_COPIES) as pool:
                for file in pool.map(lambda file: _copy_blob(source, target, file), missing):
                    bar.advance(file.size)
                    log.info(f"{file.path}, {file.size:,} bytes")
            record = entry.provenance.with_values(copied_from=source.url)
            target.commit(entry.stage, entry.key, entry.manifest, record)
        copied.append(Copied(entry, size_bytes))
    if others:
        raise RequantError(
            f"{target.url} has another artifact for {', '.join(others)}, and the first one for a stage key stays: "
            "use another store"
        )
    return copied


def _copy_blob(source: Store, target: Store, file: File) -> File:
    key = blob_key(file.sha256)
    if not source.sees_blob(file):
        raise StoreError(
            f"{source.url} has lost {file.path} ({file.sha256[:12]}): run `requant store verify` there", key=key
        )
    partial = target.cache.path(f"{PARTIAL_FILES}/copy-{file.sha256}-{os.getpid()}")
    make_folder(partial.parent)
    partial.unlink(missing_ok=True)
    try:
        if source.backend.get_file(key, partial) != file.sha256:
            raise CorruptBlob(
                f"{file.path} in {source.url} does not have the sha256 {file.sha256[:12]} that names it: "
                "run `requant store verify --deep --repair` there",
                key=key,
            )
        target.backend.put_file(key, partial, file.sha256)
    finally:
        partial.unlink(missing_ok=True)
    return file


def store_at(place: str) -> str:
    """Return the address of the store at `place`: file:///dir, s3://bucket/prefix, or a path of a folder."""
    return place if "://" in place else Path(place).expanduser().resolve().as_uri()
