"""The base of a recipe: a repo by its name, or a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from tests.factories.recipes import sentence, write


def test_a_base_may_be_written_as_its_name(tmp_path: Path) -> None:
    for name, mapping in (("me/x", "{repo_id: me/x}"), ("me/x@v1@2", "{repo_id: me/x, revision: v1@2}")):
        short, long = (load_recipe(write(tmp_path, f"base: {base}\n")) for base in (f"'{name}'", mapping))
        assert short == long and short.digest == long.digest


@pytest.mark.parametrize("name", ["me/x@", "a/b/c", "", "'@main'", "3", "null", "[me/x]"])
def test_a_base_that_is_no_name_is_refused(name: str, tmp_path: Path) -> None:
    assert sentence(tmp_path, f"base: {name}\n").startswith("base: write the base as owner/name")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the folders `recipes` and `my tuné`, from which commands are run."""
    for name in ("recipes", "my tuné"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("written", ["../my tuné", "~/my tuné", "{home}/my tuné", "./../recipes/../my tuné/"])
@pytest.mark.parametrize("form", ["'{}'", "{{folder: '{}'}}", "{{folder: '{}', repo_id: a/b}}"])
def test_a_base_in_a_folder_is_found_from_the_recipes_file_and_named_absolutely(
    home: Path, form: str, written: str
) -> None:
    recipe = load_recipe(write(home / "recipes", f"base: {form.format(written.format(home=home))}\n"))
    assert recipe.base.folder == str(home / "my tuné") and recipe.base.name == "my tuné"
    assert recipe.base.repo_id == ("a/b" if "repo_id" in form else None)
    assert parse_recipe(recipe.model_dump(mode="json")).digest == recipe.digest, "a Prefect server sends it as JSON"


def test_a_folder_that_is_not_there_is_no_repo(home: Path) -> None:
    with pytest.raises(RecipeError, match=r"^\./out/tuned does not exist: name .* or a model's folder"):
        load_recipe("./out/tuned")
    assert load_recipe("out/tuned").base.repo_id == "out/tuned"


def test_a_link_to_a_folder_keeps_its_name(home: Path) -> None:
    (home / "newest").symlink_to("my tuné")
    recipe = load_recipe(write(home / "recipes", "base: ../newest\n"))
    assert (recipe.base.folder, recipe.base.name) == (str(home / "newest"), "newest")
    inside = load_recipe(write(home / "my tuné", "base: .\n"))
    assert inside.base.folder == str(home / "my tuné"), "a recipe may lie in its base"


@pytest.mark.parametrize("written", ["my tuné", "./my tuné", "recipes/../my tuné"])
def test_a_folder_in_place_of_a_recipes_file_stands_for_its_base(home: Path, written: str) -> None:
    recipe = load_recipe(Path(written), ["publish.repo_id=me/x"])
    assert recipe.base.folder == str(home / "my tuné") and recipe.publish is not None


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("./none", "base.folder: the folder {home}/none does not exist: correct the path in the recipe"),
        ("{folder: ''}", "base.folder"),
        ("{folder: 5}", "base.folder"),
        ("{folder: './recipes', revision: v1}", "base: the folder ./recipes has no revision v1: leave it out"),
        ("{folder: './recipes', repo_id: a/b/c}", "base.repo_id: 'a/b/c' is not allowed: write a repo as owner/name"),
        ("'~nobody-of-this-name/x'", "base.folder: the folder ~nobody-of-this-name/x does not exist"),
        ('"./a\\0b"', "base.folder: the folder"),
    ],
)
def test_a_base_in_a_folder_that_cannot_be_is_refused(home: Path, base: str, said: str) -> None:
    assert said.format(home=home) in sentence(home, f"base: {base}\n")


def test_a_folder_is_a_part_of_the_digest_and_its_absence_is_none(home: Path) -> None:
    digests = {
        load_recipe(write(home, f"base: {base}\n")).digest
        for base in ("a/b", "./recipes", "'./my tuné'", "{folder: ./recipes, repo_id: a/b}")
    }
    assert len(digests) == 4
    assert "folder" not in parse_recipe({"base": "a/b"})._document()["base"], "recipes of before keep their digests"


def test_a_recipe_may_not_publish_over_what_its_folder_was_made_of(home: Path) -> None:
    publish = "publish: {repo_id: A/B}\n"
    assert "is the base itself" in sentence(home, f"base: {{folder: ./recipes, repo_id: a/b}}\n{publish}")
