"""A store in a local folder. A file is written under a temporary name, synced, and then renamed."""

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

# The folders of a store that hold objects. The folders beside them (`work`, `checkouts`, and those that store.py names)
# belong to one machine.
OBJECTS = ("artifacts", "blobs", "facts", "leases", "provenance", "resume", "runs", "uses")


class FolderBackend:
    """Objects as files below `root`. The files are read-only (0444), and so are the hard links that stages get."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def path(self, key: str) -> Path:
        """Return the path of the object `key`, whether it exists or not."""
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
                raise _foreign_link(folder)
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
            raise _foreign_link(path)
        make_folder(target.parent)
        temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            try:
                os.rename(path, temporary)
            except OSError:  # the file lies on another file system
                clone(path, temporary)
            os.chmod(temporary, 0o444)
            os.utime(temporary)  # gc measures the blob's age from now, and deletes no young one
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
        # The clock of the file system sets the times of files. It may be the clock of a file server.
        with tempfile.TemporaryFile(dir=self.root) as probe:
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
                with contextlib.suppress(FileNotFoundError):  # the file was deleted or renamed since it was listed
                    status = os.lstat(path)
                    if stat.S_ISREG(status.st_mode):
                        yield Item(os.path.relpath(path, self.root), status.st_size, status.st_mtime)

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
    """Return `folder / path`.

    Raises CheckpointError for a `path` that leads out of `folder`, and StoreError for a symbolic link below it.

    `folder` itself may contain links, as the user chose it. What lies in it may have been put there by others.
    """
    check_relative(path)
    full = folder
    for part in path.split("/"):
        full = full / part
        if full.is_symlink():
            raise _foreign_link(full)
    return full


def _foreign_link(link: Path) -> StoreError:
    return StoreError(f"{link} is a symbolic link, and nothing of ours is: remove it and run again")


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Whatever the umask, they are not writable by everyone."""
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
    """Make `target` a read-only file with the content of `source`: a hard link, or a copy across file systems."""
    make_folder(target.parent)
    try:
        os.link(source, target)
    except OSError:
        clone(source, target)
        os.chmod(target, 0o444)


def clone(source: Path, target: Path, mode: int = 0o666) -> None:
    """Copy a file into a new file. Where the file system can (reflink), both share their blocks.

    `mode` has the permissions of the new file, of which the umask takes away.
    """
    make_folder(target.parent)

    def create(path: str, flags: int) -> int:
        return os.open(path, flags, mode)

    with source.open("rb", buffering=0) as reader, open(target, "xb", opener=create) as writer:
        if not _reflink(reader.fileno(), writer.fileno()):
            _copy(reader, writer)


def _copy(reader: BinaryIO, writer: BinaryIO) -> None:
    """Copy the bytes inside the kernel where it can, as cp does."""
    try:
        while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
            pass
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in NO_ROOM:
            raise
        shutil.copyfileobj(reader, writer, 256 << 10)  # larger pieces leave the CPU's cache: four times as slow


def _reflink(source: int, target: int) -> bool:
    """Share the blocks with FICLONE (Btrfs, XFS, bcachefs). Return False where file system or platform has none."""
    try:
        import fcntl

        fcntl.ioctl(target, 0x40049409, source)  # FICLONE, linux/fs.h
        return True
    except (ImportError, OSError):
        return False
