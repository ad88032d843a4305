"""Pull requests on the Hub stand-in: opened, merged, refused."""

from __future__ import annotations

from huggingface_hub import HfApi

from tests.factories.hub_client import WEIGHTS, add, commit, status_of


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
