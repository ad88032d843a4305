"""Replaces files of a folder in one step, so that a reader finds either the old checkpoint or the new one.

New files are written to a staging folder. If the file system allows it, links to all files that stay are added there,
and the two folders are exchanged (`renameat2` with RENAME_EXCHANGE, Linux). A folder that cannot be exchanged, such as
a mount point, gets the new files one by one: shards, then the index, then the configs. Shards that the index no longer
names are removed last. If the process is killed in between, the next call removes what is too much: the new shards if
the new index was not in place yet, otherwise the old ones.
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
from requant.tasks.checkpoint.checkpoint import INDEX, read_json, stays_inside
from requant.tasks.checkpoint.untrusted import MAX_REMOVED_BYTES
from requant.tasks.errors import CheckpointError

EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
AT_FDCWD = -100
STAGING_FOLDER = ".mtp-fix"
# Files in the staging folder, with names of shards: those to remove once the new index is in place, and those that the
# folder did not have before, to remove if the process is killed before that.
REMOVED, ADDED = ".removed", ".added"
NOT_EXCHANGEABLE = {errno.EBUSY, errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder. Raises CheckpointError if another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process is repairing {folder}: wait for it") from error
        except OSError:  # network file systems may not be able to lock folders
            pass
        yield
    finally:
        os.close(descriptor)


def finish_interrupted(folder: Path) -> None:
    """Complete or undo the work of a call that was killed while it moved files into the folder one by one."""
    for stage in _stages(folder):
        if not stage.is_symlink():
            _finish(stage, folder)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Create an empty staging folder on the file system of `folder`, and remove it at the end."""
    stage = stage_of(folder)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def remove_stages(folder: Path) -> None:
    """Remove the staging folders of calls that were killed."""
    for stage in _stages(folder):
        if stage.is_symlink() or stat.S_ISREG(_mode(stage)):
            stage.unlink()
        elif stage.is_dir():
            shutil.rmtree(stage)


def _stages(folder: Path) -> tuple[Path, Path]:
    """Return both places where a staging folder of this folder can be."""
    return folder.parent / f".{folder.name}{STAGING_FOLDER}", folder / STAGING_FOLDER


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def stage_of(folder: Path) -> Path:
    """Return the path of the staging folder: next to the folder if the two can be exchanged, otherwise inside it."""
    folder = folder.resolve()
    parent = folder.parent
    exchangeable = os.access(parent, os.W_OK | os.X_OK) and parent.stat().st_dev == folder.stat().st_dev
    # A shell whose working directory is the folder would be left in the old one.
    exchangeable = exchangeable and not os.path.ismount(folder) and not Path.cwd().is_relative_to(folder)
    beside, inside = _stages(folder)
    return beside if exchangeable else inside


def install(stage: Path, folder: Path, removed: Sequence[str]) -> None:
    """Move the files of the staging folder into `folder`, and remove the `removed` ones. All other files stay."""
    if stage.parent == folder or not _exchange(stage, folder, removed):
        _move_in(stage, folder, removed)


def _exchange(stage: Path, folder: Path, removed: Sequence[str]) -> bool:
    try:
        _link_rest(folder, stage, {folder / name for name in removed})
        shutil.copystat(folder, stage)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(stage), AT_FDCWD, os.fsencode(folder), EXCHANGE) != 0:
            raise OSError(ctypes.get_errno(), "renameat2")
    except AttributeError:  # the C library has no renameat2
        return False
    except OSError as error:
        if error.errno in NOT_EXCHANGEABLE:
            return False
        raise
    sync(folder.parent)
    return True


def _link_rest(source: Path, target: Path, skip: set[Path]) -> None:
    """Hard-link every file of `source` that `target` lacks, without those in `skip`.

    Symbolic links are recreated with the same target.
    """
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        there = target / entry.name
        if Path(entry.path) in skip or (os.path.lexists(there) and not entry.is_dir(follow_symlinks=False)):
            continue
        if entry.is_symlink():
            there.symlink_to(os.readlink(entry.path))
        elif entry.is_dir():
            there.mkdir(exist_ok=True)
            _link_rest(Path(entry.path), there, skip)
            shutil.copystat(entry.path, there)
        else:
            os.link(entry.path, there)


def _move_in(stage: Path, folder: Path, removed: Sequence[str]) -> None:
    names = [p.name for p in stage.iterdir() if not p.is_dir() and not _is_unchanged(p, folder / p.name)]
    (stage / ADDED).write_text("\n".join(name for name in names if not os.path.lexists(folder / name)))
    (stage / REMOVED).write_text("\n".join(removed))
    try:
        for name in sorted(names, key=_install_order):
            os.replace(stage / name, folder / name)
        sync(folder)
    finally:
        _finish(stage, folder)


def _finish(stage: Path, folder: Path) -> None:
    """Remove the old shards if the index of the staging folder is in place, otherwise the new ones.

    Until then, what is to be removed may be the only copy of a tensor. The lists go before the staging folder does,
    which may lose its index first.
    """
    if os.path.lexists(stage / INDEX):
        _forget(stage / REMOVED)
        _remove(folder, [name for name in _listed(stage / ADDED) if not os.path.lexists(stage / name)])
    elif os.path.isfile(folder / INDEX):
        _remove(folder, _listed(stage / REMOVED))
        _forget(stage / REMOVED)


def _forget(file: Path) -> None:
    if not stat.S_ISDIR(_mode(file)):
        file.unlink(missing_ok=True)


def _listed(file: Path) -> list[str]:
    """Return the lines of a file; none if it is no ordinary file of a usual size."""
    if not stat.S_ISREG(_mode(file)) or file.stat().st_size > MAX_REMOVED_BYTES:
        return []
    return file.read_bytes().decode("utf-8", "replace").split("\n")


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Remove those of the named files that are shards and that the index, if there is one, does not name."""
    weight_map = read_json(folder / INDEX).child("weight_map") if names and os.path.isfile(folder / INDEX) else None
    named = [shard for shard in (weight_map or {}).values() if isinstance(shard, str)]
    for name in set(names).difference(named):
        if name.endswith(".safetensors") and stays_inside(folder, name):
            (folder / name).unlink(missing_ok=True)


def _is_unchanged(path: Path, there: Path) -> bool:
    """Check whether a file of the staging folder is only a link to a file of the folder."""
    return there.exists() and (path.is_symlink() or os.path.samefile(path, there))


def _install_order(name: str) -> int:
    """Sort shards first, most of which have new names, then the index, then the configs."""
    return 0 if name.endswith(".safetensors") else 1 if name == INDEX else 2
