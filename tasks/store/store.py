"""The store: artifacts in a backend, and a local cache with the files that stages read.

| key below the prefix | object |
|---|---|
| `blobs/sha256/..` | a file, by its sha256 |
| `artifacts/STAGE/KEY` | the manifest of an artifact |
| `provenance/STAGE/KEY` | the record of how the artifact was made |
| `uses/STAGE/KEY` | an empty object, whose age is the time since the artifact was last reused |
| `runs/RECIPE/COMMIT` | the artifacts that a run used (runs.py) |
| `leases/..` | the process that works on a stage key (lease.py) |
| `resume/..` | the finished files of unfinished work (resume.py) |
| `facts/..` | small facts, such as the sha256 of a git blob |
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from requant.tasks.artifact import SHA256, File, Manifest, check_relative, digest_of, sha256_of
from requant.tasks.errors import Collected, CorruptBlob, StoreError
from requant.tasks.progress import progress
from requant.tasks.record import StageRecord
from requant.tasks.store.backend import Backend
from requant.tasks.store.folder import FolderBackend, clone, inside, link, make_folder
from requant.tasks.store.lease import LeaseHandle, lease, wait_until_released

log = logging.getLogger(__name__)
PARALLEL_REQUESTS = 8
GC = ("gc", "store")  # the lease that gc holds while it deletes; gc.py explains why no run loses an object
# Folders of the local cache, beside `work` and `checkouts`. Stores of earlier versions have folders of these names.
CHECKOUT_RECORDS = "laid"  # records of what was checked out into folders of the user
PARTIAL_FILES = "arriving"  # files that are being downloaded or copied


def blob_key(sha256: str) -> str:
    """Return the key of a blob. Raises StoreError unless `sha256`, which may be read from a file, has 64 hex digits."""
    if not SHA256.fullmatch(sha256):
        raise StoreError(f"{sha256[:80]!r} is not a sha256: the manifest that names it is damaged")
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Store:
    """Blobs and manifests in a backend. `cache` has copies on this machine; for a local store it is the backend."""

    def __init__(self, backend: Backend, cache: FolderBackend) -> None:
        self.backend = backend
        self.cache = cache
        self.used: list[tuple[str, str]] = []  # stages and keys of artifacts that were made or reused with this object
        self._held: list[LeaseHandle] = []
        self._needs: frozenset[str] = frozenset()
        self._needs_lock = threading.RLock()

    @property
    def url(self) -> str:
        return self.backend.url

    @property
    def is_local(self) -> bool:
        return self.backend is self.cache

    def check(self) -> None:
        """Check at once whether the store can be used. Raises StoreError or StoreUnreachable."""
        self.cache.check()
        if not self.is_local:
            self.backend.check()

    def work_folder(self, stage: str, key: str) -> Path:
        """Return the folder for unfinished work of a stage key. It survives a crash, so that work can be resumed."""
        check_relative(f"{stage}/{key}")
        name = f"{stage}-{key[:16]}" if self.is_local else f"{stage}-{key[:16]}-{digest_of(self.url)[:8]}"
        folder = inside(self.cache.root, f"work/{name}")
        make_folder(folder)
        return folder

    def checkout_folder(self, manifest: Manifest) -> Path:
        """Return the folder in the local cache where an artifact is checked out as read-only links."""
        return self.cache.path(f"checkouts/{manifest.digest}")

    def checkout_record(self, folder: Path) -> Path:
        """Return the file that lists what was checked out into a folder of the user (flows/checkout.py)."""
        return self.cache.path(f"{CHECKOUT_RECORDS}/{digest_of(str(folder))}.json")

    # Leases

    @contextlib.contextmanager
    def lease(self, stage: str, key: str) -> Iterator[None]:
        """Hold the lease of a stage key. gc reads in it which blobs it must not delete."""
        with lease(self.backend, stage, key, needs=lambda: self._needs) as held:
            with self._needs_lock:
                self._held.append(held)
            try:
                if self._needs:  # blobs that were declared under earlier leases must be declared under this one too
                    held.renew()
                self.wait_for_gc()  # a gc that did not read this lease may be deleting its work folder
                yield
            finally:
                with self._needs_lock:
                    self._held.remove(held)

    def need(self, files: Iterable[File]) -> None:
        """Declare in the leases that this process holds that it relies on these blobs.

        gc deletes none of those that exist when this returns. Without a lease, this does nothing, and gc may delete
        them at any time.
        """
        with self._needs_lock:
            needs = self._needs | {file.sha256 for file in files}
            if self._held and needs != self._needs:
                before, self._needs = self._needs, needs
                try:
                    for held in self._held:
                        held.renew()
                    self.wait_for_gc()
                except BaseException:
                    self._needs = before  # the next call declares them again
                    raise

    def wait_for_gc(self) -> None:
        """Wait until a gc that may already have read the store has ended. It may have deleted what existed before."""
        wait_until_released(self.backend, *GC)

    # Blobs

    def has_blob(self, file: File) -> bool:
        """Check whether the blob exists. Under a lease, gc will not delete it afterwards."""
        self.need([file])
        return self.sees_blob(file)

    def sees_blob(self, file: File) -> bool:
        """Check whether the blob exists now."""
        return self.backend.size(blob_key(file.sha256)) == file.size

    def local_path(self, file: File) -> Path | None:
        """Return the path of the blob in the local cache, or None if it is not there with the right size."""
        key = blob_key(file.sha256)
        return self.cache.path(key) if self.cache.size(key) == file.size else None

    def put_blob(self, path: Path, file: File) -> None:
        """Store the file at `path`, whose size and sha256 are those of `file`. The file may be moved away.

        Storing a blob twice is harmless, as its name is the hash of its content.
        """
        key = blob_key(file.sha256)
        if path.stat().st_size != file.size:
            raise CorruptBlob(f"{path} changed while it was being stored: run again")
        self.need([file])
        if not self.is_local and not self.has_blob(file):
            self.backend.put_file(key, path, file.sha256)
        if self.cache.size(key) != file.size:
            self.cache.put_file(key, path)

    def read_blob(self, file: File) -> bytes:
        """Return the content of a small blob. Raises CorruptBlob if it does not have the sha256 in its name."""
        data = self._cached_path(file).read_bytes()
        if not self.is_local and _sha256(data) != file.sha256:  # the cached copy is damaged: download it again
            self.cache.delete(blob_key(file.sha256))
            data = self._cached_path(file).read_bytes()
        if _sha256(data) != file.sha256:
            raise CorruptBlob(
                f"{file.path} in {self.url} does not have the sha256 {file.sha256[:12]} that names it: "
                "run `requant store verify --deep --repair`, then again",
                key=blob_key(file.sha256),
            )
        return data

    def link_files(self, manifest: Manifest, folder: Path, paths: Iterable[str] | None = None) -> Path:
        """Link an artifact's files, or only those at `paths`, into `folder` as read-only files."""
        wanted = [manifest[p] for p in paths] if paths is not None else list(manifest.files)
        self.need(wanted)
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda file: self._link_file(file, folder), wanted))
        return folder

    def checkout(self, manifest: Manifest, folder: Path) -> Path:
        """Copy an artifact's files into `folder` as writable files, as reflinks where the file system can."""
        with progress("checkout", manifest.size, "bytes") as bar:
            for file in manifest.files:
                self._copy_file(file, inside(folder, file.path))
                bar.advance(file.size)
        return folder

    def _copy_file(self, file: File, target: Path) -> None:
        own = target.is_file() and target.stat().st_nlink == 1 and os.access(target, os.W_OK)
        if own and target.stat().st_size == file.size and sha256_of(target) == file.sha256:
            return
        temporary = target.with_name(f".{target.name[:40]}.part")  # a killed process may have left it
        temporary.unlink(missing_ok=True)
        try:
            clone(self._cached_path(file), temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _link_file(self, file: File, folder: Path) -> None:
        target, source = inside(folder, file.path), self._cached_path(file)
        if target.exists() and target.samefile(source):
            return  # linked by an earlier, interrupted run of the same stage key
        target.unlink(missing_ok=True)
        link(source, target)

    def _cached_path(self, file: File) -> Path:
        key = blob_key(file.sha256)
        path = self.cache.path(key)
        if self.cache.size(key) != file.size:
            if self.is_local:
                raise StoreError(
                    f"the store {self.url} has lost {file.path} ({file.sha256[:12]}): run again to make it", key=key
                )
            partial = self.cache.path(f"{PARTIAL_FILES}/{file.sha256}-{os.getpid()}-{threading.get_ident()}")
            make_folder(partial.parent)
            try:
                if self._download(key, partial) != file.sha256 and self._download(key, partial) != file.sha256:
                    raise CorruptBlob(
                        f"{file.path} from {self.url} does not have the sha256 {file.sha256[:12]} that names it: "
                        "run `requant store verify`",
                        key=key,
                    )
                self.cache.put_file(key, partial)
            finally:
                partial.unlink(missing_ok=True)
        elif not self.is_local:
            with contextlib.suppress(OSError):
                os.utime(path)  # gc removes cached blobs by the time of their last use
        return path

    def _download(self, key: str, path: Path) -> str:
        path.unlink(missing_ok=True)
        return self.backend.get_file(key, path)

    # Artifacts

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """Return the manifest of a stage key, if it exists and all its blobs do."""
        manifest = self.read_manifest(stage, key)
        return manifest if manifest is not None and self._has_all_blobs(manifest) else None

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        """Return the manifest of a stage key, if it exists, whether or not its blobs do."""
        text = self.backend.read(f"artifacts/{stage}/{key}")
        return None if text is None else Manifest.from_json(text)

    def has_any(self, stage: str) -> bool:
        """Check whether the store has an artifact of a stage."""
        return next(iter(self.backend.keys(f"artifacts/{stage}")), None) is not None

    def find(self, stage: str, key: str) -> Manifest | None:
        """Return the same as `manifest`, and record a use of the artifact, so that gc keeps it for the grace period."""
        if self.backend.size(f"artifacts/{stage}/{key}") is None:
            return None
        self.backend.write(f"uses/{stage}/{key}", b"")
        self.wait_for_gc()
        return self.manifest(stage, key)

    def _has_all_blobs(self, manifest: Manifest) -> bool:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return all(pool.map(self.sees_blob, manifest.files))

    def commit(self, stage: str, key: str, manifest: Manifest, provenance: StageRecord) -> Manifest:
        """Store the manifest and the record of an artifact whose blobs are stored. The first manifest for a key wins.

        If blobs of that first manifest are missing, it is replaced. Return the manifest that the store has afterwards.
        Raises Collected if gc deleted a blob before the manifest named it, which is possible only if this process was
        suspended for longer than gc's grace period.
        """
        name, record_name = f"artifacts/{stage}/{key}", f"provenance/{stage}/{key}"
        record = json.dumps(provenance.to_json(), indent=1).encode()
        if self.backend.size(name) is None:
            self.backend.write(record_name, record)  # before the manifest, so that every manifest has a record
        if not self.backend.write_new(name, manifest.to_json().encode()):
            winner = self.find(stage, key)
            if winner is not None:
                return winner
            self.backend.write(record_name, record)
            self.backend.write(name, manifest.to_json().encode())
        self.wait_for_gc()
        if self.backend.size(name) is None:  # gc had planned to delete the previous manifest of this key
            self.backend.write(name, manifest.to_json().encode())
        if not self._has_all_blobs(manifest):
            self.backend.delete(name)
            raise Collected(
                f"blobs of the {stage} stage were collected before its manifest was there: run again", key=name
            )
        return manifest

    def provenance(self, stage: str, key: str) -> StageRecord:
        """Return the record of an artifact, which is empty if there is none."""
        return StageRecord.from_json(self.backend.read(f"provenance/{stage}/{key}"))

    def records(self, stage: str, limit: int | None = None) -> dict[str, StageRecord]:
        """Return the records of a stage by stage key: at most `limit`, in the order in which the store lists them.

        A damaged record is empty.
        """
        names = list(itertools.islice(self.backend.keys(f"provenance/{stage}"), limit))
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            texts = pool.map(self.backend.read, names)
            return {
                name.rpartition("/")[2]: StageRecord.from_json(text) for name, text in zip(names, texts, strict=True)
            }

    # Small facts

    def put_fact(self, kind: str, name: str, value: str) -> None:
        """Store a small fact, such as the sha256 of a git blob."""
        self.backend.write(f"facts/{kind}/{name}", value.encode())

    def put_first_fact(self, kind: str, name: str, value: str) -> str:
        """Store a small fact unless there already is one, and return the stored one, also to concurrent callers."""
        if self.backend.write_new(f"facts/{kind}/{name}", value.encode()):
            return value
        return self.get_fact(kind, name) or value

    def get_fact(self, kind: str, name: str) -> str | None:
        value = self.backend.read(f"facts/{kind}/{name}")
        return value.decode() if value is not None else None
