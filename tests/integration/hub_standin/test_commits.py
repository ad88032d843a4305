"""Commits, branches and tags on the Hub stand-in, and the large files of commits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from infra.dev.hub.launch import HubStandIn
from tests.factories.hub_client import PART_SIZE, WEIGHTS, add, authorized, commit, read, status_of


def test_a_folder_is_uploaded_in_one_commit_and_only_once(
    hub: HubStandIn, api: HfApi, repo: str, folder: Path, tmp_path: Path
) -> None:
    uploaded = api.upload_folder(repo_id=repo, folder_path=folder)
    snapshot = Path(api.snapshot_download(repo, cache_dir=tmp_path / "cache"))
    assert snapshot.name == uploaded.oid
    for path in folder.rglob("*"):
        if path.is_file():
            assert (snapshot / path.relative_to(folder)).read_bytes() == path.read_bytes()
    hub.reset_traffic()
    assert api.upload_folder(repo_id=repo, folder_path=folder).oid == uploaded.oid
    assert not [exchange for exchange in hub.traffic() if exchange["method"] == "PUT"]
    assert len(api.list_repo_commits(repo)) == 2


def test_large_files_travel_in_parts(hub: HubStandIn, api: HfApi, repo: str) -> None:
    commit(api, repo, add("model.safetensors", WEIGHTS), add("small.bin", b"small"))
    sizes = [exchange["bytes_in"] for exchange in hub.traffic() if exchange["method"] == "PUT"]
    assert sorted(sizes) == [5, PART_SIZE, PART_SIZE, PART_SIZE]
    found = api.get_paths_info(repo, ["model.safetensors"])
    assert isinstance(found[0], RepoFile)
    assert found[0].lfs is not None
    assert found[0].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_files_that_were_uploaded_ahead_are_only_named_in_the_commit(
    hub: HubStandIn, api: HfApi, repo: str, tmp_path: Path
) -> None:
    operation = add("model.safetensors", WEIGHTS)
    api.preupload_lfs_files(repo, [operation])
    assert operation.path_or_fileobj == b""
    assert "model.safetensors" not in api.list_repo_files(repo)
    hub.reset_traffic()
    commit(api, repo, operation)
    assert sum(exchange["bytes_in"] for exchange in hub.traffic()) < 1000
    assert read(api, repo, "model.safetensors", tmp_path) == WEIGHTS


def test_a_body_that_is_not_what_it_was_announced_as_is_refused(hub: HubStandIn, repo: str) -> None:
    oid = hashlib.sha256(b"right").hexdigest()
    with httpx.Client(base_url=hub.url, headers=authorized(hub)) as client:
        body = {"transfers": ["basic"], "objects": [{"oid": oid, "size": 5}]}
        answer = client.post(f"/{repo}.git/info/lfs/objects/batch", json=body).json()
        upload = answer["objects"][0]["actions"]["upload"]["href"]
        assert client.put(upload, content=b"wrong").status_code == 400
        assert client.put(upload, content=b"right, but longer").status_code == 400
        assert client.put(upload.replace("size=5", "size=6"), content=b"right").status_code == 403
        value = {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 5}
        lines = [
            {"key": "header", "value": {"summary": "x"}},
            {"key": "lfsFile", "value": value},
        ]
        content = "\n".join(map(json.dumps, lines))
        address = f"/api/models/{repo}/commit/main"
        assert client.post(address, content=content).status_code == 400
        assert client.put(upload, content=b"right").status_code == 200
        assert client.post(address, content=content).status_code == 200


def test_a_commit_on_a_stale_parent_is_refused(api: HfApi, repo: str) -> None:
    parent = api.model_info(repo).sha
    first = commit(api, repo, add("a"), parent_commit=parent)
    assert status_of(lambda: commit(api, repo, add("b"), parent_commit=parent)) == 412
    commit(api, repo, add("b"), parent_commit=first)
    assert len(api.list_repo_commits(repo)) == 3


def test_files_and_folders_are_deleted(api: HfApi, repo: str) -> None:
    commit(api, repo, add("a/x"), add("a/y"), add("b"))
    commit(api, repo, CommitOperationDelete("a/"), CommitOperationDelete("b"), add("a/z"))
    assert api.list_repo_files(repo) == [".gitattributes", "a/z"]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        commit(api, repo, CommitOperationDelete("b"))
    assert status_of(lambda: commit(api, repo, add("a"))) == 400


def test_files_are_copied_from_a_branch_without_moving_their_bytes(
    hub: HubStandIn, api: HfApi, repo: str, tmp_path: Path
) -> None:
    api.create_branch(repo, branch="staging/v1")
    operations = [add("model.safetensors", WEIGHTS), add("config.json", b"{}")]
    commit(api, repo, *operations, revision="staging/v1")
    hub.reset_traffic()
    copies = [
        CommitOperationCopy(path, path, src_revision="staging/v1") for path in ("model.safetensors", "config.json")
    ]
    head = commit(api, repo, *copies)
    assert sum(exchange["bytes_in"] for exchange in hub.traffic()) < 2000
    assert read(api, repo, "model.safetensors", tmp_path, head) == WEIGHTS
    assert read(api, repo, "config.json", tmp_path, head) == b"{}"


def test_branches_and_tags_are_created_once_and_deleted(api: HfApi, repo: str) -> None:
    first = commit(api, repo, add("a"))
    second = commit(api, repo, add("b"))
    api.create_branch(repo, branch="release/1.0", revision=first)
    api.create_tag(repo, tag="v1/final", revision="release/1.0", tag_message="The first")
    refs = api.list_repo_refs(repo)
    branches = {branch.name: branch.target_commit for branch in refs.branches}
    assert branches == {"main": second, "release/1.0": first}
    assert [(tag.ref, tag.target_commit) for tag in refs.tags] == [("refs/tags/v1/final", first)]
    assert api.list_repo_files(repo, revision="v1/final") == [".gitattributes", "a"]
    assert status_of(lambda: api.create_branch(repo, branch="release/1.0")) == 409
    assert status_of(lambda: api.create_tag(repo, tag="v1/final")) == 409
    api.create_tag(repo, tag="v1/final", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(repo, branch="x", revision="missing")
    with pytest.raises(RevisionNotFoundError):
        commit(api, repo, add("c"), revision="v1/final")
    api.delete_tag(repo, tag="v1/final")
    api.delete_branch(repo, branch="release/1.0")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(repo, tag="v1/final")
    assert status_of(lambda: api.delete_branch(repo, branch="main")) == 403
    assert [branch.name for branch in api.list_repo_refs(repo).branches] == ["main"]
