"""`requant verify`, `requant rollback` and `requant publish --rollback` as their users meet them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from infra.dev.hub.launch import HubStandIn
from tests.factories.releases import TARGET, Made, edit
from tests.factories.requant import Outcome, Requant

Finished = tuple[Requant, Outcome]


def test_a_run_is_what_its_manifest_claims_and_its_card_is_valid(
    finished: Finished, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    requant, outcome = finished
    verified = requant("verify", "me/pico", "--deep", "--json")
    assert verified.status == 0, verified.stderr
    document = verified.document
    assert {"files", "problems"} <= set(document) and document["problems"] == []
    assert document["release"] == outcome.document["published"]["tag"]
    folder = requant.folder / "checkout"
    claimed = json.loads((folder / "requant.json").read_text())
    assert claimed["artifact"] == outcome.digest and claimed["base"]["sha"] == outcome.document["base"]["sha"]
    assert [gate["name"] for gate in claimed["gates"]] == [gate["name"] for gate in outcome.document["gates"]]
    assert set(claimed["provenance"]) == {"download", "quantize", "mtp_fix", "validate", "benchmark"}
    assert claimed["provenance"]["quantize"]["machine"]["cpus"] > 0
    for name in ("requant.json", "README.md", "recipe.yaml", "report.md"):
        text = (folder / name).read_text()
        assert str(requant.folder) not in text and hub.token not in text
    assert "/v1}/chat/completions" in (folder / "README.md").read_text()  # what is no folder stays as it is
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    ModelCard((folder / "README.md").read_text()).validate()


def test_a_copy_of_a_release_is_checked_by_every_byte(finished: Finished, tmp_path: Path) -> None:
    requant = finished[0]
    copy = shutil.copytree(requant.folder / "checkout", tmp_path / "copy")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "notes.json").write_text("what hf download leaves")
    verified = requant("verify", str(copy), "--json")
    assert verified.status == 0, verified.stdout
    assert verified.document["repo_id"] == str(copy) and verified.document["commit"] is None
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    (copy / "config.json").unlink()
    outcome = requant("verify", str(copy))
    assert outcome.status == 1 and f"{shard.name} is not the file that requant.json names" in outcome.stdout
    assert "config.json is missing" in outcome.stdout


def test_a_repo_is_inspected_by_its_tensors_too(finished: Finished, requant: Requant) -> None:
    """With a store of its own, since the repo is downloaded into it."""
    deep = requant("inspect", "me/pico", "--deep", "--json")
    assert deep.status == 0, deep.stderr
    assert deep.document["problems"] == []


@pytest.mark.parametrize("command", [["validate", "--base", "demo/pico"], ["bench"], ["verify"], ["inspect", "--deep"]])
def test_what_is_neither_a_folder_nor_a_repo_is_one_sentence(finished: Finished, command: list[str]) -> None:
    outcome = finished[0](command[0], "./no/such", *command[1:])
    assert outcome.status == 1, outcome.stderr
    assert outcome.stderr == ("requant: ./no/such is not a folder: name a checkpoint's folder, or repo_id[@revision]\n")


def test_the_published_recipe_makes_the_same_artifact_again(requant: Requant, finished: Finished) -> None:
    """Made again in a new process: strings have other hashes there than in forks, and sets another order."""
    before = manifests(requant)
    requant.forget("quantize", "mtp_fix")
    recipe = str(finished[0].folder / "checkout" / "recipe.yaml")
    again = requant("run", recipe, "--json", "--set", "publish=null", new_process=True)
    assert again.status == 0, again.stderr
    assert again.digest == finished[1].digest and manifests(requant) == before
    assert again.states == dict.fromkeys(again.states, "reused") | {"quantize": "ran", "mtp_fix": "ran"}


def manifests(requant: Requant) -> dict[str, bytes]:
    """What quantize and mtp_fix made, by stage and key."""
    paths = [path for stage in ("quantize", "mtp_fix") for path in (requant.store / "artifacts" / stage).iterdir()]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}


def test_verify_says_what_is_wrong_and_exits_with_1(
    finished: Finished, api: HfApi, three: list[Made], hub_here: None
) -> None:
    three[0].publish()
    edit(api)
    for arguments in (["--json"], []):
        outcome = finished[0]("verify", TARGET, *arguments)
        assert outcome.status == 1 and "README.md is not the file that requant.json names" in outcome.stdout
    assert finished[0]("verify", f"{TARGET}@{three[0].tag}", "--json").status == 0


def test_publish_rolls_back_by_recipe_or_repo(
    finished: Finished, api: HfApi, three: list[Made], hub_here: None
) -> None:
    three[0].publish()
    three[1].publish()
    recipe = finished[0].folder / "target.yaml"
    recipe.write_text(json.dumps({"base": {"repo_id": "demo/pico"}, "publish": {"repo_id": TARGET}}))
    before = api.model_info(TARGET).sha
    planned = finished[0]("rollback", str(recipe), "--dry-run", "--json").document
    assert planned["published"]["tag"] == three[0].tag and planned["published"]["commit"] == before
    assert planned["would_change"] and api.model_info(TARGET).sha == before
    first = finished[0]("publish", str(recipe), "--rollback", "--json")
    assert first.status == 0, first.stderr
    assert first.document["would_change"] is None
    published = first.document["published"]
    assert published["repo_id"] == TARGET and published["tag"] == three[0].tag and published["changed"]
    assert published["commit"] == api.model_info(TARGET).sha
    again = finished[0]("publish", TARGET, "--rollback", "--json").document["published"]
    assert not again["changed"] and again["commit"] == published["commit"]
    for arguments in ([], ["--dry-run"]):
        told = finished[0]("rollback", TARGET, *arguments)
        assert "nothing to do" in told.stdout
        assert f"releases, newest first, for --to: {three[0].tag}, {three[1].tag}" in told.stdout
    assert planned["releases"] == [three[1].tag, three[0].tag]
    assert finished[0]("publish", TARGET, "--rollback", "--to", three[1].tag, "--json").document["published"]["changed"]
    assert "moved back" in finished[0]("rollback", TARGET, "--to", three[0].tag).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["publish", "me/pico"], 2, "--rollback"),
        (["publish", "nothing.yaml", "--rollback"], 2, "nothing.yaml does not exist"),
        (["publish", "pico", "--rollback"], 1, "name it as owner/name"),
        (["verify", "./folder"], 1, "is not a folder: name a checkpoint's folder, or repo_id[@revision]"),
        (["verify", "me/nowhere"], 1, "me/nowhere does not exist"),
        (["verify", "demo/pico", "--json"], 1, "has no requant.json"),
        (["publish", "demo/pico", "--rollback"], 1, "holds no release of Requant"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], status: int, words: str, finished: Finished) -> None:
    outcome = finished[0](*arguments)
    assert outcome.status == status and "Traceback" not in outcome.stderr
    assert words in outcome.stdout + outcome.stderr


def test_a_run_with_a_pull_request_is_validated_until_someone_merges(
    requant: Requant, api: HfApi, hub_here: None
) -> None:
    target = {"repo_id": TARGET, "pull_request": True}
    waiting = requant.run(publish=target)
    assert waiting.status == 0, waiting.stderr
    assert waiting.document["status"] == "validated" and waiting.document["published"]["pull_request"].endswith("/1")
    api.merge_pull_request(TARGET, 1)
    merged = requant.run(publish=target)
    assert merged.document["status"] == "published" and merged.document["published"]["pull_request"] is None
    assert requant("verify", f"{TARGET}@{merged.document['published']['tag']}", "--json").document["problems"] == []
