"""The first recipe for a model is a recipe, and says what the base is."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from requant.flows.cli.schema import recipe_schema
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from requant.tasks.recipe.recipe import Gates
from requant.tasks.recipe.starter import Target, path_from, starter_recipe
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base

SHA = "0123456789abcdef0123456789abcdef01234567"
MINE, NOBODYS = Target("me/pico-W4A16-AutoRound"), Target("YOU/pico-W4A16-AutoRound", "there is no token: set one")


def starter(folder: Path, name: str = "owner/pico", target: Target = MINE) -> str:
    text = starter_recipe(name, SHA, Checkpoint.open(folder), target, has_license=True)
    jsonschema.validate(yaml.safe_load(text), recipe_schema())
    return text


def test_it_is_a_recipe_with_the_defaults_and_a_target(tmp_path: Path) -> None:
    text = starter(pico_base(tmp_path / "base"))
    recipe = parse_recipe(yaml.safe_load(text))
    assert (recipe.base.repo_id, recipe.quantize.group_size, recipe.mtp) == ("owner/pico", "auto", "keep")
    assert recipe.gates == Gates()
    assert recipe.publish is not None and (recipe.publish.repo_id, recipe.publish.private) == (MINE.repo_id, True)
    assert "with a vision tower and an MTP head." in text and "allow_remote_code" not in text


@pytest.mark.parametrize("name", ["owner/pico@v1.2", "owner/pico@refs/pr/3", "owner/pico@a: b #c"])
def test_a_revision_is_kept_whatever_its_name(name: str, tmp_path: Path) -> None:
    recipe = parse_recipe(yaml.safe_load(starter(pico_base(tmp_path / "base"), name)))
    assert f"{recipe.base.repo_id}@{recipe.base.revision}" == name


def test_a_model_without_a_head_has_no_key_for_one(tmp_path: Path) -> None:
    text = starter(pico_base(tmp_path / "base", head=False))
    assert "mtp" not in text


def test_experts_and_python_files_of_the_base_are_told(tmp_path: Path) -> None:
    folder = pico_base(tmp_path / "base", experts=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.Model"}}))
    text = starter(folder)
    assert "experts and an MTP head" in text
    assert parse_recipe(yaml.safe_load(text)).allow_remote_code is False and "allow_remote_code: false" in text


def test_without_a_token_the_target_is_a_comment(tmp_path: Path) -> None:
    text = starter(pico_base(tmp_path / "base"), target=NOBODYS)
    assert parse_recipe(yaml.safe_load(text)).publish is None
    uncommented = text.replace("# publish:", "publish:")
    recipe = parse_recipe(yaml.safe_load(uncommented))
    assert recipe.publish is not None and recipe.publish.repo_id == NOBODYS.repo_id


def test_a_method_from_outside_cannot_write_lines_into_the_recipe(tmp_path: Path) -> None:
    folder = pico_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    hostile = {**config, "quantization_config": {"quant_method": "x\nallow_remote_code: true"}}
    (folder / "config.json").write_text(json.dumps(hostile))
    assert parse_recipe(yaml.safe_load(starter(folder))).allow_remote_code is False


def test_the_schema_of_a_recipe_takes_the_projects_recipes_and_refuses_a_wrong_key() -> None:
    for path in (ROOT / "deployments" / "recipes").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), recipe_schema())
    with pytest.raises(jsonschema.ValidationError, match="quantise"):
        jsonschema.validate({"base": "me/x", "quantise": {}}, recipe_schema())


@pytest.mark.parametrize("name", ["my tuné", "🙂 x: #1", "-", "a'b\"c"])
@pytest.mark.parametrize("recipes", [".", "recipes/deep", "tuned"])
def test_a_folder_is_named_from_where_the_recipe_lies(
    name: str, recipes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_base(Path("tuned") / name)
    Path(recipes).mkdir(parents=True, exist_ok=True)
    for folder in (Path("tuned") / name, tmp_path / "tuned" / name):
        written = path_from(Path(recipes), folder)
        text = starter_recipe(written, None, Checkpoint.open(folder), MINE, has_license=False)
        jsonschema.validate(yaml.safe_load(text), recipe_schema())
        assert "names no license: add license:" in text
        path = Path(recipes) / "recipe.yaml"
        path.write_text(text)
        assert load_recipe(path).base.folder == str(tmp_path / "tuned" / name)
        assert ("commit" not in text) and (str(tmp_path) in text) == folder.is_absolute()


def test_a_link_to_a_folder_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lead to the folder of the newest training."""
    (tmp_path / "run-17").mkdir()
    (tmp_path / "latest").symlink_to("run-17")
    monkeypatch.chdir(tmp_path)
    assert path_from(Path("recipes"), Path("latest")) == "../latest"
    assert path_from(Path(), Path("latest")) == "./latest"
