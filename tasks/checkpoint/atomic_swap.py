"""Puts changed files into a folder at one stroke, so that a reader finds the old checkpoint or the new one.

New files are written into a stage. Where the file system allows it, the stage is completed with links to all that
stays, and the two folders change places (`renameat2(RENAME_EXCHANGE)`, Linux). A folder that cannot be exchanged (a
mount point, a parent that may not be written) gets the new files one by one, weights before the index, the index
before what it no longer names; killed in between, the next call goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from requant.tasks.artifact import sync
from requant.tasks.checkpoint.checkpoint import INDEX, PLAIN_NAME, read_json
from requant.tasks.errors import CheckpointError

EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
AT_FDCWD = -100
STAGING_FOLDER = ".mtp-fix"
REMOVED = ".removed"  # in a stage: what is to be taken away once the new index is there
IMPOSSIBLE = {errno.EBUSY, errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time on a folder. Raises CheckpointError if there is another."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process is repairing {folder}: wait for it") from error
        except OSError:  # a network file system without locks on folders
            pass
        yield
    finally:
        os.close(descriptor)


def finish(folder: Path) -> None:
    """End what a killed call began: take away the shards that its index, in place by then, no longer names."""
    noted = folder / STAGING_FOLDER / REMOVED
    if (folder / STAGING_FOLDER).is_symlink() or not stat.S_ISREG(_mode(noted)) or noted.stat().st_size > 1 << 20:
        return
    _remove(folder, noted.read_bytes().decode("utf-8", "replace").split("\n"))


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder on the same file system, for what will be installed into `folder`; taken away at the end."""
    stage = stage_of(folder)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def clear(folder: Path) -> None:
    """Take away the stages of killed calls."""
    for stage in (folder.parent / f".{folder.name}{STAGING_FOLDER}", folder / STAGING_FOLDER):
        if stage.is_symlink() or stat.S_ISREG(_mode(stage)):
            stage.unlink()
        elif stage.is_dir():
            shutil.rmtree(stage)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def stage_of(folder: Path) -> Path:
    """Beside the folder where the two can change places, else inside it."""
    folder = folder.resolve()
    parent = folder.parent
    beside = os.access(parent, os.W_OK | os.X_OK) and parent.stat().st_dev == folder.stat().st_dev
    left_alone = os.path.ismount(folder) or Path.cwd().is_relative_to(folder)  # a shell there would lose its folder
    return parent / f".{folder.name}{STAGING_FOLDER}" if beside and not left_alone else folder / STAGING_FOLDER


def install(stage: Path, folder: Path, removed: Sequence[str]) -> None:
    """Make `folder` hold the stage's files, and no longer the `removed` ones; everything else stays as it is."""
    if stage.parent == folder or not _exchange(stage, folder, removed):
        _move_in(stage, folder, removed)


def _exchange(stage: Path, folder: Path, removed: Sequence[str]) -> bool:
    try:
        _link_rest(folder, stage, {*removed})
        shutil.copystat(folder, stage)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(stage), AT_FDCWD, os.fsencode(folder), EXCHANGE) != 0:
            raise OSError(ctypes.get_errno(), "renameat2")
    except AttributeError:  # another C library
        return False
    except OSError as error:
        if error.errno in IMPOSSIBLE:
            return False
        raise
    sync(folder.parent)
    return True


def _link_rest(source: Path, target: Path, skip: set[str]) -> None:
    """Link every file of `source` that `target` has not; symbolic links are made again, and lead where they did."""
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        there = target / entry.name
        if entry.name in skip or (os.path.lexists(there) and not entry.is_dir(follow_symlinks=False)):
            continue
        if entry.is_symlink():
            there.symlink_to(os.readlink(entry.path))
        elif entry.is_dir():
            there.mkdir(exist_ok=True)
            _link_rest(Path(entry.path), there, set())
            shutil.copystat(entry.path, there)
        else:
            os.link(entry.path, there)


def _move_in(stage: Path, folder: Path, removed: Sequence[str]) -> None:
    names = [p.name for p in stage.iterdir() if not p.is_dir() and not _stays(p, folder / p.name)]
    (stage / REMOVED).write_text("\n".join(removed))
    for name in sorted(names, key=_turn):
        os.replace(stage / name, folder / name)
    sync(folder)
    _remove(folder, removed)


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Take away shards that the index does not name, and nothing else, whatever the names say."""
    if not (folder / INDEX).is_file():
        return
    named = set(read_json(folder / INDEX).get("weight_map", {}).values())
    for name in names:
        if name not in named and PLAIN_NAME.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def _stays(path: Path, there: Path) -> bool:
    """Whether a file of the stage is only a link to what the folder has."""
    return there.exists() and (path.is_symlink() or os.path.samefile(path, there))


def _turn(name: str) -> int:
    """Shards first, under names that are new; then the index, then the configs."""
    return 0 if name.endswith(".safetensors") else 1 if name == INDEX else 2
