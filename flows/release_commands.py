"""`requant verify` and `requant publish --rollback`: what is published already."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from flows.command import command, progress
from tasks.artifact import RELEASE
from tasks.errors import RecipeError, RequantError


@command("verify")
@click.argument("repo")
@click.option("--deep", is_flag=True, help="Fetch and hash every byte; nothing is kept.")
def verify(repo: str, deep: bool) -> tuple[dict[str, Any], str, int]:
    """Say whether a published repo is what its requant.json claims.

    REPO is repo_id[@revision]. Listings, headers and small files are fetched, no weights. Exit status 1: problems.
    """
    from tasks.hub.verify import verify as verified

    repo_id, _, revision = repo.partition("@")
    found = verified(_repo_id(repo_id), revision or "main", deep=deep, say=progress)
    head = f"{repo_id}@{found.commit[:7]}: release {found.release or 'unknown'}, {found.files} files"
    lines = [f"problem  {problem}" for problem in found.problems] or [f"as {RELEASE} claims"]
    document = {"repo_id": repo_id, "deep": deep, **asdict(found)}
    return document, "\n".join([head, *lines]), 1 if found.problems else 0


@command("publish")
@click.argument("recipe_or_repo")
@click.option("--rollback", is_flag=True, help="Move main back to the release before, in one commit.")
@click.option("--to", "tag", metavar="TAG", help="Move it to this release instead.")
@click.option("--overwrite", is_flag=True, help="Also where someone else changed main since.")
def publish(recipe_or_repo: str, rollback: bool, tag: str | None, overwrite: bool) -> tuple[dict[str, Any], str, int]:
    """Move main of a published repo back to an earlier release. No weights are sent.

    RECIPE_OR_REPO is a recipe's file, whose target is meant, or a repo_id. Asked for twice, it goes back once.
    `requant run` is what publishes.
    """
    from tasks.hub.rollback import rollback as moved_back

    if not rollback:
        raise click.UsageError("requant run publishes a recipe's result; here --rollback is what can be asked for")
    released = moved_back(_target(recipe_or_repo), tag, overwrite=overwrite, say=progress)
    done = "moved back" if released.changed else "nothing to do"
    return {"published": released.to_json()}, f"{released.url} holds release {released.tag} ({done})", 0


def _target(name: str) -> str:
    """The repo that is meant: a recipe's target, or the one that is named."""
    if not name.endswith((".yaml", ".yml")):
        return _repo_id(name)
    from tasks.recipe_file import load_recipe

    recipe = load_recipe(Path(name))
    repos = [one.publish.repo_id for one in recipe.each.values() if one.publish]
    if not repos:
        raise RecipeError(f"the recipe {name} has no publish.repo_id: name the repo itself")
    if len(repos) > 1:
        raise RecipeError(f"the recipe {name} has {len(repos)} outputs: name the repo itself, {' or '.join(repos)}")
    return repos[0]


def _repo_id(name: str) -> str:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise RequantError(f"{name} is not a repo on the Hub: name it as owner/name")
    return name
