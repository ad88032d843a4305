"""All repositories of the stand-in, and who may use them."""

import fcntl
import hashlib
import hmac
import json
import re
import secrets
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.dev.hub.durable import Durable
from infra.dev.hub.gitattributes import DEFAULT_GITATTRIBUTES
from infra.dev.hub.repository import Repository, Settings
from infra.dev.hub.tree import Put, apply

KINDS = ("models", "datasets")
_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


class InvalidRepoId(ValueError):
    """An id that no repository can have."""


class RepoExists(ValueError):
    """A repository of that id is already there."""


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and whether it may write."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class Limits:
    """Sizes that tests make small, to get large-file behaviour from small files."""

    multipart_over: int = 64 * 2**20
    part_size: int = 16 * 2**20
    tree_page: int = 1000


class Hub:
    """The state folder. One process at a time may hold it."""

    def __init__(self, state: Path, limits: Limits | None = None) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._held = (state / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{state} is in use by another stand-in; stop it first") from None
        self.limits = limits or Limits()
        self.durable = Durable(state)
        self.state = state
        self._open: dict[tuple[str, str], Repository] = {}
        self.lock = threading.RLock()
        secret = state / "secret"
        if not secret.exists():
            self.durable.write(secret, secrets.token_bytes(32))
        self._secret = secret.read_bytes()

    def sign(self, *parts: str | int) -> str:
        """A signature for an upload address, which the client uses without a token."""
        message = "\n".join(map(str, parts)).encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    # users

    def users(self) -> dict[str, User]:
        path = self.state / "tokens.json"
        stored = json.loads(path.read_bytes()) if path.exists() else {}
        return {token: User(user["name"], tuple(user["orgs"]), user["role"]) for token, user in stored.items()}

    def add_token(self, token: str, user: User) -> None:
        with self.lock:
            stored = {token: asdict(user) for token, user in {**self.users(), token: user}.items()}
            self.durable.write(self.state / "tokens.json", json.dumps(stored).encode())

    # repositories

    def find(self, kind: str, repo_id: str) -> Repository | None:
        """The repository of that kind and id, if there is one."""
        try:
            folder = self._folder(kind, repo_id)
        except InvalidRepoId:
            return None
        with self.lock:
            if not (folder / "repo.json").exists():
                return None
            repository = Repository(kind, repo_id, folder, self.durable)
            return self._open.setdefault((kind, repo_id), repository)

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> Repository:
        """A new repository with the first commit that the Hub makes: `.gitattributes`."""
        folder = self._folder(kind, repo_id)
        with self.lock:
            if self.find(kind, repo_id):
                raise RepoExists(f"You already created this {kind[:-1]} repo: {repo_id}")
            draft = self.durable.temporary()
            repository = Repository(kind, repo_id, draft, self.durable)
            attributes = repository.put_blob(DEFAULT_GITATTRIBUTES.encode())
            tree = apply({}, [Put(".gitattributes", attributes)])
            commit = repository.store_commit((), tree, "initial commit", "", "system")
            repository.create_ref("refs/heads/main", commit.id)
            settings = json.dumps(asdict(Settings(private=private))).encode()
            self.durable.write(draft / "repo.json", settings)
            self.durable.publish_folder(draft, folder)
            repository = Repository(kind, repo_id, folder, self.durable)
            self._open[kind, repo_id] = repository
            return repository

    def delete(self, repository: Repository) -> None:
        with self.lock, repository.lock:
            self._open.pop((repository.kind, repository.id), None)
            self.durable.remove(repository.folder)

    def _folder(self, kind: str, repo_id: str) -> Path:
        namespace, _, name = repo_id.partition("/")
        valid = all(_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in (namespace, name))
        if kind not in KINDS or not valid or name.endswith(".git"):
            raise InvalidRepoId(f"'{repo_id}' is not a valid repository id: use namespace/name")
        return self.state / "repos" / kind / namespace / name
