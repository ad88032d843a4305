"""What a revision on the Hub stand-in holds: files, hashes, trees, ranges."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi, RepoFile, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from infra.dev.hub.launch import HubStandIn
from tests.factories.hub_client import WEIGHTS, add, commit, read


def test_info_lists_every_file_with_its_hashes(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    head = hub.seed("base/info", folder)
    info = api.model_info("base/info", files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    weights, config = files["model.safetensors"], files["config.json"]
    assert info.sha == head
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.size == len(WEIGHTS)
    content = (folder / "config.json").read_bytes()
    assert config.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert config.lfs is None
    assert files["sub/empty.bin"].lfs is None
    assert info.card_data is not None
    assert info.card_data.license == "mit"


def test_a_tree_is_listed_over_several_pages(api: HfApi, repo: str) -> None:
    commit(api, repo, *[add(f"a/{number}/x.txt") for number in range(7)])
    rows = list(api.list_repo_tree(repo, recursive=True))
    assert len(rows) == 1 + 7 + 8
    assert [row.path for row in api.list_repo_tree(repo)] == [".gitattributes", "a"]
    assert len(list(api.list_repo_tree(repo, "a"))) == 7
    assert [row.path for row in api.list_repo_tree(repo, "a/3")] == ["a/3/x.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "b"))


def test_paths_info_describes_the_paths_that_exist(api: HfApi, repo: str) -> None:
    commit(api, repo, add("a/x.bin", b"12"), add("b ü&.txt"))
    found = api.get_paths_info(repo, ["a/x.bin", "b ü&.txt", "a", "missing"])
    assert [row.path for row in found] == ["a/x.bin", "b ü&.txt", "a"]
    assert isinstance(found[0], RepoFile)
    assert found[0].lfs is not None
    assert found[0].lfs.sha256 == hashlib.sha256(b"12").hexdigest()


def test_what_is_not_there_is_told_apart(api: HfApi, repo: str, tmp_path: Path) -> None:
    with pytest.raises(EntryNotFoundError):
        read(api, repo, "missing", tmp_path)
    with pytest.raises(RevisionNotFoundError):
        read(api, repo, ".gitattributes", tmp_path, revision="missing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="0" * 40)
    assert not api.file_exists(repo, "missing")
    assert not api.revision_exists(repo, "missing")


def test_the_head_of_a_file_says_what_it_is(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    head = hub.seed("base/head", folder)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    url = hf_hub_url("base/head", "model.safetensors", endpoint=hub.url)
    metadata = get_hf_file_metadata(url, token=hub.token, endpoint=hub.url)
    assert (metadata.commit_hash, metadata.etag, metadata.size) == (head, sha256, len(WEIGHTS))
    answer = httpx.head(url)
    assert answer.headers["X-Linked-Etag"] == f'"{sha256}"'
    assert answer.headers["Content-Length"] == answer.headers["X-Linked-Size"] == "300000"


def test_ranges_of_a_file_are_served(hub: HubStandIn, folder: Path) -> None:
    hub.seed("base/range", folder)
    url = hf_hub_url("base/range", "model.safetensors", endpoint=hub.url)
    for header, expected in (
        ("bytes=0-9", WEIGHTS[:10]),
        ("bytes=299990-", WEIGHTS[-10:]),
        ("bytes=-10", WEIGHTS[-10:]),
    ):
        answer = httpx.get(url, headers={"Range": header})
        assert (answer.status_code, answer.content) == (206, expected)
        assert answer.headers["Content-Range"].endswith("/300000")
    assert httpx.get(url, headers={"Range": "bytes=300000-"}).status_code == 416


def test_a_safetensors_header_is_read_without_the_tensors(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    header = {"weight": {"dtype": "F32", "shape": [100_000], "data_offsets": [0, 400_000]}}
    encoded = json.dumps(header).encode()
    path = tmp_path / "folder" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(400_000))
    hub.seed("base/header", path.parent)
    metadata = api.get_safetensors_metadata("base/header")
    assert metadata.parameter_count == {"F32": 100_000}
    assert sum(exchange["bytes_out"] for exchange in hub.traffic()) < 110_000
