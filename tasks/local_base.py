"""A base in a folder of this machine, as a revision whose commit is a digest of its files.

Sha256s are remembered in the store by path, inode, size and times, so that a folder is read once and again only where
it changed. What a training leaves in a folder beside the model is left out: it is large, or tells of its author.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import os
import platform
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from requant.tasks.artifact import File, Manifest, check_relative, digest_of
from requant.tasks.checkpoint.untrusted import MAX_JSON_BYTES, parse, shown
from requant.tasks.errors import CheckpointError, RecipeError
from requant.tasks.formatting import gigabytes
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.progress import Bar, progress
from requant.tasks.recipe.base_section import Base
from requant.tasks.store import Store

FACT = "local-files"
MAX_FILES = 10_000
RACY_NS = 2_000_000_000  # a file may change twice within one tick of its file system's clock; git's rule is the same
PARALLEL_READS = 4
CHUNK_BYTES = 1 << 20
# Files and folders of a training: its states, logs, data and settings, of which the last two name folders and people.
# Names that begin with a dot are left out too.
LEFT_OUT = (
    "checkpoint-*", "global_step*", "runs", "wandb", "logs", "__pycache__", "events.out.tfevents*", "*.log", "latest",
    "trainer_state.json", "training_args.*", "*_results.json", "zero_to_fp32.py", "*.jsonl",
    "*.parquet", "*.arrow", "*.csv", "*.tsv", "*.yaml", "*.yml", "recipe.schema.json",
    "*.sh", "*.env", "*.out", "*.err", "*.ipynb",
)  # fmt: skip
# Small files of a checkpoint, and a path in them that has folders: of Linux or macOS, of a home, of Windows.
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
OWN_PATH = re.compile(r"(~?/[^/\n]+/|[A-Za-z]:\\)[^\n]{1,1000}")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalFile:
    """A file of a folder: its path below the folder, where it really lies, and what tells that it was changed."""

    path: str
    real: Path
    size: int
    inode: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def at(cls, path: str, real: Path) -> LocalFile:
        """Describe a file. Raises CheckpointError unless it is a file that can be read."""
        try:
            status = real.stat()
            readable = os.access(real, os.R_OK)
        except OSError as error:
            raise _unreadable(path, real, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{real} is not a file: remove it", path=real)
        if not readable:
            raise CheckpointError(
                f"{real} cannot be read (no permission): allow it or remove the file",
                path=real,
            )
        return cls(path, real, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def fact(self) -> str:
        """The name under which the store remembers the file's sha256."""
        return digest_of([platform.node(), str(self.real), self.inode, self.size, self.modified_ns, self.changed_ns])


@dataclass(frozen=True)
class Listing:
    """The files of a folder, and the paths that are left out: those of a training, and names that do not print."""

    files: tuple[LocalFile, ...]
    of_training: tuple[str, ...]
    unprintable: tuple[str, ...]


def find_local_base(
    store: Store,
    base: Base,
    hash_limit_bytes: int | None = None,
    check: Callable[[Path, str, Sequence[str]], str | None] | None = None,
) -> Revision:
    """List and hash a base in a folder. Its commit is 40 digits of the digest of its files.

    With `hash_limit_bytes`, nothing is hashed if more bytes than these have no known sha256. Then the commit is empty,
    and so are the hashes of these files. `check` gets the folder, its name and the paths of its files before any is
    hashed, and says why it is no base; None if it may be one. Raises what `find_folder` raises, and CheckpointError
    with what `check` says, or if a file changes while it is read.
    """
    assert base.folder is not None, "a base of the Hub is found there"
    folder = _existing(Path(base.folder))
    listing = list_folder(folder)
    if check is not None and (why_not := check(folder, base.name, [file.path for file in listing.files])):
        raise CheckpointError(why_not, path=folder)
    revision = _unhashed(folder, base.name, listing)
    wanted = {file.path for file in revision.wanted}
    files = {file.path: file for file in listing.files if file.path in wanted}
    known = {path: sha256 for path, file in files.items() if (sha256 := store.get_fact(FACT, file.fact))}
    unknown = [file for path, file in files.items() if path not in known]
    size_bytes = sum(file.size for file in unknown)
    if hash_limit_bytes is None or size_bytes <= hash_limit_bytes:
        if unknown:
            log.info(f"hashing {len(unknown)} files of {folder}, {gigabytes(size_bytes)}")
        known |= _hash_all(store, unknown)
    hashed = tuple(replace(file, sha256=known.get(file.path)) for file in revision.files)
    if len(known) < len(files):
        return replace(revision, files=hashed)
    manifest = Manifest.of(File(path, files[path].size, sha256) for path, sha256 in known.items())
    return replace(revision, files=hashed, sha=manifest.digest[:40])


def _hash_all(store: Store, files: Sequence[LocalFile]) -> dict[str, str]:
    """Return the sha256 of each file by path. An interrupt ends the threads before the ends of their files."""
    stop = threading.Event()
    size_bytes = sum(file.size for file in files)
    with progress("hash", size_bytes, "bytes") as bar, ThreadPoolExecutor(PARALLEL_READS) as pool:
        try:
            return dict(pool.map(lambda file: (file.path, _hash(store, file, stop, bar)), files))
        except BaseException:
            stop.set()
            raise


def _hash(store: Store, file: LocalFile, stop: threading.Event, bar: Bar) -> str:
    """Return the sha256 of a file, and remember it unless the file is so young that it may change unnoticed."""
    begun_ns, hasher = time.time_ns(), hashlib.sha256()
    try:
        with file.real.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                if stop.is_set():
                    raise CancelledError
                hasher.update(chunk)
                bar.advance(len(chunk))
    except OSError as error:
        raise _unreadable(file.path, file.real, error) from error
    if LocalFile.at(file.path, file.real) != file:
        raise changed(file.real)
    if file.modified_ns + RACY_NS < begun_ns:
        store.put_fact(FACT, file.fact, hasher.hexdigest())
    return hasher.hexdigest()


def find_folder(folder: Path) -> Revision:
    """List a checkpoint's folder, without reading its files. The commit and the hashes are empty.

    Raises RecipeError if this machine has no such folder, and what `list_folder` raises.
    """
    folder = _existing(folder)
    return _unhashed(folder, folder.name, list_folder(folder))


def _existing(folder: Path) -> Path:
    is_folder = False
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        folder = folder.expanduser().resolve(strict=True)
        is_folder = folder.is_dir()
    if not is_folder:
        raise RecipeError(
            f"the folder {folder} does not exist on this machine ({platform.node()}): run where it lies, or put "
            "the checkpoint into a repo on the Hub",
            path=folder,
        )
    return folder


def _unhashed(folder: Path, name: str, listing: Listing) -> Revision:
    """Return a folder as a revision without a commit. Names that cannot lie in one folder are refused."""
    if listing.of_training:
        log.info(f"left out of {folder}, as no part of the model: {', '.join(map(shown, listing.of_training[:20]))}")
    files = tuple(HubFile(file.path, file.size, "", None) for file in listing.files)
    revision = Revision(name, "", files, left_out=listing.unprintable, folder=folder, is_local=True)
    revision.check_names()
    return revision


def list_folder(folder: Path) -> Listing:
    """List the files of a checkpoint's folder, without reading them.

    A link may lead to a file of the same folder, or of a snapshot in huggingface_hub's cache to the cache's blobs.
    Any other link is refused: what it leads to would be published, and nobody has looked at it. Raises CheckpointError.
    """
    files, of_training, unprintable = list[LocalFile](), list[str](), list[str]()
    for path in _walk(folder):
        name = path.rpartition("/")[2]
        if not path.isprintable():
            unprintable.append(path)
        elif _is_of_training(name):
            of_training.append(path)
        else:
            check_relative(path)
            files.append(LocalFile.at(path, _real(folder, path)))
    return Listing(tuple(sorted(files, key=lambda file: file.path)), tuple(sorted(of_training)), tuple(unprintable))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the path of each file, and of each folder that LEFT_OUT names, without what begins with a dot."""
    found = 0

    def fail(error: OSError) -> None:
        raise CheckpointError(
            f"the folder {error.filename} cannot be read ({error.strerror}): allow it, or name another folder",
            path=error.filename,
        ) from error

    for root, folders, names in os.walk(folder, onerror=fail):
        below = Path(root).relative_to(folder)
        linked = [name for name in folders if os.path.islink(os.path.join(root, name)) and not name.startswith(".")]
        left_out = [name for name in folders if _is_of_training(name)]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in {*linked, *left_out}]
        for name in (*left_out, *names, *(one for one in linked if one not in left_out)):
            found += 1
            if found > MAX_FILES:
                raise CheckpointError(
                    f"the folder {folder} has more than {MAX_FILES:,} files: name the folder of one checkpoint",
                    path=folder,
                )
            if not name.startswith("."):
                yield (below / name).as_posix()


def _is_of_training(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT)


def _real(folder: Path, path: str) -> Path:
    """Return where a file really lies. Raises CheckpointError for a link that leads out of the folder."""
    full = folder / path
    if not full.is_symlink():
        return full
    real = Path(os.path.realpath(full))
    blobs = folder.parent.parent / "blobs"
    in_cache = folder.parent.name == "snapshots" and real.is_relative_to(blobs)
    if not in_cache and not real.is_relative_to(folder):
        raise CheckpointError(
            f"{full} is a link that leads out of its folder, to {real}: put the file itself there",
            path=full,
        )
    return real


def private_paths(folder: Path) -> Iterator[str]:
    """Yield a sentence for each setting in small files of a folder that names a path of the user's machine.

    Trainers write the path from which they loaded a model, and the files are published as they are.
    """
    for name in SETTINGS:
        path = folder / name
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            continue
        try:
            document, _ = parse(path.read_bytes())
        except (OSError, ValueError, RecursionError):  # Others say so.
            continue
        for key, value in _settings(document):
            if OWN_PATH.fullmatch(value):
                yield (
                    f"{name} names a path of somebody's machine, and is published as it is: take {shown(key)} "
                    f"({shown(value)}) out of it"
                )


def _settings(document: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts of a JSON document, also of objects and lists in it, each with the keys that lead to it."""
    if isinstance(document, str):
        yield prefix.removesuffix("."), document
    elif isinstance(document, dict):
        for key, value in document.items():
            yield from _settings(value, f"{prefix}{key}.")
    elif isinstance(document, list):
        for value in document:
            yield from _settings(value, prefix)


def changed(real: Path) -> CheckpointError:
    """Return the error for a file that is not, or no longer, what was hashed."""
    return CheckpointError(
        f"{real} changed while it was read: wait until it is written, then run again",
        path=real,
    )


def _unreadable(path: str, real: Path, error: OSError) -> CheckpointError:
    link = "" if real.as_posix().endswith(f"/{path}") else f", to which {shown(path)} leads,"
    return CheckpointError(f"{real}{link} cannot be read ({error.strerror}): mend or remove it", path=real)
