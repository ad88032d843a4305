"""`requant init` against a Hub, and a model's name in place of a recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infra.dev.hub.launch import HubStandIn
from requant.tasks.recipe.loader import load_recipe
from tests.factories.checkpoints import write_quantized
from tests.factories.requant import Requant, store_in


@pytest.fixture
def here(environment: dict[str, str], base: Path, tmp_path: Path) -> Requant:
    return Requant(tmp_path, {**environment, **store_in(tmp_path)})


def test_a_recipe_is_written_for_a_model_without_its_weights_and_can_be_planned(
    here: Requant, hub: HubStandIn, base: Path
) -> None:
    path = here.folder / "recipes" / "pico.yaml"
    hub.reset_traffic()
    outcome = here("init", "demo/pico", "--recipe", str(path), "--json")
    assert outcome.status == 0, outcome.stderr
    fetched = [each["bytes_out"] for each in hub.traffic() if each["path"].endswith(".safetensors")]
    shards = [shard.stat().st_size for shard in base.glob("*.safetensors")]
    assert len(fetched) == len(shards) and sum(fetched) < sum(shards) / 4  # headers
    assert outcome.document["recipe"] == str(path)
    assert outcome.document["schema_file"] == str(path.parent / "recipe.schema.json")
    recipe = load_recipe(path)
    assert recipe.base.repo_id == outcome.document["base"]["repo_id"] == "demo/pico"
    assert recipe.publish is not None and recipe.publish.repo_id == "me/pico-W4A16-AutoRound"
    planned = here("plan", str(path), "--json")
    assert planned.status == 0 and planned.document["problems"] == [], planned.stderr

    path.write_text("base: demo/pico\n")  # as the user has changed it
    again = here("init", "demo/pico", "--recipe", str(path))
    assert again.status == 2 and "exists: name another file with --recipe" in again.stderr
    assert path.read_text() == "base: demo/pico\n"
    assert here("init", "demo/pico", "--recipe", str(path), "--force").status == 0 and "publish" in path.read_text()


@pytest.mark.parametrize(
    ("token", "why"), [("hf_wrong", "# The Hub refuses your token: "), ("", "# There is no token: ")]
)
def test_a_recipe_says_why_its_owner_is_not_known(
    here: Requant, base: Path, tmp_path: Path, token: str, why: str
) -> None:
    path = here.folder / "nobody.yaml"
    asked = here.variant(HF_TOKEN=token, HF_HOME=str(tmp_path))
    outcome = asked("init", str(base), "--recipe", str(path), new_process=True)
    assert outcome.status == 0, outcome.stderr
    assert why in path.read_text() and load_recipe(path).publish is None
    assert ("refuses your token" in outcome.stderr) is bool(token) and "recipe.schema.json" in outcome.stdout


def test_a_model_that_is_not_there_leaves_no_file(here: Requant) -> None:
    outcome = here("init", "demo/nothing", "--recipe", str(here.folder / "nothing.yaml"))
    assert outcome.status == 1 and "demo/nothing does not exist" in outcome.stderr
    assert not list(here.folder.glob("*.yaml")) and not list(here.folder.glob("*.json"))


def test_a_folder_that_is_not_there_and_a_quantized_model_get_no_recipe(here: Requant, base: Path) -> None:
    gone = here("init", "./nothing")
    assert gone.status == 2 and "the folder ./nothing does not exist" in gone.stderr
    made = write_quantized(base, here.folder)
    quantized = here("init", str(made), "--recipe", str(here.folder / "again.yaml"))
    assert quantized.status == 1 and "it is already quantized" in quantized.stderr
    assert not list(here.folder.glob("*.yaml"))


def test_a_base_without_a_tokenizer_is_told_by_inspect_and_init(here: Requant, base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert here("inspect", str(base), "--json").document["tokenizer"] is True
    assert here("inspect", str(bare), "--json").document["tokenizer"] is False
    assert "tokenizer     none" in here("inspect", str(bare)).stdout
    begun = here("init", str(bare), "--recipe", str(here.folder / "bare.yaml"))
    assert begun.status == 0 and "has no tokenizer" in begun.stderr


def test_a_model_can_be_planned_by_its_name(here: Requant) -> None:
    short = here("plan", "demo/pico@main", "--scheme", "W8A16", "--publish", "me/pico8", "--json")
    path = here.folder / "long.yaml"
    path.write_text("base: {repo_id: demo/pico}\nquantize: {scheme: W8A16}\npublish: {repo_id: me/pico8}\n")
    long = here("plan", str(path), "--json")
    assert short.status == long.status and short.document == long.document
