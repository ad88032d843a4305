"""The state folder of the Hub stand-in, and the folders that it is seeded with."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from infra.dev.hub.launch import HubStandIn
from tests.factories.hub_client import WEIGHTS, add, commit, read


def test_another_stand_in_goes_on_with_a_state_folder(tmp_path: Path) -> None:
    with HubStandIn(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("me/model", private=True)
        first = commit(api, "me/model", add("model.safetensors", WEIGHTS))
        api.create_tag("me/model", tag="v1")
    with HubStandIn(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        info = api.model_info("me/model", revision="v1")
        assert (info.sha, info.private) == (first, True)
        assert read(api, "me/model", "model.safetensors", tmp_path) == WEIGHTS
        commit(api, "me/model", add("after"), parent_commit=first)


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
