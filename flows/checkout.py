"""Folders of a user's own that artifacts are laid into: what Requant did not lay there is neither replaced nor removed.

A record beside the store says what was laid into which folder. A folder is a checkout of ours if every file in it is
one that the record names, with the content that it had then. Without a record (another machine, a folder that was
moved) the folder's own `requant.json` takes its place, which names every file of a release. The record is written
before the first file, so that an interrupted checkout is known too. No part of it lies in the folder: what a user
uploads from there is the artifact and what belongs to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from requant.tasks.artifact import RELEASE, Manifest, sha256_of
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.errors import FolderInUse
from requant.tasks.store.folder import make_folder
from requant.tasks.store.store import Store


@dataclass(frozen=True)
class Laid:
    """A file as it was laid into a folder. `modified_ns`: its time of change afterwards, None if it is not known."""

    size_bytes: int
    sha256: str
    modified_ns: int | None = None


# What was laid into a folder, by path. While a checkout is under way a file may be the earlier one or the new one.
Known = Mapping[str, Sequence[Laid]]


def check_folder(store: Store, folder: Path, *, force: bool = False) -> None:
    """Raises FolderInUse unless an artifact may be laid into the folder.

    The folder may be missing (it will be made), empty, or an earlier checkout in which nobody changed anything. With
    `force` the files in it do not matter.
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
            if not _is_laid(where, path, known):
                why = "was changed since Requant laid it there" if path in known else "was not laid there by Requant"
                raise FolderInUse(
                    f"{folder} is not empty, and {path} in it {why}: name an empty folder, or add --force to replace "
                    "files of the same names"
                )
    except OSError as error:
        raise FolderInUse(f"{folder} cannot be read ({error.strerror}): name another folder") from error


def check_writable(where: Path, named: Path) -> None:
    """Raises FolderInUse unless files can be written into the folder `where`, which the user calls `named`. Leaves
    nothing behind."""
    missing = [path for path in (where, *where.parents) if not path.exists()]
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise FolderInUse(f"{named} cannot be written to ({error.strerror}): name another place") from error
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
    """Lay an artifact, and the files that go beside it, into a folder of the user's own.

    The same call goes on after a kill. What earlier checkouts laid there and this one does not is removed; with `force`
    a file of somebody else's is replaced by one of the same name, and stays otherwise. Returns the folder, and the
    weight files in it that are somebody else's: a loader may read these too.
    """
    check_folder(store, folder, force=force)
    where, beside = _resolved(folder), beside or {}
    known = _known(store, where)
    present = list(_files(where)) if where.exists() else []  # a requant.json may name files that lie elsewhere
    earlier = {path for path in present if path in known and _is_laid(where, path, known)}
    coming = {file.path: Laid(file.size, file.sha256) for file in manifest.files}
    coming |= {path: Laid(len(data), hashlib.sha256(data).hexdigest()) for path, data in beside.items()}
    _record(store, where, {path: [*known.get(path, ()), *one] for path, one in _each(coming, earlier)})
    unfinished = {path for path in present if path not in known and _is_temporary(path, known)}
    for path in {*earlier, *unfinished} - set(coming):
        (where / path).unlink(missing_ok=True)
        _remove_empty(where, (where / path).parent)
    store.checkout(manifest, where)
    for path, data in beside.items():
        write_file(where, path, [data])
    for path, laid in coming.items():
        coming[path] = Laid(laid.size_bytes, laid.sha256, os.lstat(where / path).st_mtime_ns)
    _record(store, where, {path: [laid] for path, laid in coming.items()})
    return where, [path for path in _files(where) if path.endswith(".safetensors") and path not in coming]


def _each(coming: Mapping[str, Laid], earlier: Iterable[str]) -> Iterator[tuple[str, list[Laid]]]:
    for path in sorted({*coming, *earlier}):
        yield path, [coming[path]] if path in coming else []


def _resolved(folder: Path) -> Path:
    """The folder itself, behind whatever links lead to it."""
    try:
        where = folder.resolve()
        mode = where.stat().st_mode
    except FileNotFoundError:
        if folder.is_symlink():
            raise FolderInUse(
                f"{folder} is a link to {where}, which is not there: remove the link or name another folder"
            ) from None
        return where
    except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's word for links that lead round in a circle
        said = getattr(error, "strerror", None) or "its links lead round in a circle"
        raise FolderInUse(f"{folder} cannot be used ({said}): name another folder") from error
    if not stat.S_ISDIR(mode):
        raise FolderInUse(f"{folder} is not a folder: name an empty or a new one")
    return where


def _files(where: Path) -> Iterator[str]:
    """Every file and link below a folder, as paths below it."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, folders, names in os.walk(where, onerror=refuse):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *links]):
            yield os.path.relpath(os.path.join(folder, name), where).replace(os.sep, "/")


def _is_laid(where: Path, path: str, known: Known) -> bool:
    """Whether a file is as it was laid: of the same time, else of the same content. What a killed checkout was still
    writing counts as its own."""
    found = os.lstat(where / path)
    if not stat.S_ISREG(found.st_mode):
        return False
    same_size = [laid for laid in known.get(path, ()) if laid.size_bytes == found.st_size]
    if any(laid.modified_ns == found.st_mtime_ns for laid in same_size):
        return True
    if same_size and sha256_of(where / path) in {laid.sha256 for laid in same_size}:
        return True
    return path not in known and _is_temporary(path, known)


def _is_temporary(path: str, known: Known) -> bool:
    """Whether a name is one under which a file of ours is written before it gets its own: `.NAME.part` (Store.checkout)
    or `.NAME.PROCESS.part` (whole_file)."""
    folder, _, name = path.rpartition("/")
    if not (name.startswith(".") and name.endswith(".part")):
        return False
    stem = name[1:].removesuffix(".part")
    siblings = [each.rpartition("/")[2] for each in known if each.rpartition("/")[0] == folder]
    return any(stem == each[:40] or stem.rpartition(".")[0] == each for each in siblings)


def _known(store: Store, where: Path) -> Known:
    """What was laid into a folder: by the record beside the store, else by the folder's own requant.json."""
    try:
        rows = json.loads(store.checkout_record(where).read_bytes())["files"]
        return {str(path): [Laid(**laid) for laid in each] for path, each in rows.items()}
    except (FileNotFoundError, PermissionError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _known_from_release(where)  # there is no record, or none that can be read


def _known_from_release(where: Path) -> Known:
    try:
        data = (where / RELEASE).read_bytes()
        rows = json.loads(data)["files"]
        known = {str(row["path"]): [Laid(int(row["size"]), str(row["sha256"]))] for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {**known, RELEASE: [Laid(len(data), hashlib.sha256(data).hexdigest())]}


def _record(store: Store, where: Path, files: Known) -> None:
    """Say what lies in a folder. Where that cannot be written down, the next checkout asks for --force."""
    document: dict[str, Any] = {
        "folder": str(where),
        "files": {path: [asdict(laid) for laid in each] for path, each in files.items()},
    }
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
