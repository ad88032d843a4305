"""The store: artifacts on top of a backend, with a near folder where stages work on real files."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.artifact import SHA256, File, Manifest, check_relative, digest_of, sha256_of
from tasks.errors import CorruptBlob, StoreError
from tasks.store.backend import Backend
from tasks.store.folder import FolderBackend, clone, link

PARALLEL = 8


def blob_key(sha256: str) -> str:
    """Raises StoreError for anything but 64 hex digits: the name comes from outside."""
    if not SHA256.fullmatch(sha256):
        raise StoreError(f"{sha256[:80]!r} is not a sha256: the manifest that names it is damaged")
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


@dataclass(frozen=True)
class Entry:
    """One artifact in the store, as `requant store ls` shows it."""

    stage: str
    key: str
    manifest: Manifest
    provenance: dict[str, Any]


class Store:
    """Blobs and manifests. `near` holds the blobs that are on this machine; for a local store it is the store."""

    def __init__(self, backend: Backend, near: FolderBackend) -> None:
        self.backend = backend
        self.near = near

    @property
    def url(self) -> str:
        return self.backend.url

    @property
    def is_local(self) -> bool:
        return self.backend is self.near

    def check(self) -> None:
        """Raises StoreError or StoreUnreachable at once if the store cannot be used."""
        self.near.check()
        if not self.is_local:
            self.backend.check()

    def work_folder(self, stage: str, key: str) -> Path:
        """A folder for the unfinished work of one stage key; it survives a crash, so that work can be resumed."""
        check_relative(f"{stage}/{key}")
        name = f"{stage}-{key[:16]}" if self.is_local else f"{stage}-{key[:16]}-{digest_of(self.url)[:8]}"
        folder = self.near.root / "work" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # Blobs

    def has_blob(self, file: File) -> bool:
        return self.backend.size(blob_key(file.sha256)) == file.size

    def put_blob(self, path: Path, file: File) -> None:
        """Keep the file at `path`, which has been hashed as `file`. The file may be moved away.

        Writing a blob twice is harmless: its name says what it holds.
        """
        key = blob_key(file.sha256)
        if path.stat().st_size != file.size:
            raise CorruptBlob(f"{path} changed while it was being stored: run again")
        if not self.is_local and not self.has_blob(file):
            self.backend.put_file(key, path, file.sha256)
        if self.near.size(key) != file.size:
            self.near.put_file(key, path)

    def read_blob(self, file: File) -> bytes:
        """A small blob's bytes, checked against its name."""
        return self._near_path(file).read_bytes()

    def hand_out(self, manifest: Manifest, folder: Path, paths: Iterable[str] | None = None) -> Path:
        """Lay an artifact's files (or only `paths`) into `folder` as read-only files, for a stage to read."""
        wanted = [manifest[p] for p in paths] if paths is not None else list(manifest.files)
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda file: self._lay(file, folder), wanted))
        return folder

    def checkout(self, manifest: Manifest, folder: Path) -> Path:
        """Lay an artifact's files into `folder` as files of the user's own (reflinks or copies, writable)."""
        for file in manifest.files:
            target = folder / file.path
            own = target.is_file() and target.stat().st_nlink == 1 and os.access(target, os.W_OK)
            if own and target.stat().st_size == file.size and sha256_of(target) == file.sha256:
                continue
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            clone(self._near_path(file), temporary)
            os.replace(temporary, target)
        return folder

    def _lay(self, file: File, folder: Path) -> None:
        target, source = folder / file.path, self._near_path(file)
        if target.exists() and target.samefile(source):
            return  # from an earlier, interrupted run of the same stage key
        target.unlink(missing_ok=True)
        link(source, target)

    def _near_path(self, file: File) -> Path:
        key = blob_key(file.sha256)
        path = self.near.path(key)
        if self.near.size(key) != file.size:
            if self.is_local:
                raise StoreError(
                    f"the store {self.url} has lost {file.path} ({file.sha256[:12]}): run again to make it"
                )
            arriving = self.near.path(f"arriving/{file.sha256}-{os.getpid()}-{threading.get_ident()}")
            try:
                if self._fetch(key, arriving) != file.sha256 and self._fetch(key, arriving) != file.sha256:
                    raise CorruptBlob(
                        f"{file.path} from {self.url} does not have the sha256 {file.sha256[:12]} that names it: "
                        "run `requant store verify`"
                    )
                self.near.put_file(key, arriving)
            finally:
                arriving.unlink(missing_ok=True)
        return path

    def _fetch(self, key: str, path: Path) -> str:
        path.unlink(missing_ok=True)
        return self.backend.get_file(key, path)

    # Artifacts

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The artifact of a stage key, if it is there with every one of its blobs."""
        text = self.backend.read(f"artifacts/{stage}/{key}")
        if text is None:
            return None
        manifest = Manifest.from_json(text)
        with ThreadPoolExecutor(PARALLEL) as pool:
            whole = all(pool.map(self.has_blob, manifest.files))
        return manifest if whole else None

    def keep(self, stage: str, key: str, manifest: Manifest, provenance: dict[str, Any]) -> Manifest:
        """Make an artifact visible. All its blobs must be there. The first manifest for a key wins.

        One whose blobs were lost is replaced: nothing could have been reading it.
        """
        name, beside = f"artifacts/{stage}/{key}", f"provenance/{stage}/{key}"
        record = json.dumps(provenance, indent=1).encode()
        if self.backend.size(name) is None:
            self.backend.write(beside, record)  # first, so that no manifest is without one
        if self.backend.write_new(name, manifest.to_json().encode()):
            return manifest
        winner = self.manifest(stage, key)
        if winner is not None:
            return winner
        self.backend.write(beside, record)
        self.backend.write(name, manifest.to_json().encode())
        return manifest

    def provenance(self, stage: str, key: str) -> dict[str, Any]:
        """What is recorded beside an artifact; empty if nothing is."""
        text = self.backend.read(f"provenance/{stage}/{key}")
        with contextlib.suppress(ValueError):
            document = json.loads(text or b"{}")
            if isinstance(document, dict):
                return document
        return {}

    def entries(self) -> Iterator[Entry]:
        """Every artifact whose manifest can be read."""
        for name in self.backend.keys("artifacts"):
            _, stage, key = name.split("/", 2)
            with contextlib.suppress(StoreError):
                manifest = Manifest.from_json(self.backend.read(name) or b"")
                yield Entry(stage, key, manifest, self.provenance(stage, key))

    # Small facts

    def remember(self, kind: str, name: str, value: str) -> None:
        """Keep a small fact, such as the sha256 of a git blob."""
        self.backend.write(f"facts/{kind}/{name}", value.encode())

    def recall(self, kind: str, name: str) -> str | None:
        value = self.backend.read(f"facts/{kind}/{name}")
        return value.decode() if value is not None else None
