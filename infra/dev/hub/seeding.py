"""Folders that become commits, without a client."""

import hashlib
import os
import shutil
from pathlib import Path

from infra.dev.hub.gitattributes import goes_to_lfs, lfs_patterns, parse_lfs_patterns
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import Commit, Repository
from infra.dev.hub.tree import Delete, Entry, Operation, Put

_IGNORED_FOLDERS = {".git", ".cache"}


def seed(
    hub: Hub,
    kind: str,
    repo_id: str,
    folder: Path,
    *,
    message: str,
    revision: str = "main",
    delete_missing: bool = False,
    headers_only: bool = False,
) -> Commit:
    """Make a branch hold what a folder holds; a new commit only if it does not yet.

    The repository and the branch are created when needed. With `delete_missing`, files that the
    folder lacks are deleted, except `.gitattributes`. With `headers_only`, safetensors files are known
    by their size, and nothing but their headers is kept: the folder's may be sparse, of any size.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    repository = hub.find(kind, repo_id) or hub.create(kind, repo_id)
    with repository.lock:
        ref = f"refs/heads/{revision}"
        if repository.full_ref(ref) is None:
            repository.create_ref(ref, repository.resolve("main").id)
        head = repository.resolve(ref)
        tree = repository.tree(head)
        attributes = folder / ".gitattributes"
        patterns = parse_lfs_patterns(attributes.read_text()) if attributes.exists() else lfs_patterns(repository, tree)
        files = {path: _keep(repository, folder, path, patterns, headers_only) for path in _files(folder)}
        operations: list[Operation] = [Put(path, entry) for path, entry in files.items() if tree.get(path) != entry]
        if delete_missing:
            missing = tree.keys() - files.keys() - {".gitattributes"}
            operations += [Delete(path) for path in sorted(missing)]
        if not operations:
            return head
        author = repo_id.partition("/")[0]
        return repository.commit(ref, operations, title=message, author=author)


def _files(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _IGNORED_FOLDERS)
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in sorted(files)]
    return found


def _keep(repository: Repository, folder: Path, path: str, patterns: list[str], headers_only: bool) -> Entry:
    """Store one file of a folder, unless the repository holds it already."""
    source = folder / path
    size = source.stat().st_size
    if headers_only and source.suffix == ".safetensors":
        with source.open("rb") as file:
            length = file.read(8)
            return repository.put_header(length + file.read(int.from_bytes(length, "little")), size)
    if not goes_to_lfs(path, size, patterns):
        return repository.put_blob(source.read_bytes())
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    entry = Entry.lfs(sha256, size)
    if repository.lfs_entry(sha256) is None:
        temporary = repository.durable.temporary()
        shutil.copyfile(source, temporary)
        repository.adopt_lfs(temporary, entry)
    return entry
