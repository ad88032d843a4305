"""`requant rollback`: move `main` of a published repo back to an earlier release; and its older name."""

from __future__ import annotations

from pathlib import Path

import click

from requant.flows.cli.command import CommandResult, command
from requant.tasks.errors import RecipeError

TAG = click.option("--to", "tag", metavar="TAG", help="Move main to the release with this tag instead.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Move main even if someone else has changed it since.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")


@command("rollback")
@click.argument("recipe_or_repo")
@TAG
@OVERWRITE
@DRY_RUN
def rollback(recipe_or_repo: str, tag: str | None, overwrite: bool, dry_run: bool) -> CommandResult:
    """Move main of a published repo back to an earlier release.

    RECIPE_OR_REPO is a repo_id, or a recipe's YAML file, which stands for the repo that it publishes to. No weights
    are sent. A second rollback moves nothing: to go back further, give --to. The releases are listed, newest first.

    \b
    Examples:
      requant rollback YOU/Qwen3.6-27B-int4-AutoRound --dry-run
      requant rollback recipe.yaml --to TAG
    """
    return _roll_back(recipe_or_repo, tag, overwrite=overwrite, dry_run=dry_run)


@command("publish")
@click.argument("recipe_or_repo")
@click.option("--rollback", is_flag=True, help="Move main back to the release before, in one commit.")
@TAG
@OVERWRITE
@DRY_RUN
def publish(recipe_or_repo: str, rollback: bool, tag: str | None, overwrite: bool, dry_run: bool) -> CommandResult:
    """Move main of a published repo back: `requant rollback` is shorter.

    To publish, use `requant run`.

    \b
    Examples:
      requant publish YOU/Qwen3.6-27B-int4-AutoRound --rollback
      requant publish recipe.yaml --rollback --to TAG
    """
    if not rollback:
        raise click.UsageError("requant run publishes a recipe's result; here --rollback is what can be asked for")
    return _roll_back(recipe_or_repo, tag, overwrite=overwrite, dry_run=dry_run)


def _roll_back(recipe_or_repo: str, tag: str | None, *, overwrite: bool, dry_run: bool) -> CommandResult:
    from requant.flows.cli.documents import PublishDocument
    from requant.tasks.hub.release import Release
    from requant.tasks.hub.rollback import find_rollback, release_tags
    from requant.tasks.hub.rollback import rollback as roll_back

    repo_id = target_of(recipe_or_repo)
    if dry_run:
        found = find_rollback(repo_id, tag, overwrite=overwrite)
        released = Release(repo_id=repo_id, commit=found.main.sha, tag=found.tag, changed=False)
        done = "would move back" if found.paths else "nothing to do"
        files = "".join(f"\n- {path}" for path in found.paths)
        tags = release_tags(repo_id)
        text = f"{released.url} to release {released.tag} ({done}); files that differ: {len(found.paths)}{files}"
        document = PublishDocument(published=released, would_change=found.paths, releases=tags)
        return CommandResult(document.to_json(), f"{text}\n{_releases_text(tags)}")
    released = roll_back(repo_id, tag, overwrite=overwrite)
    done = "moved back" if released.changed else "nothing to do"
    tags = release_tags(repo_id)
    text = f"{released.url} holds release {released.tag} ({done})\n{_releases_text(tags)}"
    return CommandResult(PublishDocument(published=released, releases=tags).to_json(), text)


def _releases_text(tags: list[str]) -> str:
    return f"releases, newest first, for --to: {', '.join(tags)}"


def target_of(name: str) -> str:
    """Return the repo with this name, or the one that the recipe in the file with this name publishes to."""
    if not name.endswith((".yaml", ".yml")):
        from requant.tasks.hub.revision import check_repo_id

        return check_repo_id(name)
    from requant.tasks.recipe.loader import load_recipe

    recipe = load_recipe(Path(name))
    repos = [one.publish.repo_id for one in recipe.each.values() if one.publish]
    if not repos:
        raise RecipeError(f"the recipe {name} has no publish.repo_id: name the repo itself")
    if len(repos) > 1:
        raise RecipeError(f"the recipe {name} has {len(repos)} outputs: name the repo itself, {' or '.join(repos)}")
    return repos[0]
