"""A revision of a repo, resolved to a commit with the list of its files."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import Literal

from requant.tasks.artifact import REWRITTEN, SHA256, File, Manifest, check_relative, digest_of
from requant.tasks.errors import HubError
from requant.tasks.hub.client import hub_api, hub_errors

TIMEOUT_S = 60.0  # seconds without a byte of an answer; huggingface_hub would wait for ever
COMMIT = re.compile(r"[0-9a-f]{40}")
# Other frameworks' copies of the weights. Pickles are never fetched, so that none can be opened.
NOT_FETCHED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data",
    "*.tflite", "*.npz", "*.npy", "*.ot", "*.mlmodel", "consolidated*.safetensors", "original/*", "onnx/*",
)  # fmt: skip


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it: size in bytes, git blob id, and the sha256 of an LFS file."""

    path: str
    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class Revision:
    """A repo at one commit, and who may read it. `left_out`: files whose names no file of ours can have."""

    repo_id: str
    sha: str
    files: tuple[HubFile, ...]
    repo_type: Literal["model", "dataset"] = "model"
    private: bool = False
    gated: Literal["auto", "manual"] | None = None
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.repo_id}@{self.sha}"

    @property
    def wanted(self) -> list[HubFile]:
        """The files that a checkpoint is made of, without other frameworks' weights."""
        return [f for f in self.files if not any(fnmatch.fnmatch(f.path, pattern) for pattern in NOT_FETCHED)]

    @property
    def size(self) -> int:
        """Bytes of the wanted files."""
        return sum(f.size for f in self.wanted)

    def check_names(self) -> None:
        """Raises CheckpointError for wanted files that cannot lie in one folder everywhere (Manifest.of)."""
        Manifest.of(File(f.path, f.size, f.sha256 or f.blob_id) for f in self.wanted)

    @property
    def content(self) -> str:
        """sha256 over what a result depends on: path, size and hash of every wanted file but those REWRITTEN.

        Known from the Hub's list alone. Two commits with one content differ in nothing that matters.
        """
        return digest_of([[f.path, f.size, f.sha256 or f.blob_id] for f in self.wanted if f.path not in REWRITTEN])


def resolve(repo_id: str, revision: str = "main", repo_type: Literal["model", "dataset"] = "model") -> Revision:
    """Ask the Hub for the commit of a branch, tag or commit, and its files, in one request (two for a gated one).

    Raises HubError (no such repo or revision, no access), HubUnavailable, or CheckpointError for a name that leads out
    of the repo. A name with line breaks or other control characters is left out: nothing of a checkpoint has one.
    """
    with hub_errors(repo_id, revision):
        api = hub_api()
        ask = api.dataset_info if repo_type == "dataset" else api.model_info
        info = ask(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        if info.gated:  # its list of files is public, its files are not
            api.auth_check(repo_id, repo_type=repo_type)
    sha = info.sha or ""
    if not COMMIT.fullmatch(sha):
        raise HubError(f"the Hub answers {sha!r} as the commit of {repo_id}@{revision}: that is not a commit")
    files, left_out = [], []
    for sibling in info.siblings or []:
        if not sibling.rfilename.isprintable():
            left_out.append(sibling.rfilename)
            continue
        check_relative(sibling.rfilename)
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        if sha256 is not None and not SHA256.fullmatch(sha256):
            raise HubError(f"the Hub names no sha256 for {sibling.rfilename} of {repo_id}: {sha256!r}")
        files.append(HubFile(sibling.rfilename, sibling.size or 0, sibling.blob_id or "", sha256))
    ordered = tuple(sorted(files, key=lambda f: f.path))
    gated = info.gated or None  # False: open to all
    return Revision(repo_id, sha, ordered, repo_type, bool(info.private), gated, tuple(sorted(left_out)))
