"""One repository: its files on the disk, and the rest in memory with a copy in `repository.json`.

    repository.json                 settings, refs, commits with their trees, pull requests
    objects/git/ab/<sha1>           regular files, by git blob id
    objects/lfs/ab/<sha256>         large files; only the header of one that was seeded with `headers_only`
    uploads/<sha256>/<part>.<etag>  parts of an unfinished upload

`repository.json` is replaced as a whole after each change. A killed process therefore leaves either the old state or
the new one, and the next process goes on with it. Nothing is synced: a power cut may lose what was written last.
"""

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from infra.dev.hub.tree import Entry, Operation, Tree, apply, git_blob_id, tree_id

STATE = "repository.json"  # Earlier stand-ins kept another state in repo.json, which this one does not read.
SHA256 = re.compile(r"[0-9a-f]{64}")
_BAD_REF_NAME = re.compile(r"^$|^[./-]|\.\.|//|[\x00-\x20\x7f~^:?*\[\\]|@\{|[./]$|\.lock$|/\.")


class RevisionNotFound(LookupError):
    """No branch, tag, pull request or commit of that name."""


class RefExists(ValueError):
    """A branch or tag of that name already exists."""


class StaleParent(ValueError):
    """The branch has moved since the caller looked at it."""


class InvalidRef(ValueError):
    """A name that no branch or tag can have."""


@dataclass(frozen=True)
class Commit:
    """A commit. Its id is a hash of its parents, message and tree, and not of its date."""

    id: str
    parents: tuple[str, ...]
    title: str
    description: str
    tree: dict[str, Entry]
    author: str
    date: str


class PullRequest(BaseModel):
    """A pull request, with its commits on `refs/pr/<number>`. `base` is the commit of `main` that it started from."""

    number: int
    title: str
    author: str
    created: str
    status: str
    base: str
    description: str = ""
    merged_as: str | None = None


class State(BaseModel):
    """The content of `repository.json`. The keys of `refs` are full names such as `refs/heads/main`."""

    private: bool = False
    gated: str | None = None
    refs: dict[str, str] = {}
    commits: dict[str, Commit] = {}
    pull_requests: dict[int, PullRequest] = {}


def now() -> str:
    """Return the time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    temporary.replace(path)


class Repository:
    """One repository in `folder`. Its state is read from there, and is new if there is none."""

    def __init__(self, kind: str, id: str, folder: Path) -> None:
        self.kind, self.id = kind, id
        self.folder = folder
        self.lock = threading.RLock()
        path = folder / STATE
        self.state = State.model_validate_json(path.read_bytes()) if path.exists() else State()

    @contextmanager
    def changing(self) -> Iterator[State]:
        """Hold the lock while the state is changed, and write it down afterwards."""
        with self.lock:
            yield self.state
            write_file(self.folder / STATE, self.state.model_dump_json().encode())

    # objects

    def put_blob(self, data: bytes) -> Entry:
        """Store a regular file."""
        return self._put(Entry(git_blob_id(data), len(data)), data)

    def put_header(self, header: bytes, size: int) -> Entry:
        """Store only the beginning of a large file of `size` bytes. Its sha256 is made up."""
        return self._put(Entry.lfs(hashlib.sha256(b"%d " % size + header).hexdigest(), size), header)

    def _put(self, entry: Entry, data: bytes) -> Entry:
        if not self.object_path(entry).exists():
            write_file(self.object_path(entry), data)
        return entry

    def adopt_lfs(self, temporary: Path, entry: Entry) -> None:
        """Store a large file by moving a file whose content was checked."""
        path = self.object_path(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)

    def lfs_entry(self, sha256: str) -> Entry | None:
        """Return the large file with this hash, if the repository holds it."""
        if not SHA256.fullmatch(sha256) or not self._lfs_path(sha256).exists():
            return None
        return Entry.lfs(sha256, self._lfs_path(sha256).stat().st_size)

    def object_path(self, entry: Entry) -> Path:
        if entry.sha256:
            return self._lfs_path(entry.sha256)
        return self.folder / "objects" / "git" / entry.oid[:2] / entry.oid

    def _lfs_path(self, sha256: str) -> Path:
        return self.folder / "objects" / "lfs" / sha256[:2] / sha256

    # refs

    def refs(self, kind: str) -> dict[str, str]:
        """Return names and commit ids of all `heads`, `tags` or `pr`."""
        prefix = f"refs/{kind}/"
        return {ref.removeprefix(prefix): id for ref, id in sorted(self.state.refs.items()) if ref.startswith(prefix)}

    def full_ref(self, revision: str) -> str | None:
        """Return the full name of the branch, tag or pull request that `revision` names, if any."""
        candidates = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((ref for ref in candidates if ref in self.state.refs), None)

    def create_ref(self, ref: str, commit_id: str) -> None:
        """Create a branch or tag. Raises InvalidRef or RefExists."""
        name = ref.split("/", 2)[2]
        if _BAD_REF_NAME.search(name):
            raise InvalidRef(f"'{name}' is not a valid name for a branch or tag")
        with self.changing() as state:
            if ref in state.refs:
                raise RefExists(f"Reference already exists: {ref}")
            state.refs[ref] = commit_id

    def delete_ref(self, ref: str) -> None:
        """Delete a branch or tag. Raises RevisionNotFound."""
        with self.changing() as state:
            if state.refs.pop(ref, None) is None:
                raise RevisionNotFound(ref)

    def open_pull_request(
        self, base: Commit, *, title: str, author: str, description: str = "", status: str = "open"
    ) -> PullRequest:
        """Open a pull request that has no commits yet behind `base`."""
        with self.changing() as state:
            number = 1 + len(state.pull_requests)
            self.create_ref(f"refs/pr/{number}", base.id)
            request = PullRequest(
                number=number,
                title=title,
                author=author,
                created=now(),
                status=status,
                base=base.id,
                description=description,
            )
            state.pull_requests[number] = request
            return request

    # commits

    def resolve(self, revision: str) -> Commit:
        """Return the commit of a branch, tag, pull request or commit id. Raises RevisionNotFound."""
        ref = self.full_ref(revision)
        commit = self.state.commits.get(self.state.refs[ref] if ref else revision)
        if commit is None:
            raise RevisionNotFound(revision)
        return commit

    def history(self, commit: Commit) -> Iterator[Commit]:
        """Yield the commit and those before it, newest first."""
        yield commit
        while commit.parents:
            commit = self.state.commits[commit.parents[0]]
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
        """Commit to a branch or pull request. Raises StaleParent if it is no longer at `parent`."""
        with self.lock:
            head = self.resolve(ref)
            if parent is not None and parent != head.id:
                raise StaleParent("A commit has happened since. Please refresh and try again.")
            return self.commit_tree(ref, apply(head.tree, operations), title, description, author)

    def commit_tree(self, ref: str, tree: Tree, title: str, description: str, author: str) -> Commit:
        """Make a commit of a whole tree, and move the ref to it. The ref is created if there is none."""
        with self.changing() as state:
            parents = (state.refs[ref],) if ref in state.refs else ()
            identity = json.dumps([parents, title, description, tree_id(tree)]).encode()
            commit_id = hashlib.sha1(identity, usedforsecurity=False).hexdigest()
            commit = Commit(commit_id, parents, title, description, dict(tree), author, now())
            state.refs[ref] = commit_id
            return state.commits.setdefault(commit_id, commit)
