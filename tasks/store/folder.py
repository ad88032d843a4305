"""A store in a local folder. Writes go to a temporary name, are synced and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from requant.tasks.artifact import check_relative, sha256_of, sync
from requant.tasks.errors import NO_ROOM, StoreError, explain_os_error
from requant.tasks.store.backend import Item

# The folders of a store that hold objects; `work`, `arriving`, `checkouts` and `laid` beside them hold files of one
# machine.
OBJECTS = ("artifacts", "blobs", "facts", "leases", "provenance", "resume", "runs", "uses")


class FolderBackend:
    """Objects as files below `root`. Object files are read-only (0444), so that a hard link to one is too."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def path(self, key: str) -> Path:
        """Where the object `key` lies, whether it is there or not."""
        return inside(self.root, key)

    def check(self) -> None:
        try:
            make_folder(self.root)
            folders = [self.root, *(entry for entry in self.root.iterdir() if entry.is_dir())]
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
        for folder in folders:
            if folder.is_symlink() and folder != self.root:
                raise _planted(folder)
            _refuse_world_writable(folder)

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
        if path.is_symlink():
            raise _planted(path)
        make_folder(target.parent)
        temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            try:
                os.rename(path, temporary)
            except OSError:  # another file system
                clone(path, temporary)
            os.chmod(temporary, 0o444)
            os.utime(temporary)  # its age counts from now: gc leaves young blobs alone
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def get_file(self, key: str, path: Path) -> str:
        clone(self.path(key), path)
        return sha256_of(path)

    def keys(self, prefix: str) -> Iterator[str]:
        return (item.key for item in self.items(prefix))

    def items(self, prefix: str) -> Iterator[Item]:
        for item in self._files(prefix):
            if not item.key.rpartition("/")[2].startswith("."):
                yield item

    def now(self) -> float:
        with tempfile.TemporaryFile(dir=self.root) as probe:  # the file system's clock, which may be a server's
            return os.fstat(probe.fileno()).st_mtime

    def leftovers(self, before: float) -> Iterator[str]:
        for folder in OBJECTS:
            for item in self._files(folder):
                if item.key.rpartition("/")[2].startswith(".") and item.modified < before:
                    yield item.key

    def discard(self, leftover: str) -> None:
        self.delete(leftover)

    def delete(self, key: str, before_try: Callable[[], None] = lambda: None) -> None:
        before_try()
        self.path(key).unlink(missing_ok=True)

    def _files(self, prefix: str) -> Iterator[Item]:
        for folder, folders, names in os.walk(self.path(prefix)):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # deleted or renamed since
                    found = os.lstat(path)
                    if stat.S_ISREG(found.st_mode):
                        yield Item(os.path.relpath(path, self.root), found.st_size, found.st_mtime)

    @contextlib.contextmanager
    def _temporary(self, key: str, data: bytes) -> Iterator[Path]:
        target = self.path(key)
        make_folder(target.parent)
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


def inside(folder: Path, path: str) -> Path:
    """`folder / path`, refused if it may lie elsewhere: a name that leaves the folder, a symbolic link below it.

    `folder` itself may be reached through links: it is the user's choice, what lies in it is not.
    """
    check_relative(path)
    full = folder
    for part in path.split("/"):
        full = full / part
        if full.is_symlink():
            raise _planted(full)
    return full


def _planted(link: Path) -> StoreError:
    return StoreError(f"{link} is a symbolic link, and nothing of ours is: remove it and run again")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, writable by others for no umask."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o775, exist_ok=True)


def _refuse_world_writable(folder: Path) -> None:
    if folder.stat().st_mode & stat.S_IWOTH:
        raise StoreError(
            f"every user of this machine may write to the store's folder {folder}, and so could replace what it holds: "
            f"run `chmod -R o-w {folder}`, or set REQUANT_STORE to a folder of your own"
        )


def link(source: Path, target: Path) -> None:
    """Hand out a read-only file: a hard link (the same 0444 file), or a copy across file systems."""
    make_folder(target.parent)
    try:
        os.link(source, target)
    except OSError:
        clone(source, target)
        os.chmod(target, 0o444)


def clone(source: Path, target: Path) -> None:
    """Copy a file's bytes into a new file of its own, sharing the blocks where the file system can (reflink)."""
    make_folder(target.parent)
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
