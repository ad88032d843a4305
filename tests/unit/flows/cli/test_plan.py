"""`requant plan` for another machine, which has what the recipe names and this one lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from requant.flows.cli.main import cli
from requant.tasks.errors import RecipeError
from tests.factories.recipes import write


@pytest.mark.parametrize(
    ("key", "named", "missing"),
    [
        ("base", "base: ./tuned", "base.folder, since the folder {home}/tuned"),
        ("adapter", "base: a/b\nadapter: ./lora", "adapter.folder, since the folder {home}/lora"),
        ("text", "base: a/b\nquantize: {calibration: [x.txt]}", "quantize.calibration.0, since the file {home}/x.txt"),
        ("domain", "base: a/b\nvalidation: {text: {own: ./y}}", "validation.text.own, since the file {home}/y"),
    ],
)
def test_elsewhere_a_folder_or_file_that_is_not_here_is_a_note(
    key: str, named: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUANT_STORE", str(tmp_path / "store"))
    recipe = write(tmp_path, f"{named}\npublish: {{repo_id: me/tuned-W4A16}}\n")
    markdown = tmp_path / "plan.md"
    arguments = ["plan", str(recipe), "--elsewhere"]
    outcome = CliRunner().invoke(cli, [*arguments, "--json", "--markdown", str(markdown)])
    assert outcome.exit_code == 0, outcome.exception
    document = json.loads(outcome.stdout)
    assert (document["problems"], document["repo_id"]) == ([], "me/tuned-W4A16")
    assert f"not looked at: {missing.format(home=tmp_path)} is not on this machine" in document["notes"][0]
    text = CliRunner().invoke(cli, arguments).stdout
    assert "nothing can be made" not in text + markdown.read_text() and "would run" not in markdown.read_text()
    here = CliRunner().invoke(cli, ["plan", str(recipe)])
    assert isinstance(here.exception, RecipeError) and "correct the path in the recipe" in str(here.exception)


def test_elsewhere_a_recipe_of_a_missing_folder_may_still_have_wrong_keys(tmp_path: Path) -> None:
    recipe = write(tmp_path, "base: ./tuned\nquantise: {}\n")
    outcome = CliRunner().invoke(cli, ["plan", str(recipe), "--elsewhere"])
    assert isinstance(outcome.exception, RecipeError) and "quantise is not a key" in str(outcome.exception)
