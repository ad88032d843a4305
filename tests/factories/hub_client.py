"""Requests that tests of the Hub stand-in make with the real `huggingface_hub` client."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from infra.dev.hub.launch import HubStandIn

WEIGHTS = os.urandom(300_000)
PART_SIZE = 100_000


def add(path: str, content: bytes = b"content") -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(
    api: HfApi,
    repo: str,
    *operations: CommitOperationAdd | CommitOperationCopy | CommitOperationDelete,
    revision: str = "main",
    parent_commit: str | None = None,
) -> str:
    return api.create_commit(
        repo,
        operations,
        commit_message="A commit",
        revision=revision,
        parent_commit=parent_commit,
    ).oid


def read(api: HfApi, repo: str, path: str, tmp_path: Path, revision: str = "main") -> bytes:
    downloaded = api.hf_hub_download(repo, path, revision=revision, cache_dir=tmp_path / "cache")
    return Path(downloaded).read_bytes()


def status_of(call: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code


def authorized(hub: HubStandIn) -> dict[str, str]:
    return {"Authorization": f"Bearer {hub.token}"}
