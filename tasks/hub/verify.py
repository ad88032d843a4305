"""Check that a published repo has what its `requant.json` claims: by listings and headers, or by every byte."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import Field

from requant.tasks.artifact import RELEASE, sha256_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.untrusted import shown, without_folder
from requant.tasks.documents import Document
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable
from requant.tasks.hub.manifest import ReleaseManifest, read_release
from requant.tasks.hub.revision import HubFile, Revision, resolve
from requant.tasks.hub.sparse_checkout import create_checkout, stream
from requant.tasks.progress import Bar, progress

log = logging.getLogger(__name__)

PARALLEL_DOWNLOADS = PARALLEL_READS = 4


class ReleaseCheck(Document):
    """The document of `requant verify --json`."""

    repo_id: str = Field(description="The repo, or the folder")
    deep: bool = Field(description="Whether every byte was read")
    commit: str | None = Field(description="The commit that was read; null for a folder")
    release: str | None = Field(None, description="The tag of the release; null if the repo has none")
    files: int = Field(0, description="How many files the release claims")
    problems: list[str] = Field(description="What is not as the manifest claims, in sentences")


def verify_release(repo_id: str, revision: str = "main", *, deep: bool = False) -> ReleaseCheck:
    """Compare a repo with its manifest: the paths, sizes and hashes of all files, and the gates.

    Also compare the index and the safetensors headers with each other and with the files' sizes. With `deep`, download
    and hash every file, without storing it. Raises HubError if there is no such repo, or HubUnavailable.
    """
    return _check_release(resolve(repo_id, revision), deep=deep)


def verify_folder(folder: Path) -> ReleaseCheck:
    """Compare a folder to which a release was downloaded with its manifest. Every byte is read.

    Files and folders whose names begin with a dot are passed over, as `hf download` keeps notes in one. Raises
    CheckpointError for a file that cannot be read.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    try:
        sizes = [path.stat().st_size for path in paths]
        hashes = []
        with progress("verify", sum(sizes), "bytes") as bar, ThreadPoolExecutor(PARALLEL_READS) as pool:
            for size, sha256 in zip(sizes, pool.map(sha256_of, paths), strict=True):
                hashes.append(sha256)
                bar.advance(size)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}): allow it") from error
    names = [path.relative_to(folder).as_posix() for path in paths]
    files = (HubFile(name, size, "", sha256) for name, size, sha256 in zip(names, sizes, hashes, strict=True))
    return _check_release(Revision(str(folder), "", tuple(files), folder=folder, is_local=True), deep=True)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_release(resolved: Revision, *, deep: bool) -> ReleaseCheck:
    repo_id = resolved.repo_id

    def check(problems: Sequence[str], claimed: ReleaseManifest | None = None) -> ReleaseCheck:
        release, files = (claimed.tag, len(claimed.files)) if claimed else (None, 0)
        return ReleaseCheck(
            repo_id=repo_id,
            deep=deep,
            commit=resolved.sha or None,
            release=release,
            files=files,
            problems=list(problems),
        )

    try:
        claimed = read_release(resolved)
    except HubUnavailable:
        raise
    except HubError as error:
        return check([str(error)])
    if claimed is None:
        return check([f"{repo_id} has no {RELEASE}: Requant did not publish it"])
    problems = claimed.differences(resolved)
    problems += [f"the gate {shown(name)} was not passed" for name in claimed.failed_gates]
    problems += _check_structure(resolved)
    if deep and not resolved.is_local:  # The listing of a folder has the hashes of its bytes.
        problems += _check_bytes(resolved, claimed)
    return check(problems, claimed)


def _check_structure(revision: Revision) -> list[str]:
    """Return the contradictions between index, headers and sizes."""
    if revision.folder is not None:
        try:
            return list(Checkpoint.open(revision.folder).problems)
        except CheckpointError as error:
            return [str(error)]
    with tempfile.TemporaryDirectory(prefix="requant-") as folder:
        try:
            return list(Checkpoint.open(create_checkout(revision, Path(folder))).problems)
        except CheckpointError as error:
            return [without_folder(str(error), Path(folder), revision.name)]


def _check_bytes(revision: Revision, claimed: ReleaseManifest) -> list[str]:
    """Download and hash the files that the manifest lists. Return a sentence for each wrong hash."""

    files = [file for file in revision.files if file.path in claimed.files]

    def check(bar: Bar, file: HubFile) -> str | None:
        hasher = hashlib.sha256()
        for chunk in stream(revision, file.path, 0, file.size) if file.size else ():  # an empty file has no range
            hasher.update(chunk)
            bar.advance(len(chunk))
        log.info(f"read {shown(file.path)}, {file.size:,} bytes")
        if hasher.hexdigest() == claimed.files[file.path].sha256:
            return None
        return f"the bytes of {shown(file.path)} are not those that {RELEASE} names (sha256 {hasher.hexdigest()[:12]})"

    size_bytes = sum(file.size for file in files)
    with progress("verify", size_bytes, "bytes") as bar, ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        return [problem for problem in pool.map(lambda file: check(bar, file), files) if problem]
