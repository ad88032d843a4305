"""Repositories of the Hub stand-in, and who may see, read and write them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from infra.dev.hub.launch import HubStandIn
from tests.factories.hub_client import add, authorized, commit, read, status_of


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
    assert read(api, repo, ".gitattributes", tmp_path)
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
        f"{repo}/resolve/main/..%2F..%2Frepository.json",
        f"{repo}/resolve/..%2F..%2Frepository.json/x",
        f"{repo}/resolve/refs%2Fpr%2F/x",
        f"{repo}/resolve/refs%2Fpr%2F..%2F..%2Frepository.json/x",
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
        for oid in ("../../../repository.json", "x", ""):
            wanted = {"objects": [{"oid": oid, "size": 1}]}
            answer = client.post(f"/{repo}.git/info/lfs/objects/batch", json=wanted)
            assert answer.json()["objects"][0]["error"]["code"] == 422, oid
        for tag in ("", "../x", "a..b", "/a", "a b", "x.lock", "-x", "refs/../.."):
            answer = client.post(f"/api/models/{repo}/tag/main", json={"tag": tag})
            assert answer.status_code == 400, tag
