"""The cache of huggingface_hub, as it lies on the disk of somebody who has downloaded a repo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from requant.tasks.artifact import git_blob_id, sha256_of

SHA = "0123456789abcdef0123456789abcdef01234567"


def cached_repo(cache: Path, folder: Path, repo_id: str = "a/b", branch: str = "main") -> Path:
    """Put the files of a folder into the cache as the commit SHA of a repo. Return the folder of the snapshot."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / SHA
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        in_lfs = path.suffix == ".safetensors"
        blob = repo / "blobs" / (sha256_of(path) if in_lfs else git_blob_id(path))
        link = snapshot / path.relative_to(folder)
        for made in (blob, link):
            made.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repo / "refs").mkdir()
    (repo / "refs" / branch).write_text(SHA)
    return snapshot


def switch_hub_off(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Set HF_HUB_OFFLINE and the folder of the cache, which huggingface_hub read when it was imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
