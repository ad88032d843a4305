"""Pull requests on the Hub stand-in: opened, merged, refused."""

from __future__ import annotations

from huggingface_hub import CommitOperationDelete, DiscussionComment, HfApi

from tests.factories.hub_client import WEIGHTS, add, commit, status_of


def test_a_pull_request_is_merged_in_one_commit(api: HfApi, other: HfApi, repo: str) -> None:
    opened = other.create_pull_request(repo, title="Add a and b")
    assert (opened.num, opened.author) == (1, "other")
    for path in ("a", "b"):
        commit(api, repo, add(path), revision="refs/pr/1")
    assert api.list_repo_files(repo) == [".gitattributes"]
    assert [discussion.title for discussion in api.get_repo_discussions(repo)] == ["Add a and b"]
    api.change_discussion_status(repo, 1, new_status="open")
    api.merge_pull_request(repo, 1)
    assert api.list_repo_files(repo) == [".gitattributes", "a", "b"]
    commits = api.list_repo_commits(repo)
    assert [made.title for made in commits] == ["Add a and b (#1)", "initial commit"]
    details = api.get_discussion_details(repo, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", commits[0].commit_id)
    assert status_of(lambda: api.merge_pull_request(repo, 1)) == 400


def test_a_pull_request_is_not_merged_after_main_has_moved(api: HfApi, repo: str) -> None:
    number = api.create_pull_request(repo, title="x").num
    api.change_discussion_status(repo, number, new_status="open")
    commit(api, repo, add("a"))
    assert status_of(lambda: api.merge_pull_request(repo, number)) == 409


def test_a_draft_is_opened_before_it_is_merged(api: HfApi, repo: str) -> None:
    draft = api.create_pull_request(repo, title="New weights")
    assert (draft.status, draft.git_reference) == ("draft", "refs/pr/1")
    commit(api, repo, add("model.safetensors", WEIGHTS), revision="refs/pr/1")
    assert status_of(lambda: api.merge_pull_request(repo, draft.num)) == 400
    api.change_discussion_status(repo, draft.num, new_status="open")
    api.merge_pull_request(repo, draft.num)
    assert "model.safetensors" in api.list_repo_files(repo)


def test_a_commit_of_anyone_opens_a_pull_request(api: HfApi, other: HfApi, anonymous: HfApi, repo: str) -> None:
    start = commit(api, repo, add("old"))
    operations = [add("model.safetensors", WEIGHTS), CommitOperationDelete("old")]
    made = other.create_commit(
        repo, operations, commit_message="Better weights", commit_description="Why", create_pr=True, parent_commit=start
    )
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1") and made.pr_url == f"{api.endpoint}/{repo}/discussions/1"
    assert api.list_repo_files(repo, revision="refs/pr/1") == [".gitattributes", "model.safetensors"]
    assert api.list_repo_files(repo) == [".gitattributes", "old"]
    details = api.get_discussion_details(repo, 1)
    assert (details.title, details.author, details.status) == ("Better weights", "other", "open")
    assert [event.content for event in details.events if isinstance(event, DiscussionComment)] == ["Why"]
    api.merge_pull_request(repo, 1)
    assert api.list_repo_files(repo) == [".gitattributes", "model.safetensors"]
    assert status_of(lambda: anonymous.create_commit(repo, [add("a")], commit_message="x", create_pr=True)) == 401


def test_a_pull_request_begins_at_its_parent_and_a_commit_that_fails_opens_none(api: HfApi, repo: str) -> None:
    start = api.model_info(repo).sha
    commit(api, repo, add("later"))
    gone = [CommitOperationDelete("never")]
    assert status_of(lambda: api.create_commit(repo, gone, commit_message="x", create_pr=True)) == 404
    assert list(api.get_repo_discussions(repo)) == []
    api.create_commit(repo, [add("a")], commit_message="x", create_pr=True, parent_commit=start)
    assert api.list_repo_files(repo, revision="refs/pr/1") == [".gitattributes", "a"]
    assert status_of(lambda: api.merge_pull_request(repo, 1)) == 409


def test_what_the_stand_in_lacks_is_refused(api: HfApi, repo: str) -> None:
    assert status_of(lambda: api.create_discussion(repo, title="x")) == 501
