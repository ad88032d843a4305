"""A revision of a repo, resolved to a commit with the list of its files."""

from __future__ import annotations

import fnmatch
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import is_offline_mode

from requant.tasks.artifact import REWRITTEN, SHA256, File, Manifest, check_relative, digest_of
from requant.tasks.errors import HubError, RequantError
from requant.tasks.hub.cached import GIT_HASH, known_commit, missing_shard, snapshot_files, snapshot_folder
from requant.tasks.hub.client import hub_api, hub_errors, offline_variable, switched_off

log = logging.getLogger(__name__)
COMMIT = GIT_HASH
TIMEOUT_S = 60.0  # between two bytes of an answer; huggingface_hub sets no limit
# Weights for other frameworks. Pickles are never downloaded, so that none can be opened.
NOT_FETCHED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data",
    "*.tflite", "*.npz", "*.npy", "*.ot", "*.mlmodel", "consolidated*.safetensors", "original/*", "onnx/*",
)  # fmt: skip


@dataclass(frozen=True)
class HubFile:
    """A file in the Hub's listing: size in bytes, git blob id, and the sha256 if it is in LFS."""

    path: str
    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class Revision:
    """A repo at one commit, and who may read it. `left_out` are files with control characters in their names.

    A base in a folder is one too: `repo_id` is the folder's name, and `sha` 40 digits of a digest of its files, or
    empty while they are not all hashed. Nobody but the recipe says who may read it.
    """

    repo_id: str
    sha: str
    files: tuple[HubFile, ...]
    repo_type: Literal["model", "dataset"] = "model"
    private: bool = False
    gated: Literal["auto", "manual"] | None = None
    left_out: tuple[str, ...] = ()
    folder: Path | None = None  # where its files lie on this machine; None: on the Hub
    is_local: bool = False  # a base in a folder of the user, not in huggingface_hub's cache
    adapter: Revision | None = None  # the LoRA adapter that is merged into it
    license: object = None  # what the Hub says that the card names as license; of files in `folder` it is not asked

    @property
    def name(self) -> str:
        return f"{self.repo_id}@{self.sha}"

    @property
    def wanted(self) -> list[HubFile]:
        """The files without those in NOT_FETCHED."""
        return [f for f in self.files if not any(fnmatch.fnmatch(f.path, pattern) for pattern in NOT_FETCHED)]

    @property
    def size(self) -> int:
        """Bytes of the wanted files."""
        return sum(f.size for f in self.wanted)

    def check_names(self) -> None:
        """Raise CheckpointError if the wanted files cannot lie in one folder of every file system (`Manifest.of`)."""
        Manifest.of(File(f.path, f.size, f.sha256 or f.blob_id) for f in self.wanted)

    @property
    def content(self) -> str:
        """A sha256 over path, size and hash of the wanted files without REWRITTEN, from the Hub's listing alone.

        The adapter's files count too. Two commits with the same content lead to the same result.
        """
        own = digest_of([[f.path, f.size, f.sha256 or f.blob_id] for f in self.wanted if f.path not in REWRITTEN])
        return own if self.adapter is None else digest_of([own, self.adapter.content])

    @property
    def commits(self) -> str:
        """The commit, and that of the adapter behind it if there is one."""
        return self.sha if self.adapter is None else f"{self.sha}+{self.adapter.sha}"

    @property
    def model_name(self) -> str:
        """The name of the model: the repo, with that of the adapter that makes another of it."""
        return self.repo_id if self.adapter is None else f"{self.repo_id} with the adapter {self.adapter.repo_id}"

    @property
    def is_restricted(self) -> bool:
        """Whether a new repo made of it should be private: it or its adapter is, or lies in somebody's folder."""
        restricted = self.private or self.is_local
        return restricted or (self.adapter is not None and self.adapter.is_restricted)


def split_name(name: str) -> tuple[str, str]:
    """Split `repo_id[@revision]` into repo and revision, which is `main` by default."""
    repo_id, _, revision = name.partition("@")
    return repo_id, revision or "main"


def check_checkpoint_name(name: str) -> None:
    """Raise RequantError for what a user gave where a folder could stand, if it cannot be `repo_id[@revision]`."""
    if name.startswith((".", "/", "~")) or split_name(name)[0].count("/") > 1:
        raise RequantError(f"{name} is not a folder: name a checkpoint's folder, or repo_id[@revision]")


def resolve_name(name: str) -> Revision:
    """Resolve `repo_id[@revision]`, which a user gave where a folder could stand, to a commit.

    Raises RequantError for what cannot be a repo's name, otherwise as `find_revision`.
    """
    check_checkpoint_name(name)
    return find_revision(*split_name(name))


def check_repo_id(name: str) -> str:
    """Return a repo's name as it is. Raises RequantError for what cannot be one."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise RequantError(f"{name} is not a repo on the Hub: name it as owner/name")
    return name


def find_revision(repo_id: str, revision: str = "main", repo_type: Literal["model", "dataset"] = "model") -> Revision:
    """Resolve a repo that is only read: on the Hub, or in huggingface_hub's cache while HF_HUB_OFFLINE is set.

    Raises what `resolve` raises, and HubError for a repo or revision that the cache does not have.
    """
    find = _resolve_in_cache if is_offline_mode() else resolve
    return find(repo_id, revision, repo_type)


def resolve(repo_id: str, revision: str = "main", repo_type: Literal["model", "dataset"] = "model") -> Revision:
    """Ask the Hub for the commit of a branch, tag or commit, and its files, in one request (two for a gated repo).

    Raises HubError (no such repo or revision, no access), HubUnavailable, or CheckpointError for a file name that leads
    out of the repo. Names with control characters are left out, as no file of a checkpoint has one.
    """
    with hub_errors(repo_id, revision):
        api = hub_api()
        ask = api.dataset_info if repo_type == "dataset" else api.model_info
        info = ask(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        if info.gated:  # anyone may list the files of a gated repo
            api.auth_check(repo_id, repo_type=repo_type)
    sha = info.sha or ""
    if not COMMIT.fullmatch(sha):
        raise HubError(
            f"the Hub answers {sha!r} as the commit of {repo_id}@{revision}: that is not a commit", repo_id=repo_id
        )
    files, left_out = [], []
    for sibling in info.siblings or []:
        if not sibling.rfilename.isprintable():
            left_out.append(sibling.rfilename)
            continue
        check_relative(sibling.rfilename)
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        if sha256 is not None and not SHA256.fullmatch(sha256):
            raise HubError(f"the Hub names no sha256 for {sibling.rfilename} of {repo_id}: {sha256!r}", repo_id=repo_id)
        files.append(HubFile(sibling.rfilename, sibling.size or 0, sibling.blob_id or "", sha256))
    ordered = tuple(sorted(files, key=lambda f: f.path))
    gated = info.gated or None  # the Hub answers False for a repo that is not gated
    named = getattr(info.card_data, "license", None) or ""
    skipped = tuple(sorted(left_out))
    return Revision(repo_id, sha, ordered, repo_type, bool(info.private), gated, skipped, license=named)


def _resolve_in_cache(repo_id: str, revision: str, repo_type: Literal["model", "dataset"]) -> Revision:
    """Return a revision with the files that the cache has of it, which need not be all files of the commit.

    Raises HubError if it has none, or not all shards of a model's weights.
    """
    with hub_errors(repo_id, revision):
        sha = known_commit(repo_id, revision, repo_type)
        folder = snapshot_folder(repo_id, sha or "unknown", repo_type)
    files = []
    for path, size, digest in snapshot_files(folder):
        check_relative(path)
        is_sha256 = SHA256.fullmatch(digest) is not None
        files.append(HubFile(path, size, "" if is_sha256 else digest, digest if is_sha256 else None))
    if sha is None or not files:
        raise HubError(switched_off(f"{repo_id}@{revision}"), repo_id=repo_id)
    paths = {file.path for file in files}
    missing = missing_shard(folder, paths)
    if missing is None and repo_type == "model" and not any(map(_is_weights, paths)):
        missing = "its weights"
    if missing is not None:
        raise HubError(
            f"the cache of huggingface_hub has {repo_id}@{sha} without {missing}, and {offline_variable()} switches "
            "the Hub off: unset it to download the rest",
            repo_id=repo_id,
        )
    log.info(f"{offline_variable()}: {repo_id}@{revision} is {sha} in the cache of huggingface_hub")
    return Revision(repo_id, sha, tuple(files), repo_type, folder=folder)


def _is_weights(path: str) -> bool:
    """Check by its name whether a file holds weights, for whatever framework."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in ("*.safetensors", *NOT_FETCHED))
