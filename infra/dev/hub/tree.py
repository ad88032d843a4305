"""The files of a commit as a flat mapping of paths, and the operations that change it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


class InvalidPath(ValueError):
    """A path that no repository can hold."""


class MissingPath(ValueError):
    """An operation on a path that is not in the tree."""


def git_blob_id(data: bytes) -> str:
    """Return the id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Return the small text that git holds in place of a large file."""
    return (f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n").encode()


@dataclass(frozen=True)
class Entry:
    """A file in a tree. `oid` is a git blob id: of the pointer if the file is in LFS."""

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def lfs(cls, sha256: str, size: int) -> "Entry":
        return cls(git_blob_id(lfs_pointer(sha256, size)), size, sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        return len(lfs_pointer(self.sha256 or "", self.size))


Tree = Mapping[str, Entry]


@dataclass(frozen=True)
class Put:
    """Add a file, or replace it."""

    path: str
    entry: Entry


@dataclass(frozen=True)
class Delete:
    """Delete a file, or with `folder` everything below a folder."""

    path: str
    folder: bool = False


Operation = Put | Delete


def check_path(path: str) -> str:
    """Return the path. Raises InvalidPath if no repository can hold it."""
    parts = path.split("/")
    if not all(parts) or {".", "..", ".git"} & set(parts) or "\0" in path or "\\" in path:
        raise InvalidPath(f"'{path}' is not a valid path in a repository")
    return path


def apply(tree: Tree, operations: Iterable[Operation]) -> dict[str, Entry]:
    """Return the tree after the operations, applied in order. Raises InvalidPath or MissingPath."""
    result = dict(tree)
    for operation in operations:
        path = check_path(operation.path)
        if isinstance(operation, Put):
            result[path] = operation.entry
        elif operation.folder:
            below = [name for name in result if name.startswith(path + "/")]
            if not below:
                raise MissingPath(f"A folder with this name doesn't exist: {path}")
            for name in below:
                del result[name]
        elif result.pop(path, None) is None:
            raise MissingPath(f"A file with this name doesn't exist: {path}")
    if clash := folders(result) & result.keys():
        raise InvalidPath(f"{min(clash)} cannot be a file and a folder")
    return result


def folders(paths: Iterable[str]) -> set[str]:
    """Return all folders above these paths."""
    found: set[str] = set()
    for path in paths:
        while "/" in path and (path := path.rpartition("/")[0]) not in found:
            found.add(path)
    return found


def folder_id(tree: Tree, folder: str) -> str:
    """Return an id that changes when anything below the folder does."""
    return tree_id({path: entry for path, entry in tree.items() if path.startswith(folder + "/")})


def tree_id(tree: Tree) -> str:
    """Return an id that two trees share exactly if they hold the same files."""
    rows = [[path, entry.oid, entry.size, entry.sha256] for path, entry in sorted(tree.items())]
    return hashlib.sha1(json.dumps(rows).encode(), usedforsecurity=False).hexdigest()
