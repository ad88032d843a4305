"""The README cannot drift: its commands, recipe, paths and defaults are those of the code."""

from __future__ import annotations

import re
import tomllib

import click
import pytest
import yaml

from requant.flows.cli.main import cli
from requant.tasks.measuring.gates import compare
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Gates, Recipe
from tests.factories.measured import GOOD
from tests.factories.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme() -> None:
    for name, command in cli.commands.items():
        assert f"`requant {name} " in README
        if isinstance(command, click.Group):
            assert all(re.search(rf"(`|{name} ){sub}[` ]", README) for sub in command.commands)


def test_the_recipe_in_the_readme_is_valid_and_names_every_key() -> None:
    block = re.search(r"## The recipe\n\n```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    document = yaml.safe_load(block[1])
    recipe = parse_recipe(document)
    assert set(document) == set(Recipe.model_fields)
    assert recipe.quantize == type(recipe.quantize)() and recipe.gates == type(recipe.gates)()


def test_every_path_in_the_file_tree_exists_and_every_folder_of_code_is_in_it() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    parents: list[str] = []
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        assert ROOT.joinpath(*parents).is_dir(), line
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert list(ROOT.glob(f"*/{name}")), name
    folders = {path.parent.name for top in ("flows", "tasks") for path in (ROOT / top).glob("*/*.py")}
    assert {f"{folder}/" for folder in folders} <= set(tree.split())


def test_every_path_in_the_text_exists() -> None:
    folders = "|".join(("deployments", "docs", "flows", "infra", "tasks", "tests"))
    paths = set(re.findall(rf"[`(]((?:{folders})/[\w./-]+)[`)]", README))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_recipes_in_the_project_are_valid() -> None:
    paths = list((ROOT / "deployments" / "recipes").glob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        parse_recipe(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", ["README.md", "tests/README.md", ".github/workflows/test.yaml", ".ci/run"])
def test_the_make_targets_that_are_named_exist(path: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|: |' )make ([a-z][a-z0-9-]*)", (ROOT / path).read_text(), re.MULTILINE))
    assert named and named <= targets


def test_every_marker_is_explained_where_the_tests_are() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    text = (ROOT / "tests" / "README.md").read_text()
    assert all(f"`{line.split(':')[0]}`" in text for line in declared)


def test_every_gate_and_every_limit_is_in_the_readme() -> None:
    section = README.split("## The gates")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", section))
    assert {gate.name for gate in compare({**GOOD, "worst_task_recovery": 1.0, "tasks": {}}, Gates())} <= named
    assert set(Gates.model_fields) <= named
