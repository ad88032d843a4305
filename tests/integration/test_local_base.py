"""A fine-tune in a folder, from the folder to a published repo that anybody can verify."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from infra.dev.hub.launch import HubStandIn
from tests.factories.requant import Outcome, Requant

TARGET = "me/tuned"


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of the base of the finished run, in a folder of the user: what was made of them is in its store."""
    folder = tmp_path_factory.mktemp("a private place") / "my tuné"
    shutil.copytree(base, folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: demo/pico\n---\n# tuned\n")
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


def run(requant: Requant, tuned: Path) -> Outcome:
    requant.recipe = {**requant.recipe, "base": str(tuned), "publish": {"repo_id": TARGET}}
    return requant.run()


def test_a_fine_tune_in_a_folder_is_planned_made_published_and_verified(
    requant: Requant, tuned: Path, hub: HubStandIn, tmp_path: Path
) -> None:
    planned = requant("plan", str(tuned), "--json")
    assert planned.document["base"]["folder"] == str(tuned) and "hashing" in planned.stderr
    hub.reset_traffic()
    first = run(requant, tuned)
    assert first.status == 0, first.stderr
    assert first.states["download"] == "ran" and {*first.states.values()} == {"ran", "reused"}
    assert first.states["quantize"] == first.states["validate"] == "reused", "the Hub has the same bytes"
    assert not [each for each in hub.traffic() if "/demo/pico/" in each["path"]]
    assert "hashing" not in first.stderr, "the plan has done it"
    assert requant("verify", TARGET, "--deep").status == 0

    api = HfApi(endpoint=hub.url, token=hub.token)
    assert api.model_info(TARGET).private, "nobody said that it may be public"
    published = Path(api.snapshot_download(TARGET, local_dir=tmp_path / "published"))
    for path in (path for path in published.rglob("*") if path.is_file()):
        assert not any(part.encode() in path.read_bytes() for part in (str(tuned.parent), tuned.parent.name)), path
    card = ModelCard.load(published / "README.md").data
    assert (card.base_model, card.base_model_relation, card.license) == ("demo/pico", "finetune", "mit")
    document = yaml.safe_load((published / "requant.json").read_text())["base"]
    assert document == {"repo_id": "my tuné", "sha": first.document["base"]["sha"], "local": True}
    assert yaml.safe_load((published / "recipe.yaml").read_text())["base"] == {"folder": "./my tuné"}

    again = run(requant, tuned)
    assert {*again.states.values()} == {"reused"} and "hashing" not in again.stderr
    with max(tuned.glob("*.safetensors")).open("r+b") as shard:
        shard.seek(-2, os.SEEK_END)
        shard.write(b"\0\0")
    assert requant("store", "verify", "--deep").status == 0, "the store has bytes of its own"
    changes = requant("plan", str(requant.folder / "recipe.yaml"), "--json").document["changes"]
    assert changes["since"] == again.document["base"]["sha"] and len(changes["files"]["changed"]) == 1


def test_a_machine_without_the_folder_says_so_in_one_sentence(requant: Requant, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    recipe = requant.write_recipe(base={"folder": str(tmp_path / "gone")})
    (tmp_path / "gone").rmdir()
    outcome = requant("run", str(recipe))
    assert outcome.status == 2 and f"the folder {tmp_path / 'gone'} does not exist" in outcome.stderr
    assert "Traceback" not in outcome.stderr
