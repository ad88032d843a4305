"""The cache of huggingface_hub, which serves while HF_HUB_OFFLINE switches the Hub off.

It has a folder for each repo: the commits of branches and tags in `refs/`, and in `snapshots/COMMIT/` links to files
whose names are their sha256, or their git blob ids if the Hub does not keep them in LFS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from requant.tasks.artifact import SHA256, check_relative, git_blob_id
from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.errors import CheckpointError

GIT_HASH = re.compile(r"[0-9a-f]{40}")


def known_commit(repo_id: str, revision: str, repo_type: str) -> str | None:
    """Return the commit of a branch or tag as the cache knows it, or None. A commit is returned as it is.

    Raises HFValidationError for what cannot be a repo's name, as `snapshot_folder` does.
    """
    if GIT_HASH.fullmatch(revision):
        return revision
    reference = _repo_folder(repo_id, repo_type) / "refs" / revision
    try:
        check_relative(revision)
        sha = reference.read_text(errors="replace").strip()
    except (OSError, CheckpointError):
        return None
    return sha if GIT_HASH.fullmatch(sha) else None


def snapshot_folder(repo_id: str, sha: str, repo_type: str) -> Path:
    """Return the folder of the cache that has files of a commit, if it has any."""
    return _repo_folder(repo_id, repo_type) / "snapshots" / sha


def snapshot_files(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield the path, size in bytes, and sha256 or git blob id of each file of a snapshot."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():  # A link to a blob that was deleted is none.
            blob = path.resolve().name  # Where links are not possible, it is a copy, and has its own name.
            known = SHA256.fullmatch(blob) or GIT_HASH.fullmatch(blob)
            yield path.relative_to(folder).as_posix(), path.stat().st_size, blob if known else git_blob_id(path)


def missing_shard(folder: Path, paths: Collection[str]) -> str | None:
    """Return a shard that the index names and the snapshot does not have. An index that cannot be read names none."""
    try:
        shards = {str(shard) for shard in json.loads((folder / INDEX).read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return min(shards.difference(paths), default=None)


def _repo_folder(repo_id: str, repo_type: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
