"""Releases against the Hub stand-in: staged, refused, proposed, and who may read them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from infra.dev.hub.launch import HubStandIn
from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.hub import release as releasing
from requant.tasks.hub.publish_target import Account, check_target
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.hub.verify import verify_release
from requant.tasks.recipe.recipe import Publish
from tests.factories.releases import TARGET, Made, card_on_hub, edit, made, sent, titles

pytestmark = pytest.mark.usefixtures("hub_here")


def problems(
    base: Revision, *, bits: int = 4, create: bool = False, repo_id: str = TARGET, **settings: Any
) -> tuple[str, ...]:
    """What stops a release of a base before any work, as a plan says it or, with `create`, a run."""
    target = Publish(repo_id=repo_id, **settings)
    return check_target(target, base, Account.of_token(repo_id), bits=bits, create=create).problems


# Publishing


def test_a_release_is_one_commit_a_tag_and_no_branch(api: HfApi, three: list[Made]) -> None:
    released = three[0].publish()
    assert released.changed and set(api.list_repo_files(TARGET)) == three[0].names
    assert len(titles(api)) == 2
    refs = api.list_repo_refs(TARGET)
    assert [b.name for b in refs.branches] == ["main"]
    assert [(t.name, t.target_commit) for t in refs.tags] == [(three[0].tag, released.commit)]
    assert not three[0].publish().changed and len(titles(api)) == 2


def test_a_next_release_sends_what_is_new_and_takes_away_what_was(
    api: HfApi, three: list[Made], hub: HubStandIn
) -> None:
    three[0].publish()
    hub.reset_traffic()
    three[1].publish()
    shards = sum(f.size for f in three[1].manifest.files if f.path.endswith(".safetensors"))
    assert sent(hub) == shards + len("\x89PNG of 2".encode("latin-1"))
    assert set(api.list_repo_files(TARGET)) == three[1].names and "release 2" in card_on_hub(api)


def test_what_arrived_before_the_hub_failed_is_not_sent_again(api: HfApi, three: list[Made], hub: HubStandIn) -> None:
    hub.fault(r"/commit/requant-", method="POST", times=None, status=403)
    with pytest.raises(HubError):
        three[0].publish()
    hub.clear_faults()
    hub.reset_traffic()
    three[0].publish()
    assert sent(hub) == 0 and len(titles(api)) == 2


def test_what_the_hub_received_altered_never_becomes_main(api: HfApi, three: list[Made], hub: HubStandIn) -> None:
    before = three[0].publish().commit
    hub.fault(r"^/_lfs/", method="PUT", times=None, corrupt=True)
    with pytest.raises((HubError, HubUnavailable)):
        three[1].publish()
    assert api.model_info(TARGET).sha == before


def test_a_branch_that_does_not_list_what_was_sent_never_becomes_main(
    api: HfApi, three: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else writes into it between the upload and the look at what arrived."""
    before = three[0].publish().commit
    weights = next(f.path for f in three[1].manifest.files if f.path.endswith(".safetensors"))
    looks: list[str] = []

    def look(repo_id: str, revision: str = "main") -> Revision:
        looks.append(revision)
        if revision.startswith("requant-") and looks.count(revision) == 2:
            operation = CommitOperationAdd(weights, b"other weights")
            api.create_commit(repo_id, [operation], commit_message="Aside", revision=revision)
        return resolve(repo_id, revision)

    monkeypatch.setattr(releasing, "resolve", look)
    with pytest.raises(HubUnavailable, match="does not hold what was uploaded: main stays as it is"):
        three[1].publish()
    assert api.model_info(TARGET).sha == before


@pytest.mark.parametrize(
    ("path", "data", "words"),
    [
        ("README.md", b"# better words\n", "README.md is not the file that requant.json names"),
        ("evaluation.txt", b"mine", "evaluation.txt is there"),
        ("model-00001-of-00002.safetensors", None, "model-00001-of-00002.safetensors is missing"),
    ],
)
def test_a_main_that_someone_changed_is_not_overwritten(
    path: str, data: bytes | None, words: str, api: HfApi, three: list[Made]
) -> None:
    three[0].publish()
    edit(api, path, data)
    before = api.model_info(TARGET).sha
    with pytest.raises(HubError, match=f"changed by someone else since release {three[0].tag}.*overwrite") as told:
        three[1].publish()
    assert words in str(told.value) and api.model_info(TARGET).sha == before
    (problem,) = problems(three[1].base)  # and before any work
    assert "changed by someone else" in problem
    assert three[1].publish(overwrite=True).changed
    assert set(api.list_repo_files(TARGET)) == three[1].names


def test_words_that_someone_writes_during_a_release_are_not_overwritten(
    api: HfApi, three: list[Made], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After main was looked at, and before the commit that moves it: when the release logs that it uploads."""
    three[0].publish()
    caplog.set_level(logging.INFO, releasing.log.name)
    someone = logging.Handler()
    monkeypatch.setattr(someone, "emit", lambda record: edit(api))
    monkeypatch.setattr(releasing.log, "handlers", [someone])
    with pytest.raises(HubError):
        three[1].publish()
    assert card_on_hub(api) == "# by hand\n" and titles(api)[0] == "By hand"
    assert set(api.list_repo_files(TARGET)) == three[0].names


def test_an_edited_card_does_not_fail_the_run_that_has_nothing_new(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    edit(api)
    assert problems(three[0].base) == ()
    assert not three[0].publish().changed and card_on_hub(api) == "# by hand\n"


def test_who_may_not_write_there_is_told_before_any_work_unless_a_pull_request_is_asked_for(
    api: HfApi, three: list[Made], hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    three[0].publish()
    hub.add_token("hf_stranger", "stranger")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    (problem,) = problems(three[0].base)
    assert f"the token of stranger may not write to {TARGET} (403): correct the name, or set HF_TOKEN" in problem
    assert problems(three[0].base, pull_request=True) == ()
    assert len(titles(api)) == 2


@pytest.mark.parametrize(("owner", "may"), [("me", True), ("team", True), ("others", False)])
def test_a_plan_says_as_a_run_does_whether_a_repo_may_be_created_and_creates_none(
    owner: str, may: bool, api: HfApi, three: list[Made], hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_token("hf_member", "me", orgs=["team"])
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    repo_id, base = f"{owner}/not-there-yet", three[0].base
    planned = problems(base, repo_id=repo_id)
    assert not api.repo_exists(repo_id)
    assert [bool(planned), bool(problems(base, repo_id=repo_id, create=True))] == [not may, not may]
    if not may:
        assert f"may not create {repo_id}: it may create repos under me, team; correct the name" in planned[0]


def test_the_placeholder_of_the_documentation_is_no_owner(three: list[Made]) -> None:
    (told,) = problems(three[0].base, repo_id="YOU/tuned-W4A16")
    assert told.startswith(
        "YOU/tuned-W4A16 has the placeholder YOU in place of an owner: write the name of your account"
    )
    assert told.endswith(", as me/tuned-W4A16")


def test_a_token_whose_owners_are_not_all_known_is_named_when_it_may_not_create_a_repo(
    api: HfApi, three: list[Made], hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_token("hf_member", "member")
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    account, target = Account(frozenset({"member"}), lists_all=False, name="member"), Publish(repo_id="others/new")
    (told,) = check_target(target, three[0].base, account, bits=4, create=True).problems
    assert told.startswith("the token of member may not create others/new (403): correct the name")


def test_a_token_that_does_not_list_all_its_owners_leaves_that_unchecked_in_a_plan(three: list[Made]) -> None:
    limited, target = Account(frozenset({"you"}), lists_all=False), Publish(repo_id="me/not-there-yet")
    planned = check_target(target, three[0].base, limited, bits=4, create=False)
    assert planned.problems == () and "whether this token may create me/not-there-yet" in planned.unchecked[0]
    tried = check_target(target, three[0].base, limited, bits=4, create=True)
    assert (tried.problems, tried.unchecked) == ((), ())


def test_a_token_that_may_only_read_and_an_unknown_one_are_told(
    three: list[Made], hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add_token("hf_reader", "me", role="read")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    words = {"hf_reader": "may only read", "hf_unknown": "refuses HF_TOKEN", "": r"or log in with hf auth login"}
    for token, told in words.items():
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=told):
            problems(three[0].base)


def test_a_release_of_another_base_is_not_overwritten(api: HfApi, three: list[Made], tmp_path: Path) -> None:
    three[0].publish()
    other = made(tmp_path / "other", 4, repo_id="demo/llama")
    with pytest.raises(HubError, match="holds a release made of demo/pico, not of demo/llama"):
        other.publish()


def test_a_release_with_other_bits_is_not_replaced_unless_the_recipe_says_so(
    api: HfApi, three: list[Made], tmp_path: Path
) -> None:
    three[0].publish()
    told = f"{TARGET} holds a release with 4 bits, and this one has 8: publish to a repo of its own"
    assert problems(three[0].base, bits=8)[0].startswith(told)
    assert problems(three[0].base, bits=4) == problems(three[0].base, bits=8, overwrite=True) == ()
    other = made(tmp_path / "other", 5, bits=8)
    with pytest.raises(HubError, match=told):
        other.publish()
    assert other.publish(overwrite=True).changed


def test_a_repo_of_a_persons_own_words_is_published_to(api: HfApi, three: list[Made]) -> None:
    api.create_repo(TARGET)
    edit(api)
    assert three[0].publish().changed and "release 1" in card_on_hub(api)


# Who may read it


@pytest.mark.parametrize(
    ("base", "settings", "private", "gated"),
    [
        ({}, {}, False, False),
        ({"private": True}, {}, True, False),
        ({"gated": "auto"}, {}, False, "auto"),
        ({"private": True, "gated": "manual"}, {"private": False, "gated": "open"}, False, False),
        ({}, {"private": True, "gated": "manual"}, True, "manual"),
        ({"is_local": True}, {}, True, False),
        ({"is_local": True}, {"private": False}, False, False),
    ],
)
def test_who_may_read_it_follows_the_base_unless_the_recipe_says_otherwise(
    base: dict[str, Any], settings: dict[str, Any], private: bool, gated: Any, api: HfApi, tmp_path: Path
) -> None:
    made(tmp_path / "made", 1, **base).publish(**settings)
    info = api.model_info(TARGET)
    assert (info.private, info.gated) == (private, gated)


def test_what_is_closed_already_stays_so(api: HfApi, three: list[Made]) -> None:
    api.create_repo(TARGET, private=True)
    api.update_repo_settings(TARGET, gated="manual")
    three[0].publish()
    info = api.model_info(TARGET)
    assert (info.private, info.gated) == (True, "manual")


def test_a_public_repo_stays_so_for_a_base_in_a_folder(api: HfApi, tmp_path: Path) -> None:
    api.create_repo(TARGET, private=False)
    made(tmp_path / "made", 1, is_local=True).publish()
    assert not api.model_info(TARGET).private


def test_a_collection_lists_it_once(api: HfApi, three: list[Made]) -> None:
    slug = api.create_collection("Quantized").slug
    assert problems(three[0].base, collection=slug) == ()
    for each in (three[0], three[0], three[1]):
        each.publish(collection=slug)
    assert [item.item_id for item in api.get_collection(slug).items] == [TARGET]
    (problem,) = problems(three[0].base, collection="me/none-0123")
    assert "collection me/none-0123 does not exist" in problem


# Pull requests


def test_a_pull_request_is_opened_once_and_tagged_when_it_is_merged(api: HfApi, three: list[Made]) -> None:
    before = three[0].publish().commit
    first = three[1].publish(pull_request=True)
    assert first.changed and first.pull_request and api.model_info(TARGET).sha == before
    again = three[1].publish(pull_request=True)
    assert not again.changed and (again.pull_request, again.commit) == (first.pull_request, first.commit)
    (discussion,) = api.get_repo_discussions(TARGET)
    assert discussion.is_pull_request and discussion.status == "open"
    api.merge_pull_request(TARGET, discussion.num)
    merged = three[1].publish(pull_request=True)
    assert not merged.changed and merged.pull_request is None and verify_release(TARGET, merged.tag).problems == []
    assert set(api.list_repo_files(TARGET)) == three[1].names


@pytest.mark.parametrize("path", [r"/discussions$", r"/commit/refs", r"/status$"])
def test_a_pull_request_whose_answers_are_lost_is_opened_once(
    path: str, api: HfApi, three: list[Made], hub: HubStandIn
) -> None:
    hub.fault(path, method="POST", cut_after_bytes=0)
    with contextlib.suppress(HubError):
        three[0].publish(pull_request=True)
    hub.clear_faults()
    three[0].publish(pull_request=True)
    (discussion,) = api.get_repo_discussions(TARGET)
    assert discussion.status == "open"
    commits = api.list_repo_commits(TARGET, revision=f"refs/pr/{discussion.num}")
    assert len(commits) == 2 and set(api.list_repo_files(TARGET)) == {".gitattributes"}


def test_a_revision_knows_who_may_read_it_and_what_no_file_can_be_named(api: HfApi) -> None:
    api.create_repo(TARGET, private=True)
    edit(api, "a\nb.txt", b"1")
    edit(api, "plain.txt", b"1")
    there = resolve(TARGET)
    assert there.private and there.gated is None and there.left_out == ("a\nb.txt",)
    assert [f.path for f in there.files] == [".gitattributes", "plain.txt"]
