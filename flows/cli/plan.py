"""`requant plan`: say what a run would do, take and cost."""

from __future__ import annotations

from pathlib import Path

import click

from requant.flows import api
from requant.flows.cli.command import NEW_FILE, PUBLISH, SCHEME, SET, CommandResult, all_overrides, command


@command("plan")
@click.argument("recipe")
@SET
@SCHEME
@PUBLISH
@click.option(
    "--elsewhere",
    is_flag=True,
    help="Plan for another machine: check neither what this one lacks, nor the account to publish with. Of a base or "
    "a text that is not here, only the recipe's keys are checked.",
)
@click.option(
    "--markdown", "markdown_path", type=NEW_FILE, metavar="FILE", help="Write the plan to this file too, as Markdown."
)
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    scheme: str | None,
    publish: str | None,
    elsewhere: bool,
    markdown_path: Path | None,
) -> CommandResult:
    """Say what a run would do, take and cost, and what would stop it.

    RECIPE is a YAML file, or owner/name[@revision] or the folder of a base, which stands for a recipe with this base
    and defaults.
    The headers of the base's files are enough: no weights are fetched and no GPU is needed.
    Exit status 1: a problem would stop the run.

    \b
    Examples:
      requant plan deployments/recipes/qwen3.6-27b-int4.yaml --elsewhere
      requant plan recipe.yaml --set quantize.iters=50 --markdown build/plan.md
      requant plan Qwen/Qwen3.6-27B --scheme W4A16 --elsewhere
    """
    from requant.flows.report.plan import plan_markdown, plan_text
    from requant.tasks.checkpoint.writer import write_file

    document = api.plan(recipe, overrides=all_overrides(overrides, scheme, publish), elsewhere=elsewhere)
    if markdown_path is not None:
        write_file(markdown_path.parent, markdown_path.name, [plan_markdown(document, Path(recipe).name).encode()])
    return CommandResult(document.to_json(), plan_text(document), 1 if document.problems else 0)
