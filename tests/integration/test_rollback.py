"""What is published already, on the Hub stand-in: verified, and moved back."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi

from infra.dev.hub.launch import HubStandIn
from requant.tasks.errors import HubError
from requant.tasks.hub.release import find_rolled_back
from requant.tasks.hub.rollback import find_rollback, rollback
from requant.tasks.hub.verify import verify_release
from requant.tasks.recipe.recipe import Publish
from tests.factories.releases import TARGET, Made, card_on_hub, edit, edited, sent, titles

pytestmark = pytest.mark.usefixtures("hub_here")


# Verifying


def test_a_release_is_verified_without_its_weights_and_to_the_last_byte(
    api: HfApi, three: list[Made], hub: HubStandIn
) -> None:
    released = three[0].publish()
    whole = sum(f.size for f in three[0].manifest.files)
    hub.reset_traffic()
    found = verify_release(TARGET)
    assert (found.problems, found.release, found.commit) == ([], three[0].tag, released.commit)
    assert found.files == len(three[0].names) - 2  # but .gitattributes and requant.json
    assert sum(e["bytes_out"] for e in hub.traffic()) < 70_000 < whole
    hub.reset_traffic()
    assert verify_release(TARGET, three[0].tag, deep=True).problems == []
    assert sum(e["bytes_out"] for e in hub.traffic()) > whole


def test_verify_names_what_is_not_as_claimed(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    edit(api)
    edit(api, "extra.txt", b"1")
    edit(api, "tokenizer.json", None)
    other = (three[1].folder / "model-00002-of-00002.safetensors").read_bytes()
    edit(api, "model-00002-of-00002.safetensors", other)
    edit(api, "model.safetensors.index.json", b"{}")
    problems = "\n".join(verify_release(TARGET).problems)
    for words in ("README.md is not", "extra.txt is there", "tokenizer.json is missing", "00002.safetensors is not",
                  "model.safetensors.index.json has no weight_map"):  # fmt: skip
        assert words in problems


def test_a_cut_shard_is_seen_in_its_header_too(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    name = "model-00001-of-00002.safetensors"
    edit(api, name, (three[0].folder / name).read_bytes()[:-8])
    assert any("where its header describes" in problem for problem in verify_release(TARGET).problems)


def test_bytes_that_the_hub_does_not_send_as_it_lists_them_are_found_by_deep(
    api: HfApi, three: list[Made], hub: HubStandIn
) -> None:
    three[0].publish()
    hub.fault(r"/resolve/.*/tokenizer\.json", method="GET", corrupt=True)
    assert verify_release(TARGET).problems == []
    (problem,) = verify_release(TARGET, deep=True).problems
    assert problem.startswith("the bytes of tokenizer.json are not those")


def test_a_connection_cut_in_a_deep_check_is_gone_on_with(api: HfApi, three: list[Made], hub: HubStandIn) -> None:
    three[0].publish()
    hub.fault(r"/resolve/.*00001-of-00002\.safetensors", method="GET", skip=1, times=2, cut_after_bytes=70_000)
    assert verify_release(TARGET, deep=True).problems == []


def test_a_repo_without_a_manifest_or_with_a_broken_one_is_told_so(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    whole = (three[0].folder / "requant.json").read_bytes()
    edit(api, "requant.json", edited(whole, gates=[{"name": "lossless", "passed": False}]))
    assert "the gate lossless was not passed" in verify_release(TARGET).problems
    edit(api, "requant.json", b"[" * 5000)
    (problem,) = verify_release(TARGET).problems
    assert "is not what Requant writes" in problem and problem.isprintable()
    edit(api, "requant.json", None)
    assert verify_release(TARGET).problems == [f"{TARGET} has no requant.json: Requant did not publish it"]


# Rolling back


def test_a_rollback_is_one_commit_that_sends_no_weights(api: HfApi, three: list[Made], hub: HubStandIn) -> None:
    first = three[0].publish()
    three[1].publish()
    hub.reset_traffic()
    moved = rollback(TARGET)
    assert (moved.tag, moved.changed) == (three[0].tag, True) and sent(hub) == 0
    assert titles(api)[0] == f"Back to {three[0].tag}" and len(titles(api)) == 4
    assert set(api.list_repo_files(TARGET)) == three[0].names and "release 1" in card_on_hub(api)
    assert verify_release(TARGET, deep=True).problems == [] and moved.commit != first.commit


def test_what_a_rollback_would_change_is_found_without_a_change(api: HfApi, three: list[Made], hub: HubStandIn) -> None:
    for one in three[:2]:
        one.publish()
    before = api.model_info(TARGET).sha
    hub.reset_traffic()
    found = find_rollback(TARGET)
    assert (found.tag, found.main.sha, api.model_info(TARGET).sha) == (three[0].tag, before, before)
    assert "model-00001-of-00002.safetensors" in found.paths and "config.json" not in found.paths
    assert {e["method"] for e in hub.traffic()} <= {"GET", "HEAD"}
    rollback(TARGET)
    assert find_rollback(TARGET).paths == []


def test_asked_for_twice_it_goes_one_release_back(api: HfApi, three: list[Made]) -> None:
    for each in three:
        each.publish()
    moved = rollback(TARGET)
    again = rollback(TARGET)
    assert (again.tag, again.changed, again.commit) == (three[1].tag, False, moved.commit)
    assert rollback(TARGET, three[0].tag).changed and "release 1" in card_on_hub(api)
    assert rollback(TARGET, three[2].tag).changed and "release 3" in card_on_hub(api)


def test_a_release_behind_a_rollback_goes_back_to_what_main_held_before_it(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    three[1].publish()  # a bad one
    rollback(TARGET)
    three[2].publish()
    assert rollback(TARGET).tag == three[0].tag


def test_what_was_rolled_back_is_not_released_again_unless_asked_for(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    three[1].publish()
    rollback(TARGET)
    with pytest.raises(HubError, match=f"release {three[1].tag} of {TARGET} was rolled back"):
        three[1].publish()
    asked = Publish(repo_id=TARGET)  # type: ignore[call-arg]
    foreseen = [find_rolled_back(asked, one.base, one.manifest) for one in three]
    assert (foreseen[0], foreseen[2]) == (None, None), "main holds the first, and the third is new"
    assert foreseen[1] is not None and f"requant rollback {TARGET} --to {three[1].tag}" in foreseen[1]
    assert find_rolled_back(asked.model_copy(update={"overwrite": True}), three[1].base, three[1].manifest) is None
    elsewhere = asked.model_copy(update={"repo_id": "me/nowhere"})
    assert find_rolled_back(elsewhere, three[1].base, three[1].manifest) is None
    assert three[1].publish(overwrite=True).changed


def test_a_release_that_does_not_exist_is_told_with_those_that_do(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    three[1].publish()
    with pytest.raises(HubError, match=f"has no release nosuch: its releases are {three[1].tag}, {three[0].tag}"):
        rollback(TARGET, "nosuch")


def test_a_release_from_long_before_a_rollback_is_made_again(api: HfApi, three: list[Made]) -> None:
    for one in three:
        one.publish()
    rollback(TARGET)
    again = three[0].publish()
    assert again.changed and again.tag == three[0].tag and "release 1" in card_on_hub(api)


def test_a_release_that_was_made_again_and_rolled_back_is_refused(api: HfApi, three: list[Made]) -> None:
    """Its tag is that of its first commit, which is older than the release that main was moved back to."""
    three[0].publish()
    three[1].publish()
    three[0].publish()
    assert rollback(TARGET).tag == three[1].tag
    with pytest.raises(HubError, match=f"release {three[0].tag} of {TARGET} was rolled back"):
        three[0].publish()


def test_a_release_that_main_was_moved_away_from_twice_is_refused(api: HfApi, three: list[Made]) -> None:
    for one in three:
        one.publish()
    rollback(TARGET)
    rollback(TARGET, three[2].tag)
    with pytest.raises(HubError, match=f"release {three[1].tag} of {TARGET} was rolled back"):
        three[1].publish()


def test_a_rollback_whose_answer_was_lost_is_made_once(api: HfApi, three: list[Made], hub: HubStandIn) -> None:
    three[0].publish()
    three[1].publish()
    hub.fault(r"/commit/main", method="POST", cut_after_bytes=0)
    assert rollback(TARGET).changed
    assert len(titles(api)) == 4 and not rollback(TARGET).changed


def test_a_release_whose_tag_a_kill_prevented_is_tagged_before_it_goes(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    commit = three[1].publish().commit
    api.delete_tag(TARGET, tag=three[1].tag)
    assert rollback(TARGET).tag == three[0].tag
    assert {t.name: t.target_commit for t in api.list_repo_refs(TARGET).tags}[three[1].tag] == commit


def test_a_rollback_needs_a_release_to_go_to(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    with pytest.raises(HubError, match="has no release before"):
        rollback(TARGET)
    with pytest.raises(HubError, match="has no release v9"):
        rollback(TARGET, "v9")
    api.create_tag(TARGET, tag="v0", revision=api.list_repo_commits(TARGET)[-1].commit_id)
    with pytest.raises(HubError, match=f"v0 of {TARGET} is no release of Requant"):
        rollback(TARGET, "v0")


def test_a_tag_that_is_not_the_release_that_it_claims_to_be_is_not_rolled_back_to(
    api: HfApi, three: list[Made]
) -> None:
    three[0].publish()
    edit(api)
    api.create_tag(TARGET, tag="by-hand")
    before = api.model_info(TARGET).sha
    with pytest.raises(HubError, match=f"by-hand of {TARGET} is not what it claims to be .README.md"):
        rollback(TARGET, "by-hand", overwrite=True)
    assert api.model_info(TARGET).sha == before


def test_a_main_that_someone_changed_is_rolled_back_only_if_told_so(api: HfApi, three: list[Made]) -> None:
    three[0].publish()
    three[1].publish()
    edit(api)
    with pytest.raises(HubError, match=r"changed by someone else since its last release .*--overwrite"):
        rollback(TARGET)
    assert rollback(TARGET, overwrite=True).tag == three[0].tag and "release 1" in card_on_hub(api)
