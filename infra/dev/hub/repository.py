"""One repository on the disk: objects, commits, refs.

    repo.json               settings
    objects/git/ab/<sha1>   regular files, by git blob id
    objects/lfs/ab/<sha256> large files; of one seeded by its header alone, the header
    trees/<id>  commits/<id>
    refs/heads/<name>  refs/tags/<name>  refs/pr/<number>     one commit id each, names quoted
    discussions/<number>
    uploads/<sha256>/<part>.<etag>                            parts of an unfinished upload

Objects, tree and commit are written and synced before the ref that leads to them is renamed
into place: a commit is visible as a whole, or not at all.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from infra.dev.hub.durable import Durable
from infra.dev.hub.tree import Entry, Operation, Tree, apply, dump_tree, git_blob_id, load_tree, tree_id

SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_FILE_NAME = 255
_COMMIT_ID = re.compile(r"[0-9a-f]{40}")
_BAD_REF = re.compile(r"^[./-]|\.\.|//|[\x00-\x20\x7f~^:?*\[\\]|@\{|[./]$|\.lock$|/\.")


class RevisionNotFound(LookupError):
    """No branch, tag, pull request or commit of that name."""


class RefExists(ValueError):
    """A branch or tag of that name is already there."""


class StaleParent(ValueError):
    """The branch is no longer where the caller believed it to be."""


class InvalidRef(ValueError):
    """A name that no branch or tag can have."""


@dataclass(frozen=True)
class Settings:
    """Who sees a repository. `granted`: users let through the gate."""

    private: bool = False
    gated: str | None = None
    granted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    """A commit. Its id covers parents, message and tree, and no clock."""

    id: str
    parents: tuple[str, ...]
    title: str
    description: str
    tree: str
    author: str
    date: str


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Repository:
    """One repository. `lock` guards every read of a ref that is followed by a write."""

    def __init__(self, kind: str, id: str, folder: Path, durable: Durable) -> None:
        self.kind, self.id = kind, id
        self.folder = folder
        self.durable = durable
        self.lock = threading.RLock()

    # settings

    @property
    def settings(self) -> Settings:
        stored = json.loads((self.folder / "repo.json").read_bytes())
        return Settings(stored["private"], stored["gated"], tuple(stored["granted"]))

    def change_settings(self, **changes: Any) -> None:
        with self.lock:
            settings = replace(self.settings, **changes)
            self.durable.write(self.folder / "repo.json", json.dumps(asdict(settings)).encode())

    # objects

    def put_blob(self, data: bytes) -> Entry:
        """Keep a regular file."""
        entry = Entry(git_blob_id(data), len(data))
        if not self.object_path(entry).exists():
            self.durable.write(self.object_path(entry), data)
        return entry

    def adopt_lfs(self, temporary: Path, entry: Entry) -> None:
        """Keep a large file that was written to a temporary path and checked."""
        self.durable.publish(temporary, self.object_path(entry))

    def lfs_entry(self, sha256: str) -> Entry | None:
        """The large file with this hash, if the repository holds it."""
        if not SHA256.fullmatch(sha256) or not self._lfs_path(sha256).exists():
            return None
        return Entry.lfs(sha256, self._lfs_path(sha256).stat().st_size)

    def put_header(self, header: bytes, size: int) -> Entry:
        """Keep the beginning of a large file that nobody will fetch whole. Its sha256 is made up."""
        entry = Entry.lfs(hashlib.sha256(b"%d " % size + header).hexdigest(), size)
        if not self.object_path(entry).exists():
            self.durable.write(self.object_path(entry), header)
        return entry

    def object_path(self, entry: Entry) -> Path:
        if entry.sha256:
            return self._lfs_path(entry.sha256)
        return self.folder / "objects" / "git" / entry.oid[:2] / entry.oid

    def _lfs_path(self, sha256: str) -> Path:
        return self.folder / "objects" / "lfs" / sha256[:2] / sha256

    # refs

    def refs(self, kind: str) -> dict[str, str]:
        """Names and commit ids of all `heads`, `tags` or `pr`."""
        folder = self.folder / "refs" / kind
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        return {unquote(path.name): path.read_text() for path in paths}

    def _ref_path(self, ref: str) -> Path:
        """Where a full ref such as `refs/heads/main` is kept."""
        _, kind, name = ref.split("/", 2)
        file_name = quote(name, safe="")
        if not name or _BAD_REF.search(name) or len(file_name) > _LONGEST_FILE_NAME:
            raise InvalidRef(f"'{name}' is not a valid name for a branch or tag")
        return self.folder / "refs" / kind / file_name

    def full_ref(self, revision: str) -> str | None:
        """The full name of the branch, tag or pull request that `revision` names, if any."""
        if revision.startswith(("refs/heads/", "refs/tags/", "refs/pr/")):
            candidates = [revision]
        else:
            candidates = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        try:
            return next((ref for ref in candidates if self._ref_path(ref).exists()), None)
        except InvalidRef:
            return None

    def create_ref(self, ref: str, commit_id: str) -> None:
        with self.lock:
            if self._ref_path(ref).exists():
                raise RefExists(f"Reference already exists: {ref}")
            self.durable.write(self._ref_path(ref), commit_id.encode())

    def delete_ref(self, ref: str) -> None:
        with self.lock:
            if self.full_ref(ref) is None:
                raise RevisionNotFound(ref)
            self.durable.remove(self._ref_path(ref))

    # commits

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or commit id stands for."""
        if ref := self.full_ref(revision):
            return self.load_commit(self._ref_path(ref).read_text())
        if _COMMIT_ID.fullmatch(revision) and self._commit_path(revision).exists():
            return self.load_commit(revision)
        raise RevisionNotFound(revision)

    def _commit_path(self, commit_id: str) -> Path:
        return self.folder / "commits" / commit_id

    def load_commit(self, commit_id: str) -> Commit:
        stored = json.loads(self._commit_path(commit_id).read_bytes())
        return Commit(**{**stored, "parents": tuple(stored["parents"])})

    def tree(self, commit: Commit) -> dict[str, Entry]:
        return load_tree((self.folder / "trees" / commit.tree).read_bytes())

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and those before it, newest first."""
        yield commit
        while commit.parents:
            commit = self.load_commit(commit.parents[0])
            yield commit

    def commit(
        self,
        ref: str,
        operations: Iterable[Operation],
        *,
        title: str,
        description: str = "",
        author: str,
        parent: str | None = None,
    ) -> Commit:
        """Commit to a branch or pull request, if it is still at `parent`."""
        with self.lock:
            head = self.resolve(ref)
            if parent is not None and parent != head.id:
                raise StaleParent("A commit has happened since. Please refresh and try again.")
            tree = apply(self.tree(head), operations)
            commit = self.store_commit((head.id,), tree, title, description, author)
            self.move_ref(ref, commit)
            return commit

    def store_commit(self, parents: tuple[str, ...], tree: Tree, title: str, description: str, author: str) -> Commit:
        """Write a commit that no ref leads to yet."""
        content = tree_id(tree)
        identity = json.dumps([parents, title, description, content]).encode()
        commit_id = hashlib.sha1(identity, usedforsecurity=False).hexdigest()
        if not self._commit_path(commit_id).exists():
            commit = Commit(commit_id, parents, title, description, content, author, now())
            self.durable.write(self.folder / "trees" / content, dump_tree(tree))
            self.durable.write(self._commit_path(commit_id), json.dumps(asdict(commit)).encode())
        return self.load_commit(commit_id)

    def move_ref(self, ref: str, commit: Commit) -> None:
        """The one rename that makes a commit visible."""
        self.durable.write(self._ref_path(ref), commit.id.encode())
