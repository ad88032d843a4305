"""Stores of unit tests."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from requant.tasks.artifact import Manifest, file_of, sha256_of
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.record import StageRecord
from requant.tasks.store import Store
from requant.tasks.store.backend import Backend
from requant.tasks.store.folder import FolderBackend
from tests.factories.checkpoints import write_files
from tests.factories.requant import wait_for

Install = Callable[..., None]


class Remote(FolderBackend):
    """A place elsewhere, as S3 is: a file that was sent stays where it is. What it hands out can be altered."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: list[str] = []
        self.on_the_way: Callable[[bytes], bytes] = bytes

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        copy = path.with_name(f"{path.name}.sent")
        shutil.copyfile(path, copy)
        super().put_file(key, copy)

    def get_file(self, key: str, path: Path) -> str:
        self.fetched.append(key)
        found = super().get_file(key, path)
        sent = path.read_bytes()
        if (came := self.on_the_way(sent)) == sent:
            return found
        path.unlink()
        path.write_bytes(came)
        return sha256_of(path)


class Counted(FolderBackend):
    """A store that counts how often a lease in it is read."""

    reads = 0

    def read(self, key: str) -> bytes | None:
        found = super().read(key)
        self.reads += key.startswith("leases/")
        return found

    def wait_for_a_look(self) -> None:
        """Wait until whoever watches a lease has read it as it is now, and drawn its conclusion."""
        before = self.reads
        wait_for(lambda: self.reads >= before + 3)


def put(store: Store, files: Mapping[str, bytes]) -> Manifest:
    """Put files into a store."""
    scratch = store.cache.root.parent / "scratch"
    made = write_files(scratch, files)
    for file in made:
        store.put_blob(scratch / file.path, file)
    return Manifest.of(made)


def keep(store: Store, key: str, files: Mapping[str, bytes], stage: str = "quantize", **record: object) -> Manifest:
    """Put files into a store and keep them as the artifact that a stage made, with what it recorded."""
    return store.commit(stage, key, put(store, files), StageRecord(record))


def held_base(store: Store, folder: Path) -> Revision:
    """Put the files of a base into a store, so that a plan of it asks the Hub for nothing."""
    files = [file_of(folder, path.name) for path in sorted(folder.iterdir())]
    for file in files:
        store.put_blob(folder / file.path, file)
    return Revision("a/b", "0" * 40, tuple(HubFile(f.path, f.size, "", f.sha256) for f in files))


def ago(folder: Path, days: float, *below: str) -> None:
    """Make everything in a folder as old as that, or what is `below` these paths in it."""
    at = time.time() - days * 86400
    for path in [folder / name for name in below] or [folder]:
        for each in (path, *path.rglob("*")):
            os.utime(each, (at, at))


def every_operation(backend: Backend, key: str, folder: Path) -> list[Callable[[], object]]:
    """All that can be asked of a backend for one key, with files in `folder`."""
    (folder / "file").write_bytes(b"x")
    return [
        lambda: backend.read(key),
        lambda: backend.write(key, b""),
        lambda: backend.write_new(key, b""),
        lambda: backend.size(key),
        lambda: backend.delete(key),
        lambda: backend.put_file(key, folder / "file"),
        lambda: backend.get_file(key, folder / "out"),
    ]
