"""Files that are either there, whole and synced to the disk, or not there at all."""

import os
import shutil
import uuid
from pathlib import Path


class Durable:
    """Writes below one folder through a scratch folder on the same file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._scratch = root / "scratch"
        shutil.rmtree(self._scratch, ignore_errors=True)  # what a killed process left behind
        self._scratch.mkdir(parents=True)

    def temporary(self) -> Path:
        """A path that nothing reads; `publish` moves it to where it is read."""
        return self._scratch / uuid.uuid4().hex

    def publish(self, temporary: Path, path: Path) -> None:
        """Sync a temporary file and make it visible under its name, atomically."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        self.make_folder(path.parent)
        temporary.replace(path)
        sync_folder(path.parent)

    def write(self, path: Path, data: bytes) -> None:
        """Write a whole file; readers see the old one or the new one."""
        temporary = self.temporary()
        temporary.write_bytes(data)
        self.publish(temporary, path)

    def publish_folder(self, temporary: Path, path: Path) -> None:
        """Make a folder, whose files are already synced, visible under its name."""
        self.make_folder(path.parent)
        temporary.rename(path)
        sync_folder(path.parent)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder as a whole."""
        doomed = self.temporary()
        path.rename(doomed)
        sync_folder(path.parent)
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents, each synced into the one above."""
        if path.is_dir():
            return
        self.make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Sync a folder, so that the names in it survive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
