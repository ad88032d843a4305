"""Commits made from local folders, without a client."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from infra.dev.hub.gitattributes import goes_to_lfs, lfs_patterns, parse_lfs_patterns
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import Commit, Repository
from infra.dev.hub.tree import Delete, Entry, Operation, Put

_IGNORED_FOLDERS = {".git", ".cache"}


class Seed(BaseModel):
    """A folder, and the branch of the repository that it is committed to.

    With `delete_missing`, files that the folder lacks are deleted, except `.gitattributes`. With `headers_only`, only
    the headers and sizes of safetensors files are stored: the files in the folder may be sparse and of any size.
    """

    model_config = ConfigDict(extra="forbid")

    repo_id: str
    folder: Path
    repo_type: Literal["model", "dataset"] = "model"
    message: str = "Seed"
    revision: str = "main"
    delete_missing: bool = False
    headers_only: bool = False


def seed(hub: Hub, wanted: Seed) -> Commit:
    """Commit a folder to a branch, unless it holds those files already, and return the branch's commit.

    The repository and the branch are created if there are none. Raises NotADirectoryError.
    """
    if not wanted.folder.is_dir():
        raise NotADirectoryError(f"{wanted.folder} is not a folder")
    kind = f"{wanted.repo_type}s"
    repository = hub.find(kind, wanted.repo_id) or hub.create(kind, wanted.repo_id)
    with repository.lock:
        ref = f"refs/heads/{wanted.revision}"
        if repository.full_ref(ref) is None:
            repository.create_ref(ref, repository.resolve("main").id)
        head = repository.resolve(ref)
        attributes = wanted.folder / ".gitattributes"
        patterns = (
            parse_lfs_patterns(attributes.read_text()) if attributes.exists() else lfs_patterns(repository, head.tree)
        )
        files = {
            path: _put_header(repository, wanted.folder / path)
            if wanted.headers_only and path.endswith(".safetensors")
            else _put_file(repository, wanted.folder, path, patterns, hub.temporary())
            for path in _list_files(wanted.folder)
        }
        operations: list[Operation] = [
            Put(path, entry) for path, entry in files.items() if head.tree.get(path) != entry
        ]
        if wanted.delete_missing:
            missing = head.tree.keys() - files.keys() - {".gitattributes"}
            operations += [Delete(path) for path in sorted(missing)]
        if not operations:
            return head
        author = wanted.repo_id.partition("/")[0]
        return repository.commit(ref, operations, title=wanted.message, author=author)


def _list_files(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _IGNORED_FOLDERS)
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in sorted(files)]
    return found


def _put_header(repository: Repository, source: Path) -> Entry:
    """Store only the header of a safetensors file."""
    with source.open("rb") as file:
        length = file.read(8)
        return repository.put_header(length + file.read(int.from_bytes(length, "little")), source.stat().st_size)


def _put_file(repository: Repository, folder: Path, path: str, patterns: list[str], temporary: Path) -> Entry:
    """Store one file of a folder, unless the repository holds it already."""
    source = folder / path
    size = source.stat().st_size
    if not goes_to_lfs(path, size, patterns):
        return repository.put_blob(source.read_bytes())
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    entry = Entry.lfs(sha256, size)
    if repository.lfs_entry(sha256) is None:
        shutil.copyfile(source, temporary)
        repository.adopt_lfs(temporary, entry)
    return entry
