"""Copy artifacts into folders of the user, and never replace or remove files that Requant did not write there.

The store's machine has a record of the files that were written into each folder. A folder counts as a checkout if every
file in it is named by the record and has not changed since. Without a record, on another machine or after the folder
was moved, the folder's own `requant.json` is used, which names every file of a release. The record is written before
the first file, so that an interrupted checkout is recognized too. It is not in the folder itself: users upload whole
folders, which must hold the artifact and its release files only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from requant.tasks.artifact import RELEASE, Manifest, sha256_of
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.errors import FolderInUse
from requant.tasks.store.folder import make_folder
from requant.tasks.store.store import Store


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written into a folder. `modified_ns` is the time of the change, None if it is not known."""

    size_bytes: int
    sha256: str
    modified_ns: int | None = None


# The files that were written into a folder, by path. During a checkout, each may be the earlier or the new file.
Known = Mapping[str, Sequence[WrittenFile]]


def check_folder(store: Store, folder: Path, *, force: bool = False) -> None:
    """Raise FolderInUse unless an artifact may be written into the folder.

    The folder may be missing, empty, or an earlier checkout in which nobody changed anything. With `force`, its files
    are not checked.
    """
    where = _resolved(folder)
    if not force:
        _refuse_foreign_files(store, folder, where)
    check_writable(where, folder)


def _refuse_foreign_files(store: Store, folder: Path, where: Path) -> None:
    known: Known | None = None
    try:
        for path in _files(where):
            known = _known(store, where) if known is None else known
            if not _is_unchanged(where, path, known):
                why = "was changed since Requant laid it there" if path in known else "was not laid there by Requant"
                raise FolderInUse(
                    f"{folder} is not empty, and {path} in it {why}: name an empty folder, or add --force to replace "
                    "files of the same names",
                    path=folder,
                )
    except OSError as error:
        raise FolderInUse(f"{folder} cannot be read ({error.strerror}): name another folder", path=folder) from error


def refuse_sources(folder: Path, sources: Iterable[str | None]) -> None:
    """Raise FolderInUse if a checkout would write into one of the folders `sources`, whatever else is allowed."""
    where = _resolved(folder)
    for source in filter(None, sources):
        if where.is_relative_to(_resolved(Path(source))):
            raise FolderInUse(
                f"{folder} is in the folder of the base or the adapter, {source}, which Requant only reads: name "
                "another folder",
                path=folder,
            )


def check_writable(where: Path, named: Path) -> None:
    """Raise FolderInUse unless files can be written into the folder `where`, which the user calls `named`.

    Leaves nothing behind.
    """
    missing = [path for path in (where, *where.parents) if not path.exists()]
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise FolderInUse(f"{named} cannot be written to ({error.strerror}): name another place", path=named) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def copy_to_folder(
    store: Store,
    manifest: Manifest,
    folder: Path,
    beside: Mapping[str, bytes] | None = None,
    *,
    force: bool = False,
) -> tuple[Path, list[str]]:
    """Write an artifact, and the release files `beside` it, into a folder of the user.

    After a kill, the same call continues. Files of earlier checkouts that are not in this one are removed. Files that
    Requant did not write stay; with `force`, one is replaced if this checkout has a file of its name. Return the
    folder, and the weight files in it that are not the artifact's, which a loader may read too.
    """
    check_folder(store, folder, force=force)
    where, beside = _resolved(folder), beside or {}
    known = _known(store, where)
    present = list(_files(where)) if where.exists() else []  # A requant.json may name files that are elsewhere.
    earlier = {path for path in present if path in known and _is_unchanged(where, path, known)}
    coming = {file.path: WrittenFile(file.size, file.sha256) for file in manifest.files}
    coming |= {path: WrittenFile(len(data), hashlib.sha256(data).hexdigest()) for path, data in beside.items()}
    new = {path: [coming[path]] if path in coming else [] for path in sorted({*coming, *earlier})}
    _record(store, where, {path: [*known.get(path, ()), *files] for path, files in new.items()})
    unfinished = {path for path in present if path not in known and _is_temporary(path, known)}
    for path in {*earlier, *unfinished} - set(coming):
        (where / path).unlink(missing_ok=True)
        _remove_empty(where, (where / path).parent)
    store.checkout(manifest, where)
    for path, data in beside.items():
        write_file(where, path, [data])
    written = {path: replace(file, modified_ns=os.lstat(where / path).st_mtime_ns) for path, file in coming.items()}
    _record(store, where, {path: [file] for path, file in written.items()})
    return where, [path for path in _files(where) if path.endswith(".safetensors") and path not in coming]


def _resolved(folder: Path) -> Path:
    """Resolve a folder, which links may lead to. Raises FolderInUse if it cannot be used."""
    try:
        where = folder.resolve()
        mode = where.stat().st_mode
    except FileNotFoundError:
        if folder.is_symlink():
            raise FolderInUse(
                f"{folder} is a link to {where}, which is not there: remove the link or name another folder",
                path=folder,
            ) from None
        return where
    except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for a circle of links.
        said = getattr(error, "strerror", None) or "its links lead round in a circle"
        raise FolderInUse(f"{folder} cannot be used ({said}): name another folder", path=folder) from error
    if not stat.S_ISDIR(mode):
        raise FolderInUse(f"{folder} is not a folder: name an empty or a new one", path=folder)
    return where


def _files(where: Path) -> Iterator[str]:
    """Yield every file and link below a folder, as paths relative to it."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, folders, names in os.walk(where, onerror=refuse):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *links]):
            yield os.path.relpath(os.path.join(folder, name), where).replace(os.sep, "/")


def _is_unchanged(where: Path, path: str, known: Known) -> bool:
    """Check whether a file is as Requant wrote it: by the time of its last change, otherwise by its content.

    The unfinished file of a killed checkout counts as unchanged.
    """
    status = os.lstat(where / path)
    if not stat.S_ISREG(status.st_mode):
        return False
    same_size = [file for file in known.get(path, ()) if file.size_bytes == status.st_size]
    if any(file.modified_ns == status.st_mtime_ns for file in same_size):
        return True
    if same_size and sha256_of(where / path) in {file.sha256 for file in same_size}:
        return True
    return path not in known and _is_temporary(path, known)


def _is_temporary(path: str, known: Known) -> bool:
    """Check whether a path is the temporary name of a known file: `.NAME.part` (Store.checkout), or
    `.NAME.PROCESS.part` (checkpoint/writer.py).
    """
    folder, _, name = path.rpartition("/")
    if not (name.startswith(".") and name.endswith(".part")):
        return False
    stem = name[1:].removesuffix(".part")
    siblings = [other.rpartition("/")[2] for other in known if other.rpartition("/")[0] == folder]
    return any(stem == sibling[:40] or stem.rpartition(".")[0] == sibling for sibling in siblings)


def _known(store: Store, where: Path) -> Known:
    """Return the files that were written into a folder, from the record or from the folder's own requant.json."""
    try:
        rows = json.loads(store.checkout_record(where).read_bytes())["files"]
        return {str(path): [WrittenFile(**file) for file in files] for path, files in rows.items()}
    except (FileNotFoundError, PermissionError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _known_from_release(where)  # There is no record, or it is damaged.


def _known_from_release(where: Path) -> Known:
    try:
        data = (where / RELEASE).read_bytes()
        rows = json.loads(data)["files"]
        known = {str(row["path"]): [WrittenFile(int(row["size"]), str(row["sha256"]))] for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {**known, RELEASE: [WrittenFile(len(data), hashlib.sha256(data).hexdigest())]}


def _record(store: Store, where: Path, files: Known) -> None:
    """Record the files of a folder. If that is not permitted, the next checkout asks for --force."""
    rows = {path: [asdict(file) for file in written] for path, written in files.items()}
    document = {"folder": str(where), "files": rows}
    path = store.checkout_record(where)
    with contextlib.suppress(PermissionError):
        make_folder(path.parent)
        write_file(path.parent, path.name, [json.dumps(document, indent=1).encode()])


def _remove_empty(where: Path, folder: Path) -> None:
    """Remove folders that became empty, up to the checkout itself."""
    while folder != where:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
