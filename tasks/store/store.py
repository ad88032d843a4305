"""The store: artifacts on top of a backend, with a near folder where stages work on real files.

| below the prefix | is |
|---|---|
| `blobs/sha256/..` | files, by their content |
| `artifacts/STAGE/KEY` `provenance/STAGE/KEY` | manifests, and what is recorded beside each |
| `uses/STAGE/KEY` | empty; its age is the time since the artifact was last reused |
| `runs/RECIPE/COMMIT` | which artifacts a run uses (runs.py) |
| `leases/..` `resume/..` | who works on what, and what is finished of it (lease.py, resume.py) |
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
from typing import Any

from requant.tasks.artifact import SHA256, File, Manifest, check_relative, digest_of, sha256_of
from requant.tasks.errors import Collected, CorruptBlob, StoreError
from requant.tasks.store.backend import Backend
from requant.tasks.store.folder import FolderBackend, clone, inside, link, make_folder
from requant.tasks.store.lease import LeaseHandle, lease, wait_until_released

log = logging.getLogger(__name__)
PARALLEL_REQUESTS = 8
CHECKOUT_RECORDS = "laid"  # a folder of the machine's own, beside `work`, `arriving` and `checkouts`
GC = ("gc", "store")  # the lease that is held while anything is deleted (gc.py says how that excludes others)


def blob_key(sha256: str) -> str:
    """Raises StoreError for anything but 64 hex digits: the name comes from outside."""
    if not SHA256.fullmatch(sha256):
        raise StoreError(f"{sha256[:80]!r} is not a sha256: the manifest that names it is damaged")
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def record_of(text: bytes | None) -> dict[str, Any]:
    """What is recorded beside an artifact; empty if that cannot be read."""
    try:
        document = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Store:
    """Blobs and manifests. `near` holds the blobs that are on this machine; for a local store it is the store."""

    def __init__(self, backend: Backend, cache: FolderBackend) -> None:
        self.backend = backend
        self.cache = cache
        self.used: list[tuple[str, str]] = []  # the artifacts that were made or reused through this object
        self._held: list[LeaseHandle] = []
        self._needs: frozenset[str] = frozenset()
        self._needing = threading.RLock()

    @property
    def url(self) -> str:
        return self.backend.url

    @property
    def is_local(self) -> bool:
        return self.backend is self.cache

    def check(self) -> None:
        """Raises StoreError or StoreUnreachable at once if the store cannot be used."""
        self.cache.check()
        if not self.is_local:
            self.backend.check()

    def work_folder(self, stage: str, key: str) -> Path:
        """A folder for the unfinished work of one stage key; it survives a crash, so that work can be resumed."""
        check_relative(f"{stage}/{key}")
        name = f"{stage}-{key[:16]}" if self.is_local else f"{stage}-{key[:16]}-{digest_of(self.url)[:8]}"
        folder = inside(self.cache.root, f"work/{name}")
        make_folder(folder)
        return folder

    def checkout_folder(self, manifest: Manifest) -> Path:
        """Where an artifact's files are laid out beside the store, as read-only links."""
        return self.cache.path(f"checkouts/{manifest.digest}")

    def checkout_record(self, folder: Path) -> Path:
        """Where it is written down what was laid into a folder of the user's own (flows/checkout.py)."""
        return self.cache.path(f"{CHECKOUT_RECORDS}/{digest_of(str(folder))}.json")

    # What gc must leave alone

    @contextlib.contextmanager
    def lease(self, stage: str, key: str) -> Iterator[None]:
        """Hold the lease of a stage key; while it is held, everyone can read in it which blobs are needed."""
        with lease(self.backend, stage, key, needs=lambda: self._needs) as held:
            with self._needing:
                self._held.append(held)
            try:
                if self._needs:  # of leases before
                    held.renew()
                self.wait_for_gc()  # a gc that has not seen this lease may be deleting the folder of its work
                yield
            finally:
                with self._needing:
                    self._held.remove(held)

    def need(self, files: Iterable[File]) -> None:
        """Say in the leases at hand that these blobs are relied on. Those that are there afterwards stay there.

        Without a lease nothing is said: what is looked at then may go at any time.
        """
        with self._needing:
            needs = self._needs | {file.sha256 for file in files}
            if self._held and needs != self._needs:
                before, self._needs = self._needs, needs
                try:
                    for held in self._held:
                        held.renew()
                    self.wait_for_gc()
                except BaseException:
                    self._needs = before  # to be said again
                    raise

    def wait_for_gc(self) -> None:
        """Wait for the end of a gc that may have read the store before. What was looked at until now may be gone."""
        wait_until_released(self.backend, *GC)

    # Blobs

    def has_blob(self, file: File) -> bool:
        """Whether the blob is there; inside a lease, it stays."""
        self.need([file])
        return self.sees_blob(file)

    def sees_blob(self, file: File) -> bool:
        """Whether the blob is there at this moment."""
        return self.backend.size(blob_key(file.sha256)) == file.size

    def local_path(self, file: File) -> Path | None:
        """Find the blob on this machine, without fetching it; None where it is not here in its size."""
        key = blob_key(file.sha256)
        return self.cache.path(key) if self.cache.size(key) == file.size else None

    def put_blob(self, path: Path, file: File) -> None:
        """Keep the file at `path`, which has been hashed as `file`. The file may be moved away.

        Writing a blob twice is harmless: its name says what it holds.
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
        """A small blob's bytes, checked against its name."""
        data = self._cached_path(file).read_bytes()
        if not self.is_local and _sha256(data) != file.sha256:  # the copy that is here; the store has another
            self.cache.delete(blob_key(file.sha256))
            data = self._cached_path(file).read_bytes()
        if _sha256(data) != file.sha256:
            raise CorruptBlob(
                f"{file.path} in {self.url} does not have the sha256 {file.sha256[:12]} that names it: "
                "run `requant store verify --deep --repair`, then again"
            )
        return data

    def link_files(self, manifest: Manifest, folder: Path, paths: Iterable[str] | None = None) -> Path:
        """Lay an artifact's files (or only `paths`) into `folder` as read-only files, for a stage to read."""
        wanted = [manifest[p] for p in paths] if paths is not None else list(manifest.files)
        self.need(wanted)
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda file: self._lay(file, folder), wanted))
        return folder

    def checkout(self, manifest: Manifest, folder: Path) -> Path:
        """Lay an artifact's files into `folder` as files of the user's own (reflinks or copies, writable)."""
        for file in manifest.files:
            target = inside(folder, file.path)
            own = target.is_file() and target.stat().st_nlink == 1 and os.access(target, os.W_OK)
            if own and target.stat().st_size == file.size and sha256_of(target) == file.sha256:
                continue
            temporary = target.with_name(f".{target.name[:40]}.part")  # a killed one's is taken over
            temporary.unlink(missing_ok=True)
            try:
                clone(self._cached_path(file), temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return folder

    def _lay(self, file: File, folder: Path) -> None:
        target, source = inside(folder, file.path), self._cached_path(file)
        if target.exists() and target.samefile(source):
            return  # from an earlier, interrupted run of the same stage key
        target.unlink(missing_ok=True)
        link(source, target)

    def _cached_path(self, file: File) -> Path:
        key = blob_key(file.sha256)
        path = self.cache.path(key)
        if self.cache.size(key) != file.size:
            if self.is_local:
                raise StoreError(
                    f"the store {self.url} has lost {file.path} ({file.sha256[:12]}): run again to make it"
                )
            arriving = self.cache.path(f"arriving/{file.sha256}-{os.getpid()}-{threading.get_ident()}")
            make_folder(arriving.parent)
            try:
                if self._fetch(key, arriving) != file.sha256 and self._fetch(key, arriving) != file.sha256:
                    raise CorruptBlob(
                        f"{file.path} from {self.url} does not have the sha256 {file.sha256[:12]} that names it: "
                        "run `requant store verify`"
                    )
                self.cache.put_file(key, arriving)
            finally:
                arriving.unlink(missing_ok=True)
        elif not self.is_local:
            with contextlib.suppress(OSError):
                os.utime(path)  # used now: gc takes here what has not been used for long
        return path

    def _fetch(self, key: str, path: Path) -> str:
        path.unlink(missing_ok=True)
        return self.backend.get_file(key, path)

    # Artifacts

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The artifact of a stage key, if it is there with every one of its blobs."""
        manifest = self.read_manifest(stage, key)
        return manifest if manifest is not None and self._is_whole(manifest) else None

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        """Read the list of an artifact's files, whether or not its blobs are still there."""
        text = self.backend.read(f"artifacts/{stage}/{key}")
        return None if text is None else Manifest.from_json(text)

    def has_any(self, stage: str) -> bool:
        """Tell whether the store lists an artifact of a stage."""
        return next(iter(self.backend.keys(f"artifacts/{stage}")), None) is not None

    def find(self, stage: str, key: str) -> Manifest | None:
        """Like `manifest`, for one that will be used: its age counts from now, so gc leaves it alone for a while."""
        if self.backend.size(f"artifacts/{stage}/{key}") is None:
            return None
        self.backend.write(f"uses/{stage}/{key}", b"")
        self.wait_for_gc()
        return self.manifest(stage, key)

    def _is_whole(self, manifest: Manifest) -> bool:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return all(pool.map(self.sees_blob, manifest.files))

    def commit(self, stage: str, key: str, manifest: Manifest, provenance: dict[str, Any]) -> Manifest:
        """Make an artifact visible. All its blobs must be there. The first manifest for a key wins.

        One whose blobs were lost is replaced: nothing could have been reading it. Raises Collected if gc took a blob
        before the manifest named it, which needs a process that was suspended for longer than gc's grace period.
        """
        name, beside = f"artifacts/{stage}/{key}", f"provenance/{stage}/{key}"
        record = json.dumps(provenance, indent=1).encode()
        if self.backend.size(name) is None:
            self.backend.write(beside, record)  # first, so that no manifest is without one
        if not self.backend.write_new(name, manifest.to_json().encode()):
            winner = self.find(stage, key)
            if winner is not None:
                return winner
            self.backend.write(beside, record)
            self.backend.write(name, manifest.to_json().encode())
        self.wait_for_gc()
        if self.backend.size(name) is None:  # gc took it for an old one of its key
            self.backend.write(name, manifest.to_json().encode())
        if not self._is_whole(manifest):
            self.backend.delete(name)
            raise Collected(f"blobs of the {stage} stage were collected before its manifest was there: run again")
        return manifest

    def provenance(self, stage: str, key: str) -> dict[str, Any]:
        """What is recorded beside an artifact; empty if nothing is."""
        return record_of(self.backend.read(f"provenance/{stage}/{key}"))

    def records(self, stage: str, limit: int | None = None) -> dict[str, dict[str, Any]]:
        """Read what is recorded beside the artifacts of a stage, by stage key; a record that is damaged is empty.

        Of more than `limit` artifacts, some are left out: those that the store lists last.
        """
        names = list(itertools.islice(self.backend.keys(f"provenance/{stage}"), limit))
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            texts = pool.map(self.backend.read, names)
            return {name.rpartition("/")[2]: record_of(text) for name, text in zip(names, texts, strict=True)}

    # Small facts

    def put_fact(self, kind: str, name: str, value: str) -> None:
        """Keep a small fact, such as the sha256 of a git blob."""
        self.backend.write(f"facts/{kind}/{name}", value.encode())

    def put_first_fact(self, kind: str, name: str, value: str) -> str:
        """Keep a small fact unless there is one already; the one that is kept, whoever asks at the same moment."""
        if self.backend.write_new(f"facts/{kind}/{name}", value.encode()):
            return value
        return self.get_fact(kind, name) or value

    def get_fact(self, kind: str, name: str) -> str | None:
        value = self.backend.read(f"facts/{kind}/{name}")
        return value.decode() if value is not None else None
