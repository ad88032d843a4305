"""The GitHub action that plans recipes, as far as a machine without GitHub shows it: its files and its commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.factories.paths import ROOT

ACTION = ROOT / "infra" / "action"
HOW_TO = ROOT / "docs" / "how-to" / "ci.md"
GH = """#!/bin/sh
echo "$*" >>"$GH_LOG"
for word; do case $word in body=@*) cp "${word#body=@}" "$GH_LOG.body";; esac; done
case "$*" in *--paginate*) echo "$EARLIER";; esac
"""


def workflow_to_copy() -> str:
    (block,) = re.findall(r"```yaml\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    return str(block)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=me", "-c", "user.email=me@localhost", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def changed(recipes: Path) -> list[str]:
    done = subprocess.run([ACTION / "changed", "recipes"], cwd=recipes.parent, check=True, capture_output=True)
    return done.stdout.decode().splitlines()


def test_the_action_and_all_workflows_have_the_form_that_github_asks_for(tmp_path: Path) -> None:
    copied = tmp_path / "plan.yaml"
    copied.write_text(workflow_to_copy())
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    workflows = [str(copied), *map(str, sorted((ROOT / ".github" / "workflows").iterdir()))]
    for schema, files in (("vendor.github-actions", ["action.yml"]), ("vendor.github-workflows", workflows)):
        done = subprocess.run([*check, schema, *files], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_workflow_to_copy_names_inputs_of_the_action_and_the_documentation_names_all() -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    (step,) = (s for s in yaml.safe_load(workflow_to_copy())["jobs"]["plan"]["steps"] if "requant" in s["uses"])
    assert step["with"].keys() <= inputs.keys()
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", HOW_TO.read_text(), re.MULTILINE))
    assert documented == inputs.keys() - {"github-token"}


def test_the_recipes_of_the_last_commit_are_those_that_it_adds_or_edits_and_has_not_deleted(tmp_path: Path) -> None:
    recipes = tmp_path / "mine" / "recipes"
    (recipes / "old").mkdir(parents=True)
    assert changed(recipes) == []
    for name in ("same", "edited", "deleted", "old/below"):
        (recipes / f"{name}.yaml").write_text("base: a/b\n")
    git(tmp_path, "init")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "first")
    assert changed(recipes) == ["recipes/deleted.yaml", "recipes/edited.yaml", "recipes/same.yaml"]
    (recipes / "deleted.yaml").unlink()
    for name in ("edited", "new ünd", "old/below"):
        (recipes / f"{name}.yaml").write_text("base: a/c\n")
    (recipes / "README.md").write_text("x")
    (recipes / "short.yml").write_text("base: a/b\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "second")
    assert changed(recipes) == ["recipes/edited.yaml", "recipes/new ünd.yaml", "recipes/short.yml"]


def test_a_recipe_that_cannot_be_planned_is_in_the_tables_and_fails_the_job(tmp_path: Path) -> None:
    for name, text in (("first.yaml", "bas: a/b\n"), ("second one.yaml", "base: [\n")):
        (tmp_path / name).write_text(text)
    plans = tmp_path / "build" / "plans.md"
    environment = {**os.environ, "PLANS": str(plans), "PLAN": f"{sys.executable} -m requant plan --elsewhere"}
    command = [ACTION / "plan", "first.yaml", "second one.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    lines = plans.read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "## What these recipes would do", "### first.yaml", "### second one.yaml",
    ]  # fmt: skip
    first, second = (i for i, line in enumerate(lines) if line.startswith("requant: "))
    assert lines[first - 1] == lines[second - 1] == lines[-1] == "```"
    assert "bas is not a key" in "".join(lines[first:second]) and "not YAML" in lines[second]


@pytest.mark.parametrize(("earlier", "call"), [("", "POST repos/me/quants/issues/7/comments"), ("31", "PATCH .*/31")])
def test_the_comment_of_an_earlier_run_is_replaced(earlier: str, call: str, tmp_path: Path) -> None:
    """Only `gh` is a substitute here. It notes what it was called with."""
    log, plans = tmp_path / "gh.log", tmp_path / "plans.md"
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    plans.write_text("the tables\n" + "x" * 70_000)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "GITHUB_REPOSITORY": "me/quants", "GH_LOG": str(log), "EARLIER": earlier,
    }  # fmt: skip
    subprocess.run([ACTION / "comment", plans, "7"], env=environment, check=True)
    asked, written = log.read_text().splitlines()
    assert "--paginate repos/me/quants/issues/7/comments" in asked and re.search(f"--method {call}", written)
    body = Path(f"{log}.body").read_text()
    assert body.startswith("<!-- requant plan -->\nthe tables\n") and len(body) < 65_536
    assert body.endswith("(The rest is in the summary of the job.)\n")


def test_every_example_is_in_the_table_of_examples() -> None:
    listed = re.findall(r"\[([a-z0-9-]+\.yaml)\]", (ROOT / "examples" / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
