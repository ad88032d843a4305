"""The Hub stand-in, driven by the real `huggingface_hub` client."""

import asyncio
import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from infra.hub.app import create_app
from infra.hub.hub import Hub
from infra.hub.launch import HubStandIn

WEIGHTS = os.urandom(300_000)
PART_SIZE = 100_000
MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client reads from the environment when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def running_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    state = tmp_path_factory.mktemp("hub")
    with HubStandIn(
        state,
        tokens={"hf_other": "other"},
        multipart_over=2 * PART_SIZE,
        part_size=PART_SIZE,
        tree_page=5,
    ) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: HubStandIn) -> HubStandIn:
    running_hub.clear_faults()
    running_hub.reset_traffic()
    return running_hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def anonymous(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def other(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_other")


@pytest.fixture
def repo(api: HfApi, request: pytest.FixtureRequest) -> str:
    """An empty repository of this test's own."""
    digest = hashlib.sha1(request.node.name.encode()).hexdigest()
    return api.create_repo(f"me/{digest}").repo_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint."""
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "sub" / "empty.bin").touch()
    return folder


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


# repositories and who may use them


def test_whoami_names_the_owner_of_the_token(hub: HubStandIn, api: HfApi) -> None:
    hub.add_token("hf_member", "member", orgs=["lab"], role="read")
    assert api.whoami()["name"] == "me"
    member = api.whoami(token="hf_member")
    assert [org["name"] for org in member["orgs"]] == ["lab"]
    assert member["auth"]["accessToken"]["role"] == "read"


def test_another_process_takes_it_for_the_hub(hub: HubStandIn) -> None:
    script = "import huggingface_hub; print(huggingface_hub.whoami()['name'])"
    environment = {**os.environ, **hub.env}
    answer = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert answer == "me\n"


def test_a_new_repo_holds_gitattributes_and_is_created_once(api: HfApi) -> None:
    url = api.create_repo("fresh")
    assert url.repo_id == "me/fresh"
    assert api.list_repo_files("me/fresh") == [".gitattributes"]
    assert api.create_repo("me/fresh", exist_ok=True) == url
    assert status_of(lambda: api.create_repo("me/fresh")) == 409


def test_a_deleted_repo_is_gone(api: HfApi, repo: str) -> None:
    assert api.repo_exists(repo)
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)


def test_an_unknown_repo_is_not_found_by_anybody(api: HfApi, anonymous: HfApi) -> None:
    for caller, status in ((api, 404), (anonymous, 401)):
        for repo_id in ("me/nothing", "nothing"):
            with pytest.raises(RepositoryNotFoundError):
                caller.hf_hub_download(repo_id, "config.json")
        with pytest.raises(RepositoryNotFoundError) as caught:
            caller.model_info("me/nothing")
        assert caught.value.response.status_code == status


def test_a_wrong_token_is_refused_even_for_a_public_repo(hub: HubStandIn, repo: str) -> None:
    wrong = HfApi(endpoint=hub.url, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        wrong.model_info(repo)
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_only_the_owner_writes(hub: HubStandIn, repo: str, anonymous: HfApi, other: HfApi) -> None:
    hub.add_token("hf_reader", "me", role="read")
    reader = HfApi(endpoint=hub.url, token="hf_reader")
    assert status_of(lambda: commit(anonymous, repo, add("a"))) == 401
    assert status_of(lambda: commit(other, repo, add("a"))) == 403
    assert status_of(lambda: commit(reader, repo, add("a"))) == 403
    assert status_of(lambda: other.create_repo("me/theirs")) == 403
    assert status_of(lambda: other.delete_repo(repo)) == 403


def test_a_private_repo_exists_for_its_owner_only(api: HfApi, repo: str, anonymous: HfApi, other: HfApi) -> None:
    api.update_repo_settings(repo, private=True)
    assert api.model_info(repo).private
    for stranger in (anonymous, other):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info(repo)
        with pytest.raises(RepositoryNotFoundError):
            stranger.hf_hub_download(repo, ".gitattributes")
    api.update_repo_settings(repo, private=False)
    assert anonymous.model_info(repo).private is False


def test_a_gated_repo_shows_its_info_but_not_its_files(
    hub: HubStandIn, repo: str, api: HfApi, anonymous: HfApi, other: HfApi, tmp_path: Path
) -> None:
    hub.set_repo(repo, gated=True)
    for stranger, status in ((anonymous, 401), (other, 403)):
        assert stranger.model_info(repo).gated == "manual"
        with pytest.raises(GatedRepoError) as caught:
            stranger.hf_hub_download(repo, ".gitattributes")
        assert caught.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            stranger.auth_check(repo)
    hub.set_repo(repo, granted=["other"])
    assert read(other, repo, ".gitattributes", tmp_path)
    hub.set_repo(repo, gated=False)
    anonymous.auth_check(repo)


def test_a_dataset_and_a_model_of_one_name_are_two_repos(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("me/both")
    api.create_repo("me/both", repo_type="dataset")
    operations = [add("data.parquet", b"rows")]
    api.create_commit("me/both", operations, commit_message="Rows", repo_type="dataset")
    assert "data.parquet" in api.list_repo_files("me/both", repo_type="dataset")
    assert "data.parquet" not in api.list_repo_files("me/both")
    downloaded = api.hf_hub_download("me/both", "data.parquet", repo_type="dataset", cache_dir=tmp_path)
    assert Path(downloaded).read_bytes() == b"rows"


def test_a_card_must_hold_a_mapping_and_should_name_a_license(api: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit(api, repo, add("README.md", b"---\n- no\n- mapping\n---\n"))
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit(api, repo, add("README.md", b"---\na: [1\n---\n"))
    with pytest.warns(UserWarning, match="license"):
        commit(api, repo, add("README.md", b"---\r\ntags: [tiny]\r\n---\r\n# Tiny"))
    assert api.model_info(repo).tags == ["tiny"]


def test_paths_that_leave_the_repo_are_refused(hub: HubStandIn, repo: str) -> None:
    addresses = [
        f"{repo}/resolve/main/..%2F..%2Frepo.json",
        f"{repo}/resolve/..%2F..%2Frepo.json/x",
        f"{repo}/resolve/refs%2Fpr%2F/x",
        f"{repo}/resolve/refs%2Fpr%2F..%2F..%2Frepo.json/x",
        "me%2F..%2F..%2Fme/x/resolve/main/x",
        f"api/models/{repo}/tree/main/..%2F..",
        "api/models/..%2F..%2F/x",
    ]
    with httpx.Client(base_url=hub.url, headers=authorized(hub)) as client:
        for address in addresses:
            assert client.get(f"/{address}").status_code == 404, address
        for path in ("../x", "/x", "a//b", "a/./b", ".git/config", "a\\b", ""):
            lines = [
                {"key": "header", "value": {"summary": "x"}},
                {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}},
            ]
            body = "\n".join(map(json.dumps, lines))
            answer = client.post(f"/api/models/{repo}/commit/main", content=body)
            assert answer.status_code == 400, path
        for oid in ("../../../repo.json", "x", ""):
            wanted = {"objects": [{"oid": oid, "size": 1}]}
            answer = client.post(f"/{repo}.git/info/lfs/objects/batch", json=wanted)
            assert answer.json()["objects"][0]["error"]["code"] == 422, oid
        for tag in ("", "../x", "a..b", "/a", "a b", "x.lock", "-x", "refs/../.."):
            answer = client.post(f"/api/models/{repo}/tag/main", json={"tag": tag})
            assert answer.status_code == 400, tag


# what a revision holds


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


def test_an_expanded_tree_says_which_commit_changed_a_file_last(api: HfApi, repo: str) -> None:
    first = commit(api, repo, add("a/x"), add("b"))
    second = commit(api, repo, add("a/y"))
    rows = api.list_repo_tree(repo, recursive=True, expand=True)
    last = {row.path: row.last_commit.oid for row in rows if row.last_commit}
    assert (last["a/x"], last["b"], last["a/y"], last["a"]) == (first, first, second, second)


def test_paths_info_describes_the_paths_that_exist(api: HfApi, repo: str) -> None:
    commit(api, repo, add("a/x.bin", b"12"), add("b ü&.txt"))
    found = api.get_paths_info(repo, ["a/x.bin", "b ü&.txt", "a", "missing"], expand=True)
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


# commits


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


# pull requests


def test_a_pull_request_is_merged_in_one_commit(api: HfApi, other: HfApi, repo: str) -> None:
    opened = other.create_commit(repo, [add("a")], commit_message="Add a", create_pr=True)
    assert opened.pr_num == 1
    commit(api, repo, add("b"), revision="refs/pr/1")
    commit(api, repo, add("c"))
    assert api.list_repo_files(repo) == [".gitattributes", "c"]
    assert [discussion.title for discussion in api.get_repo_discussions(repo)] == ["Add a"]
    assert "b/a\n" in (api.get_discussion_details(repo, 1).diff or "")
    api.merge_pull_request(repo, 1)
    assert api.list_repo_files(repo) == [".gitattributes", "a", "b", "c"]
    commits = api.list_repo_commits(repo)
    assert len(commits) == 3
    details = api.get_discussion_details(repo, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", commits[0].commit_id)
    assert status_of(lambda: api.merge_pull_request(repo, 1)) == 400


def test_a_pull_request_in_conflict_is_not_merged(api: HfApi, repo: str) -> None:
    number = api.create_commit(repo, [add("a", b"theirs")], commit_message="x", create_pr=True).pr_num
    assert number is not None
    commit(api, repo, add("a", b"ours"))
    assert api.get_discussion_details(repo, number).conflicting_files == ["a"]
    assert status_of(lambda: api.merge_pull_request(repo, number)) == 409


def test_a_draft_is_opened_before_it_is_merged(api: HfApi, repo: str) -> None:
    draft = api.create_pull_request(repo, title="New weights")
    assert (draft.status, draft.git_reference) == ("draft", "refs/pr/1")
    commit(api, repo, add("model.safetensors", WEIGHTS), revision="refs/pr/1")
    assert status_of(lambda: api.merge_pull_request(repo, draft.num)) == 400
    api.change_discussion_status(repo, draft.num, new_status="open")
    api.merge_pull_request(repo, draft.num)
    assert "model.safetensors" in api.list_repo_files(repo)


# faults


def test_a_download_that_is_cut_twice_resumes_where_it_was(
    hub: HubStandIn, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    weights = os.urandom(32 * MEBIBYTE)
    (folder / "model.safetensors").write_bytes(weights)
    hub.seed("base/cut", folder)
    hub.fault("model.safetensors", method="GET", cut_after_bytes=15 * MEBIBYTE, times=2)
    assert read(api, "base/cut", "model.safetensors", tmp_path) == weights
    gets = [exchange for exchange in hub.traffic() if exchange["method"] == "GET"]
    # The client keeps what it received in whole chunks of 10 MiB.
    assert [(get["status"], get["bytes_out"] // MEBIBYTE) for get in gets] == [
        (200, 15),
        (206, 15),
        (206, 12),
    ]


def test_a_server_error_is_tried_again(hub: HubStandIn, api: HfApi, repo: str) -> None:
    hub.reset_traffic()
    hub.fault("preupload", status=500, times=2)
    hub.fault("objects/batch", status=429, retry_after=0)
    commit(api, repo, add("x.bin"))
    statuses = [exchange["status"] for exchange in hub.traffic()]
    assert statuses == [500, 500, 200, 429, 200, 200, 200, 200]


def test_an_upload_that_is_cut_is_sent_again(hub: HubStandIn, api: HfApi, repo: str, tmp_path: Path) -> None:
    hub.fault("part=2", method="PUT", cut_request_after_bytes=1000)
    commit(api, repo, add("model.safetensors", WEIGHTS))
    parts = [exchange for exchange in hub.traffic() if exchange["method"] == "PUT"]
    assert [part["status"] for part in parts] == [200, 0, 200, 200]
    assert read(api, repo, "model.safetensors", tmp_path) == WEIGHTS


def test_an_upload_that_is_corrupted_is_refused(hub: HubStandIn, api: HfApi, repo: str) -> None:
    hub.fault("_lfs/", method="PUT", corrupt=True)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'x.bin'") as caught:
        commit(api, repo, add("x.bin"))
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    assert caught.value.__cause__.response.status_code == 400


def test_a_download_that_is_corrupted_differs_in_one_bit(
    hub: HubStandIn, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    hub.seed("base/corrupt", folder)
    hub.fault("resolve/.*config.json", method="GET", corrupt=True)
    assert read(api, "base/corrupt", "config.json", tmp_path) == b'z"model_type": "tiny"}'


def test_the_answer_to_a_commit_can_be_lost(hub: HubStandIn, api: HfApi, repo: str) -> None:
    hub.fault("/commit/", method="POST", cut_after_bytes=0)
    with pytest.raises(Exception, match="closed connection"):
        commit(api, repo, add("a"))
    assert "a" in api.list_repo_files(repo)


def test_answers_can_be_slow_and_late(hub: HubStandIn, folder: Path) -> None:
    hub.seed("base/slow", folder)
    url = hf_hub_url("base/slow", "model.safetensors", endpoint=hub.url)
    hub.fault("base/slow", bytes_per_second=600_000, skip=1)
    started = time.monotonic()
    httpx.get(url)
    assert time.monotonic() - started < 0.4
    assert httpx.get(url).content == WEIGHTS
    assert time.monotonic() - started > 0.4
    hub.fault("base/slow", method="HEAD", delay=0.3)
    started = time.monotonic()
    httpx.head(url)
    assert time.monotonic() - started > 0.3


# state


def test_acknowledged_commits_survive_sigkill(tmp_path: Path) -> None:
    with HubStandIn(tmp_path / "hub", multipart_over=PART_SIZE, part_size=PART_SIZE) as hub:
        address = hub.url
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("me/model", private=True)
        acknowledged: list[str] = []
        killed = threading.Event()

        def commit_until_killed() -> None:
            with contextlib.suppress(Exception):
                while not killed.is_set():
                    weights = add(f"{len(acknowledged)}.bin", os.urandom(PART_SIZE + 1))
                    acknowledged.append(commit(api, "me/model", weights))

        writer = threading.Thread(target=commit_until_killed)
        writer.start()
        while len(acknowledged) < 5:
            time.sleep(0.01)
        hub.kill()
        killed.set()
        hub.start()
        writer.join()
        assert hub.url == address
        history = [each.commit_id for each in api.list_repo_commits("me/model")]
        assert set(acknowledged) <= set(history)
        snapshot = Path(api.snapshot_download("me/model", cache_dir=tmp_path / "cache"))
        for number in range(len(acknowledged)):
            assert (snapshot / f"{number}.bin").stat().st_size == PART_SIZE + 1
        commit(api, "me/model", add("after"))


def test_only_its_own_machine_gives_orders(tmp_path: Path) -> None:
    transport = httpx.ASGITransport(create_app(Hub(tmp_path)), client=("192.0.2.1", 1234))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
            return (await client.get("/_standin/traffic")).status_code

    assert asyncio.run(ask()) == 403


def test_one_state_folder_serves_one_stand_in(hub: HubStandIn) -> None:
    with pytest.raises(RuntimeError, match="in use by another stand-in"):
        HubStandIn(hub.state).start()


def test_the_same_folder_is_the_same_commit_everywhere(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    first = hub.seed("base/same", folder)
    assert hub.seed("base/same", folder, message="Again") == first
    with HubStandIn(tmp_path / "elsewhere") as elsewhere:
        assert elsewhere.seed("base/same", folder) == first


def test_a_seed_can_delete_and_can_go_to_a_branch(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    first = hub.seed("base/seeds", folder)
    (folder / "config.json").unlink()
    second = hub.seed("base/seeds", folder, message="Less", revision="next", delete_missing=True)
    assert "config.json" not in api.list_repo_files("base/seeds", revision="next")
    assert ".gitattributes" in api.list_repo_files("base/seeds", revision="next")
    assert api.model_info("base/seeds").sha == first
    titles = [each.title for each in api.list_repo_commits("base/seeds", revision=second)]
    assert titles == ["Less", "Seed", "initial commit"]
