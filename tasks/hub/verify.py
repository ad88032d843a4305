"""Is a published repo what its `requant.json` claims? From listings, headers and small files, or from every byte."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.artifact import RELEASE
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable
from requant.tasks.hub.manifest import ReleaseManifest, read_release
from requant.tasks.hub.revision import HubFile, Revision, resolve
from requant.tasks.hub.sparse_checkout import create_checkout, stream

log = logging.getLogger(__name__)

PARALLEL_DOWNLOADS = 4


@dataclass(frozen=True)
class ReleaseCheck:
    """What was looked at, and what is wrong with it. `release`: the tag that the manifest stands for."""

    commit: str
    release: str | None
    files: int
    problems: list[str]


def verify_release(repo_id: str, revision: str = "main", *, deep: bool = False) -> ReleaseCheck:
    """Compare a repo with its manifest: the Hub's sizes and hashes, no file too few or too many, gates that passed, and
    an index and safetensors headers that agree with each other and with the files' sizes.

    `deep` fetches every file and hashes it, a piece at a time: 18 GB are read, none are kept.
    Raises HubError where there is no such repo, HubUnavailable.
    """
    there = resolve(repo_id, revision)
    try:
        claimed = read_release(there)
    except HubUnavailable:
        raise
    except HubError as error:
        return ReleaseCheck(there.sha, None, 0, [str(error)])
    if claimed is None:
        return ReleaseCheck(there.sha, None, 0, [f"{repo_id} has no {RELEASE}: Requant did not publish it"])
    problems = claimed.differences(there)
    problems += [f"the gate {shown(name)} was not passed" for name in claimed.failed_gates]
    problems += _structure(there)
    if deep:
        problems += _bytes(there, claimed)
    return ReleaseCheck(there.sha, claimed.tag, len(claimed.files), problems)


def _structure(there: Revision) -> list[str]:
    """What index, headers and sizes say against each other."""
    with tempfile.TemporaryDirectory(prefix="requant-") as folder:
        try:
            return list(Checkpoint.open(create_checkout(there, Path(folder))).problems)
        except CheckpointError as error:
            return [str(error).replace(f"{folder}/", "").replace(folder, there.name)]


def _bytes(there: Revision, claimed: ReleaseManifest) -> list[str]:
    """Hash what the Hub sends of each file that is there and claimed."""

    def check(file: HubFile) -> str | None:
        hasher = hashlib.sha256()
        for piece in stream(there, file.path, 0, file.size) if file.size else ():  # an empty file has no range
            hasher.update(piece)
        log.info(f"read {shown(file.path)}, {file.size:,} bytes")
        if hasher.hexdigest() == claimed.files[file.path].sha256:
            return None
        return f"the bytes of {shown(file.path)} are not those that {RELEASE} names (sha256 {hasher.hexdigest()[:12]})"

    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        return [problem for problem in pool.map(check, (f for f in there.files if f.path in claimed.files)) if problem]
