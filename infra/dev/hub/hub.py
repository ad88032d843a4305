"""All repositories of the stand-in, and who may use them."""

import hashlib
import hmac
import re
import secrets
import shutil
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.dev.hub.gitattributes import DEFAULT_GITATTRIBUTES
from infra.dev.hub.repository import STATE, Repository
from infra.dev.hub.xet import XetStorage

KINDS = ("models", "datasets")
_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


class InvalidRepoId(ValueError):
    """An id that no repository can have."""


class RepoExists(ValueError):
    """A repository of that id already exists."""


@dataclass(frozen=True)
class User:
    """The owner of a token, and whether the token may write."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class Limits:
    """Sizes that tests reduce, to get the behaviour of large files from small ones."""

    multipart_over: int = 64 * 2**20
    part_size: int = 16 * 2**20
    tree_page: int = 1000


@dataclass
class XetSettings:
    """Whether files are uploaded through Xet, and what its tokens say.

    `cas_url` is where clients are sent instead of to the storage here.
    """

    enabled: bool = True
    cas_url: str | None = None
    token_lifetime_s: int = 3600


class Hub:
    """The repositories in a state folder. Users and collections are forgotten when the process ends."""

    def __init__(self, state: Path, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.users: dict[str, User] = {}
        self.xet = XetStorage(state / "xet")
        self.xet_settings = XetSettings()
        self.collections: dict[str, dict[str, Any]] = {}
        self.lock = threading.RLock()
        self._repositories = state / "repos"
        self._open: dict[tuple[str, str], Repository] = {}
        self._secret = secrets.token_bytes(32)
        self._temporary = state / "temporary"
        shutil.rmtree(self._temporary, ignore_errors=True)  # a killed process may have left uploads there
        self._temporary.mkdir(parents=True)

    def sign(self, *parts: str | int) -> str:
        """Return a signature for an upload address, which the client uses without a token."""
        message = "\n".join(map(str, parts)).encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    def temporary(self) -> Path:
        """Return a new path for a file that is moved to a repository when it is complete."""
        return self._temporary / uuid.uuid4().hex

    def find(self, kind: str, repo_id: str) -> Repository | None:
        """Return the repository of that kind and id, if there is one."""
        try:
            folder = self._folder(kind, repo_id)
        except InvalidRepoId:
            return None
        with self.lock:
            if (kind, repo_id) not in self._open and (folder / STATE).exists():
                self._open[kind, repo_id] = Repository(kind, repo_id, folder)
            return self._open.get((kind, repo_id))

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> Repository:
        """Create a repository with the first commit that the Hub makes, of `.gitattributes`."""
        folder = self._folder(kind, repo_id)
        with self.lock:
            if self.find(kind, repo_id):
                raise RepoExists(f"You already created this {kind[:-1]} repo: {repo_id}")
            repository = Repository(kind, repo_id, folder)
            repository.state.private = private
            tree = {".gitattributes": repository.put_blob(DEFAULT_GITATTRIBUTES.encode())}
            repository.commit_tree("refs/heads/main", tree, "initial commit", "", "system")
            self._open[kind, repo_id] = repository
            return repository

    def delete(self, repository: Repository) -> None:
        with self.lock, repository.lock:
            del self._open[repository.kind, repository.id]
            (repository.folder / STATE).unlink()  # first, so that a kill leaves no repository without its files
            shutil.rmtree(repository.folder)

    def _folder(self, kind: str, repo_id: str) -> Path:
        namespace, _, name = repo_id.partition("/")
        valid = all(_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in (namespace, name))
        if kind not in KINDS or not valid or name.endswith(".git"):
            raise InvalidRepoId(f"'{repo_id}' is not a valid repository id: use namespace/name")
        return self._repositories / kind / namespace / name
