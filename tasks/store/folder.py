"""A store in a local folder. Writes go to a temporary name, are synced and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks.artifact import check_relative, sha256_of, sync
from tasks.errors import NO_ROOM, StoreError, explain_os_error


class FolderBackend:
    """Objects as files below `root`. Object files are read-only (0444), so that a hard link to one is too."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def path(self, key: str) -> Path:
        """Where the object `key` lies, whether it is there or not."""
        check_relative(key)
        return self.root / key

    def check(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"\0" * 4096)
        except OSError as error:
            raise (
                explain_os_error(error, self.root)
                or StoreError(
                    f"the store {self.url} cannot be used ({error.strerror}): make {self.root} a writable folder "
                    "or set REQUANT_STORE to another one"
                )
            ) from error

    def read(self, key: str) -> bytes | None:
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        with self._temporary(key, data) as temporary:
            os.replace(temporary, self.path(key))

    def write_new(self, key: str, data: bytes) -> bool:
        with self._temporary(key, data) as temporary:
            try:
                os.link(temporary, self.path(key))
            except FileExistsError:
                return False
            return True

    def size(self, key: str) -> int | None:
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return None

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            try:
                os.rename(path, temporary)
            except OSError:  # another file system
                clone(path, temporary)
            os.chmod(temporary, 0o444)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def get_file(self, key: str, path: Path) -> str:
        clone(self.path(key), path)
        return sha256_of(path)

    def keys(self, prefix: str) -> Iterator[str]:
        for folder, folders, names in os.walk(self.root / prefix):
            folders.sort()
            for name in sorted(names):
                if not name.startswith("."):
                    yield (Path(folder) / name).relative_to(self.root).as_posix()

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, key: str, data: bytes) -> Iterator[Path]:
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o444)
            yield temporary
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Hand out a read-only file: a hard link (the same 0444 file), or a copy across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        clone(source, target)
        os.chmod(target, 0o444)


def clone(source: Path, target: Path) -> None:
    """Copy a file's bytes into a new file of its own, sharing the blocks where the file system can (reflink)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as reader, target.open("xb") as writer:
        if not _reflinked(reader.fileno(), writer.fileno()):
            _copy(reader, writer)


def _copy(reader: BinaryIO, writer: BinaryIO) -> None:
    """Inside the kernel where it can, as cp does."""
    try:
        while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
            pass
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in NO_ROOM:
            raise
        shutil.copyfileobj(reader, writer, 256 << 10)  # stays in the cache: larger pieces take four times as long


def _reflinked(source: int, target: int) -> bool:
    """Try FICLONE (Btrfs, XFS, bcachefs); False where the file system or the platform has none."""
    try:
        import fcntl

        fcntl.ioctl(target, 0x40049409, source)  # FICLONE, linux/fs.h
        return True
    except (ImportError, OSError):
        return False
